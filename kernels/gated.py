"""Forward of the row epilogue with a gated activation: one pass over memory.

    h = norm(z + bias)                                        over (rows, 2 cols)
    y = residual + dropout(h[:, :cols] · act(h[:, cols:]))    over (rows, cols)

As row.py, with two tiles a program, of the value and of the gate (gate.py): `_gated_fwd_kernel`
holds whole rows, or without a norm any part of them; `_gated_fwd_loop_kernel` walks wider rows
twice and finds the second reading in L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..spec import ACTIVATION_NAMES, GATED_ACTIVATIONS, NORM_NAMES, STATISTICS
from . import gated_tuning, tuning
from .gate import affine_half, halves_statistics, load_halves, write_gated
from .norm import centre, store_statistics, walk_statistics
from .tile import load_first, row_offset

# Runtime integers whose value must not compile a new kernel: alignment is passed as ALIGN instead.
FORWARD_INTEGERS = ("rows", "cols", "stride_zm", "stride_rm", "stride_ym", "threshold")


@triton.jit(do_not_specialize=FORWARD_INTEGERS)
def _gated_fwd_kernel(
    z_ptr,
    bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    residual_ptr,
    y_ptr,
    statistics_ptr,
    seed_ptr,
    rows,
    cols,
    stride_zm,
    stride_rm,
    stride_ym,
    eps,
    threshold,
    NORM: tl.constexpr,
    GATE: tl.constexpr,
    ALIGN: tl.constexpr,
    EVEN_N: tl.constexpr,
    PTX: tl.constexpr,
    PER_THREAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of y a program: whole rows under a norm, any part of them without."""
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
        eps = tl.cast(eps, tl.float32)
        a, b, mean, rstd = halves_statistics(a, b, first, column_mask, cols, eps, NORM, EVEN_N)
        store_statistics(statistics_ptr, row, rows, mean, rstd, NORM)
        a, b = a * rstd[:, None], b * rstd[:, None]
        a = affine_half(a, norm_weight_ptr, norm_bias_ptr, column, column_mask)
        b = affine_half(b, norm_weight_ptr, norm_bias_ptr, gate_column, column_mask)
    write_gated(
        *(a, b, residual_ptr, y_ptr, seed_ptr, row, col0, column, mask, cols, stride_rm, stride_ym),
        *(threshold, GATE, ALIGN, PTX, PER_THREAD, BLOCK_M, BLOCK_N),
    )


@triton.jit(do_not_specialize=FORWARD_INTEGERS)
def _gated_fwd_loop_kernel(
    z_ptr,
    bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    residual_ptr,
    y_ptr,
    statistics_ptr,
    seed_ptr,
    rows,
    cols,
    stride_zm,
    stride_rm,
    stride_ym,
    eps,
    threshold,
    NORM: tl.constexpr,
    GATE: tl.constexpr,
    ALIGN: tl.constexpr,
    EVEN_N: tl.constexpr,
    PTX: tl.constexpr,
    PER_THREAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One row a program, wider than its tiles: statistics block by block, then the row again."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, BLOCK_M)
    # The statistics do not know of the halves.
    first, mean, m2 = walk_statistics(
        *(z_ptr, bias_ptr, row, rows, 2 * cols, stride_zm, NORM, ALIGN, BLOCK_M, 2 * BLOCK_N)
    )
    rstd = tl.rsqrt(m2 / (2 * cols) + tl.cast(eps, tl.float32))
    store_statistics(statistics_ptr, row, rows, first + mean, rstd, NORM)
    z_offset = row_offset(row, stride_zm, ALIGN)
    end = (cols // ALIGN) * ALIGN
    for col0 in tl.range(0, cols, BLOCK_N):
        column = col0 + tl.arange(0, BLOCK_N)
        gate_column = end + column
        column_mask = column < end
        mask = column_mask[None, :]
        a, b = load_halves(z_ptr, bias_ptr, z_offset, column, gate_column, column_mask, mask)
        a = centre(centre(a, first, None, NORM, True), mean, None, NORM, True) * rstd[:, None]
        b = centre(centre(b, first, None, NORM, True), mean, None, NORM, True) * rstd[:, None]
        a = affine_half(a, norm_weight_ptr, norm_bias_ptr, column, column_mask)
        b = affine_half(b, norm_weight_ptr, norm_bias_ptr, gate_column, column_mask)
        write_gated(
            *(a, b, residual_ptr, y_ptr, seed_ptr, row, col0, column, mask, cols),
            *(stride_rm, stride_ym, threshold, GATE, ALIGN, PTX, PER_THREAD, BLOCK_M, BLOCK_N),
        )


def half_of(cols: int, operation: str, activation: str) -> int:
    """Columns of the result, which are those of the value and of the gate.

    Raises:
        ValueError: z cannot be halved.
    """
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


def gated_forward(
    z: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    norm: int,
    eps: float,
    activation: int,
    threshold: int,
) -> tuple[Tensor, Tensor]:
    """`row.row_forward` with a gated activation.

    Args:
        z: (rows, 2 cols), and bias, norm_weight, norm_bias: (2 cols,).
        residual: (rows, cols).

    Returns:
        y (rows, cols); the statistics of all columns of z + bias.

    Raises:
        ValueError: an odd number of columns.
    """
    activation_name = str(ACTIVATION_NAMES[activation])
    rows, cols = z.shape[0], half_of(z.shape[1], "row_forward", activation_name)
    name = NORM_NAMES[norm]
    y = z.new_empty((rows, cols))
    statistics = z.new_empty((STATISTICS[name], rows), dtype=torch.float32)
    if rows == 0 or cols == 0:
        return y, statistics
    device = tuning.device(z)
    stride_rm = cols if residual is None else residual.stride(0)
    strides = (z.stride(0), stride_rm, y.stride(0))
    # Of cols and not of 2 cols: the gate begins there.
    align = tuning.alignment(cols, z.element_size(), *strides)
    wide = is_wide(align, z, residual, y)
    tile = gated_tuning.forward_tile(cols, name, device, wide)
    kernel = _gated_fwd_kernel
    if name and tile.block_n < cols:
        kernel, tile = _gated_fwd_loop_kernel, gated_tuning.forward_loop_tile(device)
    blocks = triton.cdiv(rows, tile.block_m) * (1 if name else triton.cdiv(cols, tile.block_n))
    if name is None:
        norm_weight = norm_bias = None
    with tuning.device_of(z):
        kernel[(blocks,)](
            z,
            bias,
            norm_weight,
            norm_bias,
            residual,
            y,
            statistics if name else None,
            seed if threshold else None,
            rows,
            cols,
            *strides,
            eps,
            threshold,
            NORM=name,
            GATE=GATED_ACTIVATIONS[activation_name].gate,
            ALIGN=align,
            EVEN_N=cols == tile.block_n,
            PTX=device.arch > 0,
            PER_THREAD=min(8, 16 // z.element_size()),
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            num_warps=tile.num_warps,
            **gated_tuning.forward_options(name, device, wide),
        )
    return y, statistics
