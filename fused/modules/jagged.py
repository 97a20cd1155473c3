"""Jagged nested tensors: sequences of uneven length, one after another, without padding.

What is said of each position by itself, and of all of them together, needs no boundaries: Linear,
layer, rms and batch norm, activations and dropout run on the values (all positions, features).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ..spec import norm_name

Function = TypeVar("Function", bound=Callable[..., Tensor])
_PADDED = (
    "takes padded tensors with a mask, not jagged ones; pad the input with"
    " torch.nested.to_padded_tensor(x, 0.0) and pass mask="
)


def is_jagged(x: Any) -> bool:
    """Whether x is a nested tensor of the jagged layout."""
    return isinstance(x, Tensor) and x.is_nested and x.layout is torch.jagged


def values_of(
    operation: str, x: Tensor, norm: str | None, mask: Any, channel_dropout: bool
) -> Tensor:
    """The values (all positions, features) of a jagged tensor (batch, ragged, features).

    Raises:
        ValueError: group and instance norm, channel dropout, a mask, holes, or another ragged
            dimension.
    """
    if norm in ("group", "instance"):
        raise ValueError(f"{operation}: {norm} norm {_PADDED}")
    if channel_dropout:
        raise ValueError(f"{operation}: channel_dropout {_PADDED}")
    if mask is not None:
        raise ValueError(f"{operation}: mask is for padded tensors; a jagged one needs none")
    given: Any = x
    if x.dim() != 3 or given._ragged_idx != 1 or given.lengths() is not None:
        raise ValueError(
            f"{operation}: a jagged input must be (batch, ragged, features) without holes, got"
            f" {x.dim()} dimensions; use x.contiguous() where there are holes"
        )
    return x.values()


def like(x: Tensor, values: Tensor) -> Tensor:
    """The jagged tensor of x's structure with other values."""
    given: Any = x
    return torch.nested.nested_tensor_from_jagged(values, given.offsets())


def values_of_added(operation: str, x: Tensor, **added: Any) -> dict[str, Tensor | None]:
    """The values of what is added to x, of its structure, by name.

    Raises:
        ValueError: it is not jagged, or has other lengths.
    """
    for name, t in added.items():
        if t is not None and (not is_jagged(t) or t.shape[:2] != x.shape[:2]):
            raise ValueError(f"{operation}: {name} must be jagged with the offsets of the input")
    return {name: None if t is None else t.values() for name, t in added.items()}


def on_jagged_values(first: str) -> Callable[[Function], Function]:
    """Lets a function of (all positions, features) take a jagged argument; `first` is its name."""

    def decorate(function: Function) -> Function:
        @wraps(function)
        def call(*args: Any, **options: Any) -> Tensor:
            x = args[0] if args else options.get(first)
            if not is_jagged(x):
                return function(*args, **options)
            assert x is not None
            rest = args[1:]
            options.pop(first, None)
            name = function.__name__
            drops = bool(options.get("channel_dropout"))
            norm = norm_name(options.get("norm"))
            values = values_of(name, x, norm, options.pop("mask", None), drops)
            added = {key: options.pop(key, None) for key in ("residual", "shortcut")}
            options |= values_of_added(name, x, **added)
            if first == "z":  # its channels are where it is told, those of a product the last
                options["channel_dim"] = -1
            return like(x, function(values, *rest, **options))

        return cast(Function, call)

    return decorate
