"""Whether a provider computes the chain: the gate before anything is timed.

The very call that will be timed is compared with the reference in float64, at full size. Rows
do not depend on each other, so the oracle sees a sample of them, spread over all threads and
blocks; dy is zero elsewhere, and the gradients of the parameters then depend on the sample alone. A
dropout mask is read off the output: each element must be zero, or the scale times the activation,
and the share that is kept must be that of the probability.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused.run import reference
from fused.spec import default_eps, make_spec

from .cells import Cell
from .providers import Inputs, Provider

SAMPLED_ROWS = 256
# Largest and root-mean-square error, relative to those of the oracle. Eager rounds to the dtype
# after each of up to five operators, and its LayerNorm sums the gradient of its bfloat16 weight in
# bfloat16, which alone is 2 % off; a wrong formula is far beyond.
LIMITS = {
    torch.float32: (2e-5, 1e-5),
    torch.float16: (2e-2, 6e-3),
    torch.bfloat16: (1e-1, 4e-2),
}
# Standard deviations that the kept share may be off; by chance once in 10^7.
DEVIATIONS = 5.5
CLEARLY_NOT_ZERO = 1e-3


class CheckError(Exception):
    """The provider does not compute the chain; it is not timed."""


def _compare(what: str, got: Tensor, want: Tensor, limits: tuple[float, float]) -> float:
    """The largest relative error; raises where a limit is passed or a value is not finite."""
    if torch.equal(got.double(), want):  # counters of batches may be zero
        return 0.0
    error = got.double() - want
    largest = float(error.abs().max() / want.abs().max())
    rms = float(error.norm() / want.norm())
    if largest <= limits[0] and rms <= limits[1]:
        return largest
    worst = int(error.abs().nan_to_num(nan=math.inf).argmax())
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), want.shape))
    raise CheckError(
        f"{what}: relative error {largest:.2g} (limit {limits[0]:.2g}), rms {rms:.2g} (limit "
        f"{limits[1]:.2g}); worst at {place}: {float(got[place]):.6g}, "
        f"should be {float(want[place]):.6g}"
    )


def _oracle(cell: Cell, chain: nn.Sequential, x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The chain without dropout in float64, differentiable in x and the parameters."""
    rest = list(parameters)
    z = F.linear(x, rest.pop(0), rest.pop(0)) if cell.has_linear else x
    eps = 0.0
    for child in chain:
        if isinstance(child, (nn.LayerNorm, nn.RMSNorm)):
            eps = default_eps(cell.norm, child.eps, getattr(torch, cell.dtype))
    epilogue = make_spec(cell.norm or None, eps, cell.activation or None, 0.0)
    weight = rest.pop(0) if cell.norm else None
    bias = rest.pop(0) if rest else None
    return reference.row(z, epilogue, None, weight, bias)


def _keep_mask(y: Tensor, undropped: Tensor, p: float) -> Tensor:
    """What the provider kept; raises where it is not a share of about 1 − p."""
    keep = y != 0
    counted = undropped.abs() > CLEARLY_NOT_ZERO
    share = float(keep[counted].double().mean())
    allowed = DEVIATIONS * math.sqrt(p * (1 - p) / int(counted.sum()))
    if not abs(share - (1 - p)) <= allowed:
        raise CheckError(f"dropout keeps {share:.5f}, should be {1 - p:.5f} ± {allowed:.5f}")
    return keep


def sampled_rows(cell: Cell) -> Tensor:
    """Up to SAMPLED_ROWS of the cell's, spread over all."""
    count = min(cell.M, SAMPLED_ROWS)
    return torch.linspace(0, cell.M - 1, count, dtype=torch.float64).long().unique()


def check_form(y: Tensor, dy: Tensor, dtype: torch.dtype) -> None:
    """Raises where an output has not the shape and dtype it should have, or is not finite."""
    if y.shape != dy.shape or y.dtype != dtype:
        raise CheckError(f"the output is {tuple(y.shape)} {y.dtype}")
    if not bool(y.isfinite().all()):
        raise CheckError("the output is not finite")


def check(provider: Provider, cell: Cell, chain: nn.Sequential, inputs: Inputs) -> float:
    """Runs the provider once and compares output and gradients with the oracle.

    Returns:
        The largest relative error.

    Raises:
        CheckError: the provider does not compute the chain.
    """
    limits = LIMITS[getattr(torch, cell.dtype)]
    rows = sampled_rows(cell).to(inputs.x.device)
    dy = torch.zeros_like(inputs.dy)
    dy[rows] = inputs.dy[rows]
    sample = Inputs(inputs.x, dy)
    with torch.set_grad_enabled(cell.needs_gradients):
        y = provider.forward(sample)
    gradients = provider.backward(sample, y) if provider.backward else ()

    y = y.detach()
    check_form(y, dy, getattr(torch, cell.dtype))
    x64 = inputs.x.detach()[rows].double().requires_grad_()
    parameters = [p.detach().double().requires_grad_() for p in chain.parameters()]
    want = _oracle(cell, chain, x64, parameters)
    if cell.drops:
        keep = _keep_mask(y[rows], want.detach(), cell.p)
        want = want * (keep.double() * provider.keep_scale)
    worst = _compare("output", y[rows], want.detach(), limits)
    if not gradients:
        return worst
    right = torch.autograd.grad(want, [x64, *parameters], dy[rows].double())
    dx = gradients[0]
    others = torch.ones(cell.M, dtype=torch.bool, device=rows.device)
    others[rows] = False
    if bool((dx[others] != 0).any()):
        raise CheckError("dx is not zero in rows where dy is")
    names = ["x", *(name for name, _ in chain.named_parameters())]
    for name, got, expected in zip(names, (dx[rows], *gradients[1:]), right, strict=True):
        worst = max(worst, _compare(f"gradient of {name}", got, expected, limits))
    return worst
