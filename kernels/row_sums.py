"""The two means along a row that the gradient of a norm needs, for rows wider than a tile.

    mean(g) and mean(g xhat),   g = dh norm_weight,   dh the gradient of the norm's result

With these, row_backward.py can treat any part of a row by itself.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .activation import activate_grad
from .dropout import dropout_multiplier
from .norm import affine, centre, load_statistics, row_gradient_means
from .tile import load_columns, load_tile, row_offset

# Runtime integers whose value must not compile a new kernel: alignment is passed as ALIGN instead.
BACKWARD_INTEGERS = ("rows", "cols", "stride_dym", "stride_zm", "threshold")


@triton.jit(do_not_specialize=BACKWARD_INTEGERS)
def _row_sums_kernel(
    dy_ptr,
    z_ptr,
    bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    statistics_ptr,
    sums_ptr,
    seed_ptr,
    rows,
    cols,
    stride_dym,
    stride_zm,
    alpha,
    beta,
    threshold,
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALIGN: tl.constexpr,
    PTX: tl.constexpr,
    PER_THREAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One row a program, block by block: sums_ptr is [2, rows], mean(g) and mean(g xhat)."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, BLOCK_M)
    end = (cols // ALIGN) * ALIGN
    alpha = tl.cast(alpha, tl.float32)
    beta = tl.cast(beta, tl.float32)
    mean_g = tl.zeros((BLOCK_M,), tl.float32)
    mean_gx = tl.zeros((BLOCK_M,), tl.float32)
    mean, rstd = load_statistics(statistics_ptr, row, rows, NORM)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    for col0 in tl.range(0, cols, BLOCK_N):
        column = col0 + tl.arange(0, BLOCK_N)
        column_mask = column < end
        mask = column_mask[None, :]
        offset = row_offset(row, stride_dym, ALIGN) + column[None, :]
        g = tl.load(dy_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        z_offset = row_offset(row, stride_zm, ALIGN)
        bias = load_columns(bias_ptr, column, column_mask) if bias_ptr is not None else None
        norm_weight = (
            load_columns(norm_weight_ptr, column, column_mask)
            if norm_weight_ptr is not None
            else None
        )
        norm_bias = (
            load_columns(norm_bias_ptr, column, column_mask) if norm_bias_ptr is not None else None
        )
        x = load_tile(z_ptr, z_offset + column[None, :], mask, bias)
        xhat = centre(x, mean, None, NORM, True) * rstd[:, None]
        h = affine(xhat, norm_weight, norm_bias)
        if seed_ptr is not None:
            g *= dropout_multiplier(seed, row, col0, cols, threshold, PER_THREAD, BLOCK_M, BLOCK_N)
        g = activate_grad(g, h, alpha, beta, ACTIVATION, PTX)
        if norm_weight_ptr is not None:
            g = g * norm_weight
        block_g, block_gx = row_gradient_means(g, xhat, cols, NORM)
        mean_g += block_g
        mean_gx += block_gx
    tl.store(sums_ptr + row, mean_g)
    tl.store(sums_ptr + rows + row, mean_gx)


def row_sums(
    inputs: tuple[Tensor | None, ...],
    seed: Tensor | None,
    scalars: tuple[int | float, ...],
    flags: dict[str, Any],
) -> Tensor:
    """float32 (2, rows); the arguments are groups of `_row_sums_kernel`'s, in its order."""
    dy = inputs[0]
    assert dy is not None
    sums = dy.new_empty((2, dy.shape[0]), dtype=torch.float32)
    tile = tuning.row_sums_tile(tuning.device(dy))
    _row_sums_kernel[(dy.shape[0],)](
        *inputs,
        sums,
        seed,
        *scalars,
        **flags,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        num_warps=tile.num_warps,
    )
    return sums
