"""How a chain with a norm over samples or positions runs: batch, group and instance norm.

An input of any rank is seen as three dimensions in memory order, so that nothing is copied:
(samples, channels, positions), or (samples, positions, channels) where the channels are the last
dimension or the memory format is channels-last. Then one operator runs the chain, and the running
statistics follow from the statistics that it returns.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import gemm, linear_channel, ops, synchronize
from .autocast import AUTOCAST_FLOAT32_NORMS, float32_under_autocast
from .autograd import ChannelCodes, ChannelFunction, Codes
from .channel_composite import BATCH, elements_of, run_composite
from .checks import few_values
from .dispatch import (
    needs_gradient,
    norm_alone,
)
from .gated import gate
from .layout import Layout, apply_layout, layout_of, undo_layout
from .random import draw_seed
from .recording import composite, is_compiling
from .running import ChannelNorm, update_running
from .spec import NORM_CODES, is_gated

_INSTANCE = NORM_CODES["instance"]


def run_channel(
    x: Tensor,
    channel_dim: int,
    norm: ChannelNorm,
    codes: Codes,
    *,
    bias: Tensor | None = None,
    channel_dropout: bool = False,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    seed: Tensor | None = None,
    reuse: bool = False,
) -> Tensor:
    """residual + dropout(activation(norm(x))), and the update of the running statistics.

    Args:
        x: any rank ≥ 1; its channels are dimension 1 or, with channel_dim -1, the last.
        codes: as for the row operators; the norm's code is that of `norm`. A gated activation
            halves the channels of the result and of the residual.
        bias: (channels,), which x contains already and whose gradient is asked for here.
        residual: of x's shape, or None.
        mask: bool, x's shape without the channels, or None; needs channel_dim -1.
        seed: int64 (1,); drawn where the chain drops and None is given.
        reuse: nothing else needs x, so that its memory may become the result's.
    """
    if float32_under_autocast(
        x.device.type, x.dtype, norm.name in AUTOCAST_FLOAT32_NORMS, codes[2]
    ):
        x = x.float()
    if residual is not None and residual.dtype != x.dtype:
        y = run_channel(
            x,
            channel_dim,
            norm,
            codes,
            bias=bias,
            channel_dropout=channel_dropout,
            mask=mask,
            seed=seed,
        )
        y = residual + y
        return y if mask is None else torch.where(mask.unsqueeze(-1), y, 0)
    if is_gated(codes[2]):
        assert norm.name is not None  # else the chain is one along rows
        alone = norm_alone(codes)
        h = run_channel(x, channel_dim, norm, alone, bias=bias, mask=mask, reuse=reuse)
        return _gate(h, channel_dim, codes, channel_dropout, residual, mask, seed)
    if norm.virtual_batch_size is not None and norm.mean is None:
        parts = math.ceil(x.shape[0] / norm.virtual_batch_size)
        if parts > 1:
            return _run_virtual_batches(
                x, channel_dim, norm, codes, parts, channel_dropout, residual, mask, seed
            )
    apart = channel_dropout or norm.name not in ("batch", None)
    layout = layout_of(x, channel_dim, apart)
    channels = layout.view[2 if layout.channels_last else 1]
    groups = norm.groups if norm.name == "group" else channels
    scalars = (codes[0], groups, layout.channels_last, *codes[1:], channel_dropout)
    reuse = reuse and not is_compiling()
    return _run(x, layout, norm, scalars, bias, residual, mask, seed, reuse)


def run_linear_channel(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    channel_dim: int,
    norm: ChannelNorm,
    codes: Codes,
    **options: Any,
) -> Tensor:
    """`run_channel` of x · weightᵀ + bias; channel_dim is that of the product."""
    given = (channel_dim, norm, codes, options)
    if gemm.enabled and linear_channel.serves_linear_channel(x, weight, bias, *given):
        return linear_channel.run_linear_channel(x, weight, bias, norm, codes, **options)
    # The gradient of the bias comes with the others, unless the sum over processes, the parts of a
    # batch or the other channels of a group are in it.
    own = (
        bias is not None
        and bias.requires_grad
        and (channel_dim == -1 or x.dim() == 2)
        and norm.name != "group"
        and not norm.across
        and norm.virtual_batch_size is None
        and torch.is_grad_enabled()
        and not composite(x)
    )
    z = F.linear(x, weight, bias.detach() if own and bias is not None else bias)
    bias = bias if own else None
    return run_channel(z, channel_dim, norm, codes, bias=bias, reuse=True, **options)


def drop_channels(
    y: Tensor,
    channel_dim: int,
    threshold: int,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """Channel dropout behind a norm along rows, and what is added after it."""
    codes = (0, 0.0, 0, 0.0, 0.0, threshold)
    return run_channel(
        y,
        channel_dim,
        ChannelNorm(),
        codes,
        channel_dropout=True,
        residual=residual,
        mask=mask,
        seed=seed,
        reuse=True,
    )


def _gate(
    h: Tensor,
    channel_dim: int,
    codes: Codes,
    channel_dropout: bool,
    residual: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
) -> Tensor:
    """What follows the norm, of the halves of the channels."""
    if channel_dropout and codes[5]:
        y = gate(h, channel_dim, (*codes[:5], 0), None, None)
        return drop_channels(y, channel_dim, codes[5], residual, mask, seed)
    y = gate(h, channel_dim, codes, residual, seed)
    return y if mask is None else torch.where(mask.unsqueeze(-1), y, 0)


def _run_virtual_batches(
    x: Tensor,
    channel_dim: int,
    norm: ChannelNorm,
    codes: Codes,
    parts: int,
    channel_dropout: bool,
    residual: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
) -> Tensor:
    """Batch norm over parts of the batch as torch.chunk makes them, one after another."""
    samples = x.shape[0]
    size = math.ceil(samples / parts)
    if samples % size or channel_dim != -1 or mask is not None or channel_dropout:
        others = [None if t is None else t.split(size) for t in (residual, mask)]
        whole = replace(norm, virtual_batch_size=None)
        outputs = []
        for i, piece in enumerate(x.split(size)):
            reason = few_values(whole, tuple(piece.shape), channel_dim)
            if reason:
                raise ValueError(f"virtual_batch_size={norm.virtual_batch_size}: {reason}")
            outputs.append(
                run_channel(
                    piece,
                    channel_dim,
                    _after(whole, i, parts),
                    codes,
                    channel_dropout=channel_dropout,
                    residual=None if others[0] is None else others[0][i],
                    mask=None if others[1] is None else others[1][i],
                    seed=None if seed is None else seed + i,
                )
            )
        return torch.cat(outputs)
    # Equal parts: what batch norm is to a part, instance norm is to a sample.
    shape, channels = tuple(x.shape), x.shape[-1]
    layout = Layout(shape, (samples // size, size * math.prod(shape[1:-1]), channels), True)
    scalars = (_INSTANCE, channels, True, *codes[1:], False)
    return _run(x, layout, norm, scalars, None, residual, None, seed)


def _after(norm: ChannelNorm, part: int, parts: int) -> ChannelNorm:
    """The norm of one part of a batch; each part counts as an update of its own."""
    if norm.batches is None or norm.momentum is not None:
        return norm
    return replace(norm, batches=norm.batches * parts + part)


def _run(
    x: Tensor,
    layout: Layout,
    norm: ChannelNorm,
    codes: ChannelCodes,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    reuse: bool = False,
) -> Tensor:
    """The chain over the three dimensions of the layout."""
    if seed is None and codes[7]:
        seed = draw_seed(x.device)
    if mask is not None:
        mask = mask.reshape(layout.view[:2]).contiguous()
    mean, variance = norm.mean, norm.variance
    if mean is not None and variance is not None:
        # Constants, one for each channel, whatever the norm is called.
        mean, variance = mean.view(1, -1), variance.view(1, -1)
        codes = (BATCH, *codes[1:])
    across = norm.across and mean is None and synchronize.is_needed(norm.group)
    learns = norm.running_mean is not None and mean is None and (across or x.numel() > 0)
    if composite(x):
        return run_composite(
            x, layout, norm, codes, mean, variance, across, learns, residual, mask, seed
        )
    z = apply_layout(x, layout)
    residual = None if residual is None else apply_layout(residual, layout)
    parameters = norm.weight, norm.bias
    if across or needs_gradient(x, *parameters, bias, residual):
        if residual is z:  # the compiler takes no tensor twice
            residual = residual.view_as(residual)
        group = (norm.group or _world()) if across else None
        tensors = (z, bias, *parameters, residual, mean, variance, mask, seed)
        found = ChannelFunction.apply(*tensors, codes, group, learns)
        y, *rest = found if learns else (found,)
    elif mean is not None or norm.name is None:
        given = (mean, variance, *parameters, residual, mask, seed, *codes)
        if not reuse:
            return undo_layout(ops.channel_apply(z, *given), layout)
        ops.channel_apply_(z, *given)
        return undo_layout(z, layout)
    else:
        y, *rest = ops.channel_forward(z, *parameters, residual, mask, seed, *codes)
    y, statistics = undo_layout(y, layout), tuple(rest)
    if learns:
        update_running(norm, elements_of(layout, codes), *statistics)
    return y


def _world() -> Any:
    import torch.distributed as dist

    return dist.group.WORLD
