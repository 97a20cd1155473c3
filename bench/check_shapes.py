"""The gate of check.py for chains of two inputs (shapes.py), which may have two results.

The oracle is the chain itself in float64; where rows are apart, it sees a sample of them. Nothing
is compared that rounding decides: dy is zero where ReLU is at its kink, and what dropout drops from
a sum is not as small as rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .cells import Cell
from .check import LIMITS, CheckError, _compare, _keep_mask, check_form, sampled_rows
from .check_channel import KINK, RUNNING, _same_layout
from .providers import Inputs, Provider


class _Dropped(nn.Module):
    """In place of dropout: what the provider has kept."""

    def __init__(self, factor: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, z: Tensor) -> Tensor:
        return z * self.factor(z.detach())


def _far_from_kink(oracle: nn.Module, xs: list[Tensor], kink: float) -> Tensor:
    trial = copy.deepcopy(oracle)  # running statistics must not be updated twice
    trial.relu = nn.Identity()
    with torch.no_grad():
        return trial(*xs).abs() > kink


def check_shapes(provider: Provider, cell: Cell, chain: nn.Module, inputs: Inputs) -> float:
    """Runs the provider once and compares results, running statistics and gradients.

    Returns:
        The largest relative error.

    Raises:
        CheckError: the provider does not compute the chain, or gives another memory format.
    """
    dtype, images = getattr(torch, cell.dtype), cell.shape != ""
    limits, kink = LIMITS[dtype], KINK[dtype]
    for name, buffer in chain.named_buffers():
        buffer.fill_(RUNNING.get(name.rpartition(".")[2], 0))
    oracle = copy.deepcopy(chain).double()
    rows = (torch.arange(cell.sizes[0]) if images else sampled_rows(cell)).to(inputs.x.device)
    given = inputs.x, *inputs.more
    if cell.sums and cell.drops:
        x = inputs.x.detach()
        given = x.where(x.abs() > kink, kink).requires_grad_(cell.needs_gradients), *inputs.more
    xs = [t.detach()[rows].double().requires_grad_() for t in given]
    clear = _far_from_kink(oracle, xs, kink) if images else torch.tensor(True)
    dys = [(dy[rows] * clear.to(dy.device)) for dy in (inputs.dy, *inputs.more_dy)]
    sparse = [torch.zeros_like(inputs.dy).index_copy_(0, rows, dy) for dy in dys]
    sample = Inputs(given[0], sparse[0], given[1:], tuple(sparse[1:]))
    with torch.set_grad_enabled(cell.needs_gradients):
        found = provider.forward(sample)
    gradients = provider.backward(sample, found) if provider.backward else ()
    results = [t.detach() for t in (found if isinstance(found, tuple) else (found,))]
    for y in results:
        check_form(y, inputs.dy, dtype)
    if provider.name == "fused" and images:
        for t in (*results, *gradients[: len(xs)]):
            _same_layout("the output or a gradient", t, inputs.x)

    def factor(z: Tensor) -> Tensor:
        y, scale = results[-1][rows], provider.keep_scale
        if cell.sums:
            y = (y - xs[1].detach()).abs() > scale / 2 * z.abs()
        return _keep_mask(y, z, cell.p).double() * scale

    if cell.drops:
        oracle.dropout = _Dropped(factor)
    with torch.set_grad_enabled(cell.needs_gradients):
        want = oracle(*xs)
    wanted = want if isinstance(want, tuple) else (want,)
    worst = 0.0
    for name, y, right in zip(("output", "sum"), results, wanted, strict=False):
        worst = max(worst, _compare(name, y[rows], right.detach(), limits))
    for (name, got), right in zip(chain.named_buffers(), oracle.buffers(), strict=True):
        worst = max(worst, _compare(name, got, right.double(), limits))
    if not gradients:
        return worst
    parameters = dict(oracle.named_parameters())
    expected = torch.autograd.grad(wanted, [*xs, *parameters.values()], [d.double() for d in dys])
    others = torch.ones(len(inputs.x), dtype=torch.bool, device=rows.device)
    others[rows] = False
    for name, got, right in zip(("x", "other", *parameters), gradients, expected, strict=True):
        of_input = name in ("x", "other")
        if of_input and bool((got[others] != 0).any()):
            raise CheckError(f"the gradient of {name} is not zero in rows where dy is")
        of_rows = got[rows] if of_input else got
        worst = max(worst, _compare(f"gradient of {name}", of_rows, right, limits))
    return worst
