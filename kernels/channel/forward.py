"""Channel norms (batch, group, instance) and channel dropout: the forward launchers.

    y = residual + dropout(activation(norm(z) + shortcut))

z is contiguous and seen in memory order: (samples, channels, positions), or with channels_last
(samples, positions, channels). The backward launchers are those of backward.py.
"""

from __future__ import annotations

import triton
from torch import Tensor

from ..tuning import channel as channel_tuning
from ..tuning import rules as tuning
from .apply import apply
from .held import _channel_held_fwd_kernel
from .loop import _channel_loop_fwd_kernel
from .problem import problem_of
from .statistics import empty_statistics, split_statistics

# By the way that tuning/channel.py chooses; the third, "split", is two other kernels.
FORWARD = {"held": _channel_held_fwd_kernel, "loop": _channel_loop_fwd_kernel}


def channel_statistics(
    z: Tensor, mask: Tensor | None, norm: int, groups: int, channels_last: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance of batch, group or instance norm.

    Args:
        z: three dimensions, contiguous.
        mask: (samples, positions), bool, with channels_last alone; or None. False positions are
            left out.
        norm, groups, channels_last: as `spec.Spec.channel`.

    Returns:
        float32: mean and variance, (samples, groups) or for batch norm (1, channels); count,
        (samples,) or (1,), the elements behind each, (0,) without mask. All 0 where there is none.
    """
    problem = problem_of(z.shape, z.element_size(), None, norm, groups, channels_last)
    if z.numel() == 0:
        mean, variance, count = empty_statistics(z, mask, problem)
        return mean.zero_(), variance.zero_(), count.zero_()
    return split_statistics(z, mask, problem)


def channel_forward(
    z: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    norm: int,
    groups: int,
    channels_last: bool,
    eps: float,
    activation: int,
    alpha: float,
    beta: float,
    threshold: int,
    channel_dropout: bool,
    shortcut: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y = residual + dropout(activation(norm(z) + shortcut)), by the statistics of z itself.

    Args:
        z, residual, shortcut: three dimensions, contiguous; one dtype.
        norm_weight, norm_bias: (channels,), contiguous, any floating dtype, or None.
        mask: (samples, positions), bool, with channels_last alone; or None. Where it is false y is
            0, and the position takes no part in the statistics.
        seed: int64 (1,); may be None where threshold is 0.
        norm to channel_dropout: as `spec.Spec.channel`.

    Returns:
        y of z's shape and dtype; mean, variance and count as `channel_statistics`.
    """
    scalars = (norm, groups, channels_last, eps, activation, alpha, beta, threshold)
    problem = problem_of(z.shape, z.element_size(), None, *scalars, channel_dropout)
    y = z.new_empty(z.shape)
    if z.numel() == 0:
        return y, *channel_statistics(z, mask, norm, groups, channels_last)
    parameters = (norm_weight, norm_bias)
    way, tile = problem.group_tile(backward=False, device=tuning.device(z))
    if tile is None:
        mean, variance, count = split_statistics(z, mask, problem)
        apply(z, (mean, variance), parameters, residual, mask, seed, y, problem, shortcut)
        return y, mean, variance, count
    statistics = empty_statistics(z, mask, problem)
    mean, variance, count = statistics
    device, options = tuning.device(z), {}
    if way == "loop" and shortcut is not None:
        options = channel_tuning.register_options(tile, device)
    with tuning.device_of(z):
        FORWARD[way][(problem.samples * triton.cdiv(problem.groups, tile.groups),)](
            *(z, parameters, residual, shortcut, mask, seed if threshold else None, y),
            (mean, variance, count if count.numel() else None),
            *(problem.channels, problem.positions, problem.groups),
            *(problem.scalars, threshold),
            FORM=problem.form(device, mask),
            TILE=problem.tile_form(tile),
            num_warps=tile.num_warps,
            **options,
        )
    return y, mean, variance, count


def channel_apply(
    z: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    norm: int,
    groups: int,
    channels_last: bool,
    eps: float,
    activation: int,
    alpha: float,
    beta: float,
    threshold: int,
    channel_dropout: bool,
    shortcut: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """y = residual + dropout(activation(norm(z) + shortcut)), by given statistics.

    Args:
        mean, variance: (samples, groups) or (1, channels), contiguous, any floating dtype; both
            None without a norm.
        out: where y goes, laid out as z; it may be z itself. None: a new tensor.
        The others are those of `channel_forward`.

    Returns:
        y of z's shape and dtype.
    """
    y = z.new_empty(z.shape) if out is None else out
    if z.numel() == 0:
        return y
    scalars = (norm, groups, channels_last, eps, activation, alpha, beta, threshold)
    problem = problem_of(z.shape, z.element_size(), mean, *scalars, channel_dropout)
    if norm == 0:
        mean = variance = norm_weight = norm_bias = None
    parameters = (norm_weight, norm_bias)
    apply(z, (mean, variance), parameters, residual, mask, seed, y, problem, shortcut)
    return y
