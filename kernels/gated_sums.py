"""The two means along a row that the gradient of a norm needs, before a gated activation.

As row_sums.py, for rows of which the tiles of gated_backward.py hold a part; a mean is over both
halves of the row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import gated_tuning, tuning
from .gate import halves_gradient, halves_gradient_means, load_halves
from .norm import load_statistics
from .row_sums import BACKWARD_INTEGERS
from .tile import load_columns, row_offset


@triton.jit(do_not_specialize=BACKWARD_INTEGERS)
def _gated_sums_kernel(
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
    threshold,
    NORM: tl.constexpr,
    GATE: tl.constexpr,
    ALIGN: tl.constexpr,
    PTX: tl.constexpr,
    PER_THREAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One row a program, block by block: sums_ptr is [2, rows], mean(g) and mean(g xhat)."""
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
            *(column, gate_column, column_mask, mask, cols, stride_dym, threshold),
            *(NORM, GATE, ALIGN, PTX, PER_THREAD, BLOCK_M, BLOCK_N),
        )
        if norm_weight_ptr is not None:
            da *= load_columns(norm_weight_ptr, column, column_mask)
            db *= load_columns(norm_weight_ptr, gate_column, column_mask)
        block_g, block_gx = halves_gradient_means(da, db, xhat_a, xhat_b, cols, NORM)
        mean_g += block_g
        mean_gx += block_gx
    tl.store(sums_ptr + row, mean_g)
    tl.store(sums_ptr + rows + row, mean_gx)


def gated_sums(
    inputs: tuple[Tensor | None, ...],
    seed: Tensor | None,
    scalars: tuple[int, ...],
    flags: dict[str, Any],
) -> Tensor:
    """float32 (2, rows); the arguments are groups of `_gated_sums_kernel`'s, in its order."""
    dy = inputs[0]
    assert dy is not None
    sums = dy.new_empty((2, dy.shape[0]), dtype=torch.float32)
    device = tuning.device(dy)
    tile = gated_tuning.sums_tile(device)
    _gated_sums_kernel[(dy.shape[0],)](
        *inputs,
        sums,
        seed,
        *scalars,
        **flags,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        num_warps=tile.num_warps,
        **gated_tuning.sums_options(device),
    )
    return sums
