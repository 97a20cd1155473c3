"""Gradients that are to be differentiated again (create_graph=True): by plain torch operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Affine = tuple[Tensor | None, Tensor | None]
Run = Callable[[Tensor, Affine, Tensor | None], Tensor]


def differentiable(
    ctx: Any,
    run: Run,
    z: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    affine: Affine,
    shortcut: Tensor | None,
    dy: Tensor,
) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight, bias, norm_weight, norm_bias and shortcut, with a graph of their
    own.

    Args:
        run: y of (z, affine, shortcut), differentiable; affine: norm_weight and norm_bias.
        z: the value of x · weightᵀ + bias, or of x where there is no weight.
        x, weight: as saved: None where there is no weight, or where no gradient needs its value.
    """
    linear = ctx.weight is not None
    inputs = (
        x if linear else z,
        ctx.weight if weight is None else weight,
        *(ctx.bias, *affine, shortcut),
    )
    needs = ctx.needs_input_grad[:6]
    # Views, so that a tensor passed twice gets two gradients.
    views = [
        t.view_as(t) if t is not None and need else None
        for t, need in zip(inputs, needs, strict=True)
    ]
    first, weight, bias, norm_weight, norm_bias, shortcut = (
        given if found is None else found for given, found in zip(inputs, views, strict=True)
    )
    assert first is not None
    with torch.enable_grad():
        h = z if linear else first
        if linear and needs[0]:
            h = F.linear(first, weight, bias)
        else:  # z has these values already; their gradients are added
            if weight is not None:
                h = h + F.linear(first, weight - weight.detach())
            if bias is not None:
                own = bias - bias.detach()
                last = linear or z.dim() == 2 or ctx.spec.channels_last
                h = h + (own if last else own[:, None])
        y = run(h, (norm_weight, norm_bias), shortcut)
        wanted = [t for t in views if t is not None]
        found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True, allow_unused=True))
    return tuple(None if t is None else next(found) for t in views)
