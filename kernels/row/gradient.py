"""The kernel of the row epilogue's backward; backward.py launches it, and says how it works."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ..parts.norm import centre, load_statistics, row_gradient, row_gradient_means
from ..parts.output import Drop, drop, output_gradient
from ..parts.tile import (
    Place,
    add_place,
    load_columns,
    load_place,
    row_offset,
    store_place,
)
from .sums import BACKWARD_INTEGERS


class Wanted(NamedTuple):
    """Which sums over the rows a kernel makes."""

    norm_weight: bool
    norm_bias: bool
    bias: bool


@triton.jit(do_not_specialize=BACKWARD_INTEGERS)
def _row_bwd_kernel(
    incoming,
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
    incoming: dy; the shortcut, and where its gradient g goes, with contiguous rows; or None.
    total: of add & norm, whose sum is z here (add_norm.py): a gradient of it from elsewhere, and
    where the gradient of what was dropped goes, with contiguous rows; None where there is none.
    """
    dy_ptr, shortcut_ptr, dshortcut_ptr = incoming
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
        offset = row_offset(row, cols, ALIGN)
        h = add_place(h, Place(shortcut_ptr, offset, column[None, :], mask))
        part = Drop(seed, row, col0, cols, threshold)
        if dropped_ptr is None:
            g = output_gradient(g, h, None, part, scalars, FORM)
        if dshortcut_ptr is not None:
            store_place(Place(dshortcut_ptr, offset, column[None, :], mask), g)
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
