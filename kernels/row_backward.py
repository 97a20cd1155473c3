"""Backward of the row epilogue: mask and activation again, norm gradient, column sums.

One pass over memory up to `BACKWARD_TILE_COLS` columns. Persistent programs walk over the rows and
keep the column sums (gradients of norm_weight, norm_bias and bias) in float32 registers; a second
stage adds up the programs' sums in a fixed order, so there are no atomics and the bits repeat.
Without a norm, tiles are parts of rows, and the same kernel serves any width.

A wider norm takes two kernels: `_row_sums_kernel` finds the two means of a row that the gradient
needs, after which any part of a row can be treated by itself, as without a norm.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..spec import ACTIVATION_NAMES, NORM_NAMES
from . import tuning
from .activation import activate_grad
from .dropout import dropout_multiplier
from .norm import centre, row_gradient, row_gradient_means
from .row import affine, load_columns, load_tile, row_offset

BACKWARD_INTEGERS = ("rows", "cols", "stride_dym", "stride_zm", "threshold")


@triton.jit
def _normalize(x, mean_ptr, rstd_ptr, row, row_mask, NORM: tl.constexpr):
    """(xhat [M, N], rstd [M]) from the saved statistics."""
    rstd = tl.load(rstd_ptr + row, mask=row_mask, other=0.0)
    mean = rstd
    if NORM == "layer":
        mean = tl.load(mean_ptr + row, mask=row_mask, other=0.0)
    return centre(x, mean, None, NORM, True) * rstd[:, None], rstd


@triton.jit(do_not_specialize=BACKWARD_INTEGERS)
def _row_bwd_kernel(
    dy_ptr,
    z_ptr,
    bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    mean_ptr,
    rstd_ptr,
    sums_ptr,
    seed_ptr,
    dz_ptr,
    partial_ptr,
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
    STAGES: tl.constexpr,
):
    """dz, and this program's column sums: partial_ptr is [sums present, row programs, cols].

    A program keeps to one block of columns. The planes are norm_weight, norm_bias, bias.
    With STAGES = 2 the next rows are on their way while these are computed, and the parameters stay
    in registers; with 1 there is no room for either, and the parameters come from L1 every time.
    """
    # Parts of rows only where no sum along the row is taken here.
    col_blocks = tl.cdiv(cols, BLOCK_N) if NORM is None or sums_ptr is not None else 1
    pid = tl.program_id(0)
    row_programs = tl.num_programs(0) // col_blocks
    row_program = pid // col_blocks
    col0 = (pid % col_blocks) * BLOCK_N
    column = col0 + tl.arange(0, BLOCK_N)
    column_mask = column < (cols // ALIGN) * ALIGN
    alpha = tl.cast(alpha, tl.float32)
    beta = tl.cast(beta, tl.float32)
    if STAGES > 1:
        bias = load_columns(bias_ptr, column, column_mask) if bias_ptr is not None else None
        norm_weight = (
            load_columns(norm_weight_ptr, column, column_mask)
            if norm_weight_ptr is not None
            else None
        )
        norm_bias = (
            load_columns(norm_bias_ptr, column, column_mask) if norm_bias_ptr is not None else None
        )
    if norm_weight_ptr is not None:
        dnorm_weight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if norm_bias_ptr is not None:
        dnorm_bias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if bias_ptr is not None:
        dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    if seed_ptr is not None:
        seed = tl.load(seed_ptr)

    for tile in tl.range(row_program, tl.cdiv(rows, BLOCK_M), row_programs, num_stages=STAGES):
        row = tl.cast(tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        row_mask = row < rows
        mask = row_mask[:, None] & column_mask[None, :]
        offset = row_offset(row, stride_dym, ALIGN) + column[None, :]
        g = tl.load(dy_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        z_offset = row_offset(row, stride_zm, ALIGN)
        if STAGES == 1:
            bias = load_columns(bias_ptr, column, column_mask) if bias_ptr is not None else None
            norm_weight = (
                load_columns(norm_weight_ptr, column, column_mask)
                if norm_weight_ptr is not None
                else None
            )
            norm_bias = (
                load_columns(norm_bias_ptr, column, column_mask)
                if norm_bias_ptr is not None
                else None
            )
        h = load_tile(z_ptr, z_offset + column[None, :], mask, bias)
        if NORM is not None:
            xhat, rstd = _normalize(h, mean_ptr, rstd_ptr, row, row_mask, NORM)
            h = affine(xhat, norm_weight, norm_bias)
        if seed_ptr is not None:
            g *= dropout_multiplier(seed, row, col0, cols, threshold, PER_THREAD, BLOCK_M, BLOCK_N)
        g = activate_grad(g, h, alpha, beta, ACTIVATION, PTX)
        if norm_bias_ptr is not None:
            dnorm_bias += g
        if NORM is not None:
            if norm_weight_ptr is not None:
                dnorm_weight += g * xhat
                g = g * norm_weight
            if sums_ptr is not None:
                mean_g = tl.load(sums_ptr + row, mask=row_mask, other=0.0)
                mean_gx = tl.load(sums_ptr + rows + row, mask=row_mask, other=0.0)
            else:
                mean_g, mean_gx = row_gradient_means(g, xhat, cols, NORM)
            g = row_gradient(g, xhat, rstd, mean_g, mean_gx, NORM)
        if bias_ptr is not None:
            dbias += g
        tl.store(dz_ptr + row_offset(row, cols, ALIGN) + column[None, :], g, mask=mask)

    if partial_ptr is not None:
        plane = tl.cast(row_programs, tl.int64) * cols
        partial_ptr += tl.multiple_of(tl.cast(row_program, tl.int64) * cols, ALIGN)
        if norm_weight_ptr is not None:
            tl.store(partial_ptr + column, tl.sum(dnorm_weight, 0), mask=column_mask)
            partial_ptr += tl.multiple_of(plane, ALIGN)
        if norm_bias_ptr is not None:
            tl.store(partial_ptr + column, tl.sum(dnorm_bias, 0), mask=column_mask)
            partial_ptr += tl.multiple_of(plane, ALIGN)
        if bias_ptr is not None:
            tl.store(partial_ptr + column, tl.sum(dbias, 0), mask=column_mask)


@triton.jit(do_not_specialize=BACKWARD_INTEGERS)
def _row_sums_kernel(
    dy_ptr,
    z_ptr,
    bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    mean_ptr,
    rstd_ptr,
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
    """The row means of g and g xhat (g = dh · norm_weight), float32 [2, rows], for wide rows."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, BLOCK_M)
    end = (cols // ALIGN) * ALIGN
    alpha = tl.cast(alpha, tl.float32)
    beta = tl.cast(beta, tl.float32)
    mean_g = tl.zeros((BLOCK_M,), tl.float32)
    mean_gx = tl.zeros((BLOCK_M,), tl.float32)
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
        xhat, _ = _normalize(x, mean_ptr, rstd_ptr, row, row < rows, NORM)
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


@triton.jit(do_not_specialize=("programs", "cols"))
def _column_sum_kernel(
    partial_ptr,
    out0_ptr,
    out1_ptr,
    out2_ptr,
    programs,
    cols,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sums partial [planes, programs, cols] over the programs; grid axis 1 is the plane."""
    plane = tl.program_id(1)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = column < (cols // ALIGN) * ALIGN
    partial_ptr += tl.multiple_of(tl.cast(plane, tl.int64) * programs * cols, ALIGN)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in tl.range(0, programs, BLOCK_M):
        program = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_M)
        mask = (program < programs)[:, None] & column_mask[None, :]
        offset = row_offset(program, cols, ALIGN) + column[None, :]
        total += tl.load(partial_ptr + offset, mask=mask, other=0.0)
    sums = tl.sum(total, 0)
    if plane == 0:
        tl.store(out0_ptr + column, sums, mask=column_mask)
    if out1_ptr is not None:
        if plane == 1:
            tl.store(out1_ptr + column, sums, mask=column_mask)
    if out2_ptr is not None:
        if plane == 2:
            tl.store(out2_ptr + column, sums, mask=column_mask)


def row_backward(
    dy: Tensor,
    z: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    norm: int,
    activation: int,
    alpha: float,
    beta: float,
    threshold: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `row_forward`, given the gradient dy of its result.

    Args:
        dy, z: (rows, cols), last stride 1, any row stride and offset; one dtype.
        bias, norm_weight, norm_bias: as in the forward.
        mean, rstd: as the forward returned them.
        seed, norm, activation, alpha, beta, threshold: as in the forward.

    Returns:
        dz (rows, cols) in z's dtype; dnorm_weight, dnorm_bias and dbias, (cols,) in the dtypes of
        their parameters, empty (0,) where the parameter is None.
    """
    rows, cols = z.shape
    name = NORM_NAMES[norm]
    if name is None:
        norm_weight = norm_bias = None
    empty = rows == 0 or cols == 0
    dz = z.new_empty((rows, cols))
    parameters = (norm_weight, norm_bias, bias)
    gradients = [
        z.new_empty((0,)) if p is None else (p.new_zeros if empty else p.new_empty)((cols,))
        for p in parameters
    ]
    dnorm_weight, dnorm_bias, dbias = gradients
    if empty:
        return dz, dnorm_weight, dnorm_bias, dbias
    device = tuning.device(z)
    mean_arg, rstd_arg = (mean if name == "layer" else None), (rstd if name else None)
    scalars = (rows, cols, dy.stride(0), z.stride(0), alpha, beta, threshold)
    flags = {
        "NORM": name,
        "ACTIVATION": ACTIVATION_NAMES[activation],
        "ALIGN": tuning.alignment(cols, z.element_size(), dy.stride(0), z.stride(0)),
        "PTX": device.arch > 0,
        "PER_THREAD": min(8, 16 // z.element_size()),
    }
    inputs = (dy, z, bias, norm_weight, norm_bias, mean_arg, rstd_arg)
    seed_arg = seed if threshold else None
    # The sums that the kernel keeps, in the order of its planes.
    wanted = [g for g, p in zip(gradients, parameters, strict=True) if p is not None]
    tile = tuning.backward_tile(cols, name, len(wanted), device)
    col_blocks = triton.cdiv(cols, tile.block_n)
    with torch.cuda.device_of(z):
        sums = None
        if name and col_blocks > 1:
            sums = z.new_empty((2, rows), dtype=torch.float32)
            row_tile = tuning.row_sums_tile(device)
            _row_sums_kernel[(rows,)](
                *inputs,
                sums,
                seed_arg,
                *scalars,
                **flags,
                BLOCK_M=row_tile.block_m,
                BLOCK_N=row_tile.block_n,
                num_warps=row_tile.num_warps,
            )
        row_tiles = triton.cdiv(rows, tile.block_m)
        programs = tuning.programs(row_tiles, col_blocks, tile, device)
        partial = None
        if wanted:
            partial = z.new_empty((len(wanted), programs, cols), dtype=torch.float32)
        _row_bwd_kernel[(programs * col_blocks,)](
            *inputs,
            sums,
            seed_arg,
            dz,
            partial,
            *scalars,
            **flags,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            STAGES=tuning.backward_stages(tile),
            num_warps=tile.num_warps,
        )
        if partial is not None:
            _sum_columns(partial, wanted)
    return dz, dnorm_weight, dnorm_bias, dbias


def _sum_columns(partial: Tensor, outputs: list[Tensor]) -> None:
    """Second stage: outputs[i] = partial[i].sum(0), in a fixed order."""
    planes, programs, cols = partial.shape
    tile = tuning.column_sum_tile(tuning.device(partial))
    _column_sum_kernel[(triton.cdiv(cols, tile.block_n), planes)](
        partial,
        *(outputs + [None] * (3 - planes)),
        programs,
        cols,
        ALIGN=tuning.alignment(cols, 4),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        num_warps=tile.num_warps,
    )
