"""Differentiation: what is saved, what is recomputed, and double backward.

`RowFunction` serves the norms along a row, `ChannelFunction` those over samples or positions. A
Linear in front is torch's own node, which saves what nn.Linear saves: x and weight, each only where
the other's gradient needs it; where gemm.py has one operator for both, the functions do the same.
Beyond that are saved the pre-norm z, the statistics and the seed: no mask, no activation, no
normalised copy. Backward recomputes them in one pass. When the gradient itself is to be
differentiated (create_graph=True), it is computed by the differentiable reference instead.

There is no jvp: forward-mode differentiation and torch.func transforms take the reference
(rows.py, channels.py), which torch differentiates in every mode.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..backends import ops
from ..backends.backend import as_asked, asked
from ..spec import NORM_CODES, WANT_BIAS, WANT_NORM_BIAS, WANT_NORM_WEIGHT, Spec
from . import reference, synchronize
from .double_backward import Affine, differentiable
from .layout import contiguous_rows

# The operators' `wanted`, by which of bias, norm_weight and norm_bias need a gradient.
_WANTED = {
    needs: WANT_BIAS * needs[0] | WANT_NORM_WEIGHT * needs[1] | WANT_NORM_BIAS * needs[2]
    for needs in product((False, True), repeat=3)
}


class RowFunction(torch.autograd.Function):
    """y = residual + dropout(activation(norm(z) + shortcut)) over (rows, cols).

    With a weight, z = x · weightᵀ + bias is one operator with the rest; the weight must need a
    gradient, and there is no shortcut. Without a weight, z = x already contains the bias: `bias` is
    passed so that backward, which has the sum over the rows, can return its gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        shortcut: Tensor | None,
        residual: Tensor | None,
        seed: Tensor | None,
        spec: Spec,
    ) -> Tensor:
        rest, scalars = (norm_weight, norm_bias, residual, seed), spec.row
        z = x
        linear: tuple[Tensor | None, ...] = (None, None)
        if weight is None:
            y, statistics = ops.row_forward(x, None, *rest, *scalars, shortcut)
        else:
            y, z, statistics = ops.linear_row_forward(x, weight, bias, *rest, True, *scalars)
            linear = x, (weight if ctx.needs_input_grad[0] else None)
        ctx.save_for_backward(z, norm_weight, norm_bias, shortcut, statistics, seed, *linear)
        # These are not saved: their values are not needed, so they may change. Double backward
        # needs the tensors themselves.
        ctx.weight, ctx.bias, ctx.spec, ctx.scalars = weight, bias, spec, scalars
        ctx.asked = asked() if x.is_cuda else None
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        needs = ctx.needs_input_grad
        dresidual = dy if needs[6] else None
        if not any(needs[:6]):
            return (None,) * 6 + (dresidual, None, None)
        z, norm_weight, norm_bias, shortcut, statistics, seed, x, weight = ctx.saved_tensors
        spec = ctx.spec
        if torch.is_grad_enabled():

            def run(h: Tensor, affine: Affine, shortcut: Tensor | None) -> Tensor:
                return reference.row(h, spec, None, *affine, None, seed, shortcut)

            affine = norm_weight, norm_bias
            found = differentiable(ctx, run, z, x, weight, affine, shortcut, dy)
            return *found, dresidual, None, None
        if dy.stride(-1) != 1:
            dy = contiguous_rows(dy)
        parameters = norm_weight, norm_bias, statistics, seed, _WANTED[needs[2:5]]
        backward: Callable[..., Any] = ops.row_backward
        if ctx.asked is not None:
            backward = partial(as_asked, ctx.asked, backward)
        given = (dy, z, None, *parameters, *ctx.scalars, shortcut)
        dx, dnorm_weight, dnorm_bias, dbias, dshortcut = backward(*given)
        if spec.norm is None:
            dshortcut = dx
        dweight = None
        if x is not None:
            dweight = dx.t() @ x
            dx = None if weight is None else dx @ weight
        return (
            dx if needs[0] else None,
            dweight,
            dbias if needs[2] else None,
            dnorm_weight if needs[3] else None,
            dnorm_bias if needs[4] else None,
            dshortcut if needs[5] else None,
            *(dresidual, None, None),
        )


class ChannelFunction(torch.autograd.Function):
    """residual + dropout(activation(norm(z) + shortcut)), z and residual as the operators take
    them.

    z = x, and bias, are as in `RowFunction`, the bias one for each channel. With a weight, x is
    (rows, inputs), and so are residual and result; rows are the positions of batch norm and the
    samples of group norm.

    Views are made outside, so that what the user gets is no view of a function's output, and may be
    written to in place. With `mean` and `variance` given the norm is by constants, else by the
    statistics of z, over all processes of `group` where there is one.

    Returns:
        y; where `learns`, also mean, variance and count as the operators give them, which are not
        differentiable.
    """

    @staticmethod
    def forward(  # noqa: PLR0913  autograd takes no tuples of tensors
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        shortcut: Tensor | None,
        residual: Tensor | None,
        mean: Tensor | None,
        variance: Tensor | None,
        mask: Tensor | None,
        seed: Tensor | None,
        spec: Spec,
        group: Any,
        learns: bool,
    ) -> Any:
        parameters = norm_weight, norm_bias, residual, mask, seed
        scalars = spec.channel
        constant = mean is not None or spec.norm is None
        z = x
        linear: tuple[Tensor | None, ...] = (None, None)
        found: tuple[Tensor, ...] = ()
        if weight is not None:
            given = (norm_weight, norm_bias, residual, seed)
            y, z, *rest = ops.linear_channel_forward(x, weight, bias, *given, True, *scalars)
            found = (*rest, rest[0].new_empty(0))
            linear = x, (weight if ctx.needs_input_grad[0] else None)
        elif constant:
            y = ops.channel_apply(z, mean, variance, *parameters, *scalars, shortcut)
        elif group is not None:
            layout = NORM_CODES[spec.norm], spec.groups, spec.channels_last
            local = ops.channel_statistics(z, mask, *layout)
            found = synchronize.merge_statistics(z, spec.channels_last, local, group)
            y = ops.channel_apply(z, *found[:2], *parameters, *scalars, shortcut)
        else:
            y, *rest = ops.channel_forward(z, *parameters, *scalars, shortcut)
            found = tuple(rest)
        statistics = (mean, variance, None) if constant else found
        ctx.save_for_backward(z, norm_weight, norm_bias, shortcut, *statistics, mask, seed, *linear)
        ctx.weight, ctx.bias, ctx.spec, ctx.scalars = weight, bias, spec, scalars
        ctx.asked = asked() if x.is_cuda else None
        ctx.group, ctx.constant = group, constant
        if not learns:
            return y
        ctx.mark_non_differentiable(*found)
        ctx.set_materialize_grads(False)
        return y, *found

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> Any:
        needs, spec, none = ctx.needs_input_grad, ctx.spec, (None,) * 7
        if dy is None:
            return (None,) * 7 + none
        z, norm_weight, norm_bias, shortcut, mean, variance, count, mask, seed, x, weight = (
            ctx.saved_tensors
        )
        dy = dy.contiguous()  # a gradient may come expanded, or laid out otherwise
        dresidual = None
        if needs[6]:
            dresidual = dy if mask is None else torch.where(mask[:, :, None], dy, 0)
        if not any(needs[:6]):
            return (None,) * 6 + (dresidual, *none)
        batch = spec.norm == "batch"
        if x is not None:  # samples, positions, channels
            view = (1, *z.shape) if batch else (z.shape[0], 1, z.shape[1])
            z, dy = z.view(view), dy.view(view)
        parameters = norm_weight, norm_bias, mask, seed
        dx = dweight = dbias = dnorm_weight = dnorm_bias = dshortcut = None
        if torch.is_grad_enabled():
            if ctx.group is not None:
                raise RuntimeError(
                    "batch norm across processes cannot be differentiated twice; leave"
                    " create_graph out, or use a norm within the process"
                )
            known = (mean, variance) if ctx.constant else (None, None)

            def run(h: Tensor, affine: Affine, shortcut: Tensor | None) -> Tensor:
                given = (*known, *affine, None, mask, seed, shortcut)
                return reference.channel(h.view(z.shape), spec, *given)

            own = z if x is None else z.view(len(x), -1)
            affine = norm_weight, norm_bias
            found = differentiable(ctx, run, own, x, weight, affine, shortcut, dy)
            return *found, dresidual, *none
        if ctx.group is not None:
            statistics, scalars = (mean, variance), ctx.scalars
            given = (dy, z, *statistics, *parameters, *scalars, shortcut)
            sums, dshortcut = as_asked(ctx.asked, ops.channel_sums, *given)
            if shortcut is not None:
                dy, scalars = dshortcut, spec.norm_alone.channel
            # Of this process alone, as for any parameter: DistributedDataParallel averages them.
            dnorm_weight = sums[1].to(norm_weight.dtype) if needs[3] else None
            dnorm_bias = sums[0].to(norm_bias.dtype) if needs[4] else None
            total = synchronize.add_up(sums, ctx.group)
            sums = (*statistics, total, count)
            dx = as_asked(ctx.asked, ops.channel_gradient, dy, z, *sums, *parameters, *scalars)
        else:
            if count is not None and not count.numel():
                count = None
            # A group's statistics also contain the bias of its other channels.
            later = needs[2] and spec.norm == "group"
            wanted = _WANTED[(needs[2] and not later, *needs[3:5])]
            given = (mean, variance, count, *parameters, wanted, ctx.constant)
            backward: Callable[..., Any] = ops.channel_backward
            if ctx.asked is not None:
                backward = partial(as_asked, ctx.asked, backward)
            given = (dy, z, *given, *ctx.scalars, shortcut)
            dx, dnorm_weight, dnorm_bias, dbias, dshortcut = backward(*given)
            if spec.norm is None:
                dshortcut = dx
            if later:
                dbias = dx.sum((0, 1))
        if x is not None:
            dz = dx.view(len(x), -1)
            dweight = dz.t() @ x
            dx = None if weight is None else dz @ weight
        return (
            dx if needs[0] else None,
            dweight,
            dbias if needs[2] else None,
            dnorm_weight if needs[3] else None,
            dnorm_bias if needs[4] else None,
            dshortcut if needs[5] else None,
            *(dresidual, *none),
        )
