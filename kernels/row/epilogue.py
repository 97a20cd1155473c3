"""The row epilogue of one tile, from memory to memory.

y = residual + dropout(activation(norm(z + bias)))
"""

import triton
import triton.language as tl

from ..parts.norm import affine, row_statistics, store_statistics
from ..parts.output import Drop, write_output
from ..parts.tile import Place, load_first, load_rows, row_offset


@triton.jit
def write_rows(
    z_ptr,
    parameters,
    residual_ptr,
    y_ptr,
    statistics_ptr,
    seed_ptr,
    row,  # int64 [BLOCK_M]
    col0,
    rows,
    cols,
    stride_zm,
    stride_rm,
    stride_ym,
    scalars,
    threshold,
    FORM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y, and under a norm the statistics: the tile then holds whole rows, and col0 is 0.

    parameters: bias, norm_weight and norm_bias.
    """
    ALIGN: tl.constexpr = FORM.ALIGN
    NORM: tl.constexpr = FORM.NORM
    EVEN_N: tl.constexpr = FORM.EVEN_N
    bias_ptr, norm_weight_ptr, norm_bias_ptr = parameters
    column = col0 + tl.arange(0, BLOCK_N)
    row_mask = row < rows
    column_mask = column < (cols // ALIGN) * ALIGN
    mask = row_mask[:, None] & column_mask[None, :]

    z_offset = row_offset(row, stride_zm, ALIGN)
    place = Place(z_ptr, z_offset, column[None, :], mask)
    h = load_rows(place, bias_ptr, column, column_mask)  # [BLOCK_M, BLOCK_N]
    if NORM is not None:
        first = tl.zeros((row.shape[0],), tl.float32)
        if NORM == "layer":
            first = load_first(z_ptr, row, stride_zm, row_mask, bias_ptr)
        eps = tl.cast(scalars[0], tl.float32)
        h, mean, rstd = row_statistics(h, first, column_mask, cols, eps, NORM, EVEN_N)
        store_statistics(statistics_ptr, row, rows, mean, rstd, NORM)
        h, _ = affine(h, rstd, norm_weight_ptr, norm_bias_ptr, column, column_mask)
    write_output(
        *(h, None, Drop(seed_ptr, row, col0, cols, threshold)),
        Place(residual_ptr, row_offset(row, stride_rm, ALIGN), column[None, :], mask),
        Place(y_ptr, row_offset(row, stride_ym, ALIGN), column[None, :], mask),
        *(scalars, FORM),
    )
