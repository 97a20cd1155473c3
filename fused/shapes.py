"""Functions for the shapes in which models use the parts of a chain; functional.py has them."""

from __future__ import annotations

import torch
from torch import Tensor

from .run import gate as _gate
from .run.checks import (
    check_float,
    check_parameter,
    checked_probability,
    checked_seed,
    checked_spec,
)
from .spec import GATES, activation_name


def gate(
    value: Tensor,
    gate: Tensor,
    activation: str = "silu",
    p: float = 0.0,
    training: bool = True,
    seed: int | Tensor | None = None,
) -> Tensor:
    """One tensor gated by another, and dropout, as one operation: the MLP of Llama, for one.

        y = dropout(value · activation(gate))

    Each tensor may have strides of its own, as the halves of one tensor have.

    Args:
        value: of any shape but (), floating point.
        gate: of value's shape, dtype and device.
        activation: "sigmoid", "silu", "gelu", "gelu_tanh" or "relu", in any case.
        p: dropout probability; acts when `training` is true. The mask is laid along the last
            dimension.
        seed: the dropout seed, an int or an int64 tensor of one element; drawn from torch's
            generator where None.

    Returns:
        of value's shape and dtype.

    Raises:
        ValueError: shapes or devices that do not match, another activation, p outside [0, 1].
        TypeError: dtypes that are not floating point or do not match.
    """
    operation = "gate"
    check_float("value", operation, value)
    check_parameter(operation, "gate", gate, tuple(value.shape), value)
    if gate.dtype != value.dtype:
        raise TypeError(
            f"{operation}: gate must have the dtype of value ({value.dtype}), got {gate.dtype};"
            " convert one of them"
        )
    if value.dim() < 1 or value.layout is not torch.strided or gate.layout is not torch.strided:
        raise ValueError(
            f"{operation}: value and gate must be strided tensors of one dimension or more, got"
            f" {value.layout} and {gate.layout} of {value.dim()} dimensions"
        )
    name = activation_name(activation)
    if name not in GATES:
        raise ValueError(
            f"{operation}: activation must be one of {', '.join(map(str, GATES))}, got"
            f" {activation!r}; multiply by another one outside"
        )
    p = checked_probability(operation, p) * bool(training)
    spec = checked_spec(operation, None, None, value.dtype, GATES[name], p, {})
    return _gate.gate(spec, value, gate, checked_seed(operation, seed, value.device))
