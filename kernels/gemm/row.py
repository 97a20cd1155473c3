"""Linear with the row epilogue in one kernel: GEMM, norm along a row, activation, dropout.

    y = residual + dropout(activation(norm(x · weightᵀ + bias)))

Under a norm a tile holds whole rows; without one it is any part of rows, and where there are tensor
descriptors the kernel of tma.py serves. z takes the way over
memory, into its own tensor or, where no backward will read it, into y's: the program reads back
what it has just written, a few rows at a time, from L1 or L2. The accumulators do not have the
layout in which rows are summed up and written: rearranged in registers and shared memory, whole
tiles cost conversions of float32 and spilled words (static, sm_90, 64 x 256: 7103 instructions and
38 spilled words, against 1752 and none so).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...spec import ACTIVATION_NAMES, NORM_NAMES, STATISTICS
from ..parts.output import form_of
from ..row.epilogue import write_rows
from ..tuning import gemm as gemm_tuning
from ..tuning import rules as tuning
from .tile import product_tile, write_product
from .tma import can_describe, plain_forward

# Runtime integers whose value must not compile a new kernel: alignment is passed as ALIGN instead.
INTEGERS = ("rows", "cols", "inner", "stride_xm", "stride_wn", "stride_rm", "threshold")


@triton.jit(do_not_specialize=INTEGERS)
def _gemm_row_kernel(
    x_ptr,
    weight_ptr,
    parameters,
    residual_ptr,
    z_ptr,
    y_ptr,
    statistics_ptr,
    seed_ptr,
    rows,
    cols,
    inner,
    stride_xm,
    stride_wn,
    stride_rm,
    scalars,
    threshold,
    FORM: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    """One tile a program: whole rows under a norm, any part of them without."""
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    bias_ptr, norm_weight_ptr, norm_bias_ptr = parameters
    if z_ptr is None:
        z_ptr = y_ptr
    _z, row0, col0, _row_mask, _column, _column_mask = write_product(
        *(x_ptr, weight_ptr, bias_ptr, z_ptr, rows, cols, inner, stride_xm, stride_wn),
        *(FORM.NORM is not None, TILE),
    )
    # All of the program's threads now see z in memory.
    tl.debug_barrier()
    present = tl.minimum(rows - row0, TILE.BLOCK_M).to(tl.int32)
    for step in tl.range(0, present, STEP):
        write_rows(
            *(z_ptr, (None, norm_weight_ptr, norm_bias_ptr), residual_ptr, y_ptr),
            *(statistics_ptr, seed_ptr, row0 + step + tl.arange(0, STEP), col0),
            *(rows, cols, cols, stride_rm, cols, scalars, threshold, FORM, BLOCK_N),
        )


def linear_row_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    save_z: bool,
    norm: int,
    eps: float,
    activation: int,
    alpha: float,
    beta: float,
    threshold: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """y = residual + dropout(activation(norm(x · weightᵀ + bias))).

    Args:
        x: (rows, inner), last stride 1, any row stride and offset.
        weight: (cols, inner), likewise, of x's dtype.
        bias, norm_weight, norm_bias: (cols,), contiguous, any floating dtype, or None.
        residual: (rows, cols), last stride 1, of x's dtype, or None.
        seed: int64 (1,); may be None where threshold is 0.
        save_z: whether z is needed.
        norm, eps, activation, alpha, beta, threshold: as `spec.Spec.row`.

    Returns:
        y (rows, cols) in x's dtype; z = x · weightᵀ + bias, likewise, or (0,) where it is not
        needed; the statistics of z as `row.row_forward` gives them.

    Raises:
        ValueError: rows too wide for a tile (`gemm_tuning.row_tile` knows which).
    """
    (rows, inner), cols = x.shape, weight.shape[0]
    name = NORM_NAMES[norm]
    y = x.new_empty((rows, cols))
    z = x.new_empty((rows, cols) if save_z else (0,))
    statistics = x.new_empty((STATISTICS[name], rows), dtype=torch.float32)
    if rows == 0 or cols == 0:
        return y, z, statistics
    device = tuning.device(x)
    precision = gemm_tuning.precision(x.dtype)
    kind = gemm_tuning.Kind(name, x.dtype, precision)
    seed = seed if threshold else None
    if name is None:
        plain = gemm_tuning.plain_tile(kind, device.arch)
        if plain is not None and can_describe(x, weight, residual, y):
            plain_forward(
                *(x, weight, bias, residual, seed, z if save_z else None, y),
                (eps, alpha, beta),
                threshold,
                form_of(x, device, None, ACTIVATION_NAMES[activation], threshold, align=1),
                product_tile(x, weight, plain, precision, align=1),
                plain.num_warps,
            )
            return y, z, statistics
    tile = gemm_tuning.row_tile(cols, kind, device.arch, device.warp_size)
    if tile is None:
        raise ValueError(f"linear_row_forward: no tile holds {cols} columns of {x.dtype} ({kind})")
    col_blocks = 1 if name else triton.cdiv(cols, tile.block_n)
    if name is None:
        norm_weight = norm_bias = None
    stride_rm = cols if residual is None else residual.stride(0)
    align = tuning.alignment(cols, x.element_size(), stride_rm)
    even = cols == tile.block_n
    with tuning.device_of(x):
        _gemm_row_kernel[(triton.cdiv(rows, tile.block_m) * col_blocks,)](
            x,
            weight,
            (bias, norm_weight, norm_bias),
            residual,
            z if save_z else None,
            y,
            statistics if name else None,
            seed,
            *(rows, cols, inner, x.stride(0), weight.stride(0), stride_rm),
            (eps, alpha, beta),
            threshold,
            FORM=form_of(x, device, name, ACTIVATION_NAMES[activation], threshold, align, even),
            TILE=product_tile(x, weight, tile, precision, align),
            STEP=tile.step,
            num_warps=tile.num_warps,
        )
    return y, z, statistics
