"""The two means along a row that the gradient of a norm needs, for rows wider than a tile.

    mean(g) and mean(g xhat),   g = dh norm_weight,   dh the gradient of the norm's result

With these, gradient.py can treat any part of a row by itself. A shortcut's gradient is dh: it is
written here, and gradient.py then reads it in place of dy, and needs neither the shortcut nor what
comes after it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..parts.norm import affine, centre, load_statistics, row_gradient_means
from ..parts.output import Drop, Form, output_gradient
from ..parts.tile import (
    Place,
    add_place,
    load_place,
    load_rows,
    row_offset,
    store_place,
    times_columns,
)
from ..tuning import rules as tuning

# Runtime integers whose value must not compile a new kernel: alignment is passed as ALIGN instead.
BACKWARD_INTEGERS = ("rows", "cols", "stride_dym", "stride_zm", "threshold")


@triton.jit(do_not_specialize=BACKWARD_INTEGERS)
def _row_sums_kernel(
    incoming,
    z_ptr,
    parameters,
    statistics_ptr,
    sums_ptr,
    seed_ptr,
    rows,
    cols,
    stride_dym,
    stride_zm,
    scalars,
    threshold,
    FORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One row a program, block by block: sums_ptr is [2, rows], mean(g) and mean(g xhat).

    incoming: dy; the shortcut, and where its gradient goes, with contiguous rows; or None.
    """
    dy_ptr, shortcut_ptr, dshortcut_ptr = incoming
    NORM: tl.constexpr = FORM.NORM
    ALIGN: tl.constexpr = FORM.ALIGN
    bias_ptr, norm_weight_ptr, norm_bias_ptr = parameters
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, BLOCK_M)
    end = (cols // ALIGN) * ALIGN
    mean_g = tl.zeros((BLOCK_M,), tl.float32)
    mean_gx = tl.zeros((BLOCK_M,), tl.float32)
    mean, rstd = load_statistics(statistics_ptr, row, rows, NORM)
    seed = tl.load(seed_ptr) if seed_ptr is not None else None
    for col0 in tl.range(0, cols, BLOCK_N):
        column = col0 + tl.arange(0, BLOCK_N)
        column_mask = column < end
        mask = column_mask[None, :]
        offset = row_offset(row, stride_dym, ALIGN)
        g = load_place(Place(dy_ptr, offset, column[None, :], mask))
        offset = row_offset(row, stride_zm, ALIGN)
        x = load_rows(Place(z_ptr, offset, column[None, :], mask), bias_ptr, column, column_mask)
        x = centre(x, mean, None, NORM, True)
        h, xhat = affine(x, rstd, norm_weight_ptr, norm_bias_ptr, column, column_mask)
        offset = row_offset(row, cols, ALIGN)
        h = add_place(h, Place(shortcut_ptr, offset, column[None, :], mask))
        g = output_gradient(g, h, None, Drop(seed, row, col0, cols, threshold), scalars, FORM)
        if dshortcut_ptr is not None:
            store_place(Place(dshortcut_ptr, offset, column[None, :], mask), g)
        g = times_columns(g, norm_weight_ptr, column, column_mask)
        block_g, block_gx = row_gradient_means(g, xhat, cols, NORM)
        mean_g += block_g
        mean_gx += block_gx
    tl.store(sums_ptr + row, mean_g)
    tl.store(sums_ptr + rows + row, mean_gx)


def row_sums(
    inputs: tuple[Any, ...],
    seed: Tensor | None,
    scalars: tuple[Any, ...],
    form: Form,
    kernel: Any,
    tile: tuning.Tile,
    options: dict[str, int],
) -> Tensor:
    """float32 (2, rows), by `_row_sums_kernel` or that of gated_sums.py.

    Inputs and scalars are groups of the kernel's arguments, in its order.
    """
    z: Tensor = inputs[1]
    sums = z.new_empty((2, z.shape[0]), dtype=torch.float32)
    kernel[(z.shape[0],)](
        *inputs,
        sums,
        seed,
        *scalars,
        FORM=form,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        num_warps=tile.num_warps,
        **options,
    )
    return sums
