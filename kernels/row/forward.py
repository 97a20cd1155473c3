"""Forward of the row epilogue: one pass over memory, statistics along a row.

    y = residual + dropout(activation(norm(z + bias) + shortcut))        over (rows, cols)

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

from ...spec import ACTIVATION_NAMES, GATED_ACTIVATIONS, NORM_NAMES, STATISTICS, is_gated
from ..parts.norm import affine, centre, store_statistics, walk_statistics
from ..parts.output import Drop, form_of, write_output
from ..parts.tile import Place, add_place, load_rows, row_offset
from ..tuning import rules as tuning
from .epilogue import write_rows
from .gated import FORWARD_INTEGERS, forward_kernel, half_of, is_wide


@triton.jit(do_not_specialize=FORWARD_INTEGERS)
def _row_fwd_kernel(
    z_ptr,
    parameters,
    residual_ptr,
    y_ptr,
    statistics_ptr,
    total_ptr,
    seed_ptr,
    rows,
    cols,
    stride_zm,
    stride_rm,
    stride_ym,
    scalars,
    threshold,
    shortcut_ptr,
    FORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile a program: whole rows under a norm, any part of them without."""
    # One grid axis, because the others stop at 65535.
    col_blocks = tl.cdiv(cols, BLOCK_N) if FORM.NORM is None else 1
    pid = tl.program_id(0)
    row = (pid // col_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    write_rows(
        *(z_ptr, parameters, residual_ptr, y_ptr, statistics_ptr, seed_ptr),
        *(row, (pid % col_blocks) * BLOCK_N, rows, cols, stride_zm, stride_rm, stride_ym),
        *(scalars, threshold, FORM, BLOCK_N, total_ptr, shortcut_ptr),
    )


@triton.jit(do_not_specialize=FORWARD_INTEGERS)
def _row_fwd_loop_kernel(
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
    shortcut_ptr,
    FORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One row a program, wider than a tile: statistics block by block, then the row again."""
    NORM: tl.constexpr = FORM.NORM
    ALIGN: tl.constexpr = FORM.ALIGN
    bias_ptr, norm_weight_ptr, norm_bias_ptr = parameters
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, BLOCK_M)
    first, mean, m2 = walk_statistics(
        z_ptr, bias_ptr, row, rows, cols, stride_zm, FORM, BLOCK_M, BLOCK_N
    )
    rstd = tl.rsqrt(m2 / cols + tl.cast(scalars[0], tl.float32))
    store_statistics(statistics_ptr, row, rows, first + mean, rstd, NORM)
    z_offset = row_offset(row, stride_zm, ALIGN)
    end = (cols // ALIGN) * ALIGN
    seed = tl.load(seed_ptr) if seed_ptr is not None else None

    for col0 in tl.range(0, cols, BLOCK_N):
        column = col0 + tl.arange(0, BLOCK_N)
        column_mask = column < end
        mask = column_mask[None, :]
        place = Place(z_ptr, z_offset, column[None, :], mask)
        h = load_rows(place, bias_ptr, column, column_mask)
        h = centre(h, first, column_mask, NORM, True)
        h = centre(h, mean, column_mask, NORM, True)
        h, _ = affine(h, rstd, norm_weight_ptr, norm_bias_ptr, column, column_mask)
        offset = row_offset(row, cols, ALIGN)
        h = add_place(h, Place(shortcut_ptr, offset, column[None, :], mask))
        write_output(
            *(h, None, Drop(seed, row, col0, cols, threshold)),
            Place(residual_ptr, row_offset(row, stride_rm, ALIGN), column[None, :], mask),
            Place(y_ptr, row_offset(row, stride_ym, ALIGN), column[None, :], mask),
            *(scalars, FORM),
        )


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
    shortcut: Tensor | None = None,
    *,
    out: Tensor | None = None,
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y = residual + dropout(activation(norm(z + bias) + shortcut)).

    Args:
        z, residual: (rows, cols), last stride 1, any row stride and offset; one dtype.
        bias, norm_weight, norm_bias: (cols,), contiguous, any floating dtype, or None.
        seed: int64 (1,); may be None where threshold is 0.
        norm, eps, activation, alpha, beta, threshold: as `spec.Spec.row`.
        shortcut: of z's shape and dtype, contiguous, at any offset.
        out: where y goes, laid out as z may be; it may be z itself. None: a new tensor.
        total: where the sum goes of add & norm (add_norm.py), for rows that one tile holds.

    A gated activation takes z (rows, 2 cols) and (2 cols,) of each parameter (gated.py).

    Returns:
        y (rows, cols) in z's dtype; statistics of z + bias, float32: (2, rows) mean and rstd for
        layer norm, (1, rows) rstd for rms norm, (0, rows) without a norm.

    Raises:
        ValueError: a gated activation, and an odd number of columns, a shortcut or `out`.
    """
    name, activation_name = NORM_NAMES[norm], ACTIVATION_NAMES[activation]
    rows, cols = z.shape
    gated = is_gated(activation)
    if gated:
        if out is not None:
            raise ValueError(
                f"row_forward_: {activation_name} halves the columns, so its result cannot be"
                " written over z; take row_forward"
            )
        cols = half_of(cols, shortcut, "row_forward", str(activation_name))
        activation_name = GATED_ACTIVATIONS[str(activation_name)].gate
    y = z.new_empty((rows, cols)) if out is None else out
    statistics = z.new_empty((STATISTICS[name], rows), dtype=torch.float32)
    if rows == 0 or cols == 0:
        return y, statistics
    device = tuning.device(z)
    stride_rm = cols if residual is None else residual.stride(0)
    strides = (z.stride(0), stride_rm, y.stride(0))
    align = tuning.alignment(cols, z.element_size(), *strides)
    options: dict[str, int] = {}
    if gated:
        wide = is_wide(align, z, residual, y)
        kernel, tile, options = forward_kernel(cols, name, device, wide)
    else:
        crowded = shortcut is not None and not is_wide(align, z, residual, shortcut, y)
        kernel, tile = _row_fwd_kernel, tuning.forward_tile(cols, name, device, crowded)
        if name and tile.block_n < cols:
            kernel, tile = _row_fwd_loop_kernel, tuning.forward_loop_tile(device)
    blocks = triton.cdiv(rows, tile.block_m) * (1 if name else triton.cdiv(cols, tile.block_n))
    if name is None:
        norm_weight = norm_bias = None
    even = cols == tile.block_n
    form = form_of(z, device, name, activation_name, threshold, align, even)
    with tuning.device_of(z):
        kernel[(blocks,)](
            z,
            (bias, norm_weight, norm_bias),
            residual,
            y,
            statistics if name else None,
            *((total,) if kernel is _row_fwd_kernel else ()),
            seed if threshold else None,
            rows,
            cols,
            *strides,
            (eps, alpha, beta),
            threshold,
            *(() if gated else (shortcut,)),
            FORM=form,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            num_warps=tile.num_warps,
            **options,
        )
    return y, statistics
