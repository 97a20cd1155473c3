"""A gate of two tensors, each with strides of its own, forward and backward: one pass over memory.

    y = dropout(value · act(gate))                            over (rows, cols)

A program has one tile of each tensor, of the same rows and columns: any part of a row, or several
short rows.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ...spec import ACTIVATION_NAMES, GATED_ACTIVATIONS
from ..parts.output import Drop, form_of, output_gradient, write_output
from ..parts.tile import Place, load_place, row_offset, store_place
from ..tuning import gated as gated_tuning
from ..tuning import rules as tuning
from .gated import is_wide

# Runtime integers whose value must not compile a new kernel, as in gated.py.
_SIZES = ("rows", "cols", "threshold")
_FORWARD_INTEGERS = (*_SIZES, "stride_vm", "stride_gm", "stride_ym")
_BACKWARD_INTEGERS = (*_SIZES, "stride_dym", "stride_vm", "stride_gm", "stride_dvm", "stride_dgm")


@triton.jit
def _tile_of(rows, cols, ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(rows, first column, columns, mask) of this program, by one grid axis as in gated.py."""
    col_blocks = tl.cdiv(cols, BLOCK_N)
    pid = tl.program_id(0)
    row = (pid // col_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col0 = (pid % col_blocks) * BLOCK_N
    column = col0 + tl.arange(0, BLOCK_N)
    mask = (row < rows)[:, None] & (column < (cols // ALIGN) * ALIGN)[None, :]
    return row, col0, column[None, :], mask


@triton.jit(do_not_specialize=_FORWARD_INTEGERS)
def _gate_fwd_kernel(
    value_ptr,
    gate_ptr,
    y_ptr,
    stride_vm,
    stride_gm,
    stride_ym,
    seed_ptr,
    rows,
    cols,
    scalars,
    threshold,
    FORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    ALIGN: tl.constexpr = FORM.ALIGN
    row, col0, column, mask = _tile_of(rows, cols, ALIGN, BLOCK_M, BLOCK_N)
    a = load_place(Place(value_ptr, row_offset(row, stride_vm, ALIGN), column, mask))
    b = load_place(Place(gate_ptr, row_offset(row, stride_gm, ALIGN), column, mask))
    write_output(
        *(a, b, Drop(seed_ptr, row, col0, cols, threshold)),
        Place(None, None, column, mask),
        Place(y_ptr, row_offset(row, stride_ym, ALIGN), column, mask),
        *(scalars, FORM),
    )


@triton.jit(do_not_specialize=_BACKWARD_INTEGERS)
def _gate_bwd_kernel(
    dy_ptr,
    value_ptr,
    gate_ptr,
    dvalue_ptr,
    dgate_ptr,
    stride_dym,
    stride_vm,
    stride_gm,
    stride_dvm,
    stride_dgm,
    seed_ptr,
    rows,
    cols,
    scalars,
    threshold,
    FORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    ALIGN: tl.constexpr = FORM.ALIGN
    row, col0, column, mask = _tile_of(rows, cols, ALIGN, BLOCK_M, BLOCK_N)
    g = load_place(Place(dy_ptr, row_offset(row, stride_dym, ALIGN), column, mask))
    a = load_place(Place(value_ptr, row_offset(row, stride_vm, ALIGN), column, mask))
    b = load_place(Place(gate_ptr, row_offset(row, stride_gm, ALIGN), column, mask))
    da, db = output_gradient(g, a, b, Drop(seed_ptr, row, col0, cols, threshold), scalars, FORM)
    store_place(Place(dvalue_ptr, row_offset(row, stride_dvm, ALIGN), column, mask), da)
    store_place(Place(dgate_ptr, row_offset(row, stride_dgm, ALIGN), column, mask), db)


def _launch(
    kernel: Any, tensors: tuple[Tensor, ...], seed: Tensor | None, activation: int, threshold: int
) -> None:
    """Tensors of one shape (rows, cols), as the kernel takes them."""
    first = tensors[0]
    rows, cols = first.shape
    if rows == 0 or cols == 0:
        return
    device, strides = tuning.device(first), [t.stride(0) for t in tensors]
    align = tuning.alignment(cols, first.element_size(), *strides)
    tile = gated_tuning.forward_tile(cols, None, device, is_wide(align, *tensors))
    blocks = triton.cdiv(rows, tile.block_m) * triton.cdiv(cols, tile.block_n)
    name = GATED_ACTIVATIONS[str(ACTIVATION_NAMES[activation])].gate
    with tuning.device_of(first):
        kernel[(blocks,)](
            *(*tensors, *strides, seed if threshold else None, rows, cols, (0.0, 0.0, 0.0)),
            threshold,
            FORM=form_of(first, device, None, name, threshold, align),
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            num_warps=tile.num_warps,
        )


def gate_forward(
    value: Tensor, gate: Tensor, seed: Tensor | None, activation: int, threshold: int
) -> Tensor:
    """y = dropout(value · act(gate)).

    Args:
        value, gate: (rows, cols), last stride 1, any row stride and offset; one dtype.
        seed: int64 (1,); may be None where threshold is 0.
        activation: the code of the gated activation with this gate.
    """
    y = value.new_empty(value.shape)
    _launch(_gate_fwd_kernel, (value, gate, y), seed, activation, threshold)
    return y


def gate_backward(
    dy: Tensor,
    value: Tensor,
    gate: Tensor,
    seed: Tensor | None,
    activation: int,
    threshold: int,
    joined: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of `gate_forward`, given the gradient dy of its result.

    joined: gate and value are the halves of one tensor. Then the first result is the gradient of
    all of it, (rows, 2 cols), and the second is empty.
    """
    rows, cols = value.shape
    first = value.new_empty((rows, 2 * cols if joined else cols))
    second = value.new_empty((0 if joined else rows, cols))
    dgate, dvalue = (first[:, :cols], first[:, cols:]) if joined else (second, first)
    _launch(_gate_bwd_kernel, (dy, value, gate, dvalue, dgate), seed, activation, threshold)
    return first, second
