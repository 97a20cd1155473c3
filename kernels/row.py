"""Forward of the row epilogue: one pass over memory, statistics along a row.

    y = residual + dropout(activation(norm(z + bias)))        over (rows, cols)

`_row_fwd_kernel` holds whole rows in one tile (several short rows at a time); without a norm a tile
is any part of a row. `_row_fwd_loop_kernel` walks wider rows twice and finds the second reading in
L2. Everything is float32 between one load and one rounding at the store.

y may be z itself. No program reads what another writes. A tile is read before it is written, and
so is each block of columns in the looped kernel's second walk; the first walk, and the first
element of a row, are behind sums along the row that all threads of the row take part in.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..spec import ACTIVATION_NAMES, NORM_NAMES, STATISTICS, is_gated
from . import tuning
from .activation import activate
from .dropout import dropout_multiplier
from .gated import gated_forward
from .norm import affine, centre, store_statistics, walk_statistics
from .row_epilogue import write_rows
from .tile import load_columns, load_tile, row_offset

# Runtime integers whose value must not compile a new kernel: alignment is passed as ALIGN instead.
FORWARD_INTEGERS = ("rows", "cols", "stride_zm", "stride_rm", "stride_ym", "threshold")


@triton.jit(do_not_specialize=FORWARD_INTEGERS)
def _row_fwd_kernel(
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
    alpha,
    beta,
    threshold,
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALIGN: tl.constexpr,
    EVEN_N: tl.constexpr,
    PTX: tl.constexpr,
    PER_THREAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile a program: whole rows under a norm, any part of them without."""
    # One grid axis, because the others stop at 65535.
    col_blocks = tl.cdiv(cols, BLOCK_N) if NORM is None else 1
    pid = tl.program_id(0)
    row = (pid // col_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col0 = (pid % col_blocks) * BLOCK_N
    write_rows(
        *(z_ptr, bias_ptr, norm_weight_ptr, norm_bias_ptr, residual_ptr, y_ptr, statistics_ptr),
        *(seed_ptr, row, col0, rows, cols, stride_zm, stride_rm, stride_ym),
        *(eps, alpha, beta, threshold, NORM, ACTIVATION, ALIGN, EVEN_N, PTX, PER_THREAD),
        *(BLOCK_M, BLOCK_N),
    )


@triton.jit(do_not_specialize=FORWARD_INTEGERS)
def _row_fwd_loop_kernel(
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
    alpha,
    beta,
    threshold,
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALIGN: tl.constexpr,
    EVEN_N: tl.constexpr,
    PTX: tl.constexpr,
    PER_THREAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One row a program, wider than a tile: statistics block by block, then the row again."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, BLOCK_M)
    first, mean, m2 = walk_statistics(
        *(z_ptr, bias_ptr, row, rows, cols, stride_zm, NORM, ALIGN, BLOCK_M, BLOCK_N)
    )
    rstd = tl.rsqrt(m2 / cols + tl.cast(eps, tl.float32))
    store_statistics(statistics_ptr, row, rows, first + mean, rstd, NORM)
    z_offset = row_offset(row, stride_zm, ALIGN)
    end = (cols // ALIGN) * ALIGN
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)

    for col0 in tl.range(0, cols, BLOCK_N):
        column = col0 + tl.arange(0, BLOCK_N)
        column_mask = column < end
        mask = column_mask[None, :]
        bias = load_columns(bias_ptr, column, column_mask) if bias_ptr is not None else None
        norm_weight = (
            load_columns(norm_weight_ptr, column, column_mask)
            if norm_weight_ptr is not None
            else None
        )
        norm_bias = (
            load_columns(norm_bias_ptr, column, column_mask) if norm_bias_ptr is not None else None
        )
        h = load_tile(z_ptr, z_offset + column[None, :], mask, bias)
        h = centre(h, first, column_mask, NORM, True)
        h = centre(h, mean, column_mask, NORM, True) * rstd[:, None]
        h = affine(h, norm_weight, norm_bias)
        y = activate(h, tl.cast(alpha, tl.float32), tl.cast(beta, tl.float32), ACTIVATION, PTX)
        if seed_ptr is not None:
            y *= dropout_multiplier(seed, row, col0, cols, threshold, PER_THREAD, BLOCK_M, BLOCK_N)
        if residual_ptr is not None:
            offset = row_offset(row, stride_rm, ALIGN) + column[None, :]
            y += tl.load(residual_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + row_offset(row, stride_ym, ALIGN) + column[None, :], y, mask=mask)


def row_forward(
    z: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    norm: int,
    eps: float,
    activation: int,
    alpha: float,
    beta: float,
    threshold: int,
    *,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y = residual + dropout(activation(norm(z + bias))).

    Args:
        z, residual: (rows, cols), last stride 1, any row stride and offset; one dtype.
        bias, norm_weight, norm_bias: (cols,), contiguous, any floating dtype, or None.
        seed: int64 (1,); may be None where threshold is 0.
        norm, eps, activation, alpha, beta, threshold: as `spec.Spec.row`.
        out: where y goes, laid out as z may be; it may be z itself. None: a new tensor.

    A gated activation takes z (rows, 2 cols) and (2 cols,) of each parameter (gated.py).

    Returns:
        y (rows, cols) in z's dtype; statistics of z + bias, float32: (2, rows) mean and rstd for
        layer norm, (1, rows) rstd for rms norm, (0, rows) without a norm.

    Raises:
        ValueError: a gated activation, and an odd number of columns or `out`.
    """
    if is_gated(activation):
        if out is not None:
            raise ValueError(
                f"row_forward_: {ACTIVATION_NAMES[activation]} halves the columns, so its result"
                " cannot be written over z; take row_forward"
            )
        inputs = (z, bias, norm_weight, norm_bias, residual, seed)
        return gated_forward(*inputs, norm, eps, activation, threshold)
    rows, cols = z.shape
    name = NORM_NAMES[norm]
    y = z.new_empty((rows, cols)) if out is None else out
    statistics = z.new_empty((STATISTICS[name], rows), dtype=torch.float32)
    if rows == 0 or cols == 0:
        return y, statistics
    device = tuning.device(z)
    tile = tuning.forward_tile(cols, name, device)
    kernel = _row_fwd_kernel
    if name and tile.block_n < cols:
        kernel, tile = _row_fwd_loop_kernel, tuning.forward_loop_tile(device)
    blocks = triton.cdiv(rows, tile.block_m) * (1 if name else triton.cdiv(cols, tile.block_n))
    if name is None:
        norm_weight = norm_bias = None
    stride_rm = cols if residual is None else residual.stride(0)
    strides = (z.stride(0), stride_rm, y.stride(0))
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
            alpha,
            beta,
            threshold,
            NORM=name,
            ACTIVATION=ACTIVATION_NAMES[activation],
            ALIGN=tuning.alignment(cols, z.element_size(), *strides),
            EVEN_N=cols == tile.block_n,
            PTX=device.arch > 0,
            PER_THREAD=min(8, 16 // z.element_size()),
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            num_warps=tile.num_warps,
        )
    return y, statistics
