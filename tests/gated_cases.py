"""Cases of gated activations: z and the parameters have 2N columns, residual, y and dy have N."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from cases import Inputs, make_inputs
from torch import Tensor, nn

from fused.spec import GATED_ACTIVATIONS, Spec, dropout_threshold

GATED = tuple(GATED_ACTIVATIONS)


def make_gated_epilogue(norm: str | None, activation: str, p: float = 0.0) -> Spec:
    return Spec(norm, 1e-5 if norm else 0.0, activation, threshold=dropout_threshold(p))


def make_gated_inputs(
    rows: int, half: int, dtype: torch.dtype, norm: str | None = "layer", **options: Any
) -> Inputs:
    """`make_inputs` for N = half."""
    inputs = make_inputs(rows, 2 * half, dtype, norm, **options)
    inputs.dy = inputs.dy[:, :half].contiguous()
    if inputs.residual is not None:
        inputs.residual = inputs.residual[:, half:].contiguous()
    return inputs


GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "glu": torch.sigmoid,
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": lambda b: F.gelu(b, approximate="tanh"),
    "reglu": F.relu,
}


class Plain(nn.Module):
    """A gated activation by torch's own operators, along a dimension."""

    def __init__(self, name: str, dim: int = -1) -> None:
        super().__init__()
        self.name, self.dim = name, dim

    def forward(self, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, self.dim)
        return value * GATES[self.name](gate)
