"""A family of kernels: the calls that are compiled and interpreted for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from .covering import Case, covering
from .targets import TARGETS

ORDINARY_TARGET = "sm_90"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


class Make(Protocol):
    """Makes the tensors of a call: without memory to compile it, real ones to interpret it."""

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor: ...


def without_memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Tensors for `launch.captured`, which reads shapes, strides and addresses alone."""
    return torch.empty(shape, dtype=dtype, device="meta")


def in_memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Tensors for the interpreter; no traffic depends on their values."""
    return torch.ones(shape, dtype=dtype)


def nothing(case: Case) -> bool:
    """Excludes no case."""
    return False


@dataclass(frozen=True)
class Family:
    """Calls of one launcher.

    `properties`: the values of each, the ordinary one first; covering.py chooses their
    combinations. `headlines`: what differs from the ordinary in the cases that every target
    compiles besides; the first in which a kernel appears speaks for it in tables. `small`: the same
    for calls that the interpreter runs, by name. `call` makes the tensors of a case and runs its
    launcher. `excluded`: whether a case, which may lack properties, cannot be.
    """

    name: str
    properties: Mapping[str, Sequence[Any]]
    headlines: Sequence[Mapping[str, Any]]
    small: Mapping[str, Mapping[str, Any]]
    call: Callable[[Case, Make], object]
    excluded: Callable[[Case], bool] = field(default=nothing)

    @property
    def ordinary(self) -> Case:
        return {name: values[0] for name, values in self.properties.items()}

    def cases(self) -> list[Case]:
        """Headlines on every target, then what it takes until every pair of values has met.

        The target is one of the properties.
        """
        start = [
            self.ordinary | different | {"target": target}
            for different in self.headlines
            for target in TARGETS
        ]
        # The first value is taken where no other is asked for.
        targets = sorted(TARGETS, key=lambda target: target != ORDINARY_TARGET)
        return covering(dict(self.properties) | {"target": targets}, start, self.excluded)

    def label(self, case: Case) -> str:
        """A case without its target: what differs from the ordinary."""
        found = {k: v for k, v in case.items() if k != "target" and v != self.ordinary[k]}
        return " ".join([self.name, *(f"{k}={v}" for k, v in found.items())])
