"""Differentiation: what is saved, what is recomputed, and double backward.

Saved are the inputs, the pre-norm z, the statistics of each row and the seed: no mask, no
activation, no normalised copy. Backward recomputes them in one pass. When the gradient itself is to
be differentiated (create_graph=True), it is computed by the differentiable reference instead.

There is no jvp: forward-mode differentiation and torch.func transforms take the reference
(functional.py), which torch differentiates in every mode.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops, reference
from .spec import ACTIVATION_NAMES, NORM_NAMES, Epilogue

Codes = tuple[int, float, int, float, float, int]
_Gradients = tuple[Tensor | None, ...]


def epilogue_of(codes: Codes) -> Epilogue:
    """The `Epilogue` behind the operators' scalars."""
    norm, eps, activation, alpha, beta, threshold = codes
    return Epilogue(NORM_NAMES[norm], eps, ACTIVATION_NAMES[activation], alpha, beta, threshold)


def contiguous_rows(t: Tensor) -> Tensor:
    """t itself when the elements of each row are adjacent, else a contiguous copy."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _differentiable(inputs: list[Tensor | None], dy: Tensor, run: Any) -> _Gradients:
    """Gradients of run(*inputs) that carry a graph of their own."""
    # Views, so that a tensor passed twice gets two gradients.
    views = [None if t is None else t.view_as(t) for t in inputs]
    wanted = [v for v in views if v is not None and v.requires_grad]
    with torch.enable_grad():
        y = run(*views)
        found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True, allow_unused=True))
    return tuple(next(found) if v is not None and v.requires_grad else None for v in views)


def _backward(
    dy: Tensor,
    z: Tensor,
    parameters: tuple[Tensor | None, Tensor | None, Tensor | None],
    statistics: tuple[Tensor, Tensor],
    seed: Tensor | None,
    codes: Codes,
) -> _Gradients:
    """dz, dbias, dnorm_weight, dnorm_bias; None where the parameter is absent."""
    bias, norm_weight, norm_bias = parameters
    dz, dnorm_weight, dnorm_bias, dbias = ops.row_backward(
        contiguous_rows(dy), z, bias, norm_weight, norm_bias, *statistics, seed, *codes
    )
    return (
        dz,
        None if bias is None else dbias,
        None if norm_weight is None else dnorm_weight,
        None if norm_bias is None else dnorm_bias,
    )


class RowFunction(torch.autograd.Function):
    """y = residual + dropout(activation(norm(z + bias))) over (rows, cols)."""

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
        y, mean, rstd = ops.row_forward(z, bias, norm_weight, norm_bias, residual, seed, *codes)
        ctx.save_for_backward(z, bias, norm_weight, norm_bias, mean, rstd, seed)
        ctx.codes = codes
        ctx.has_residual = residual is not None
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        z, bias, norm_weight, norm_bias, mean, rstd, seed = ctx.saved_tensors
        dresidual = dy if ctx.has_residual else None
        if torch.is_grad_enabled():
            epilogue = epilogue_of(ctx.codes)

            def run(z: Tensor, bias: Any, norm_weight: Any, norm_bias: Any) -> Tensor:
                return reference.row(z, epilogue, bias, norm_weight, norm_bias, None, seed)

            gradients = _differentiable([z, bias, norm_weight, norm_bias], dy, run)
        else:
            gradients = _backward(
                dy, z, (bias, norm_weight, norm_bias), (mean, rstd), seed, ctx.codes
            )
        return *gradients, dresidual, None, None


class LinearRowFunction(torch.autograd.Function):
    """The same with z = x · weightᵀ; x (rows, K), weight (cols, K)."""

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
        z = torch.mm(x, weight.t())
        y, mean, rstd = ops.row_forward(z, bias, norm_weight, norm_bias, residual, seed, *codes)
        ctx.save_for_backward(x, weight, bias, norm_weight, norm_bias, z, mean, rstd, seed)
        ctx.codes = codes
        ctx.has_residual = residual is not None
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, bias, norm_weight, norm_bias, z, mean, rstd, seed = ctx.saved_tensors
        dresidual = dy if ctx.has_residual else None
        if torch.is_grad_enabled():
            epilogue = epilogue_of(ctx.codes)

            def run(x: Tensor, weight: Tensor, bias: Any, scale: Any, shift: Any) -> Tensor:
                z = torch.mm(x, weight.t())
                return reference.row(z, epilogue, bias, scale, shift, None, seed)

            gradients = _differentiable([x, weight, bias, norm_weight, norm_bias], dy, run)
            return *gradients, dresidual, None, None
        dz, dbias, dnorm_weight, dnorm_bias = _backward(
            dy, z, (bias, norm_weight, norm_bias), (mean, rstd), seed, ctx.codes
        )
        assert dz is not None
        dx = torch.mm(dz, weight) if ctx.needs_input_grad[0] else None
        dweight = torch.mm(dz.t(), x) if ctx.needs_input_grad[1] else None
        return dx, dweight, dbias, dnorm_weight, dnorm_bias, dresidual, None, None
