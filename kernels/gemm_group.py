"""Linear with group norm of its features in one kernel: GEMM, norm, activation, dropout.

    y = residual + dropout(activation(norm(x · weightᵀ + bias)))

A tile holds whole groups. In memory a group of a row is WIDTH neighbours, so (rows, cols) is at the
same time (rows · groups, WIDTH), of which group norm is layer norm but for its parameters. WIDTH is
a power of two and at least 8: then dropout's groups of eight are the same in both views. z takes
the way over memory, for the reasons given in gemm_row.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import gemm_tuning, tuning
from .activation import activate
from .channel_problem import Problem
from .dropout import dropout_multiplier
from .gemm_tile import add_bias, product, tile_of_program
from .norm import affine, centre
from .tile import load_first, row_offset

# Runtime integers whose value must not compile a new kernel: alignment is passed as ALIGN instead.
INTEGERS = ("rows", "cols", "groups", "inner", "stride_xm", "stride_wn", "threshold")


@triton.jit
def write_groups(
    z_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    residual_ptr,
    y_ptr,
    mean_ptr,
    variance_ptr,
    seed_ptr,
    row,  # int64 [BLOCK_M], of each group
    group,  # [BLOCK_M]
    rows,
    groups,
    eps,
    alpha,
    beta,
    threshold,
    ACTIVATION: tl.constexpr,
    PTX: tl.constexpr,
    PER_THREAD: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """y, mean and variance of BLOCK_M groups; z is (rows · groups, WIDTH) and has the bias."""
    BLOCK_M: tl.constexpr = row.shape[0]
    column = tl.arange(0, WIDTH)
    present = (row < rows) & (group < groups)
    mask = present[:, None] & (column < WIDTH)[None, :]
    place = row * groups + group
    # A multiple of WIDTH, and so of 16 bytes.
    offset = row_offset(place, WIDTH, PER_THREAD) + column[None, :]
    x = tl.load(z_ptr + offset, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, WIDTH]
    # As in norm.row_statistics: constant groups have variance 0 exactly.
    first = load_first(z_ptr, place, WIDTH, present, None)
    x = centre(x, first, None, "layer", True)
    mean = tl.sum(x, 1) / WIDTH
    x = centre(x, mean, None, "layer", True)
    variance = tl.sum(x * x, 1) / WIDTH
    tl.store(mean_ptr + place, first + mean, mask=present)
    tl.store(variance_ptr + place, variance, mask=present)
    h = x * tl.rsqrt(variance + tl.cast(eps, tl.float32))[:, None]
    own = (group * WIDTH)[:, None] + column[None, :]
    if norm_weight_ptr is not None:
        h = affine(h, tl.load(norm_weight_ptr + own, mask=mask, other=0.0).to(tl.float32), None)
    if norm_bias_ptr is not None:
        h = affine(h, None, tl.load(norm_bias_ptr + own, mask=mask, other=0.0).to(tl.float32))
    y = activate(h, tl.cast(alpha, tl.float32), tl.cast(beta, tl.float32), ACTIVATION, PTX)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
        y *= dropout_multiplier(seed, place, 0, WIDTH, threshold, PER_THREAD, BLOCK_M, WIDTH)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offset, y, mask=mask)


@triton.jit(do_not_specialize=INTEGERS)
def _gemm_group_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    residual_ptr,
    z_ptr,
    y_ptr,
    mean_ptr,
    variance_ptr,
    seed_ptr,
    rows,
    cols,
    groups,
    inner,
    stride_xm,
    stride_wn,
    eps,
    alpha,
    beta,
    threshold,
    ACTIVATION: tl.constexpr,
    ALIGN_K: tl.constexpr,
    ALIGN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
    PER_THREAD: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    STEP: tl.constexpr,
):
    """One tile a program: BLOCK_N // WIDTH groups of BLOCK_M rows."""
    GROUPS: tl.constexpr = BLOCK_N // WIDTH
    row0, col0 = tile_of_program(tl.program_id(0), rows, cols, False, BLOCK_M, BLOCK_N)
    row = row0 + tl.arange(0, BLOCK_M)
    column = col0 + tl.arange(0, BLOCK_N)
    row_mask = row < rows
    column_mask = column < (cols // ALIGN_N) * ALIGN_N
    z = product(
        *(x_ptr, weight_ptr, row, row_mask, column, column_mask, inner, stride_xm, stride_wn),
        *(ALIGN_K, EVEN_K, PRECISION, BLOCK_K, STAGES),
    )
    z = add_bias(z, bias_ptr, column, column_mask).to(y_ptr.dtype.element_ty)
    if z_ptr is None:
        z_ptr = y_ptr
    mask = row_mask[:, None] & column_mask[None, :]
    tl.store(z_ptr + row_offset(row, cols, ALIGN_N) + column[None, :], z, mask=mask)
    # All of the program's threads now see z in memory.
    tl.debug_barrier()
    unit = tl.arange(0, STEP * GROUPS)
    present = tl.minimum(rows - row0, BLOCK_M).to(tl.int32)
    for step in tl.range(0, present, STEP):
        write_groups(
            *(z_ptr, norm_weight_ptr, norm_bias_ptr, residual_ptr, y_ptr, mean_ptr, variance_ptr),
            *(seed_ptr, row0 + step + unit // GROUPS, col0 // WIDTH + unit % GROUPS),
            *(rows, groups, eps, alpha, beta, threshold),
            *(ACTIVATION, PTX, PER_THREAD, WIDTH),
        )


def group_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    parameters: tuple[Tensor | None, Tensor | None],
    residual: Tensor | None,
    seed: Tensor | None,
    save_z: bool,
    problem: Problem,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `gemm_channel.linear_channel_forward`; problem is that of z as (rows, 1, cols)."""
    (rows, inner), cols = x.shape, weight.shape[0]
    device = tuning.device(x)
    precision = gemm_tuning.precision(x.dtype)
    kind = gemm_tuning.Kind("group", x.dtype, precision)
    tile = gemm_tuning.group_tile(problem.width, kind, device.arch, device.warp_size)
    if tile is None:
        raise ValueError(f"linear_channel_forward: no tile for groups of {problem.width} columns")
    y = x.new_empty((rows, cols))
    z = x.new_empty((rows, cols) if save_z else (0,))
    shape = (rows, problem.groups)
    mean, variance = (x.new_empty(shape, dtype=torch.float32) for _ in range(2))
    strides = (x.stride(0), weight.stride(0))
    programs = triton.cdiv(rows, tile.block_m) * triton.cdiv(cols, tile.block_n)
    with tuning.device_of(x):
        _gemm_group_kernel[(programs,)](
            *(x, weight, bias, *parameters, residual, z if save_z else None, y, mean, variance),
            seed if problem.threshold else None,
            *(rows, cols, problem.groups, inner, *strides),
            *(problem.eps, problem.alpha, problem.beta, problem.threshold),
            ACTIVATION=problem.activation,
            ALIGN_K=tuning.alignment(inner, x.element_size(), *strides),
            ALIGN_N=tuning.alignment(cols, x.element_size()),
            EVEN_K=inner % tile.block_k == 0,
            PRECISION=precision,
            PTX=device.arch > 0,
            PER_THREAD=min(8, 16 // x.element_size()),
            WIDTH=problem.width,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            STAGES=tile.stages,
            STEP=tile.step,
            num_warps=tile.num_warps,
        )
    return y, z, mean, variance
