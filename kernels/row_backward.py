"""Backward of the row epilogue: mask and activation again, norm gradient, column sums.

One pass over memory up to `BACKWARD_TILE_COLS` columns. Persistent programs walk over the rows and
keep the column sums (gradients of norm_weight, norm_bias and bias) in float32 registers; a second
stage adds up the programs' sums in a fixed order, so there are no atomics and the bits repeat.
Without a norm, tiles are parts of rows, and the same kernel serves any width.

A wider norm takes two kernels: that of row_sums.py finds the two means of a row that the gradient
needs, after which any part of a row can be treated by itself, as without a norm.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..spec import (
    ACTIVATION_NAMES,
    NORM_NAMES,
    WANT_BIAS,
    WANT_NORM_BIAS,
    WANT_NORM_WEIGHT,
    is_gated,
)
from . import tuning
from .activation import activate_grad
from .column_sum import sum_columns
from .dropout import dropout_multiplier
from .gated import half_of
from .gated_backward import gated_backward
from .norm import affine, centre, load_statistics, row_gradient, row_gradient_means
from .row_sums import BACKWARD_INTEGERS, row_sums
from .tile import load_columns, load_tile, row_offset


@triton.jit(do_not_specialize=BACKWARD_INTEGERS)
def _row_bwd_kernel(
    dy_ptr,
    z_ptr,
    bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    statistics_ptr,
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
    WANT_NORM_WEIGHT: tl.constexpr,
    WANT_NORM_BIAS: tl.constexpr,
    WANT_BIAS: tl.constexpr,
):
    """dz, and this program's column sums: partial_ptr is [sums wanted, row programs, cols].

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
    if WANT_NORM_WEIGHT:
        dnorm_weight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if WANT_NORM_BIAS:
        dnorm_bias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if WANT_BIAS:
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
            mean, rstd = load_statistics(statistics_ptr, row, rows, NORM)
            xhat = centre(h, mean, None, NORM, True) * rstd[:, None]
            h = affine(xhat, norm_weight, norm_bias)
        if seed_ptr is not None:
            g *= dropout_multiplier(seed, row, col0, cols, threshold, PER_THREAD, BLOCK_M, BLOCK_N)
        g = activate_grad(g, h, alpha, beta, ACTIVATION, PTX)
        if WANT_NORM_BIAS:
            dnorm_bias += g
        if NORM is not None:
            if WANT_NORM_WEIGHT:
                dnorm_weight += g * xhat
            if norm_weight_ptr is not None:
                g = g * norm_weight
            if sums_ptr is not None:
                mean_g = tl.load(sums_ptr + row, mask=row_mask, other=0.0)
                mean_gx = tl.load(sums_ptr + rows + row, mask=row_mask, other=0.0)
            else:
                mean_g, mean_gx = row_gradient_means(g, xhat, cols, NORM)
            g = row_gradient(g, xhat, rstd, mean_g, mean_gx, NORM)
        if WANT_BIAS:
            dbias += g
        tl.store(dz_ptr + row_offset(row, cols, ALIGN) + column[None, :], g, mask=mask)

    if partial_ptr is not None:
        plane = tl.cast(row_programs, tl.int64) * cols
        partial_ptr += tl.multiple_of(tl.cast(row_program, tl.int64) * cols, ALIGN)
        if WANT_NORM_WEIGHT:
            tl.store(partial_ptr + column, tl.sum(dnorm_weight, 0), mask=column_mask)
            partial_ptr += tl.multiple_of(plane, ALIGN)
        if WANT_NORM_BIAS:
            tl.store(partial_ptr + column, tl.sum(dnorm_bias, 0), mask=column_mask)
            partial_ptr += tl.multiple_of(plane, ALIGN)
        if WANT_BIAS:
            tl.store(partial_ptr + column, tl.sum(dbias, 0), mask=column_mask)


def row_backward(
    dy: Tensor,
    z: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    statistics: Tensor,
    seed: Tensor | None,
    wanted: int,
    norm: int,
    eps: float,
    activation: int,
    alpha: float,
    beta: float,
    threshold: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `row_forward`, given the gradient dy of its result.

    Args:
        dy, z: (rows, cols), last stride 1, any row stride and offset; one dtype.
        bias, norm_weight, norm_bias: as in the forward.
        statistics: as the forward returned them; eps went into them and is not used again.
        wanted: sum of the WANT_ constants: the sums over the rows to make. WANT_BIAS makes sense
            without a bias too: z then contains it.
        seed, norm, activation, alpha, beta, threshold: as in the forward. With a gated activation
            dy is (rows, cols), and what else has columns has 2 cols (gated_backward.py).

    Returns:
        dz (rows, cols) in z's dtype; dnorm_weight and dnorm_bias, (cols,) in the dtypes of their
        parameters, and dbias, (cols,) in z's dtype. Those that are not wanted, or whose parameter
        does not exist, are float32 and empty, (0,).

    Raises:
        ValueError: a gated activation, and an odd number of columns.
    """
    rows, cols = z.shape
    activation_name = ACTIVATION_NAMES[activation]
    if is_gated(activation):
        half_of(cols, "row_backward", str(activation_name))
    name = NORM_NAMES[norm]
    if name is None:
        norm_weight = norm_bias = None
    empty = rows == 0 or cols == 0
    dz = z.new_empty((rows, cols))
    # A sum takes the dtype of its owner; the order is that of the kernel's planes.
    owners = {
        "WANT_NORM_WEIGHT": norm_weight if wanted & WANT_NORM_WEIGHT else None,
        "WANT_NORM_BIAS": norm_bias if wanted & WANT_NORM_BIAS else None,
        "WANT_BIAS": z if wanted & WANT_BIAS else None,
    }
    gradients = [
        z.new_empty((0,), dtype=torch.float32)
        if owner is None
        else (owner.new_zeros if empty else owner.new_empty)((cols,))
        for owner in owners.values()
    ]
    dnorm_weight, dnorm_bias, dbias = gradients
    if empty:
        return dz, dnorm_weight, dnorm_bias, dbias
    inputs = (dy, z, bias, norm_weight, norm_bias, statistics if name else None)
    seed_arg = seed if threshold else None
    made = [g for g in gradients if g.numel()]
    wants = {flag: owner is not None for flag, owner in owners.items()}
    if is_gated(activation):
        out = (dz, made, wants)
        gated_backward(inputs, seed_arg, *out, name, str(activation_name), threshold)
        return dz, dnorm_weight, dnorm_bias, dbias
    device = tuning.device(z)
    scalars = (rows, cols, dy.stride(0), z.stride(0), alpha, beta, threshold)
    align = tuning.alignment(cols, z.element_size(), dy.stride(0), z.stride(0))
    flags = {
        "NORM": name,
        "ACTIVATION": activation_name,
        "ALIGN": align,
        "PTX": device.arch > 0,
        "PER_THREAD": min(8, 16 // z.element_size()),
    }
    wide = align * z.element_size() == 16 and (dy.data_ptr() | z.data_ptr()) % 16 == 0
    tile = tuning.backward_tile(cols, name, len(made), z.element_size(), device, wide)
    col_blocks = triton.cdiv(cols, tile.block_n)
    with tuning.device_of(z):
        sums = None
        if name and col_blocks > 1:
            sums = row_sums(inputs, seed_arg, scalars, flags)
        row_tiles = triton.cdiv(rows, tile.block_m)
        programs = tuning.programs(row_tiles, col_blocks, tile, device)
        partial = None
        if made:
            partial = z.new_empty((len(made), programs, cols), dtype=torch.float32)
        _row_bwd_kernel[(programs * col_blocks,)](
            *inputs,
            sums,
            seed_arg,
            dz,
            partial,
            *scalars,
            **flags,
            **wants,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            STAGES=tuning.backward_stages(tile),
            num_warps=tile.num_warps,
        )
        if partial is not None:
            sum_columns(partial, made)
    return dz, dnorm_weight, dnorm_bias, dbias
