"""A fused.Sequential beside the nn.Sequential of the same children, and their comparison."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fused


def layers(p: float = 0.0) -> list[nn.Module]:
    return [nn.Linear(16, 32), nn.LayerNorm(32), nn.GELU(), nn.Dropout(p), nn.Linear(32, 4)]


def pair(modules: list[nn.Module]) -> tuple[nn.Sequential, fused.Sequential]:
    plain = nn.Sequential(*modules)
    return plain, fused.Sequential(*modules)


def outcome(net: nn.Module, x: Tensor) -> list[Tensor | None]:
    """The output, and the gradients of the input and of every parameter."""
    x = x.detach().requires_grad_()
    y = net(x)
    leaves = [x, *(t for t in net.parameters() if t.requires_grad)]
    dy = torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(y)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy, allow_unused=True)]


def assert_close(found: list[Tensor | None], expected: list[Tensor | None], within: float) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            # A sum over the rows grows with them.
            scale = max(1.0, float(theirs.abs().max())) if theirs.numel() else 1.0
            torch.testing.assert_close(ours, theirs, rtol=within, atol=within * scale)


def assert_same(
    plain: nn.Module, net: nn.Module, *shape: int, x: Tensor | None = None, within: float = 1e-5
) -> None:
    """The same output and gradients for one input, random and of this shape where none is given."""
    if x is None:
        x = torch.randn(*(shape or (6, 16)))
    assert_close(outcome(net, x), outcome(plain, x), within)
