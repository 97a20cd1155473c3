"""Cells of the benchmark with what is measured in them, small."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

P = 0.25


def make_cell(**changes: Any) -> Any:
    from bench.cells import Cell

    return replace(
        Cell("norm", "N-A-D", "layer", "gelu", "float32", 300, 0, 96, P, "training"), **changes
    )


def make_all(cell: Any) -> tuple[Any, Any, dict[str, Any]]:
    """The chain, the inputs and the providers of a cell by name."""
    from bench.harness import make_ring
    from bench.providers import make_chain, make_providers

    torch.manual_seed(0)
    chain = make_chain(cell, "cpu")
    (inputs,) = make_ring(cell, "cpu")
    found = make_providers(cell, chain, inputs)
    return chain, inputs, {provider.name: provider for provider in found}


def _drop(y: Tensor, p: float) -> Tensor:
    return nn.functional.dropout(y, p)


class DropsAnew(torch.autograd.Function):
    """Dropout whose backward draws another mask than its forward."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return _drop(y, P)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return _drop(dy, P)


class WeighsGradient(torch.autograd.Function):
    """A gradient that is 1 % too large."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy * 1.01


WRONG: dict[str, tuple[Callable[[nn.Sequential, Tensor], Tensor], str]] = {
    "output": (lambda chain, x: chain(x) * 1.01, "output: relative error"),
    "nan": (lambda chain, x: chain(x) * float("nan"), "the output is not finite"),
    "one row": (lambda chain, x: torch.cat([chain(x[:-1]), x[-1:]]), "output: relative error"),
    "dtype": (lambda chain, x: chain(x).double(), "torch.float64"),
    "gradient": (lambda chain, x: WeighsGradient.apply(chain(x)), "gradient of x"),
    "no dropout": (lambda chain, x: chain[:2](x), "dropout keeps 1.0"),
    "other p": (lambda chain, x: _drop(chain[:2](x), 0.3), "should be 0.75000 ±"),
    "scale": (lambda chain, x: chain(x) * (1 - P), "output: relative error"),
    "masks": (lambda chain, x: DropsAnew.apply(chain[:2](x)), "gradient of x"),
}


def make_with_wrong_eager(name: str) -> Callable[..., list[Any]]:
    """Fused, and a provider called eager that computes something else."""
    from bench.providers import make_providers

    def make(cell: Any, chain: nn.Sequential, inputs: Any) -> list[Any]:
        ours, eager, *_ = make_providers(cell, chain, inputs)
        call = WRONG[name][0]
        return [ours, replace(eager, forward=lambda given: call(chain, given.x))]

    return make
