"""Backward of the row epilogue: mask and activation again, norm gradient, column sums.

One pass over memory up to `BACKWARD_TILE_COLS` columns. Persistent programs walk over the rows and
keep the column sums (gradients of norm_weight, norm_bias and bias) in float32 registers; a second
stage adds up the programs' sums in a fixed order, so there are no atomics and the bits repeat.
Without a norm, tiles are parts of rows, and the same kernel serves any width.

A wider norm takes two kernels: that of sums.py finds the two means of a row that the gradient
needs, after which any part of a row can be treated by itself, as without a norm. The first of them
then writes the gradient of a shortcut, and the second reads it as dy, with nothing behind the norm.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
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
from ..parts.output import form_of
from ..tuning import rules as tuning
from .gated import half_of, is_wide
from .gated_backward import backward_kernel, sums_kernel
from .gradient import Wanted, _row_bwd_kernel
from .sums import _row_sums_kernel, row_sums


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
    shortcut: Tensor | None = None,
    *,
    total: Tensor | None = None,
    dropped: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `row_forward`, given the gradient dy of its result.

    Args:
        dy, z: (rows, cols), last stride 1, any row stride and offset; one dtype.
        bias, norm_weight, norm_bias: as in the forward.
        statistics: as the forward returned them; eps went into them and is not used again.
        wanted: sum of the WANT_ constants: the sums over the rows to make. WANT_BIAS makes sense
            without a bias too: z then contains it.
        seed, norm, activation, alpha, beta, threshold, shortcut: as in the forward. With a gated
            activation dy is (rows, cols), what else has columns has 2 cols (gated_backward.py).
        total, dropped: of add & norm (add_norm.py), where z is the sum and dz its gradient; both
            contiguous: what is added to dz, and where its dropped part goes, of which WANT_BIAS
            then means the sum.

    Returns:
        dz (rows, cols) in z's dtype; dnorm_weight and dnorm_bias, (cols,) in the dtypes of their
        parameters, and dbias, (cols,) in z's dtype. Those that are not wanted, or whose parameter
        does not exist, are float32 and empty, (0,). dshortcut as dz, (0,) without a shortcut, and
        without a norm: it is dz.

    Raises:
        ValueError: a gated activation, and an odd number of columns or a shortcut.
    """
    name, activation_name = NORM_NAMES[norm], ACTIVATION_NAMES[activation]
    gated = is_gated(activation)
    if gated:
        half_of(z.shape[1], shortcut, "row_backward", str(activation_name))
        activation_name = GATED_ACTIVATIONS[str(activation_name)].gate
    rows, cols = dy.shape
    if name is None:
        norm_weight = norm_bias = None
    dz = z.new_empty(z.shape)
    dshortcut = z.new_empty((0,) if shortcut is None or name is None else z.shape)
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
        return dz, dnorm_weight, dnorm_bias, dbias, dshortcut
    made = [g for g in gradients if g.numel()]
    itemsize, device = z.element_size(), tuning.device(z)
    align = tuning.alignment(cols, itemsize, dy.stride(0), z.stride(0))
    wide = is_wide(align, dy, z, total, shortcut)
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
    incoming = (dy, shortcut, dshortcut if dshortcut.numel() else None)
    rest = (z, parameters, statistics if name else None)
    inputs: tuple[Any, ...] = (dy if gated else incoming, *rest)
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
            if shortcut is not None:
                inputs = ((dshortcut, None, None), *rest)
                scalars = (rows, cols, cols, *scalars[3:])
                form, seed = form._replace(ACTIVATION=None, DROPOUT=None), None
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
    return dz, dnorm_weight, dnorm_bias, dbias, dshortcut
