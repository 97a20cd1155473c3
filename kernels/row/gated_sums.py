"""The two means along a row that the gradient of a norm needs, before a gated activation.

As sums.py, for rows of which the tiles of gated_backward.py hold a part; a mean is over both
halves of the row.
"""

import triton
import triton.language as tl

from ..parts.norm import load_statistics
from ..parts.tile import row_offset, times_columns
from .gate import halves_gradient, halves_gradient_means, load_halves
from .sums import BACKWARD_INTEGERS


@triton.jit(do_not_specialize=BACKWARD_INTEGERS)
def _gated_sums_kernel(
    dy_ptr,
    z_ptr,
    parameters,
    statistics_ptr,
    sums_ptr,
    seed_ptr,
    rows,
    cols,
    stride_dym,
    stride_zm,
    scalars,
    threshold,
    FORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One row a program, block by block: sums_ptr is [2, rows], mean(g) and mean(g xhat)."""
    ALIGN: tl.constexpr = FORM.ALIGN
    NORM: tl.constexpr = FORM.NORM
    bias_ptr, norm_weight_ptr, norm_bias_ptr = parameters
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, BLOCK_M)
    z_offset = row_offset(row, stride_zm, ALIGN)
    end = (cols // ALIGN) * ALIGN  # cols, known to be a multiple of ALIGN
    mean_g = tl.zeros((BLOCK_M,), tl.float32)
    mean_gx = tl.zeros((BLOCK_M,), tl.float32)
    mean, rstd = load_statistics(statistics_ptr, row, rows, NORM)
    for col0 in tl.range(0, cols, BLOCK_N):
        column = col0 + tl.arange(0, BLOCK_N)
        gate_column = end + column
        column_mask = column < end
        mask = column_mask[None, :]
        a, b = load_halves(z_ptr, bias_ptr, z_offset, column, gate_column, column_mask, mask)
        da, db, xhat_a, xhat_b = halves_gradient(
            *(dy_ptr, a, b, norm_weight_ptr, norm_bias_ptr, seed_ptr, mean, rstd, row, col0),
            *(column, gate_column, column_mask, mask, cols, stride_dym, scalars, threshold, FORM),
        )
        da = times_columns(da, norm_weight_ptr, column, column_mask)
        db = times_columns(db, norm_weight_ptr, gate_column, column_mask)
        block_g, block_gx = halves_gradient_means(da, db, xhat_a, xhat_b, cols, NORM)
        mean_g += block_g
        mean_gx += block_gx
    tl.store(sums_ptr + row, mean_g)
    tl.store(sums_ptr + rows + row, mean_gx)
