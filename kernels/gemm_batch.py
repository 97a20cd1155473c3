"""Linear with batch norm's statistics in the GEMM's epilogue: z is read once less.

    z = x · weightᵀ + bias,   mean = Σ z / rows,   variance = Σ (z - mean)² / rows   of each column

Each tile leaves the mean and the sum of squared deviations of its columns: two passes over it in
registers, never E[z²] - E[z]². The tiles are merged as channel_statistics.py merges its chunks
(Chan, Golub and LeVeque, 1983): in a fixed order, without atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import gemm_tuning, tuning
from .channel_apply import apply
from .channel_problem import Problem
from .channel_statistics import merge_chunks
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
    inside = row_mask[:, None]
    x = tl.where(inside, z.to(tl.float32), 0.0)
    centre = over_positions(x, True) / count  # [1, BLOCK_N]
    x = tl.where(inside, x - centre, 0.0)
    mean, m2 = tile_moments(x, inside, count, True)
    block = row0 // BLOCK_M
    plane = tl.cast(tl.cdiv(rows, BLOCK_M), tl.int64) * cols
    offset = (block * cols + column)[None, :]
    tl.store(partial_ptr + offset, centre, mask=column_mask[None, :])
    tl.store(partial_ptr + plane + offset, mean, mask=column_mask[None, :])
    tl.store(partial_ptr + 2 * plane + offset, m2, mask=column_mask[None, :])
    if col0 == 0:
        tl.store(count_ptr + block, count)


def batch_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    parameters: tuple[Tensor | None, Tensor | None],
    residual: Tensor | None,
    seed: Tensor | None,
    save_z: bool,
    problem: Problem,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `gemm_channel.linear_channel_forward`; problem is that of z as (1, rows, cols)."""
    (rows, inner), cols = x.shape, weight.shape[0]
    device = tuning.device(x)
    precision = gemm_tuning.precision(x.dtype)
    kind = gemm_tuning.Kind("batch", x.dtype, precision)
    tile = gemm_tuning.batch_tile(cols, kind, device.arch, device.warp_size)
    row_blocks = triton.cdiv(rows, tile.block_m)
    z = x.new_empty((rows, cols))
    partial = x.new_empty((3, 1, row_blocks, cols), dtype=torch.float32)
    count = x.new_empty((1, row_blocks), dtype=torch.float32)
    mean, variance = (x.new_empty((1, cols), dtype=torch.float32) for _ in range(2))
    strides = (x.stride(0), weight.stride(0))
    with tuning.device_of(x):
        _gemm_batch_kernel[(row_blocks * triton.cdiv(cols, tile.block_n),)](
            x,
            weight,
            bias,
            z,
            partial,
            count,
            rows,
            cols,
            inner,
            *strides,
            ALIGN_K=tuning.alignment(inner, x.element_size(), *strides),
            ALIGN_N=tuning.alignment(cols, x.element_size()),
            EVEN_K=inner % tile.block_k == 0,
            PRECISION=precision,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            STAGES=tile.stages,
            num_warps=tile.num_warps,
        )
        merge_chunks(partial, count, (mean, variance, None), cols, device)
    # y takes z's place where no backward will read z.
    y = z.new_empty(z.shape) if save_z else z
    whole, result = z.unsqueeze(0), y.unsqueeze(0)
    residual = None if residual is None else residual.unsqueeze(0)
    apply(whole, (mean, variance), parameters, residual, None, seed, result, problem)
    return y, z if save_z else z.new_empty((0,)), mean, variance
