"""Monte-Carlo dropout: the spread of a model's output under dropout, as its uncertainty.

Gal and Ghahramani, "Dropout as a Bayesian approximation: representing model uncertainty in deep
learning", ICML 2016.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from ..modules.norms import ChannelDropout
from ..nn import Sequential
from ..run.moments import column_moments, merge_moments
from .foldable import runs_in_order

__all__ = ["MonteCarlo", "mc_dropout"]

# Elements of the stacked input of one forward, where the caller does not say: 4 MiB in float32.
_STACKED = 1 << 20


class MonteCarlo(NamedTuple):
    """Mean and standard deviation of the samples of `mc_dropout`, each of the output's shape."""

    mean: Tensor
    standard_deviation: Tensor


def mc_dropout(
    model: nn.Module,
    x: Tensor,
    samples: int = 100,
    *,
    seed: int | None = None,
    batch_samples: int | None = None,
) -> MonteCarlo:
    """Runs a model many times with dropout switched on, and everything else in eval mode.

        mean = Σ yₛ / S,   standard deviation = sqrt(Σ (yₛ − mean)² / (S − 1)),   S = samples

    Every dropout module of the model draws, each sample anew; dropout that a module calls as a
    function or keeps for itself (nn.MultiheadAttention, nn.LSTM) does not. Training flags are given
    back as they were, after an exception too; running statistics stay as they are, and no gradients
    are recorded. While it runs, no other thread may use the model.

    Several samples are stacked in the batch and go through the model together. Where the model is a
    Sequential, what comes before its first dropout runs once; in a Sequential with hooks of its
    own, or inside another model, it runs for each sample. Memory does not grow with `samples`.

    Args:
        model: takes x, gives one tensor with the same dimension 0.
        x: (B, ...); rows must not depend on one another, as in eval mode they do not.
        samples: S, at least 2.
        seed: makes the result reproducible, and leaves torch's generators as they were; None goes
            on with them. Another batch_samples draws other masks.
        batch_samples: how many samples go through the model together; None: as many as keep the
            stacked input within a million elements, at least one.

    Returns:
        (mean, standard_deviation), each of the output's shape and in its units; float32, or float64
        where the output is.

    Raises:
        ValueError: no dropout in the model, or with p = 0 only; fewer than two samples;
            batch_samples < 1; an output that has not one row for each of the input's.
        TypeError: x or the output is not a tensor.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 1))
        >>> mean, standard_deviation = mc_dropout(net, torch.randn(16, 8), seed=0)
    """
    if not isinstance(x, Tensor) or x.dim() < 1:
        got = "one without dimensions" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"mc_dropout: x must be a tensor (B, ...), got {got}")
    if samples < 2:
        raise ValueError(f"mc_dropout: samples must be at least 2, got {samples}")
    if batch_samples is not None and batch_samples < 1:
        raise ValueError(f"mc_dropout: batch_samples must be at least 1, got {batch_samples}")
    dropouts = [m for m in model.modules() if isinstance(m, _DropoutNd | ChannelDropout) and m.p]
    if not dropouts:
        raise ValueError(
            f"mc_dropout: {type(model).__name__} has no dropout module with p > 0, so all samples"
            " would be equal"
        )
    with torch.no_grad(), _drawing(model, dropouts), _seeded(seed, x.device):
        h, rest = _start(model, x, {id(m) for m in dropouts})
        most = batch_samples or max(1, _STACKED // max(1, h.numel()))
        total = None
        for first in range(0, samples, most):
            y = _run(rest, h, min(most, samples - first))
            part = column_moments(y, torch.ones_like(y, dtype=torch.bool))
            total = part if total is None else merge_moments(total, part)
    assert total is not None
    return MonteCarlo(total.mean, (total.m2 / (samples - 1)).sqrt())


def _run(model: Callable[[Tensor], Any], h: Tensor, samples: int) -> Tensor:
    """The outputs of so many samples, (samples, B, ...), in float32 or float64."""
    # Always a copy: a first child that works in place must not change h.
    y = model(h.repeat(samples, *[1] * (h.dim() - 1)))
    if not isinstance(y, Tensor):
        raise TypeError(f"mc_dropout: the model must return a tensor, got {type(y).__name__}")
    rows = samples * len(h)
    if y.dim() < 1 or len(y) != rows:
        raise ValueError(
            f"mc_dropout: the model must keep dimension 0: it made {tuple(y.shape)} of {rows} rows"
        )
    y = y.to(torch.promote_types(y.dtype, torch.float32))
    return y.unflatten(0, (samples, len(h)))


def _start(model: nn.Module, x: Tensor, dropouts: set[int]) -> tuple[Tensor, Callable[..., Any]]:
    """What the children before the first dropout make of x, and the model from there on.

    Where the model cannot be cut, or where dimension 0 changes on the way: x and the model.
    """
    before: list[nn.Module] = []
    after: list[nn.Module] = []  # the last to run comes first
    module = model
    while runs_in_order(module):
        children: list[tuple[str, Any]] = list(module._modules.items())
        drops = [any(id(m) in dropouts for m in child.modules()) for _, child in children]
        cut = drops.index(True)
        kind = Sequential if isinstance(module, Sequential) else nn.Sequential
        before.append(kind(OrderedDict(children[:cut])))
        after.append(kind(OrderedDict(children[cut + 1 :])))
        module = children[cut][1]
    h = x
    for part in before:
        h = part(h)
        if not isinstance(h, Tensor) or h.dim() < 1 or len(h) != len(x):
            return x, model
    return h, nn.Sequential(module, *reversed(after)) if before else model


@contextmanager
def _drawing(model: nn.Module, dropouts: Sequence[nn.Module]) -> Iterator[None]:
    """Sets training for these modules alone, and gives all flags back afterwards."""
    # One by one: model.train() may be overridden, and sets all below it.
    flags = [(module, module.training) for module in model.modules()]
    # In eval mode nn.TransformerEncoderLayer would go past its children, dropout included.
    fastpath = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for module, _ in flags:
            module.training = False
        for module in dropouts:
            module.training = True
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for module, training in flags:
            module.training = training


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Seeds the generators of the CPU and of this device, and gives them back afterwards."""
    if seed is None:
        yield
        return
    if device.type == "cpu":
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(seed)
            yield
        return
    backend = torch.get_device_module(device)
    with torch.random.fork_rng([device.index], device_type=device.type), backend.device(device):
        # Not torch.manual_seed: it would seed other devices too, which nobody gives back.
        torch.default_generator.manual_seed(seed)
        backend.manual_seed(seed)
        yield
