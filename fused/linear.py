"""Differentiation of a Linear that is one operator with what follows it (gemm.py says where).

Saved are x and weight, as nn.Linear saves them, and what the chain behind it saves (autograd.py).
Backward is that chain's one pass, which gives the gradient of z = x · weightᵀ + bias, and the
library's two products with it. A gradient that is itself to be differentiated is computed by the
differentiable reference, from z on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops, reference
from .autograd import (
    ChannelCodes,
    Codes,
    channel_epilogue_of,
    contiguous_rows,
    epilogue_of,
    wanted_sums,
)
from .spec import NORM_NAMES

# The inputs of which a chain has gradients, in the order of the functions' arguments.
Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


class LinearRowFunction(torch.autograd.Function):
    """y = residual + dropout(activation(norm(x · weightᵀ + bias))); weight must need a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        residual: Tensor | None,
        seed: Tensor | None,
        codes: Codes,
    ) -> Tensor:
        parameters = (bias, norm_weight, norm_bias)
        y, z, statistics = ops.linear_row_forward(
            x, weight, *parameters, residual, seed, True, *codes
        )
        kept = weight if ctx.needs_input_grad[0] else None
        ctx.save_for_backward(x, kept, z, norm_weight, norm_bias, statistics, seed)
        # Not saved: their values are not needed, so they may change; double backward needs their
        # places.
        ctx.weight, ctx.bias, ctx.codes = weight, bias, codes
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        needs, codes = ctx.needs_input_grad, ctx.codes
        x, weight, z, norm_weight, norm_bias, statistics, seed = ctx.saved_tensors
        dresidual = dy if needs[5] else None
        if torch.is_grad_enabled():

            def run(z: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None) -> Tensor:
                epilogue = epilogue_of(codes)
                return reference.row(z, epilogue, None, norm_weight, norm_bias, None, seed)

            inputs = (x, ctx.weight if weight is None else weight, ctx.bias, norm_weight, norm_bias)
            found = _differentiable(run, inputs, needs[:5], z, dy)
            return *found, dresidual, None, None
        wanted = wanted_sums(needs[2:5])
        dz, dnorm_weight, dnorm_bias, dbias = ops.row_backward(
            contiguous_rows(dy),
            *(z, None, norm_weight, norm_bias, statistics, seed, wanted),
            *codes,
        )
        return (
            None if weight is None else dz @ weight,
            dz.t() @ x,
            dbias if needs[2] else None,
            dnorm_weight if needs[3] else None,
            dnorm_bias if needs[4] else None,
            dresidual,
            None,
            None,
        )


class LinearChannelFunction(torch.autograd.Function):
    """The same with batch or group norm behind; `codes` are those of rows as channels-last memory.

    Returns:
        y; where `learns`, also mean and variance as the operator gives them, which are not
        differentiable.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        residual: Tensor | None,
        seed: Tensor | None,
        codes: ChannelCodes,
        learns: bool,
    ) -> Any:
        parameters = (bias, norm_weight, norm_bias)
        y, z, mean, variance = ops.linear_channel_forward(
            x, weight, *parameters, residual, seed, True, *codes
        )
        kept = weight if ctx.needs_input_grad[0] else None
        ctx.save_for_backward(x, kept, z, norm_weight, norm_bias, mean, variance, seed)
        ctx.weight, ctx.bias, ctx.codes = weight, bias, codes
        if not learns:
            return y
        ctx.mark_non_differentiable(mean, variance)
        ctx.set_materialize_grads(False)
        return y, mean, variance

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> Any:
        needs, codes = ctx.needs_input_grad, ctx.codes
        if dy is None:
            return (None,) * 9
        x, weight, z, norm_weight, norm_bias, mean, variance, seed = ctx.saved_tensors
        dresidual = dy if needs[5] else None
        batch = NORM_NAMES[codes[0]] == "batch"
        # Samples, positions, channels: batch norm's statistics are of positions.
        view = (1, *z.shape) if batch else (z.shape[0], 1, z.shape[1])
        if torch.is_grad_enabled():

            def run(z: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None) -> Tensor:
                given = (None, None, norm_weight, norm_bias, None, None, seed)
                epilogue = channel_epilogue_of(codes)
                return reference.channel(z.view(view), epilogue, *given).view(z.shape)

            inputs = (x, ctx.weight if weight is None else weight, ctx.bias, norm_weight, norm_bias)
            found = _differentiable(run, inputs, needs[:5], z, dy)
            return *found, dresidual, None, None, None
        wanted = wanted_sums((needs[2] and batch, *needs[3:5]))
        dz, dnorm_weight, dnorm_bias, dbias = ops.channel_backward(
            dy.contiguous().view(view),
            *(z.view(view), mean, variance, None, norm_weight, norm_bias, None, seed),
            *(wanted, False, *codes),
        )
        dz = dz.view(z.shape)
        if needs[2] and not batch:
            dbias = dz.sum(0)
        return (
            None if weight is None else dz @ weight,
            dz.t() @ x,
            dbias if needs[2] else None,
            dnorm_weight if needs[3] else None,
            dnorm_bias if needs[4] else None,
            dresidual,
            None,
            None,
            None,
        )


def _differentiable(
    run: Callable[[Tensor, Tensor | None, Tensor | None], Tensor],
    inputs: Inputs,
    needs: tuple[bool, ...],
    z: Tensor,
    dy: Tensor,
) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight, bias, norm_weight and norm_bias, with a graph of their own.

    Args:
        run: y of (z, norm_weight, norm_bias), differentiable.
        inputs: of weight the place alone where x needs no gradient.
        z: the value of x · weightᵀ + bias.
    """
    # Views, so that a tensor passed twice gets two gradients.
    asked = [
        t.view_as(t) if t is not None and need else None
        for t, need in zip(inputs, needs, strict=True)
    ]
    x, weight, bias, norm_weight, norm_bias = (
        given if found is None else found for given, found in zip(inputs, asked, strict=True)
    )
    assert x is not None and weight is not None
    with torch.enable_grad():
        if needs[0]:
            h = F.linear(x, weight, bias)
        else:
            h = z + F.linear(x, weight - weight.detach())
            h = h if bias is None else h + (bias - bias.detach())
        y = run(h, norm_weight, norm_bias)
        wanted = [t for t in asked if t is not None]
        found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True, allow_unused=True))
    return tuple(None if t is None else next(found) for t in asked)
