"""The row epilogue of one tile, from memory to memory.

    y = residual + dropout(activation(norm(z + bias)))

Everything is float32 between one load and one rounding at the store.
"""

import triton
import triton.language as tl

from .activation import activate
from .dropout import dropout_multiplier
from .norm import affine, row_statistics, store_statistics
from .tile import load_columns, load_first, load_tile, row_offset


@triton.jit
def write_rows(
    z_ptr,
    bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
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
    eps,
    alpha,
    beta,
    threshold,
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALIGN: tl.constexpr,
    EVEN_N: tl.constexpr,
    PTX: tl.constexpr,
    PER_THREAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y, and under a norm the statistics: the tile then holds whole rows, and col0 is 0."""
    column = col0 + tl.arange(0, BLOCK_N)
    row_mask = row < rows
    column_mask = column < (cols // ALIGN) * ALIGN
    mask = row_mask[:, None] & column_mask[None, :]

    z_offset = row_offset(row, stride_zm, ALIGN)
    bias = load_columns(bias_ptr, column, column_mask) if bias_ptr is not None else None
    h = load_tile(z_ptr, z_offset + column[None, :], mask, bias)  # [BLOCK_M, BLOCK_N]
    if NORM is not None:
        first = tl.zeros((BLOCK_M,), tl.float32)
        if NORM == "layer":
            first = load_first(z_ptr, row, stride_zm, row_mask, bias_ptr)
        eps = tl.cast(eps, tl.float32)
        h, mean, rstd = row_statistics(h, first, column_mask, cols, eps, NORM, EVEN_N)
        store_statistics(statistics_ptr, row, rows, mean, rstd, NORM)
        norm_weight = (
            load_columns(norm_weight_ptr, column, column_mask)
            if norm_weight_ptr is not None
            else None
        )
        norm_bias = (
            load_columns(norm_bias_ptr, column, column_mask) if norm_bias_ptr is not None else None
        )
        h = affine(h * rstd[:, None], norm_weight, norm_bias)
    y = activate(h, tl.cast(alpha, tl.float32), tl.cast(beta, tl.float32), ACTIVATION, PTX)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
        y *= dropout_multiplier(seed, row, col0, cols, threshold, PER_THREAD, BLOCK_M, BLOCK_N)
    if residual_ptr is not None:
        offset = row_offset(row, stride_rm, ALIGN) + column[None, :]
        y += tl.load(residual_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row_offset(row, stride_ym, ALIGN) + column[None, :], y, mask=mask)
