"""Add & norm: h = residual + dropout(z), y = norm(h), where the sum h is a result too.

One pass forward and one backward: the gradient of h joins that of the norm before it is stored,
and is the residual's; that of z is dropped from it. Kept for backward are h, which the caller has
anyway, the statistics and the seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import ops
from ..backends.backend import as_asked, asked, choose
from ..spec import NORM_CODES, WANT_BIAS, WANT_NORM_BIAS, WANT_NORM_WEIGHT, Spec
from . import by_torch, reference
from .autocast import autocast_dtype, cast_by_autocast, float32_under_autocast
from .layout import contiguous_rows
from .prepare import run
from .random import draw_seed
from .recording import composite, is_compiling
from .rows import apart, needs_gradient


class AddNormFunction(torch.autograd.Function):
    """y and h over (rows, cols). z contains the bias of its Linear already, if it has one: `bias`
    is passed so that backward, which has the sum over the rows, can return its gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        bias: Tensor | None,
        residual: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        seed: Tensor | None,
        spec: Spec,
    ) -> tuple[Tensor, Tensor]:
        ctx.scalars = NORM_CODES[spec.norm], spec.eps, spec.threshold
        given = residual, norm_weight, norm_bias, seed
        y, h, statistics = ops.add_norm_forward(z, *given, *ctx.scalars)
        ctx.save_for_backward(h, norm_weight, norm_bias, statistics, seed)
        ctx.spec, ctx.asked = spec, asked() if z.is_cuda else None
        ctx.set_materialize_grads(False)
        return y, h

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> Any:
        needs, spec = ctx.needs_input_grad, ctx.spec
        if dy is None and dh is None:
            return (None,) * 7
        h, norm_weight, norm_bias, statistics, seed = ctx.saved_tensors
        if dy is None or torch.is_grad_enabled():
            found = _by_reference(ctx, dy, dh, h, norm_weight, norm_bias, seed)
        else:
            wanted = WANT_BIAS * needs[1] | WANT_NORM_WEIGHT * needs[3] | WANT_NORM_BIAS * needs[4]
            dh = None if dh is None else contiguous_rows(dh)
            backward: Callable[..., Any] = ops.add_norm_backward
            if ctx.asked is not None:
                backward = partial(as_asked, ctx.asked, backward)
            parameters = norm_weight, norm_bias, statistics, seed, wanted
            dz, dresidual, dweight, dshift, dbias = backward(
                contiguous_rows(dy), dh, h, *parameters, *ctx.scalars
            )
            found = (dz if spec.threshold else dresidual), dbias, dresidual, dweight, dshift
        own = (g if need else None for g, need in zip(found, needs[:5], strict=True))
        return *own, None, None


def _by_reference(
    ctx: Any,
    dy: Tensor | None,
    dh: Tensor | None,
    h: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    seed: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The gradients of z, bias, residual and the norm's parameters by plain torch operators."""
    given = h, norm_weight, norm_bias
    found: list[Tensor | None] = [None, None, None]
    if dy is not None:
        with torch.enable_grad():
            views = [None if t is None else t.view_as(t) for t in given]
            needed = [t for t in views if t is not None and t.requires_grad]
            norm = Spec(ctx.spec.norm, ctx.spec.eps)
            y = reference.row(views[0], norm, None, *views[1:])  # type: ignore[arg-type]
            some = iter(torch.autograd.grad(y, needed, dy, create_graph=True))
            found = [None if t is None or not t.requires_grad else next(some) for t in views]
    total, dweight, dshift = found
    if dh is not None:
        total = dh if total is None else total + dh
    assert total is not None
    dz = total
    if ctx.spec.threshold:
        assert seed is not None
        dz = reference.dropout(total, ctx.spec.threshold, seed)
    return dz, dz.sum(0) if ctx.needs_input_grad[1] else None, total, dweight, dshift


def add_norm(
    spec: Spec,
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(norm(h), h) with h = residual + dropout(z), with eager's dtypes under autocast.

    Args:
        spec: its norm, "layer" or "rms", eps and threshold count.
        x: z, of any rank ≥ 1, or with weight (N, K) and bias (N,) z = x · weightᵀ + bias.
        residual: of z's shape.
        seed: int64 (1,); drawn where the chain drops and None is given.
    """
    device = x.device.type
    cast = None if weight is None else autocast_dtype(device)
    if cast is not None and weight is not None:
        x, weight = cast_by_autocast(x, cast), cast_by_autocast(weight, cast)
        bias = None if bias is None else cast_by_autocast(bias, cast)
    if (
        residual.dtype != x.dtype
        or composite(x)
        or float32_under_autocast(device, x.dtype, spec.norm)
        or (device == "cuda" and choose(device, x.dtype, x.get_device()) != "triton")
    ):
        # Two operations, whose own results say what dtypes they have. CUDA C++ has no other.
        add, norm = Spec(threshold=spec.threshold), Spec(spec.norm, spec.eps)
        h = run(add, x, weight, bias, residual=residual, seed=seed)
        return run(norm, h, norm_weight=norm_weight, norm_bias=norm_bias), h
    gradient = needs_gradient(x, weight, bias, residual, norm_weight, norm_bias)
    if weight is not None:
        # The gradient of the bias comes with those of the norm: no other pass over dz.
        own = bias is not None and gradient and bias.requires_grad
        x = F.linear(x, weight, bias.detach() if own and bias is not None else bias)
        bias = bias if own else None
    shape = x.shape
    rows = math.prod(shape[:-1])
    if (
        not spec.threshold
        and bias is None
        and not is_compiling(x)
        and by_torch.serves_row(Spec(spec.norm), x.numel(), x, gradient, False)
    ):
        h = residual + x
        return by_torch.row(h, norm_weight, norm_bias, None, Spec(spec.norm, spec.eps)), h
    z = contiguous_rows(x.reshape(rows, shape[-1]))
    residual = contiguous_rows(apart(residual, x).reshape(rows, shape[-1]))  # type: ignore[union-attr]
    if seed is None and spec.threshold:
        seed = draw_seed(x.device)
    given = residual, norm_weight, norm_bias, seed
    if gradient:
        y, h = AddNormFunction.apply(z, bias, *given, spec)
    else:
        scalars = NORM_CODES[spec.norm], spec.eps, spec.threshold
        y, h, _ = ops.add_norm_forward(z, *given, *scalars)
    return y.view(shape), h.view(shape)
