"""Differentiation: what is saved, what is recomputed, and double backward.

`RowFunction` serves the norms along a row, `ChannelFunction` those over samples or positions.
A Linear in front stays torch's own node, so it saves what nn.Linear saves: x and weight, each only
where the other's gradient needs it. Beyond that are saved the pre-norm z, the statistics of each
row and the seed: no mask, no activation, no normalised copy. Backward recomputes them in one pass.
When the gradient itself is to be differentiated (create_graph=True), it is computed by the
differentiable reference instead.

There is no jvp: forward-mode differentiation and torch.func transforms take the reference
(dispatch.py), which torch differentiates in every mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops, reference, synchronize
from .backend import request
from .spec import (
    ACTIVATION_NAMES,
    NORM_NAMES,
    WANT_BIAS,
    WANT_NORM_BIAS,
    WANT_NORM_WEIGHT,
    ChannelEpilogue,
    Epilogue,
)

Codes = tuple[int, float, int, float, float, int]
ChannelCodes = tuple[int, int, bool, float, int, float, float, int, bool]


def epilogue_of(codes: Codes) -> Epilogue:
    """The `Epilogue` behind the operators' scalars."""
    norm, eps, activation, alpha, beta, threshold = codes
    return Epilogue(NORM_NAMES[norm], eps, ACTIVATION_NAMES[activation], alpha, beta, threshold)


def channel_epilogue_of(codes: ChannelCodes) -> ChannelEpilogue:
    """The `ChannelEpilogue` behind the channel operators' scalars."""
    norm, groups, channels_last, *rest, channel_dropout = codes
    row = epilogue_of((norm, *rest))  # type: ignore[arg-type]
    return ChannelEpilogue(
        *(row.norm, row.eps, row.activation, row.alpha, row.beta, row.threshold),
        groups=groups,
        channels_last=channels_last,
        channel_dropout=channel_dropout,
    )


def wanted_sums(needs: Sequence[bool]) -> int:
    """The operators' `wanted`, from which of bias, norm_weight and norm_bias need a gradient."""
    bits = (WANT_BIAS, WANT_NORM_WEIGHT, WANT_NORM_BIAS)
    return sum(bit for bit, need in zip(bits, needs, strict=True) if need)


def contiguous_rows(t: Tensor) -> Tensor:
    """t itself when the elements of each row are adjacent, else a contiguous copy."""
    # Not contiguous(), which takes an empty tensor of any strides for contiguous.
    return t if t.stride(-1) == 1 else t.clone(memory_format=torch.contiguous_format)


def _asked(t: Tensor) -> str | None:
    """The backend asked for, where backward must be told: it has threads of its own for GPUs."""
    # The compiler cannot read a request.
    return request.get() if t.is_cuda and not torch.compiler.is_dynamo_compiling() else None


def _call(asked: str | None, operator: Callable[..., Any], *args: Any) -> Any:
    """Calls an operator in backward as if what `_asked` gave in forward were asked for here."""
    if asked is None or asked == request.get():
        return operator(*args)
    before = request.set(asked)
    try:
        return operator(*args)
    finally:
        request.reset(before)


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
        ctx.codes, ctx.asked = codes, _asked(z)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        needs = ctx.needs_input_grad
        dresidual = dy if needs[4] else None
        wanted = wanted_sums(needs[1:4])
        if not (needs[0] or wanted):
            return None, None, None, None, dresidual, None, None
        z, norm_weight, norm_bias, statistics, seed = ctx.saved_tensors
        if torch.is_grad_enabled():
            inputs = (z, ctx.bias, norm_weight, norm_bias)
            dz, dbias, dnorm_weight, dnorm_bias = _differentiable(
                inputs, needs[:4], seed, ctx.codes, dy
            )
        else:
            dz, dnorm_weight, dnorm_bias, dbias = _call(
                *(ctx.asked, ops.row_backward, contiguous_rows(dy)),
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
    epilogue = epilogue_of(codes)

    def run(z: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None) -> Tensor:
        return reference.row(z, epilogue, None, norm_weight, norm_bias, None, seed)

    return _gradients_of(run, torch.add, inputs, needs, dy)


def _gradients_of(
    run: Callable[[Tensor, Tensor | None, Tensor | None], Tensor],
    add_bias: Callable[[Tensor, Tensor], Tensor],
    inputs: tuple[Tensor | None, ...],
    needs: tuple[bool, ...],
    dy: Tensor,
) -> tuple[Any, ...]:
    """The gradients of z, bias, norm_weight and norm_bias through `run`, differentiable."""
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
        # z contains the bias.
        h = z if bias is None else add_bias(z, bias - bias.detach())
        y = run(h, norm_weight, norm_bias)
        wanted = [t for t in asked if t is not None]
        found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True, allow_unused=True))
    return tuple(None if t is None else next(found) for t in asked)


class ChannelFunction(torch.autograd.Function):
    """residual + dropout(activation(norm(z))), z and residual as the operators take them.

    Views are made outside, so that what the user gets is no view of a function's output, and may be
    written to in place. `bias` is as in `RowFunction`, one for each channel. With `mean` and
    `variance` given the norm is by constants, else by the statistics of z, over all processes of
    `group` where there is one.

    Returns:
        y; where `learns`, also mean, variance and count as the operators give them, which are not
        differentiable.
    """

    @staticmethod
    def forward(  # noqa: PLR0913  autograd takes no tuples of tensors
        ctx: Any,
        z: Tensor,
        bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        residual: Tensor | None,
        mean: Tensor | None,
        variance: Tensor | None,
        mask: Tensor | None,
        seed: Tensor | None,
        codes: ChannelCodes,
        group: Any,
        learns: bool,
    ) -> Any:
        parameters = norm_weight, norm_bias, residual, mask, seed
        constant = mean is not None or codes[0] == 0
        found: tuple[Tensor, ...] = ()
        if constant:
            y = ops.channel_apply(z, mean, variance, *parameters, *codes)
        elif group is not None:
            local = ops.channel_statistics(z, mask, *codes[:3])
            found = synchronize.merge_statistics(z, codes[2], local, group)
            y = ops.channel_apply(z, *found[:2], *parameters, *codes)
        else:
            y, *rest = ops.channel_forward(z, *parameters, *codes)
            found = tuple(rest)
        statistics = (mean, variance, None) if constant else found
        ctx.save_for_backward(z, norm_weight, norm_bias, *statistics, mask, seed)
        ctx.bias, ctx.codes, ctx.group = bias, codes, group
        ctx.constant, ctx.asked = constant, _asked(z)
        if not learns:
            return y
        ctx.mark_non_differentiable(*found)
        ctx.set_materialize_grads(False)
        return y, *found

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> Any:
        needs, codes = ctx.needs_input_grad, ctx.codes
        gradients: list[Any] = [None] * 12
        if dy is None:
            return tuple(gradients)
        z, norm_weight, norm_bias, mean, variance, count, mask, seed = ctx.saved_tensors
        dy = dy.contiguous()  # a gradient may come expanded, or laid out otherwise
        if needs[4]:
            gradients[4] = dy if mask is None else torch.where(mask[:, :, None], dy, 0)
        wanted = wanted_sums(needs[1:4])
        if not (needs[0] or wanted):
            return tuple(gradients)
        parameters = norm_weight, norm_bias, mask, seed
        dbias = dnorm_weight = dnorm_bias = None
        if torch.is_grad_enabled():
            if ctx.group is not None:
                raise RuntimeError(
                    "batch norm across processes cannot be differentiated twice; leave"
                    " create_graph out, or use a norm within the process"
                )
            statistics = (mean, variance) if ctx.constant else (None, None)
            inputs = (z, ctx.bias, norm_weight, norm_bias)
            dz, dbias, dnorm_weight, dnorm_bias = _differentiable_channel(
                inputs, needs[:4], statistics, mask, seed, codes, dy
            )
        elif ctx.group is not None:
            statistics = mean, variance
            sums = _call(ctx.asked, ops.channel_sums, dy, z, *statistics, *parameters, *codes)
            # Of this process alone, as for any parameter: DistributedDataParallel averages them.
            dnorm_weight = sums[1].to(norm_weight.dtype) if needs[2] else None
            dnorm_bias = sums[0].to(norm_bias.dtype) if needs[3] else None
            total = synchronize.add_up(sums, ctx.group)
            given = (*statistics, total, count, *parameters)
            dz = _call(ctx.asked, ops.channel_gradient, dy, z, *given, *codes)
        else:
            if count is not None and not count.numel():
                count = None
            known = (mean, variance, count, *parameters, wanted, ctx.constant)
            dz, dnorm_weight, dnorm_bias, dbias = _call(
                ctx.asked, ops.channel_backward, dy, z, *known, *codes
            )
        gradients[0] = dz if needs[0] else None
        gradients[1] = dbias if needs[1] else None
        gradients[2] = dnorm_weight if needs[2] else None
        gradients[3] = dnorm_bias if needs[3] else None
        return tuple(gradients)


def _differentiable_channel(
    inputs: tuple[Tensor | None, ...],
    needs: tuple[bool, ...],
    statistics: tuple[Tensor | None, Tensor | None],
    mask: Tensor | None,
    seed: Tensor | None,
    codes: ChannelCodes,
    dy: Tensor,
) -> tuple[Any, ...]:
    """`_differentiable` for `ChannelFunction`."""
    epilogue = channel_epilogue_of(codes)

    def run(z: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None) -> Tensor:
        return reference.channel(z, epilogue, *statistics, norm_weight, norm_bias, None, mask, seed)

    def add_bias(z: Tensor, difference: Tensor) -> Tensor:
        return z + (difference if epilogue.channels_last else difference[:, None])

    return _gradients_of(run, add_bias, inputs, needs, dy)
