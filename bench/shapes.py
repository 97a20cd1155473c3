"""Chains of two inputs: plain torch as models write it, and fused with the same parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

import fused

from .cells import Cell


class AddNorm(nn.Module):
    """As a transformer's sublayer ends; a pre-norm block goes on with both results."""

    def __init__(self, norm: nn.Module, p: float) -> None:
        super().__init__()
        self.norm, self.dropout = norm, nn.Dropout(p) if p else nn.Identity()

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        h = residual + self.dropout(x)
        return self.norm(h), h


class Shortcut(nn.Module):
    """As a ResNet's block ends."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.relu = norm, nn.ReLU(inplace=True)

    def forward(self, x: Tensor, identity: Tensor) -> Tensor:
        out = self.norm(x)
        out += identity
        return self.relu(out)


class Gate(nn.Module):
    """As the MLP of Llama has it."""

    def __init__(self, activation: str, p: float) -> None:
        super().__init__()
        self.activation, self.dropout = activation, nn.Dropout(p) if p else nn.Identity()

    def forward(self, gate: Tensor, value: Tensor) -> Tensor:
        return self.dropout(getattr(F, self.activation)(gate) * value)


def make_shape(cell: Cell, norm: nn.Module | None) -> nn.Module:
    """The cell's chain, in plain torch."""
    if norm is None:
        return Gate(cell.activation, cell.p)
    return Shortcut(norm) if cell.activation else AddNorm(norm, cell.p)


def fuse(cell: Cell, chain: nn.Module) -> Callable[..., Tensor | tuple[Tensor, Tensor]]:
    """The same by fused."""
    if isinstance(chain, Gate):
        gate = fused.functional.gate
        return lambda a, b: gate(b, a, cell.activation, cell.p, chain.training)
    ours: nn.Module
    if isinstance(chain, AddNorm):
        ours = fused.AddNorm(cell.N, cell.norm, cell.p)
    else:
        block = ours = fused.NormAct(cell.N, norm=cell.norm, activation=cell.activation)
    ours.norm = chain.norm
    ours.train(chain.training)
    return ours if isinstance(chain, AddNorm) else lambda x, identity: block(x, shortcut=identity)
