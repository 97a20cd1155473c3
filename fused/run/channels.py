"""Who runs a chain with batch, group or instance norm: the reference, torch's operators, or ours.

An input of any rank is seen as three dimensions in memory order, so that nothing is copied:
(samples, channels, positions), or (samples, positions, channels) where the channels are the last
dimension or the memory format is channels-last. Then one operator runs the chain, and the running
statistics follow from the statistics that it returns. As in rows.py, the tensors are prepared.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import gemm, ops
from ..spec import Spec
from . import by_torch, reference, synchronize
from .autograd import ChannelFunction
from .checks import few_values
from .layout import Layout, apply_layout, lay_out
from .random import draw_seed
from .rows import apart, needs_gradient, row
from .running import ChannelNorm, update_running

_MIXED = ("batch", None)  # to these a position of one sample is as one of another
Added = tuple[Tensor | None, Tensor | None]  # residual and shortcut


def channel(  # noqa: PLR0913  the chain's tensors, and how it runs
    spec: Spec,
    x: Tensor,
    channel_dim: int,
    norm: ChannelNorm,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    seed: Tensor | None = None,
    *,
    plain: bool = False,
    eager: bool = False,
    fresh: bool = False,
    shortcut: Tensor | None = None,
) -> Tensor:
    """residual + dropout(activation(norm(z) + shortcut)), and the update of the running statistics.

    Args:
        x: z, of any rank ≥ 1, or with weight and bias z = x · weightᵀ + bias; the channels of z are
            dimension 1 or, with channel_dim -1, the last.
        norm: that of `spec`. Its channels are not halved: a gate is another chain.
        mask: bool, x's shape without the channels, or None; needs channel_dim -1.
        seed: as in `row`.
        plain: the reference runs it.
        eager: nothing watches this call, so that sizes may decide and memory may be reused.
        fresh: nothing else needs x.
    """
    added = residual, shortcut
    if eager and mask is None:
        elements = x.numel()
        if weight is not None:
            elements = elements // max(1, x.shape[-1]) * weight.shape[0]
        if elements <= by_torch.LARGEST and by_torch.serves_channel(
            spec, elements, x, channel_dim, norm
        ):
            return _by_torch(spec, x, norm, weight, bias, added, seed)
    found = None
    given: Any = (spec, x, channel_dim, norm, weight, bias, residual, mask, plain)
    if weight is not None and (shortcut is not None or not _is_one_operator(*given)):
        # The gradient of the bias comes with the others, unless it depends on other processes, on
        # other parts of the batch or on other channels of a group.
        if (
            not plain
            and needs_gradient(bias)
            and (channel_dim == -1 or x.dim() == 2)
            and norm.name != "group"
            and not norm.across
            and norm.virtual_batch_size is None
        ):
            found = bias
        x = F.linear(x, weight, bias if found is None else found.detach())
        weight, bias, fresh = None, found, True
    if norm.virtual_batch_size is not None and norm.mean is None:
        parts = math.ceil(x.shape[0] / norm.virtual_batch_size)
        if parts > 1:
            return _virtual_batches(spec, x, channel_dim, norm, parts, added, mask, seed, plain)
    if weight is None:
        z, layout = lay_out(x, channel_dim, spec.channel_dropout or norm.name not in _MIXED)
    else:
        z, shape = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), (*x.shape[:-1], weight.shape[0])
        layout = Layout(shape, (len(z), 1, shape[-1]), True)
    channels = layout.view[2 if layout.channels_last else 1]
    groups = norm.groups if norm.name == "group" else channels
    spec = spec._replace(groups=groups, channels_last=layout.channels_last)
    return _over(spec, z, layout, norm, weight, bias, added, mask, seed, plain, fresh and eager)


def _over(
    spec: Spec,
    z: Tensor,
    layout: Layout,
    norm: ChannelNorm,
    weight: Tensor | None,
    bias: Tensor | None,
    added: Added,
    mask: Tensor | None,
    seed: Tensor | None,
    plain: bool,
    reuse: bool = False,
) -> Tensor:
    """The chain over the three dimensions of the layout, or of (rows, inputs) and a weight.

    reuse: nothing else needs z, so that its memory may become the result's.
    """
    if seed is None and spec.threshold:
        seed = draw_seed(z.device)
    if mask is not None:
        mask = mask.reshape(layout.view[:2]).contiguous()
    residual, shortcut = added
    if residual is not None:
        residual = apply_layout(residual, layout)
        if weight is not None:
            residual = residual.view(len(z), -1)
        residual = apart(residual, z)
    if shortcut is not None:
        shortcut = apart(apart(apply_layout(shortcut, layout), z), residual)
    mean, variance = norm.mean, norm.variance
    if mean is not None and variance is not None:
        # Constants, one for each channel, whatever the norm is called.
        mean, variance = mean.view(1, -1), variance.view(1, -1)
        spec = spec._replace(norm="batch")
    across = norm.across and mean is None and synchronize.is_needed(norm.group)
    learns = norm.running_mean is not None and mean is None and (across or z.numel() > 0)
    parameters = norm.weight, norm.bias
    found: tuple[Tensor, ...] = ()
    if plain:
        added = residual, shortcut
        y, found = _by_reference(spec, z, norm, mean, variance, across, learns, added, mask, seed)
    elif across or needs_gradient(z, weight, bias, *parameters, residual, shortcut):
        group = (norm.group or _world()) if across else None
        tensors = (z, weight, bias, *parameters, shortcut, residual, mean, variance, mask, seed)
        y = ChannelFunction.apply(*tensors, spec, group, learns)
        if learns:
            y, *found = y
    elif weight is not None:
        given = (z, weight, bias, *parameters, residual, seed, False)
        y, _, *found = ops.linear_channel_forward(*given, *spec.channel)
        found = (*found, z.new_empty(0))
    elif mean is not None or norm.name is None:
        constants = (mean, variance, *parameters, residual, mask, seed, *spec.channel, shortcut)
        if reuse:
            y = z
            ops.channel_apply_(y, *constants)
        else:
            y = ops.channel_apply(z, *constants)
    else:
        own = (*parameters, residual, mask, seed, *spec.channel, shortcut)
        y, *found = ops.channel_forward(z, *own)
    if learns:
        positions = layout.view[1 if layout.channels_last else 2]
        update_running(norm, positions * (layout.view[0] if spec.norm == "batch" else 1), *found)
    y = y.view(layout.shape)
    return y.movedim(-1, 1) if layout.channels_moved else y


def _by_torch(
    spec: Spec,
    x: Tensor,
    norm: ChannelNorm,
    weight: Tensor | None,
    bias: Tensor | None,
    added: Added,
    seed: Tensor | None,
) -> Tensor:
    """`channel` by torch's norm and, where something is dropped, by the row operator."""
    residual, shortcut = added
    z = x if weight is None else F.linear(x, weight, bias)
    h = by_torch.normalize(z, norm, spec.eps)
    h = h if shortcut is None else h + shortcut
    if not spec.threshold:
        return by_torch.activate(h, residual, spec)
    # A row of the mask is the positions of a channel, or the channels.
    rows = h.flatten(2) if h.dim() > 2 else h
    residual = None if residual is None else residual.reshape(rows.shape)
    return row(spec.without_norm, rows, residual=residual, seed=seed).view(h.shape)


def _by_reference(
    spec: Spec,
    z: Tensor,
    norm: ChannelNorm,
    mean: Tensor | None,
    variance: Tensor | None,
    across: bool,
    learns: bool,
    added: Added,
    mask: Tensor | None,
    seed: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """y, and what is learned, as the operators give them, by plain torch operators."""
    residual, shortcut = added
    parameters = norm.weight, norm.bias
    found: tuple[Tensor, ...] = ()
    if across:
        found = synchronize.differentiable_statistics(z, spec.channels_last, mask, norm.group)
        h = reference.normalize_channels(z, spec, *found[:2], *parameters)
        rest = (None, None, None, None, residual, mask, seed, shortcut)
        y = reference.channel(h, spec.without_norm, *rest)
    else:
        given = (mean, variance, *parameters, residual, mask, seed, shortcut)
        y = reference.channel(z, spec, *given)
    if learns and not across:
        known = reference.channel_statistics(z.detach(), spec, mask)
        found = (*known[:2], known[2] if mask is not None else z.new_empty(0))
    return y.contiguous(), tuple(t.detach() for t in found)


def _is_one_operator(
    spec: Spec,
    x: Tensor,
    channel_dim: int,
    norm: ChannelNorm,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    plain: bool,
) -> bool:
    """Whether a Linear and the chain behind it are one operator, where gemm.py says that it is."""
    if (
        not gemm.enabled
        or plain
        or norm.name not in ("batch", "group")
        or norm.mean is not None
        or norm.across
        or norm.virtual_batch_size is not None
        or mask is not None
        or spec.channel_dropout
        # Group norm has one position for each sample; more are not neighbours of one row.
        or not (x.dim() == 2 or (channel_dim == -1 and x.dim() > 2 and norm.name == "batch"))
        or x.numel() == 0
        or torch.is_autocast_enabled(x.device.type)
    ):
        return False
    # Frozen weights stay torch's: with them nn.Linear does not keep x.
    if not weight.requires_grad and needs_gradient(x, bias, norm.weight, norm.bias, residual):
        return False
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return gemm.serves(rows, weight, norm.name, norm.groups)


def _virtual_batches(
    spec: Spec,
    x: Tensor,
    channel_dim: int,
    norm: ChannelNorm,
    parts: int,
    added: Added,
    mask: Tensor | None,
    seed: Tensor | None,
    plain: bool,
) -> Tensor:
    """Batch norm over parts of the batch as torch.chunk makes them, one after another."""
    samples = x.shape[0]
    size = math.ceil(samples / parts)
    if samples % size == 0 and channel_dim == -1 and mask is None and not spec.channel_dropout:
        # Equal parts: what batch norm is to a part, instance norm is to a sample.
        shape, channels = tuple(x.shape), x.shape[-1]
        layout = Layout(shape, (samples // size, size * math.prod(shape[1:-1]), channels), True)
        spec = spec._replace(norm="instance", groups=channels, channels_last=True)
        z = apply_layout(x, layout)
        return _over(spec, z, layout, norm, None, None, added, None, seed, plain)
    whole = replace(norm, virtual_batch_size=None)
    residuals, shortcuts, masks = (
        [None] * parts if t is None else t.split(size) for t in (*added, mask)
    )
    outputs = []
    for i, piece in enumerate(x.split(size)):
        reason = few_values(whole, tuple(piece.shape), channel_dim)
        if reason:
            raise ValueError(f"virtual_batch_size={norm.virtual_batch_size}: {reason}")
        state = whole
        if norm.batches is not None and norm.momentum is None:
            # Each part counts as an update of its own.
            state = replace(whole, batches=norm.batches * parts + i)
        drawn = None if seed is None else seed + i
        given = (state, None, None, residuals[i], masks[i], drawn)
        own: Any = {"plain": plain, "shortcut": shortcuts[i]}
        outputs.append(channel(spec, piece, channel_dim, *given, **own))
    return torch.cat(outputs)


def _world() -> Any:
    import torch.distributed as dist

    return dist.group.WORLD
