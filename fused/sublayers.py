"""Functions for what a transformer is made of beside attention; public in functional.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .run.add_norm import add_norm as run_add_norm
from .run.autocast import float32_under_autocast
from .run.checks import (
    check_float,
    check_parameter,
    check_scale_dtype,
    checked_probability,
    checked_seed,
    checked_spec,
    contiguous,
)
from .run.gate import gate as run_gate
from .spec import GATES, ROW_NORMS, activation_name, norm_name


def add_norm(
    x: Tensor,
    residual: Tensor,
    *,
    norm: str = "layer",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float | None = None,
    p: float = 0.0,
    training: bool = True,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Dropout, addition and norm as one operation, as a transformer's sublayer ends or begins.

        h = residual + dropout(x),  y = norm(h)

    Args:
        x: (..., N), floating point.
        residual: of x's shape.
        norm: "layer" or "rms", over the N features.
        norm_weight, norm_bias: (N,) or None.
        eps: added to the variance; torch's default where None.
        p: dropout probability; acts when `training` is true.
        seed: the dropout seed, an int or an int64 tensor of one element; drawn from torch's
            generator where None. The mask is `dropout_mask` over the rows of N features.

    Returns:
        y and h, each of x's shape, in the dtypes that eager gives. y is the norm of h as it is
        stored, so that it can be computed again from h.

    Raises:
        ValueError: another norm, p outside [0, 1], a tensor whose shape does not fit.
        TypeError: a tensor that is not floating point, or parameters of another dtype.
    """
    operation = "add_norm"
    name = norm_name(norm)
    if name not in ROW_NORMS:
        known = " or ".join(map(repr, ROW_NORMS))
        raise ValueError(f"{operation}: norm must be {known}, got {norm!r}")
    check_float("x", operation, x)
    if not x.dim():
        raise ValueError(f"{operation}: x must have a dimension of features, got a scalar")
    check_parameter(operation, "residual", residual, tuple(x.shape), x)
    check_parameter(operation, "norm_weight", norm_weight, tuple(x.shape[-1:]), x)
    check_parameter(operation, "norm_bias", norm_bias, tuple(x.shape[-1:]), x)
    dtype = torch.promote_types(x.dtype, residual.dtype)
    dtype = torch.float32 if float32_under_autocast(x.device.type, dtype, name) else dtype
    check_scale_dtype(operation, "norm_weight", norm_weight, dtype)
    check_scale_dtype(operation, "norm_bias", norm_bias, dtype)
    p = checked_probability(operation, p) * bool(training)
    spec = checked_spec(operation, name, eps, dtype, None, p, {})
    affine = contiguous(norm_weight), contiguous(norm_bias)
    return run_add_norm(
        spec, x, residual, None, None, *affine, checked_seed(operation, seed, x.device)
    )


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
    return run_gate(spec, value, gate, checked_seed(operation, seed, value.device))
