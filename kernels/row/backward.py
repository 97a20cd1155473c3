"""Backward of the row epilogue: mask and activation again, norm gradient, column sums.

One pass over memory up to `BACKWARD_TILE_COLS` columns. Persistent programs walk over the rows and
keep the column sums (gradients of norm_weight, norm_bias and bias) in float32 registers; a second
stage adds up the programs' sums in a fixed order, so there are no atomics and the bits repeat.
Without a norm, tiles are parts of rows, and the same kernel serves any width.

A wider norm takes two kernels: that of sums.py finds the two means of a row that the gradient
needs, after which any part of a row can be treated by itself, as without a norm.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...spec import (
    ACTIVATION_NAMES,
    GATED_ACTIVATIONS,
    NORM_NAMES,
    WANT_BIAS,
    WANT_NORM_BIAS,
    WANT_NORM_WEIGHT,
    is_gated,
)
from ..parts.column_sum import sum_columns
from ..parts.norm import centre, load_statistics, row_gradient, row_gradient_means
from ..parts.output import Drop, drop, form_of, output_gradient
from ..parts.tile import Place, load_columns, load_place, row_offset
from ..tuning import rules as tuning
from .gated import half_of, is_wide
from .gated_backward import backward_kernel, sums_kernel
from .sums import BACKWARD_INTEGERS, _row_sums_kernel, row_sums


class Wanted(NamedTuple):
    """Which sums over the rows a kernel makes."""

    norm_weight: bool
    norm_bias: bool
    bias: bool


@triton.jit(do_not_specialize=BACKWARD_INTEGERS)
def _row_bwd_kernel(
    dy_ptr,
    z_ptr,
    parameters,
    statistics_ptr,
    sums_ptr,
    seed_ptr,
    dz_ptr,
    partial_ptr,
    rows,
    cols,
    stride_dym,
    stride_zm,
    scalars,
    threshold,
    total,
    FORM: tl.constexpr,
    WANTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dz, and this program's column sums: partial_ptr is [sums wanted, row programs, cols].

    A program keeps to one block of columns. The planes are norm_weight, norm_bias, bias.
    With STAGES = 2 the next rows are on their way while these are computed, and the parameters stay
    in registers; with 1 there is no room for either, and the parameters come from L1 every time.
    total: of add & norm, whose sum is z here (add_norm.py): a gradient of it from elsewhere, and
    where the gradient of what was dropped goes, with contiguous rows; None where there is none.
    """
    total_ptr, dropped_ptr = total
    NORM: tl.constexpr = FORM.NORM
    bias_ptr, norm_weight_ptr, norm_bias_ptr = parameters
    ALIGN: tl.constexpr = FORM.ALIGN
    # Parts of rows only where no sum along the row is taken here.
    col_blocks = tl.cdiv(cols, BLOCK_N) if NORM is None or sums_ptr is not None else 1
    pid = tl.program_id(0)
    row_programs = tl.num_programs(0) // col_blocks
    row_program = pid // col_blocks
    col0 = (pid % col_blocks) * BLOCK_N
    column = col0 + tl.arange(0, BLOCK_N)
    column_mask = column < (cols // ALIGN) * ALIGN
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
    if WANTED.norm_weight:
        dnorm_weight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if WANTED.norm_bias:
        dnorm_bias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if WANTED.bias:
        dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    seed = tl.load(seed_ptr) if seed_ptr is not None else None

    for tile in tl.range(row_program, tl.cdiv(rows, BLOCK_M), row_programs, num_stages=STAGES):
        row = tl.cast(tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        row_mask = row < rows
        mask = row_mask[:, None] & column_mask[None, :]
        offset = row_offset(row, stride_dym, ALIGN)
        g = load_place(Place(dy_ptr, offset, column[None, :], mask))
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
        h = load_place(Place(z_ptr, z_offset, column[None, :], mask))
        if bias_ptr is not None:
            h += bias
        if NORM is not None:
            mean, rstd = load_statistics(statistics_ptr, row, rows, NORM)
            xhat = centre(h, mean, None, NORM, True) * rstd[:, None]
            h = xhat
            if norm_weight_ptr is not None:
                h *= norm_weight
            if norm_bias_ptr is not None:
                h += norm_bias
        part = Drop(seed, row, col0, cols, threshold)
        if dropped_ptr is None:
            g = output_gradient(g, h, None, part, scalars, FORM)
        if WANTED.norm_bias:
            dnorm_bias += g
        if NORM is not None:
            if WANTED.norm_weight:
                dnorm_weight += g * xhat
            if norm_weight_ptr is not None:
                g = g * norm_weight
            if sums_ptr is not None:
                mean_g = tl.load(sums_ptr + row, mask=row_mask, other=0.0)
                mean_gx = tl.load(sums_ptr + rows + row, mask=row_mask, other=0.0)
            else:
                mean_g, mean_gx = row_gradient_means(g, xhat, cols, NORM)
            g = row_gradient(g, xhat, rstd, mean_g, mean_gx, NORM)
        out_offset = row_offset(row, cols, ALIGN) + column[None, :]
        if total_ptr is not None:
            g += tl.load(total_ptr + out_offset, mask=mask, other=0.0).to(tl.float32)
        if dropped_ptr is None:
            if WANTED.bias:
                dbias += g
            tl.store(dz_ptr + out_offset, g, mask=mask)
        else:
            tl.store(dz_ptr + out_offset, g, mask=mask)
            g = drop(g, part, FORM)
            if WANTED.bias:
                dbias += g
            tl.store(dropped_ptr + out_offset, g, mask=mask)

    if partial_ptr is not None:
        plane = tl.cast(row_programs, tl.int64) * cols
        partial_ptr += tl.multiple_of(tl.cast(row_program, tl.int64) * cols, ALIGN)
        if WANTED.norm_weight:
            tl.store(partial_ptr + column, tl.sum(dnorm_weight, 0), mask=column_mask)
            partial_ptr += tl.multiple_of(plane, ALIGN)
        if WANTED.norm_bias:
            tl.store(partial_ptr + column, tl.sum(dnorm_bias, 0), mask=column_mask)
            partial_ptr += tl.multiple_of(plane, ALIGN)
        if WANTED.bias:
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
    *,
    total: Tensor | None = None,
    dropped: Tensor | None = None,
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
        total, dropped: of add & norm (add_norm.py), where z is the sum and dz its gradient; both
            contiguous: what is added to dz, and where its dropped part goes, of which WANT_BIAS
            then means the sum.

    Returns:
        dz (rows, cols) in z's dtype; dnorm_weight and dnorm_bias, (cols,) in the dtypes of their
        parameters, and dbias, (cols,) in z's dtype. Those that are not wanted, or whose parameter
        does not exist, are float32 and empty, (0,).

    Raises:
        ValueError: a gated activation, and an odd number of columns.
    """
    name, activation_name = NORM_NAMES[norm], ACTIVATION_NAMES[activation]
    gated = is_gated(activation)
    if gated:
        half_of(z.shape[1], "row_backward", str(activation_name))
        activation_name = GATED_ACTIVATIONS[str(activation_name)].gate
    rows, cols = dy.shape
    if name is None:
        norm_weight = norm_bias = None
    dz = z.new_empty(z.shape)
    # A sum takes the dtype of its owner; the order is that of the kernel's planes.
    owners = (
        norm_weight if wanted & WANT_NORM_WEIGHT else None,
        norm_bias if wanted & WANT_NORM_BIAS else None,
        z if wanted & WANT_BIAS else None,
    )
    gradients = [
        z.new_empty((0,), dtype=torch.float32)
        if owner is None
        else (owner.new_empty if rows and cols else owner.new_zeros)(z.shape[1])
        for owner in owners
    ]
    dnorm_weight, dnorm_bias, dbias = gradients
    if rows == 0 or cols == 0:
        return dz, dnorm_weight, dnorm_bias, dbias
    made = [g for g in gradients if g.numel()]
    itemsize, device = z.element_size(), tuning.device(z)
    align = tuning.alignment(cols, itemsize, dy.stride(0), z.stride(0))
    wide = is_wide(align, dy, z, total)
    options: dict[str, int] = {}
    if gated:
        kernel, tile, stages, options = backward_kernel(
            cols, name, len(made), itemsize, device, wide
        )
    else:
        kernel = _row_bwd_kernel
        tile = tuning.backward_tile(cols, name, len(made), itemsize, device, wide)
        stages = tuning.backward_stages(tile)
    col_blocks = triton.cdiv(cols, tile.block_n)
    parameters = (bias, norm_weight, norm_bias)
    inputs = (dy, z, parameters, statistics if name else None)
    seed = seed if threshold else None
    scalars = (rows, cols, dy.stride(0), z.stride(0), (eps, alpha, beta), threshold)
    form = form_of(z, device, name, activation_name, threshold, align)
    if dropped is not None:
        sums_form, sums_seed = form._replace(DROPOUT=None), None
    else:
        sums_form, sums_seed = form, seed
    with tuning.device_of(z):
        sums = None
        if name and col_blocks > 1:
            means: tuple[Any, tuning.Tile, dict[str, int]]
            means = (_row_sums_kernel, tuning.row_sums_tile(device), {})
            means = sums_kernel(device) if gated else means
            sums = row_sums(inputs, sums_seed, scalars, sums_form, *means)
        programs = tuning.programs(triton.cdiv(rows, tile.block_m), col_blocks, tile, device)
        partial = None
        if made:
            partial = z.new_empty((len(made), programs, z.shape[1]), dtype=torch.float32)
        kernel[(programs * col_blocks,)](
            *inputs,
            sums,
            seed,
            dz,
            partial,
            *scalars,
            *(() if gated else ((total, dropped),)),
            FORM=form,
            WANTED=Wanted(*(owner is not None for owner in owners)),
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            STAGES=stages,
            num_warps=tile.num_warps,
            **options,
        )
        if partial is not None:
            sum_columns(partial, made)
    return dz, dnorm_weight, dnorm_bias, dbias
