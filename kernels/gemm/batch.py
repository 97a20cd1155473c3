"""Linear with batch norm's statistics in the GEMM's epilogue: z is read once less.

    z = x · weightᵀ + bias,   mean = Σ z / rows,   variance = Σ (z - mean)² / rows   of each column

Each tile leaves the mean and the sum of squared deviations of its columns: two passes over it in
registers, never E[z²] - E[z]². The tiles are merged as channel/statistics.py merges its chunks
(Chan, Golub and LeVeque, 1983): in a fixed order, without atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..channel.apply import apply
from ..channel.problem import Problem
from ..channel.statistics import merge_chunks
from ..channel.tile import over_positions, tile_moments
from ..tuning import gemm as gemm_tuning
from ..tuning import rules as tuning
from .tile import product_tile, write_product

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
    TILE: tl.constexpr,
):
    """One tile a program: z, and its columns' moments.

    partial_ptr is [3, row blocks, cols]: a value near the mean, mean minus it, and the sum of
    squared deviations; count_ptr [row blocks]. The moments are those of z as it is stored.
    """
    z, row0, col0, row_mask, column, column_mask = write_product(
        *(x_ptr, weight_ptr, bias_ptr, z_ptr, rows, cols, inner, stride_xm, stride_wn),
        *(False, TILE),
    )
    count = tl.minimum(rows - row0, TILE.BLOCK_M).to(tl.float32)
    inside = row_mask[:, None]
    x = tl.where(inside, z.to(tl.float32), 0.0)
    centre = over_positions(x, True) / count  # [1, BLOCK_N]
    x = tl.where(inside, x - centre, 0.0)
    mean, m2 = tile_moments(x, inside, count, True)
    block = row0 // TILE.BLOCK_M
    plane = tl.cast(tl.cdiv(rows, TILE.BLOCK_M), tl.int64) * cols
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
    align = tuning.alignment(cols, x.element_size())
    with tuning.device_of(x):
        _gemm_batch_kernel[(row_blocks * triton.cdiv(cols, tile.block_n),)](
            x,
            weight,
            bias,
            z,
            partial,
            count,
            *(rows, cols, inner, x.stride(0), weight.stride(0)),
            TILE=product_tile(x, weight, tile, precision, align),
            num_warps=tile.num_warps,
        )
        merge_chunks(partial, count, (mean, variance, None), cols, device)
    # y takes z's place where no backward will read z.
    y = z.new_empty(z.shape) if save_z else z
    whole, result = z.unsqueeze(0), y.unsqueeze(0)
    residual = None if residual is None else residual.unsqueeze(0)
    apply(whole, (mean, variance), parameters, residual, None, seed, result, problem)
    return y, z if save_z else z.new_empty((0,)), mean, variance
