"""Differentiation: what is saved, what is recomputed, and double backward.

A Linear in front stays torch's own node, so it saves what nn.Linear saves: x and weight, each only
where the other's gradient needs it. Beyond that are saved the pre-norm z, the statistics of each
row and the seed: no mask, no activation, no normalised copy. Backward recomputes them in one pass.
When the gradient itself is to be differentiated (create_graph=True), it is computed by the
differentiable reference instead.

There is no jvp: forward-mode differentiation and torch.func transforms take the reference
(dispatch.py), which torch differentiates in every mode.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops, reference
from .spec import ACTIVATION_NAMES, NORM_NAMES, Epilogue

Codes = tuple[int, float, int, float, float, int]


def epilogue_of(codes: Codes) -> Epilogue:
    """The `Epilogue` behind the operators' scalars."""
    norm, eps, activation, alpha, beta, threshold = codes
    return Epilogue(NORM_NAMES[norm], eps, ACTIVATION_NAMES[activation], alpha, beta, threshold)


def contiguous_rows(t: Tensor) -> Tensor:
    """t itself when the elements of each row are adjacent, else a contiguous copy."""
    return t if t.stride(-1) == 1 else t.contiguous()


class RowFunction(torch.autograd.Function):
    """y = residual + dropout(activation(norm(z))) over (rows, cols).

    z already contains the linear bias, of which it does not carry the gradient: `bias` is passed
    for that alone, because backward has its sum over the rows at hand.
    """

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        residual: Tensor | None,
        seed: Tensor | None,
        codes: Codes,
    ) -> Tensor:
        y, statistics = ops.row_forward(z, None, norm_weight, norm_bias, residual, seed, *codes)
        ctx.save_for_backward(z, norm_weight, norm_bias, statistics, seed)
        # Not saved: its value is not needed, so it may change; double backward needs its place.
        ctx.bias = bias
        ctx.codes = codes
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        needs = ctx.needs_input_grad
        dresidual = dy if needs[4] else None
        wanted = (
            (ops.WANT_NORM_WEIGHT if needs[2] else 0)
            | (ops.WANT_NORM_BIAS if needs[3] else 0)
            | (ops.WANT_BIAS if needs[1] else 0)
        )
        if not (needs[0] or wanted):
            return None, None, None, None, dresidual, None, None
        z, norm_weight, norm_bias, statistics, seed = ctx.saved_tensors
        if torch.is_grad_enabled():
            inputs = (z, ctx.bias, norm_weight, norm_bias)
            dz, dbias, dnorm_weight, dnorm_bias = _differentiable(
                inputs, needs[:4], seed, ctx.codes, dy
            )
        else:
            dz, dnorm_weight, dnorm_bias, dbias = ops.row_backward(
                contiguous_rows(dy),
                *(z, None, norm_weight, norm_bias, statistics, seed, wanted),
                *ctx.codes,
            )
        return (
            dz if needs[0] else None,
            dbias if needs[1] else None,
            dnorm_weight if needs[2] else None,
            dnorm_bias if needs[3] else None,
            dresidual,
            None,
            None,
        )


def _differentiable(
    inputs: tuple[Tensor | None, ...],
    needs: tuple[bool, ...],
    seed: Tensor | None,
    codes: Codes,
    dy: Tensor,
) -> tuple[Any, ...]:
    """The gradients of z, bias, norm_weight and norm_bias, with a graph of their own."""
    # Views, so that a tensor passed twice gets two gradients.
    asked = [
        t.view_as(t) if t is not None and need else None
        for t, need in zip(inputs, needs, strict=True)
    ]
    z, bias, norm_weight, norm_bias = (
        given if found is None else found for given, found in zip(inputs, asked, strict=True)
    )
    assert z is not None
    with torch.enable_grad():
        h = z if bias is None else z + (bias - bias.detach())  # z contains the bias
        y = reference.row(h, epilogue_of(codes), None, norm_weight, norm_bias, None, seed)
        wanted = [t for t in asked if t is not None]
        found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True, allow_unused=True))
    return tuple(None if t is None else next(found) for t in asked)
