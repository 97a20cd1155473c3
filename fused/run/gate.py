"""A gate of two tensors, dropout(value · activation(gate)): who runs it, and its derivative.

It is one pass over memory forward and one backward. Saved are value, gate and the seed. The two may
be the halves of one tensor, the gate first; gated activations of a chain, whose gate is the second
half, are those of rows.py.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..backends import ops
from ..backends.backend import as_asked, asked
from ..spec import GATED_CODES, Spec
from . import by_torch, reference
from .layout import contiguous_rows
from .random import draw_seed
from .recording import composite, is_compiling, is_plain
from .rows import needs_gradient


def _halves(value: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    """The value and its gate, which may be the second and the first half of one tensor."""
    if gate is not None:
        return value, gate
    gate, value = value.chunk(2, -1)
    return value, gate


def _scalars(spec: Spec) -> tuple[int, int]:
    return GATED_CODES[str(spec.activation)], spec.threshold


class GateFunction(torch.autograd.Function):
    """dropout(value · activation(gate)) over (rows, cols); gate None: both are halves of value."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, gate: Tensor | None, seed: Tensor | None, spec: Spec
    ) -> Tensor:
        ctx.save_for_backward(value, gate, seed)
        ctx.spec, ctx.asked = spec, asked() if value.is_cuda else None
        return ops.gate_forward(*_halves(value, gate), seed, *_scalars(spec))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        value, gate, seed = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():
            # Views, so that a tensor passed twice gets two gradients.
            views = value.view_as(value), None if gate is None else gate.view_as(gate)
            y = reference.gate(*_halves(*views), ctx.spec, seed)
            wanted = [t for t, need in zip(views, needs, strict=True) if t is not None and need]
            found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
            return *(next(found) if need else None for need in needs), None, None
        given = (contiguous_rows(dy), *_halves(value, gate), seed, *_scalars(ctx.spec))
        dvalue, dgate = as_asked(ctx.asked, ops.gate_backward, *given, gate is None)
        return dvalue if needs[0] else None, dgate if needs[1] else None, None, None


def gate(
    spec: Spec, value: Tensor, gate: Tensor | None = None, seed: Tensor | None = None
) -> Tensor:
    """dropout(value · activation(gate)) of two tensors of one shape, dtype and device.

    Args:
        spec: activation and dropout, which are all that it may have; a gated activation by its name
            stands for that of its gate.
        value: of any rank ≥ 1.
        gate: None: gate and value are the first and the second half of value's last dimension.
        seed: int64 (1,); drawn where the chain drops and None is given.
    """
    shape = value.shape
    if len(shape) != 2:
        rows = math.prod(shape[:-1])  # not -1, which is ambiguous where there are no features
        value = value.reshape(rows, shape[-1])
        gate = None if gate is None else gate.reshape(rows, shape[-1])
    if seed is None and spec.threshold:
        seed = draw_seed(value.device)
    gradient = needs_gradient(value, gate)
    elements = value.numel() * (1 if gate is None else 2)
    plain = composite(value, "a gate of two tensors runs")
    plain = plain or (gate is not None and not is_plain(gate))
    if plain or (not is_compiling(value) and by_torch.serves_gate(spec, elements, value)):
        y = reference.gate(*_halves(value, gate), spec, seed)
    else:
        if gate is not None:
            gate = contiguous_rows(gate.view_as(gate) if gate is value else gate)
        value = contiguous_rows(value)
        if gradient:
            y = GateFunction.apply(value, gate, seed, spec)
        else:
            y = ops.gate_forward(*_halves(value, gate), seed, *_scalars(spec))
    return y if len(shape) == 2 else y.view(*shape[:-1], y.shape[-1])
