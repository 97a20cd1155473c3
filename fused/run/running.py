"""Batch, group and instance norm as they stand at one call, and their running statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .recording import is_dynamo_compiling


@dataclass(eq=False, slots=True)
class ChannelNorm:
    """A batch, group or instance norm (or none) as it stands at one call.

    Attributes:
        name: "batch", "group", "instance" or None.
        groups: of group norm.
        weight, bias: (channels,) or None.
        mean, variance: (channels,), to normalise with; None: the statistics of the input.
        running_mean, running_var: (channels,), to be updated; None: they are not.
        batches: int64, the number of updates before this one, in training; for momentum None.
        momentum: the weight of the new statistics; None: all updates weigh the same.
        group, across: whether the statistics are those of all processes, and of which group (None:
            all). Batch norm only.
        virtual_batch_size: statistics are taken over parts of the batch of at most this many
            samples; None: over all. Batch norm only.
    """

    name: str | None = None
    groups: int = 1
    weight: Tensor | None = None
    bias: Tensor | None = None
    mean: Tensor | None = None
    variance: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    batches: Tensor | None = None
    momentum: float | None = 0.1
    across: bool = False
    group: Any = None
    virtual_batch_size: int | None = None


def count_batch(norm: ChannelNorm) -> None:
    """Counts a batch in num_batches_tracked, as torch's forward does, once the chain has run."""
    if norm.batches is not None:
        norm.batches.add_(1)


def update_running(
    norm: ChannelNorm,
    elements: int,
    mean: Tensor,
    variance: Tensor,
    count: Tensor,
) -> None:
    """running ← running + momentum · (new − running), the variance by n − 1 elements.

    Args:
        elements: behind each of the statistics, where count does not say it.
        mean, variance, count: as the operators return them.

    Several rows of statistics are those of samples, which count as one update by their average,
    or of virtual batches, which are updates one after another.
    """
    running_mean, running_var = norm.running_mean, norm.running_var
    assert running_mean is not None and running_var is not None
    if type(mean) is Tensor and not is_dynamo_compiling():
        # As in torch, autograd takes no notice: another call of torch's own norm may hold them.
        running_mean, running_var = running_mean.data, running_var.data
    if count.numel():
        unbiased = variance * (count / (count - 1).clamp(min=1))[:, None]
    else:
        unbiased = variance * (elements / max(elements - 1, 1))
    momentum: Any = norm.momentum
    rows = mean.shape[0]
    if norm.virtual_batch_size is not None and rows > 1:
        if momentum is None:
            assert norm.batches is not None
            done = norm.batches * rows
            momentum = rows / (done + rows)
            mean, unbiased = mean.mean(0), unbiased.mean(0)
        else:
            # One after another, in closed form.
            later = torch.arange(rows - 1, -1, -1, device=mean.device, dtype=mean.dtype)
            shares = (1 - momentum) ** later * momentum
            momentum = 1 - (1 - momentum) ** rows
            shares = (shares / momentum if momentum else shares)[:, None]
            mean, unbiased = (shares * mean).sum(0), (shares * unbiased).sum(0)
    elif momentum is None:
        assert norm.batches is not None
        momentum = 1 / (norm.batches + 1)
    if rows > 1 and mean.dim() > 1:
        mean, unbiased = mean.mean(0), unbiased.mean(0)
    if count.numel():  # nothing seen, nothing learned
        momentum = momentum * (count.sum() > 0)
    new = mean.view(-1), unbiased.view(-1)
    if isinstance(momentum, float) and running_mean.dtype == mean.dtype:
        torch._foreach_lerp_([running_mean, running_var], new, momentum)
        return
    for running, found in zip((running_mean, running_var), new, strict=True):
        target = found.to(running.dtype)
        running.lerp_(target, momentum.to(target) if isinstance(momentum, Tensor) else momentum)
