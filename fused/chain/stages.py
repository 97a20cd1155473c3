"""The children of a chain by their part in it, and the full guard: what stops the chain, and why.

Every `..._reason` method returns a sentence, or the empty string when nothing is in the way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..backends import backend
from ..modules.gated import GATED_MODULES
from ..run.autocast import autocast_dtype, float32_under_autocast
from . import guard
from .grammar import ACTIVATION, NORM
from .guard import KIND_OF, NORM_OF, activation_of


@dataclass
class Stages:
    """Linear, norm, activation and dropout, each None where the chain has none."""

    names: list[str]
    children: list[nn.Module]
    linear: nn.Linear | None = None
    norm: Any = None
    activation: nn.Module | None = None
    dropout: Any = None
    types: list[type] = field(default_factory=list)
    norm_name: str | None = None
    # The activation of a chain of activation and dropout.
    alone: nn.Module | None = None
    # Whether the activation halves the features.
    gated: bool = False
    # Reads what may change about the activation; None where nothing may.
    attributes: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        for child in self.children:
            setattr(self, ("linear", "norm", "activation", "dropout")[KIND_OF[type(child)]], child)
        self.types = [type(child) for child in self.children]
        if self.norm is not None:
            self.norm_name = NORM_OF[type(self.norm)]
        self.gated = type(self.activation) in GATED_MODULES
        if self.linear is None and self.norm is None and not self.gated:
            self.alone = self.activation
        if self.activation is not None:
            self.attributes = guard.activation_attributes(self.activation, self._reads_input())

    def describe(self) -> str:
        """The chain in names: linear → layer → gelu → dropout."""
        parts = []
        for child, kind in zip(self.children, self.types, strict=True):
            if KIND_OF[kind] == NORM:
                parts.append(NORM_OF[kind])
            elif KIND_OF[kind] == ACTIVATION and not self._activation_reason():
                parts.append(activation_of(child)[0])
            else:
                parts.append(kind.__name__.lower())
        return " → ".join(parts)

    def _activation_reason(self) -> str:
        if self.activation is None:
            return ""
        return guard.activation_reason(self.activation, self._reads_input())

    def _reads_input(self) -> bool:
        """Whether the activation reads the chain's own input."""
        return self.linear is None and self.norm is None

    def static_reason(self) -> str:
        """What stops the chain whatever the input is; empty when nothing does."""
        if guard.global_hooks():
            return "global module hooks are set"
        for name, child, expected in zip(self.names, self.children, self.types, strict=True):
            reason = guard.module_reason(child, expected)
            if not reason and child is self.activation:
                reason = self._activation_reason()
            if reason:
                return f"child {name!r}: {reason}"
        return ""

    def parameter_reason(
        self, device: torch.device, dtype: torch.dtype, served: bool = True
    ) -> str:
        """What stops the chain for an input of this device and dtype; empty when nothing does.

        `served`: a backend must serve them.
        """
        linear, norm = self.linear, self.norm
        if linear is not None:
            reason = guard.parameter_reason(linear, "weight", device, optional=False)
            reason = reason or guard.parameter_reason(linear, "bias", device)
            if reason:
                return f"Linear: {reason}"
            dtype, reason = guard.linear_dtype(linear, dtype, autocast_dtype(device.type))
            if reason:
                return reason
        if norm is not None:
            if float32_under_autocast(device.type, dtype, self.norm_name):
                dtype = torch.float32
            reason = self.norm_reason(device, dtype)
            if reason:
                return f"{type(norm).__name__}: {reason}"
        if not served or backend.requested() == "reference":
            return ""
        return backend.reason(device.type, dtype)

    def own_reason(self) -> str:
        """What stops the chain as far as can be known without an input; empty if nothing does."""
        reason = self.static_reason()
        first = next((t for c in self.children for t in c.parameters(recurse=False)), None)
        if not reason and first is not None:
            # A model on the meta device will be moved to another.
            served = first.device.type != "meta"
            reason = self.parameter_reason(first.device, first.dtype, served)
        return reason or self.backend_reason()

    def input_reason(self, x: Any) -> str:
        """What stops the chain for this input; empty when nothing does."""
        reason = guard.tensor_reason(x) or self.parameter_reason(x.device, x.dtype)
        if reason:
            return reason
        features = tuple(x.shape)
        if self.linear is not None:
            outputs, inputs = self.linear.weight.shape
            bias = self.linear.bias
            if bias is not None and bias.shape != (outputs,):
                return f"Linear: its bias is {tuple(bias.shape)}, its output has {outputs} features"
            if features[-1] != inputs:
                return f"Linear takes {inputs} features, the input has {features[-1]}"
            features = (*features[:-1], outputs)
        reason = self.shape_reason(features) or self.gate_reason(features)
        if reason:
            return reason
        if self.gated and self._reads_input() and not x.is_contiguous():
            return "the input is not contiguous, and is halved"
        if self.alone is not None and not x.is_contiguous() and guard.memory_order(x) is None:
            return "the input has gaps or overlaps in memory"
        return ""

    def norm_reason(self, device: torch.device, dtype: torch.dtype) -> str:
        """Why the norm's parameters cannot be read with an input of this device and dtype."""
        return guard.norm_reason(self.norm, device, dtype)

    def shape_reason(self, shape: tuple[int, ...]) -> str:
        """What stops the chain for a norm's input of this shape."""
        if self.norm is not None:
            expected = self.norm.normalized_shape
            if shape[len(shape) - len(expected) :] != expected:
                return f"the norm takes {expected}, its input is {shape}"
        return ""

    def gate_dim(self, rank: int) -> int:
        """The dimension that a gated activation must halve."""
        return rank - 1

    def gate_reason(self, shape: tuple[int, ...]) -> str:
        """What stops a gated activation on a tensor of this shape."""
        if not self.gated:
            return ""
        given: Any = self.activation
        rank, own = len(shape), self.gate_dim(len(shape))
        if not -rank <= given.dim < rank or given.dim % rank != own:
            return f"{type(given).__name__} halves dimension {given.dim}, the features are in {own}"
        if shape[own] % 2:
            return f"{type(given).__name__} halves {shape[own]} features"
        return ""

    def output_shapes(self, x: Any) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """The shapes of the norm's and the chain's result, which differ by a gate.

        None if eager is to raise for x, or may.
        """
        if guard.tensor_reason(x) or self.static_reason():
            return None
        shape = list(x.shape)
        if self.linear is not None:
            shape[-1] = self.linear.weight.shape[0]
        normed = tuple(shape)
        if self.gated:
            if self.gate_reason(normed):
                return None
            shape[self.gate_dim(len(shape))] //= 2
        return normed, tuple(shape)

    def backend_reason(self) -> str:
        """Why a chain that nothing else stops runs as plain torch operators, with its own mask."""
        return "backend 'reference' is asked for" if backend.requested() == "reference" else ""
