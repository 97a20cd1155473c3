"""Forward of the row epilogue with a gated activation: one pass over memory.

    h = norm(z + bias)                                        over (rows, 2 cols)
    y = residual + dropout(h[:, :cols] · act(h[:, cols:]))    over (rows, cols)

As forward.py, with two tiles a program, of the value and of the gate (gate.py): `_gated_fwd_kernel`
holds whole rows, or without a norm any part of them; `_gated_fwd_loop_kernel` walks wider rows
twice and finds the second reading in L2.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..parts.norm import centre, store_statistics, walk_statistics
from ..parts.output import Drop, write_output
from ..parts.tile import Place, load_first, row_offset
from ..tuning import gated as gated_tuning
from ..tuning import rules as tuning
from .gate import affine_halves, halves_statistics, load_halves

# Runtime integers whose value must not compile a new kernel: alignment is passed as ALIGN instead.
FORWARD_INTEGERS = ("rows", "cols", "stride_zm", "stride_rm", "stride_ym", "threshold")


@triton.jit(do_not_specialize=FORWARD_INTEGERS)
def _gated_fwd_kernel(
    z_ptr,
    parameters,
    residual_ptr,
    y_ptr,
    statistics_ptr,
    seed_ptr,
    rows,
    cols,
    stride_zm,
    stride_rm,
    stride_ym,
    scalars,
    threshold,
    FORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of y a program: whole rows under a norm, any part of them without."""
    ALIGN: tl.constexpr = FORM.ALIGN
    NORM: tl.constexpr = FORM.NORM
    EVEN_N: tl.constexpr = FORM.EVEN_N
    bias_ptr, norm_weight_ptr, norm_bias_ptr = parameters
    # One grid axis, because the others stop at 65535.
    col_blocks = tl.cdiv(cols, BLOCK_N) if NORM is None else 1
    pid = tl.program_id(0)
    row = (pid // col_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col0 = (pid % col_blocks) * BLOCK_N
    end = (cols // ALIGN) * ALIGN  # cols, known to be a multiple of ALIGN
    column = col0 + tl.arange(0, BLOCK_N)
    gate_column = end + column
    row_mask = row < rows
    column_mask = column < end
    mask = row_mask[:, None] & column_mask[None, :]
    z_offset = row_offset(row, stride_zm, ALIGN)
    a, b = load_halves(z_ptr, bias_ptr, z_offset, column, gate_column, column_mask, mask)
    if NORM is not None:
        first = tl.zeros((BLOCK_M,), tl.float32)
        if NORM == "layer":
            first = load_first(z_ptr, row, stride_zm, row_mask, bias_ptr)
        eps = tl.cast(scalars[0], tl.float32)
        a, b, mean, rstd = halves_statistics(a, b, first, column_mask, cols, eps, NORM, EVEN_N)
        store_statistics(statistics_ptr, row, rows, mean, rstd, NORM)
        a, b = affine_halves(
            *(a * rstd[:, None], b * rstd[:, None], norm_weight_ptr, norm_bias_ptr),
            *(column, gate_column, column_mask),
        )
    write_output(
        *(a, b, Drop(seed_ptr, row, col0, cols, threshold)),
        Place(residual_ptr, row_offset(row, stride_rm, ALIGN), column[None, :], mask),
        Place(y_ptr, row_offset(row, stride_ym, ALIGN), column[None, :], mask),
        *(scalars, FORM),
    )


@triton.jit(do_not_specialize=FORWARD_INTEGERS)
def _gated_fwd_loop_kernel(
    z_ptr,
    parameters,
    residual_ptr,
    y_ptr,
    statistics_ptr,
    seed_ptr,
    rows,
    cols,
    stride_zm,
    stride_rm,
    stride_ym,
    scalars,
    threshold,
    FORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One row a program, wider than its tiles: statistics block by block, then the row again."""
    NORM: tl.constexpr = FORM.NORM
    ALIGN: tl.constexpr = FORM.ALIGN
    bias_ptr, norm_weight_ptr, norm_bias_ptr = parameters
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, BLOCK_M)
    # The statistics do not know of the halves.
    first, mean, m2 = walk_statistics(
        z_ptr, bias_ptr, row, rows, 2 * cols, stride_zm, FORM, BLOCK_M, 2 * BLOCK_N
    )
    rstd = tl.rsqrt(m2 / (2 * cols) + tl.cast(scalars[0], tl.float32))
    store_statistics(statistics_ptr, row, rows, first + mean, rstd, NORM)
    z_offset = row_offset(row, stride_zm, ALIGN)
    end = (cols // ALIGN) * ALIGN
    for col0 in tl.range(0, cols, BLOCK_N):
        column = col0 + tl.arange(0, BLOCK_N)
        gate_column = end + column
        column_mask = column < end
        mask = column_mask[None, :]
        a, b = load_halves(z_ptr, bias_ptr, z_offset, column, gate_column, column_mask, mask)
        a = centre(centre(a, first, None, NORM, True), mean, None, NORM, True)
        b = centre(centre(b, first, None, NORM, True), mean, None, NORM, True)
        a, b = affine_halves(
            *(a * rstd[:, None], b * rstd[:, None], norm_weight_ptr, norm_bias_ptr),
            *(column, gate_column, column_mask),
        )
        write_output(
            *(a, b, Drop(seed_ptr, row, col0, cols, threshold)),
            Place(residual_ptr, row_offset(row, stride_rm, ALIGN), column[None, :], mask),
            Place(y_ptr, row_offset(row, stride_ym, ALIGN), column[None, :], mask),
            *(scalars, FORM),
        )


def half_of(cols: int, shortcut: Tensor | None, operation: str, activation: str) -> int:
    """Columns of the result, which are those of the value and of the gate.

    Raises:
        ValueError: z cannot be halved, or there is a shortcut.
    """
    if shortcut is not None:
        raise ValueError(
            f"{operation}: {activation} takes no shortcut between norm and gate, got one of shape"
            f" {tuple(shortcut.shape)}; add it as the residual of the norm, and gate the sum"
        )
    if cols % 2:
        raise ValueError(
            f"{operation}: {activation} halves the columns of z, so there must be an even number of"
            f" them, got {cols}"
        )
    return cols // 2


def is_wide(align: int, *tensors: Tensor | None) -> bool:
    """Whether rows of this alignment, in elements, and addresses allow 16-byte accesses."""
    present = [t for t in tensors if t is not None]
    return align * present[0].element_size() == 16 and not any(t.data_ptr() % 16 for t in present)


def forward_kernel(
    cols: int, norm: str | None, device: tuning.Device, wide: bool
) -> tuple[Any, tuning.Tile, dict[str, int]]:
    """The kernel for results of this width, its tile, and what else the compiler is told."""
    tile = gated_tuning.forward_tile(cols, norm, device, wide)
    kernel = _gated_fwd_kernel
    if norm and tile.block_n < cols:
        kernel, tile = _gated_fwd_loop_kernel, gated_tuning.forward_loop_tile(device)
    return kernel, tile, gated_tuning.forward_options(norm, device, wide)
