"""The gate of check.py for norms over samples or positions, where every element has a part in all.

The oracle is torch in float64 at full size.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from .cells import Cell
from .check import LIMITS, CheckError, _compare, _keep_mask
from .providers import Inputs, Provider

# What the running statistics are set to, so that an update that is left out shows.
RUNNING = {"running_mean": 1.0, "running_var": 3.0}
# So near to a kink of the activation, rounding decides on which side of it an element falls; the
# terms of which it is the difference are up to about ten.
KINK = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def check_channel(provider: Provider, cell: Cell, chain: nn.Sequential, inputs: Inputs) -> float:
    """Runs the provider once and compares output, running statistics and gradients.

    Returns:
        The largest relative error.

    Raises:
        CheckError: the provider does not compute the chain, or gives another memory format.
    """
    dtype = getattr(torch, cell.dtype)
    limits = LIMITS[dtype]
    for name, buffer in chain[0].named_buffers():
        buffer.fill_(RUNNING.get(name, 0))
    norm, activation = (copy.deepcopy(child).double() for child in chain[:2])
    with torch.set_grad_enabled(cell.needs_gradients):
        y = provider.forward(inputs)
    gradients = provider.backward(inputs, y) if provider.backward else ()
    y = y.detach()
    if y.shape != inputs.dy.shape or y.dtype != dtype:
        raise CheckError(f"the output is {tuple(y.shape)} {y.dtype}")
    if provider.name == "fused":  # torch's InstanceNorm returns contiguous images
        _same_layout("the output", y, inputs.x)
        for dx in gradients[:1]:
            _same_layout("the gradient of x", dx, inputs.x)
    if not bool(y.isfinite().all()):
        raise CheckError("the output is not finite")

    x = inputs.x.detach().double().requires_grad_()
    with torch.set_grad_enabled(cell.needs_gradients):
        h = norm(x)
        want = activation(h)
    if cell.drops:
        keep = _keep_mask(y, want.detach(), cell.p)
        want = want * (keep.double() * provider.keep_scale)
    worst = _compare("output", y, want.detach(), limits)
    for (name, got), expected in zip(chain[0].named_buffers(), norm.buffers(), strict=True):
        worst = max(worst, _compare(name, got, expected.double(), limits))
    if not gradients:
        return worst
    right = torch.autograd.grad(want, [x, *norm.parameters()], inputs.dy.double())
    names = ["x", *(name for name, _ in norm.named_parameters())]
    for name, got, expected in zip(names, gradients, right, strict=True):
        pair = (got, expected)
        if name == "x":
            pair = _beside_the_kink(cell, h.detach(), *pair)
        worst = max(worst, _compare(f"gradient of {name}", *pair, limits))
    return worst


def _same_layout(what: str, t: Tensor, x: Tensor) -> None:
    """Raises where the strides are not those of the input."""
    if t.stride() != x.stride():
        raise CheckError(f"{what} has strides {t.stride()}, the input {x.stride()}")


def _beside_the_kink(cell: Cell, h: Tensor, got: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """Both gradients without the elements whose activation is at its kink."""
    if cell.activation != "relu":
        return got, expected
    far = h.abs() > KINK[getattr(torch, cell.dtype)]
    return got[far], expected[far]
