"""Making the children of a block from the names and options that it was given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..modules.gated import make_gate
from ..modules.norms import BatchNorm, ChannelDropout, GroupNorm, InstanceNorm
from ..spec import (
    ACTIVATIONS,
    GATED_ACTIVATIONS,
    ROW_NORMS,
    activation_name,
    activation_parameters,
    activations,
)
from .guard import ACTIVATION, KIND_OF, ReLUSquared, activation_of, activation_reason


def named_activation(
    activation: str | nn.Module | None, given: dict[str, float]
) -> tuple[str | None, dict[str, float]]:
    """The name of an activation given by name or as a module, and the parameters: its or those.

    Raises:
        ValueError: a module that is none of the known activations.
        TypeError: parameters with a module, which has its own.
    """
    if not isinstance(activation, nn.Module):
        return activation_name(activation), given
    if KIND_OF.get(type(activation)) != ACTIVATION:
        known = ", ".join(activations())
        raise ValueError(f"unknown activation {activation}; known are the modules of: {known}")
    reason = activation_reason(activation, first=False)
    if reason:
        raise ValueError(f"activation {activation} cannot be taken: {reason}")
    if given:
        raise TypeError(f"activation {activation} has its own parameters; got {', '.join(given)}")
    name, parameters = activation_of(activation)
    return name, dict(parameters)


def make_activation(
    activation: str | None, parameters: dict[str, float], dim: int = -1
) -> nn.Module | None:
    """The activation's module; raises for a name or parameter that is unknown.

    dim: what a gated one halves.
    """
    activation_parameters(activation, parameters)  # raises for what is unknown
    if activation is None:
        return None
    if activation == "relu_squared":
        return ReLUSquared()
    if activation == "gelu_tanh":
        return nn.GELU(approximate="tanh")
    if activation in GATED_ACTIVATIONS:
        return make_gate(activation, dim)
    module = ACTIVATIONS[activation].module
    assert module is not None
    return module(**parameters)


# The options of each norm over samples or positions, and what stands for "not given".
_NORM_DEFAULTS = {
    "eps": None,
    "affine": True,
    "num_groups": None,
    "momentum": 0.1,
    "track_running_stats": None,
    "virtual_batch_size": None,
    "process_group": None,
}
_RUNNING = ("eps", "affine", "momentum", "track_running_stats")
_NORM_OPTIONS = {
    "batch": (*_RUNNING, "virtual_batch_size", "process_group"),
    "group": ("eps", "affine", "num_groups"),
    "instance": _RUNNING,
}


def make_norm(
    norm: str | None,
    features: int | Sequence[int],
    channel_dim: int,
    options: dict[str, Any],
    **where: Any,
) -> nn.Module | None:
    """The norm's module; raises for options that it does not have. where: device and dtype."""
    given = {key: value for key, value in options.items() if value != _NORM_DEFAULTS[key]}
    for key in given:
        if key not in _NORM_OPTIONS.get(norm or "", ("eps", "affine")):
            raise ValueError(f"{key} does not belong to norm={norm!r}")
    if norm is None:
        return None
    if norm in ROW_NORMS:
        shape: Any = features if isinstance(features, int) else list(features)
        eps = given.get("eps", 1e-5 if norm == "layer" else None)
        kind: Any = nn.LayerNorm if norm == "layer" else nn.RMSNorm
        return kind(shape, eps, options["affine"], **where)
    if not isinstance(features, int):
        raise ValueError(f"{norm} norm takes one number of features, got {tuple(features)}")
    if norm == "group":
        groups = given.pop("num_groups", None)
        if groups is None:
            raise ValueError("norm='group' needs num_groups")
        if channel_dim == 1:
            return nn.GroupNorm(groups, features, **given, **where)
        return GroupNorm(groups, features, channel_dim=channel_dim, **given, **where)
    own: Any = BatchNorm if norm == "batch" else InstanceNorm
    given["affine"] = options["affine"]
    return own(features, channel_dim=channel_dim, **given, **where)


def make_dropout(dropout: float, channel_dropout: float, channel_dim: int) -> nn.Module | None:
    """The dropout's module, of elements or of channels."""
    if dropout and channel_dropout:
        raise ValueError("dropout and channel_dropout are two kinds of dropout; pass one of them")
    if channel_dropout:
        return ChannelDropout(channel_dropout, channel_dim)
    return nn.Dropout(dropout) if dropout else None
