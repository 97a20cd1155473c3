"""The gate of check.py where a row of the output depends on others: the norms over samples or
positions, and networks of several chains.

The oracle is torch in float64 at full size.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from .cells import Cell
from .check import LIMITS, CheckError, _compare, _keep_mask, check_form
from .providers import Inputs, Provider

# What the running statistics are set to, so that an update that is left out shows.
RUNNING = {"running_mean": 1.0, "running_var": 3.0}
# A sum is zero where it is smaller than this share of its terms, in float64.
VANISHING = 1e-10
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
    if cell.blocks > 1 and cell.drops:
        return _check_without_dropout(provider, cell, chain, inputs)
    dtype = getattr(torch, cell.dtype)
    limits = LIMITS[dtype]
    for name, buffer in chain.named_buffers():
        buffer.fill_(RUNNING.get(name.rpartition(".")[2], 0))
    layers = [copy.deepcopy(c).double() for c in chain if not isinstance(c, nn.Dropout)]
    oracle = nn.Sequential(*layers)
    with torch.set_grad_enabled(cell.needs_gradients):
        y = provider.forward(inputs)
    gradients = provider.backward(inputs, y) if provider.backward else ()
    y = y.detach()
    check_form(y, inputs.dy, dtype)
    if provider.name == "fused" and cell.shape:  # torch's InstanceNorm returns contiguous images
        _same_layout("the output", y, inputs.x)
        for dx in gradients[:1]:
            _same_layout("the gradient of x", dx, inputs.x)

    x = inputs.x.detach().double().requires_grad_()
    with torch.set_grad_enabled(cell.needs_gradients):
        h = oracle[:-1](x)
        want = oracle[-1](h)
    if cell.drops:
        keep = _keep_mask(y, want.detach(), cell.p)
        want = want * (keep.double() * provider.keep_scale)
    worst = _compare("output", y, want.detach(), limits)
    for (name, got), expected in zip(chain.named_buffers(), oracle.buffers(), strict=True):
        worst = max(worst, _compare(name, got, expected.double(), limits))
    if not gradients:
        return worst
    right = torch.autograd.grad(want, [x, *oracle.parameters()], inputs.dy.double())
    names = ["x", *(name for name, _ in chain.named_parameters())]
    for name, got, expected in zip(names, gradients, right, strict=True):
        pair = (got, expected)
        if name == "x":
            pair = _beside_the_kink(cell, h.detach(), *pair)
        if _vanishes(name, *pair, inputs.dy, limits[0]):
            continue
        worst = max(worst, _compare(f"gradient of {name}", *pair, limits))
    return worst


def _check_without_dropout(
    provider: Provider, cell: Cell, chain: nn.Sequential, inputs: Inputs
) -> float:
    """Of several chains the output does not show what the inner ones have dropped."""
    dropouts = [child for child in chain if isinstance(child, nn.Dropout)]
    for child in dropouts:
        child.p = 0.0
    try:
        return check_channel(provider, replace(cell, p=0.0), chain, inputs)
    finally:
        for child in dropouts:
            child.p = cell.p


def _same_layout(what: str, t: Tensor, x: Tensor) -> None:
    """Raises where the strides are not those of the input."""
    if t.stride() != x.stride():
        raise CheckError(f"{what} has strides {t.stride()}, the input {x.stride()}")


def _vanishes(name: str, got: Tensor, expected: Tensor, dy: Tensor, limit: float) -> bool:
    """Whether the gradient is zero but for rounding, as that of a bias in front of batch norm.

    Raises:
        CheckError: it should be, and is not small beside the terms that it is the sum of.
    """
    terms = float(dy.double().abs().sum()) / dy.shape[1]
    if float(expected.abs().max()) > VANISHING * terms:
        return False
    if float(got.double().abs().max()) > limit * terms:
        raise CheckError(f"gradient of {name}: {float(got.abs().max()):.2g}, should vanish")
    return True


def _beside_the_kink(cell: Cell, h: Tensor, got: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """Both gradients without the elements whose activation is at its kink."""
    if cell.activation != "relu":
        return got, expected
    far = h.abs() > KINK[getattr(torch, cell.dtype)]
    return got[far], expected[far]
