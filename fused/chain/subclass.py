"""The fused class of each kind of nn.Sequential, subclasses included, and which have none.

A subclass keeps its name, methods and attributes: its fused class, made on the fly, derives from it
and then from `Sequential`, so that only the forward changes.
"""

from __future__ import annotations

import types
from abc import ABCMeta
from functools import cache
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from .sequential import Sequential

# What nn.Sequential's forward, or copying and pickling, may depend on.
_OWN = ("forward", "__iter__", "__new__", "__reduce__", "__reduce_ex__")
# What fused.Sequential adds, and would hide or be hidden by.
_ADDED = [name for name in vars(Sequential) if not hasattr(nn.Sequential, name)]


def _class_reason(kind: type) -> str:
    name = kind.__name__
    if kind.forward is not nn.Sequential.forward:  # type: ignore[attr-defined]
        return f"{name} is a subclass of nn.Sequential with a forward of its own"
    if kind.__module__.startswith("torch.ao."):
        return f"quantization in torch looks for exactly this class, {name}"
    if type(kind) not in (type, ABCMeta):
        return f"the class of {name} is {type(kind).__name__}, which may not make another class"
    for method in _OWN:
        if getattr(kind, method) is not getattr(nn.Sequential, method):
            return f"{name} has {_article(method)} {method} of its own"
    return ""


def _article(method: str) -> str:
    return "an" if method.startswith("__i") else "a"


def convert_reason(module: nn.Sequential) -> str:
    """Why `fuse_` leaves the module as it is, in a sentence; empty where it does not."""
    if isinstance(module, Sequential):
        return ""
    if "forward" in module.__dict__:
        return "its forward was replaced"
    if type(module) is not nn.Sequential:
        # Its class was made on the fly, and goes back to the first of its bases.
        if is_parametrized(module):
            return "it is parametrised"
        reason = _class_reason(type(module))
        if reason:
            return reason
    for name in _ADDED:
        if hasattr(module, name):
            return f"it has a `{name}` of its own"
    return ""


def _restore(original: type, *arguments: Any) -> Any:
    """Called where a module is copied or unpickled; a class that changed since is left alone."""
    kind = original if _class_reason(original) else fused_class(original)
    return kind.__new__(kind, *arguments)


class _Converted:
    """The first base of a class made on the fly."""

    forward = Sequential.forward

    def __init_subclass__(cls, **given: Any) -> None:
        """Nothing: a registry of subclasses need not know the class."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The original class is what a pickle can name."""
        reduced: Any = super().__reduce_ex__(max(2, protocol))
        new, (kind, *arguments), *rest = reduced
        original = original_class(kind)
        if original is None:  # a class that somebody else derived from this one
            return (new, (kind, *arguments), *rest)
        return (_restore, (original, *arguments), *rest)


@cache
def fused_class(kind: type) -> type[Sequential]:
    """The class to convert a module of this class to; `convert_reason` has passed it."""
    if kind is nn.Sequential:
        return Sequential
    same = ("__qualname__", "__module__", "__doc__")
    attributes = {name: getattr(kind, name) for name in same} | {"_original": kind}
    bases = (_Converted, kind, Sequential)
    return types.new_class(kind.__name__, bases, exec_body=lambda own: own.update(attributes))


def original_class(kind: type) -> type | None:
    """What a class of `fused_class` was made from; None for any other class."""
    return nn.Sequential if kind is Sequential else kind.__dict__.get("_original")
