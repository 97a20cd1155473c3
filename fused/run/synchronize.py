"""Batch norm over several processes: merging statistics, adding up sums (torch.distributed).

Every process of the group takes part in every call, also one whose own batch is empty.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .moments import gather

Statistics = tuple[Tensor, Tensor, Tensor]


def is_needed(group: Any) -> bool:
    """Whether there is more than one process to talk to."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return False
    return dist.get_world_size(group) > 1


def merge_statistics(z: Tensor, channels_last: bool, local: Statistics, group: Any) -> Statistics:
    """The statistics of all processes' batches together, each weighted by its count.

    Args:
        z: (samples, channels, positions) or, channels last, (samples, positions, channels).
        local: mean and variance (1, channels), count (1,), or empty where z's shape says it.
        group: the process group; None for all processes.

    Returns:
        mean, variance (1, channels) and count (1,), of the local ones' dtype.

    The formula is that of Chan, Golub and LeVeque, 1983, for many parts at once.
    """
    mean, variance, count = local
    if not count.numel():
        count = mean.new_full((1,), z.shape[0] * z.shape[1 if channels_last else 2])
    own = torch.cat([mean.view(-1), variance.view(-1), count]).double()
    parts = gather("batch norm", own, group)  # (processes, 2 · channels + 1)
    channels = mean.shape[1]
    means, variances, counts = parts.split([channels, channels, 1], dim=1)
    total = counts.sum(0)
    share = counts / total.clamp(min=1)
    merged = (share * means).sum(0, keepdim=True)
    between = (share * (means - merged).square()).sum(0, keepdim=True)
    merged_variance = (share * variances).sum(0, keepdim=True) + between
    return merged.to(mean.dtype), merged_variance.to(mean.dtype), total.to(mean.dtype)


def add_up(sums: Tensor, group: Any) -> Tensor:
    """The sum of all processes' tensors."""
    import torch.distributed as dist

    total = sums.clone()
    dist.all_reduce(total, group=group)
    return total


class _Sum(torch.autograd.Function):
    """`add_up`, differentiable: each process's tensor is in every process's sum."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return add_up(t, group)

    @staticmethod
    def backward(ctx: Any, dsum: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(dsum, ctx.group), None


def differentiable_statistics(
    z: Tensor, channels_last: bool, mask: Tensor | None, group: Any
) -> Statistics:
    """`merge_statistics` of z by operators that torch differentiates: the reference's way."""
    x = z.to(torch.promote_types(z.dtype, torch.float32))
    x = x if channels_last else x.transpose(1, 2)
    x = x.reshape(-1, x.shape[-1])
    present = x.new_ones(len(x), 1) if mask is None else mask.reshape(-1, 1).to(x.dtype)
    x = torch.where(present > 0, x, 0)
    count = _Sum.apply(present.sum().view(1), group)
    divisor = count.clamp(min=1)
    mean = _Sum.apply(x.sum(0, keepdim=True), group) / divisor
    difference = torch.where(present > 0, x - mean, 0)
    variance = _Sum.apply(difference.square().sum(0, keepdim=True), group) / divisor
    return mean, variance, count
