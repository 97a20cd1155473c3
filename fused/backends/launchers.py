"""The launchers of the Triton kernels, by operator; kernels/ is imported at the first call.

They are called with the operators' own lists of arguments (ops.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, NamedTuple

Launchers = Mapping[str, Callable[..., Any]]


class Place(NamedTuple):
    """Where a launcher is: a module of kernels/, and its function. `in_place`: out is z."""

    module: str
    function: str
    in_place: bool = False


def launcher(place: Place) -> Callable[..., Any]:
    """Calls the function at a place, which is looked up once, at the first call."""
    function: Callable[..., Any] | None = None

    def find() -> Callable[..., Any]:
        nonlocal function
        module = import_module(f"..kernels.{place.module}", __package__)
        function = getattr(module, place.function)
        return function

    def call(*args: Any) -> Any:
        return (function or find())(*args)

    def call_in_place(z: Any, *args: Any) -> None:
        (function or find())(z, *args, out=z)

    return call_in_place if place.in_place else call


# Of operators whose launcher has their name and arguments.
CHANNEL_PLACES = {
    "forward": ("statistics", "forward", "apply"),
    "backward": ("backward", "sums", "gradient"),
}
PLACES = {
    "row_forward": Place("row.forward", "row_forward"),
    "row_forward_": Place("row.forward", "row_forward", in_place=True),
    "row_backward": Place("row.backward", "row_backward"),
    "add_norm_forward": Place("row.add_norm", "add_norm_forward"),
    "add_norm_backward": Place("row.add_norm", "add_norm_backward"),
    "gate_forward": Place("row.pair", "gate_forward"),
    "gate_backward": Place("row.pair", "gate_backward"),
    "channel_apply_": Place("channel.forward", "channel_apply", in_place=True),
    **{
        f"channel_{name}": Place(f"channel.{module}", f"channel_{name}")
        for module, names in CHANNEL_PLACES.items()
        for name in names
    },
}
# By Triton alone; gemm.py asks for them where it serves.
LINEAR_PLACES = {
    f"linear_{name}_forward": Place(f"gemm.{name}", f"linear_{name}_forward")
    for name in ("row", "channel")
}
TRITON: Launchers = {name: launcher(place) for name, place in PLACES.items()}
LINEAR: Launchers = {name: launcher(place) for name, place in LINEAR_PLACES.items()}
