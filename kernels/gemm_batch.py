"""Linear with batch norm's statistics in the GEMM's epilogue: z is read once less.

    z = x · weightᵀ + bias,   mean = Σ z / rows,   variance = Σ (z - mean)² / rows   of each column

Each tile leaves the mean and the sum of squared deviations of its columns: two passes over it in
registers, never E[z²] - E[z]². The tiles are merged as channel_statistics.py merges its chunks
(Chan, Golub and LeVeque, 1983): in a fixed order, without atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .channel_tile import over_positions, tile_moments
from .gemm_tile import add_bias, product, tile_of_program
from .tile import row_offset

# Runtime integers whose value must not compile a new kernel: alignment is passed as ALIGN instead.
INTEGERS = ("rows", "cols", "inner", "stride_xm", "stride_wn")


@triton.jit(do_not_specialize=INTEGERS)
def _gemm_batch_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    z_ptr,
    partial_ptr,
    count_ptr,
    rows,
    cols,
    inner,
    stride_xm,
    stride_wn,
    ALIGN_K: tl.constexpr,
    ALIGN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One tile a program: z, and its columns' moments.

    partial_ptr is [3, row blocks, cols]: a value near the mean, mean minus it, and the sum of
    squared deviations; count_ptr [row blocks]. The moments are those of z as it is stored.
    """
    row0, col0 = tile_of_program(tl.program_id(0), rows, cols, False, BLOCK_M, BLOCK_N)
    row = row0 + tl.arange(0, BLOCK_M)
    column = col0 + tl.arange(0, BLOCK_N)
    row_mask = row < rows
    column_mask = column < (cols // ALIGN_N) * ALIGN_N
    mask = row_mask[:, None] & column_mask[None, :]
    z = product(
        *(x_ptr, weight_ptr, row, row_mask, column, column_mask, inner, stride_xm, stride_wn),
        *(ALIGN_K, EVEN_K, PRECISION, BLOCK_K, STAGES),
    )
    z = add_bias(z, bias_ptr, column, column_mask).to(z_ptr.dtype.element_ty)
    tl.store(z_ptr + row_offset(row, cols, ALIGN_N) + column[None, :], z, mask=mask)
    count = tl.minimum(rows - row0, BLOCK_M).to(tl.float32)
    x = tl.where(mask, z.to(tl.float32), 0.0)
    centre = over_positions(x, True) / count  # [1, BLOCK_N]
    x = tl.where(mask, x - centre, 0.0)
    mean, m2 = tile_moments(x, mask, count, True)
    block = row0 // BLOCK_M
    plane = tl.cast(tl.cdiv(rows, BLOCK_M), tl.int64) * cols
    offset = (block * cols + column)[None, :]
    tl.store(partial_ptr + offset, centre, mask=column_mask[None, :])
    tl.store(partial_ptr + plane + offset, mean, mask=column_mask[None, :])
    tl.store(partial_ptr + 2 * plane + offset, m2, mask=column_mask[None, :])
    if col0 == 0:
        tl.store(count_ptr + block, count)
