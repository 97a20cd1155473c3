"""Backward of the row epilogue with a gated activation: mask and activation again, column sums.

As backward.py, with two tiles a program, of the value and of the gate (gate.py): persistent
programs walk over the rows, and keep the column sums of both halves in float32 registers. A norm's
rows that are wider than the tiles take gated_sums.py first, and then any part of a row by itself.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..parts.norm import load_statistics, row_gradient
from ..parts.tile import load_columns, row_offset, times_columns
from ..tuning import gated as gated_tuning
from ..tuning import rules as tuning
from .gate import halves_gradient, halves_gradient_means, load_halves
from .gated_sums import _gated_sums_kernel
from .sums import BACKWARD_INTEGERS


@triton.jit
def _store_sums(partial_ptr, of_a, of_b, column, gate_column, column_mask):
    """The sums of a program over its rows, of both halves."""
    tl.store(partial_ptr + column, tl.sum(of_a, 0), mask=column_mask)
    tl.store(partial_ptr + gate_column, tl.sum(of_b, 0), mask=column_mask)


@triton.jit(do_not_specialize=BACKWARD_INTEGERS)
def _gated_bwd_kernel(
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
    FORM: tl.constexpr,
    WANTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dz, and this program's column sums: partial_ptr is [sums wanted, row programs, 2 cols].

    A program keeps to one block of columns, in both halves. The planes are norm_weight, norm_bias,
    bias. With STAGES = 2 the next rows are on their way while these are computed, and the bias
    stays in registers; with 1 there is no room for either, and the parameters come from L1.
    """
    NORM: tl.constexpr = FORM.NORM
    bias_ptr, norm_weight_ptr, norm_bias_ptr = parameters
    ALIGN: tl.constexpr = FORM.ALIGN
    # Parts of rows only where no sum along the row is taken here.
    col_blocks = tl.cdiv(cols, BLOCK_N) if NORM is None or sums_ptr is not None else 1
    pid = tl.program_id(0)
    row_programs = tl.num_programs(0) // col_blocks
    row_program = pid // col_blocks
    col0 = (pid % col_blocks) * BLOCK_N
    end = (cols // ALIGN) * ALIGN  # cols, known to be a multiple of ALIGN
    column = col0 + tl.arange(0, BLOCK_N)
    gate_column = end + column
    column_mask = column < end
    if STAGES > 1 and bias_ptr is not None:
        bias_a = load_columns(bias_ptr, column, column_mask)
        bias_b = load_columns(bias_ptr, gate_column, column_mask)
    if WANTED.norm_weight:
        dnorm_weight_a = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        dnorm_weight_b = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if WANTED.norm_bias:
        dnorm_bias_a = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        dnorm_bias_b = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if WANTED.bias:
        dbias_a = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        dbias_b = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    for tile in tl.range(row_program, tl.cdiv(rows, BLOCK_M), row_programs, num_stages=STAGES):
        row = tl.cast(tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        row_mask = row < rows
        mask = row_mask[:, None] & column_mask[None, :]
        mean = tl.zeros((BLOCK_M,), tl.float32)
        rstd = mean
        if NORM is not None:
            mean, rstd = load_statistics(statistics_ptr, row, rows, NORM)
        z_offset = row_offset(row, stride_zm, ALIGN)
        if STAGES > 1:
            a, b = load_halves(z_ptr, None, z_offset, column, gate_column, column_mask, mask)
            if bias_ptr is not None:
                a, b = a + bias_a, b + bias_b
        else:
            a, b = load_halves(z_ptr, bias_ptr, z_offset, column, gate_column, column_mask, mask)
        da, db, xhat_a, xhat_b = halves_gradient(
            *(dy_ptr, a, b, norm_weight_ptr, norm_bias_ptr, seed_ptr, mean, rstd, row, col0),
            *(column, gate_column, column_mask, mask, cols, stride_dym, scalars, threshold, FORM),
        )
        if WANTED.norm_bias:
            dnorm_bias_a += da
            dnorm_bias_b += db
        if NORM is not None:
            if WANTED.norm_weight:
                dnorm_weight_a += da * xhat_a
                dnorm_weight_b += db * xhat_b
            da = times_columns(da, norm_weight_ptr, column, column_mask)
            db = times_columns(db, norm_weight_ptr, gate_column, column_mask)
            if sums_ptr is not None:
                mean_g = tl.load(sums_ptr + row, mask=row_mask, other=0.0)
                mean_gx = tl.load(sums_ptr + rows + row, mask=row_mask, other=0.0)
            else:
                mean_g, mean_gx = halves_gradient_means(da, db, xhat_a, xhat_b, cols, NORM)
            da = row_gradient(da, xhat_a, rstd, mean_g, mean_gx, NORM)
            db = row_gradient(db, xhat_b, rstd, mean_g, mean_gx, NORM)
        if WANTED.bias:
            dbias_a += da
            dbias_b += db
        dz_offset = row_offset(row, 2 * end, ALIGN)
        tl.store(dz_ptr + dz_offset + column[None, :], da, mask=mask)
        tl.store(dz_ptr + dz_offset + gate_column[None, :], db, mask=mask)

    if partial_ptr is not None:
        plane = tl.cast(row_programs, tl.int64) * 2 * cols
        partial_ptr += tl.multiple_of(tl.cast(row_program, tl.int64) * 2 * cols, ALIGN)
        if WANTED.norm_weight:
            of_a, of_b = dnorm_weight_a, dnorm_weight_b
            _store_sums(partial_ptr, of_a, of_b, column, gate_column, column_mask)
            partial_ptr += tl.multiple_of(plane, ALIGN)
        if WANTED.norm_bias:
            of_a, of_b = dnorm_bias_a, dnorm_bias_b
            _store_sums(partial_ptr, of_a, of_b, column, gate_column, column_mask)
            partial_ptr += tl.multiple_of(plane, ALIGN)
        if WANTED.bias:
            _store_sums(partial_ptr, dbias_a, dbias_b, column, gate_column, column_mask)


def backward_kernel(
    cols: int, norm: str | None, sums: int, itemsize: int, device: tuning.Device, wide: bool
) -> tuple[Any, tuning.Tile, int, dict[str, int]]:
    """The kernel for results of this width, its tile and stages, what else the compiler is told."""
    tile = gated_tuning.backward_tile(cols, norm, sums, itemsize, device, wide)
    options = gated_tuning.backward_options(tile, norm, sums, device, wide)
    return _gated_bwd_kernel, tile, gated_tuning.backward_stages(norm), options


def sums_kernel(device: tuning.Device) -> tuple[Any, tuning.Tile, dict[str, int]]:
    """The kernel for the two means along a row, its tile, and what else the compiler is told."""
    return _gated_sums_kernel, gated_tuning.sums_tile(device), gated_tuning.sums_options(device)
