"""Linear with group norm of its features in one kernel: GEMM, norm, activation, dropout.

    y = residual + dropout(activation(norm(x · weightᵀ + bias)))

A tile holds whole groups. In memory a group of a row is WIDTH neighbours, so (rows, cols) is at the
same time (rows · groups, WIDTH), of which group norm is layer norm but for its parameters. WIDTH is
a power of two and at least 8: then dropout's groups of eight are the same in both views. z takes
the way over memory, for the reasons given in row.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..channel.problem import Problem
from ..parts.norm import centre
from ..parts.output import Drop, form_of, write_output
from ..parts.tile import Place, load_first, load_place, row_offset
from ..tuning import gemm as gemm_tuning
from ..tuning import rules as tuning
from .tile import product_tile, write_product

# Runtime integers whose value must not compile a new kernel: alignment is passed as ALIGN instead.
INTEGERS = ("rows", "cols", "groups", "inner", "stride_xm", "stride_wn", "threshold")


@triton.jit
def write_groups(
    z_ptr,
    parameters,
    residual_ptr,
    y_ptr,
    statistics,
    seed_ptr,
    row,  # int64 [BLOCK_M], of each group
    group,  # [BLOCK_M]
    rows,
    groups,
    scalars,
    threshold,
    FORM: tl.constexpr,
):
    """y, mean and variance of BLOCK_M groups; z is (rows · groups, WIDTH) and has the bias."""
    PER_THREAD: tl.constexpr = FORM.PER_THREAD
    _bias_ptr, norm_weight_ptr, norm_bias_ptr = parameters
    mean_ptr, variance_ptr = statistics
    WIDTH: tl.constexpr = FORM.WIDTH
    column = tl.arange(0, WIDTH)
    present = (row < rows) & (group < groups)
    mask = present[:, None] & (column < WIDTH)[None, :]
    unit = row * groups + group
    # A multiple of WIDTH, and so of 16 bytes.
    offset = row_offset(unit, WIDTH, PER_THREAD) + column[None, :]
    x = load_place(Place(z_ptr, offset, None, mask))  # [BLOCK_M, WIDTH]
    # As in norm.row_statistics: constant groups have variance 0 exactly.
    first = load_first(z_ptr, unit, WIDTH, present, None)
    x = centre(x, first, None, "layer", True)
    mean = tl.sum(x, 1) / WIDTH
    x = centre(x, mean, None, "layer", True)
    variance = tl.sum(x * x, 1) / WIDTH
    tl.store(mean_ptr + unit, first + mean, mask=present)
    tl.store(variance_ptr + unit, variance, mask=present)
    h = x * tl.rsqrt(variance + tl.cast(scalars[0], tl.float32))[:, None]
    own = (group * WIDTH)[:, None] + column[None, :]
    if norm_weight_ptr is not None:
        h *= load_place(Place(norm_weight_ptr, own, None, mask))
    if norm_bias_ptr is not None:
        h += load_place(Place(norm_bias_ptr, own, None, mask))
    write_output(
        *(h, None, Drop(seed_ptr, unit, 0, WIDTH, threshold)),
        *(Place(residual_ptr, offset, None, mask), Place(y_ptr, offset, None, mask)),
        *(scalars, FORM),
    )


@triton.jit(do_not_specialize=INTEGERS)
def _gemm_group_kernel(
    x_ptr,
    weight_ptr,
    parameters,
    residual_ptr,
    z_ptr,
    y_ptr,
    statistics,
    seed_ptr,
    rows,
    cols,
    groups,
    inner,
    stride_xm,
    stride_wn,
    scalars,
    threshold,
    FORM: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    """One tile a program: BLOCK_N // WIDTH groups of BLOCK_M rows."""
    GROUPS: tl.constexpr = TILE.BLOCK_N // FORM.WIDTH
    if z_ptr is None:
        z_ptr = y_ptr
    _z, row0, col0, _row_mask, _column, _column_mask = write_product(
        *(x_ptr, weight_ptr, parameters[0], z_ptr, rows, cols, inner, stride_xm, stride_wn),
        *(False, TILE),
    )
    # All of the program's threads now see z in memory.
    tl.debug_barrier()
    unit = tl.arange(0, STEP * GROUPS)
    present = tl.minimum(rows - row0, TILE.BLOCK_M).to(tl.int32)
    for step in tl.range(0, present, STEP):
        write_groups(
            *(z_ptr, parameters, residual_ptr, y_ptr, statistics, seed_ptr),
            *(row0 + step + unit // GROUPS, col0 // FORM.WIDTH + unit % GROUPS),
            *(rows, groups, scalars, threshold, FORM),
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
    align = tuning.alignment(cols, x.element_size())
    form = form_of(
        *(x, device, "group", problem.activation, problem.threshold, align), width=problem.width
    )
    programs = triton.cdiv(rows, tile.block_m) * triton.cdiv(cols, tile.block_n)
    with tuning.device_of(x):
        _gemm_group_kernel[(programs,)](
            *(x, weight, (bias, *parameters), residual, z if save_z else None, y),
            (mean, variance),
            seed if problem.threshold else None,
            *(rows, cols, problem.groups, inner, x.stride(0), weight.stride(0)),
            (problem.eps, problem.alpha, problem.beta),
            problem.threshold,
            FORM=form,
            TILE=product_tile(x, weight, tile, precision, align),
            STEP=tile.step,
            num_warps=tile.num_warps,
        )
    return y, z, mean, variance
