"""Linears that are taken for a GPU's on CPU tensors, and what of them is called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from fused.backends import gemm

H100 = (90, 32)
HALF = torch.bfloat16


@contextmanager
def recorded(operator: str, run: Callable[..., Any]) -> Iterator[list[tuple[Any, ...]]]:
    """The calls of an operator, which `run` serves; CPU tensors count as a GPU's."""
    made: list[tuple[Any, ...]] = []

    def record(*args: Any) -> Any:
        made.append(args)
        return run(*args)

    library = torch.library.Library("fused_lnad", "IMPL")
    library.impl(operator, record, "CPU")
    with mock.patch.multiple(gemm, _is_on_gpu=lambda x: True, _device=lambda index: H100):
        yield made
    library._destroy()


def gradients(
    net: nn.Module, x: Tensor, residual: Tensor | None = None, **autograd: Any
) -> dict[str, Tensor]:
    torch.manual_seed(5)
    leaves = {"x": x} | dict(net.named_parameters())
    leaves |= {} if residual is None else {"residual": residual}
    leaves = {name: t for name, t in leaves.items() if t.requires_grad}
    y = net(x) if residual is None else net(x, residual)
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    found = torch.autograd.grad(y, list(leaves.values()), dy, **autograd)
    return {"y": y} | dict(zip(leaves, found, strict=True))
