"""Group and instance norm in one pass: a tile holds whole groups of a sample.

z is read once and y is written once. A channels-last tile has several groups side by side, so that
its rows are whole cache lines; short planar groups share a tile as well.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import channel_tuning, tuning
from .channel_epilogue import load_affine, write_output
from .channel_problem import Problem
from .channel_tile import (
    INTEGERS,
    channel_end,
    groups_from,
    load_tile,
    over_channels,
    over_positions,
    to_channels,
)


@triton.jit
def channels_of_groups(
    group0,
    channels,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    UNITS: tl.constexpr,
    ALIGN: tl.constexpr,
    LAST: tl.constexpr,
):
    """(channel, channel_mask) [UNITS] of GROUPS groups.

    Each group has UNITS / GROUPS places; where its width is not a power of two some are masked.
    """
    PLACES: tl.constexpr = UNITS // GROUPS
    unit = tl.arange(0, UNITS)
    if PLACES == WIDTH:
        channel = group0 * WIDTH + unit
        channel_mask = channel < channel_end(channels, ALIGN, LAST)
    else:
        channel = (group0 + unit // PLACES) * WIDTH + unit % PLACES
        channel_mask = (unit % PLACES < WIDTH) & (channel < channels)
    return channel, channel_mask


@triton.jit(do_not_specialize=INTEGERS)
def _channel_held_fwd_kernel(
    z_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    residual_ptr,
    mask_ptr,
    seed_ptr,
    y_ptr,
    mean_ptr,
    variance_ptr,
    count_ptr,
    channels,
    positions,
    groups,
    eps,
    alpha,
    beta,
    threshold,
    ACTIVATION: tl.constexpr,
    DROPOUT: tl.constexpr,
    LAST: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGN: tl.constexpr,
    PTX: tl.constexpr,
    PER_THREAD: tl.constexpr,
    GROUPS: tl.constexpr,
    UNITS: tl.constexpr,
    RUN: tl.constexpr,
):
    """GROUPS groups of one sample."""
    group_blocks = tl.cdiv(groups, GROUPS)
    sample = (tl.program_id(0) // group_blocks).to(tl.int64)
    group0 = tl.program_id(0) % group_blocks * GROUPS
    channel, channel_mask = channels_of_groups(group0, channels, WIDTH, GROUPS, UNITS, ALIGN, LAST)
    x, row, offset, mask, inside, present = load_tile(
        z_ptr, mask_ptr, sample, channel, channel_mask, 0, channels, positions, ALIGN, LAST, RUN
    )
    elements = present * WIDTH
    share = 1.0 / tl.maximum(elements, 1.0)
    # The mean of the differences from a first mean repairs what that has lost by rounding:
    # constant values have variance 0 exactly.
    centre = over_channels(over_positions(x, LAST), GROUPS, LAST) * share
    x = tl.where(inside, x - to_channels(centre, UNITS, LAST), 0.0)
    mean = over_channels(over_positions(x, LAST), GROUPS, LAST) * share
    x = tl.where(inside, x - to_channels(mean, UNITS, LAST), 0.0)
    variance = over_channels(over_positions(x * x, LAST), GROUPS, LAST) * share
    group = groups_from(group0, GROUPS, UNITS, LAST)
    tl.store(mean_ptr + sample * groups + group, centre + mean, mask=group < groups)
    tl.store(variance_ptr + sample * groups + group, variance, mask=group < groups)
    if count_ptr is not None:
        if group0 == 0:
            tl.store(count_ptr + sample, elements)
    weight, bias = load_affine(norm_weight_ptr, norm_bias_ptr, channel, channel_mask, LAST)
    rstd = to_channels(tl.rsqrt(variance + tl.cast(eps, tl.float32)), UNITS, LAST)
    seed = tl.load(seed_ptr) if seed_ptr is not None else None
    write_output(
        x * (weight * rstd) + bias,
        residual_ptr,
        y_ptr,
        row,
        offset,
        mask,
        inside,
        seed,
        *(sample, channel, group0 * WIDTH, 0, channels, positions),
        *(alpha, beta, threshold, ACTIVATION, DROPOUT),
        *(mask_ptr is not None, PTX, PER_THREAD, LAST),
    )


def held_forward(
    inputs: tuple[Tensor | None, ...],
    y: Tensor,
    statistics: tuple[Tensor, Tensor, Tensor],
    problem: Problem,
    tile: channel_tuning.GroupTile,
) -> None:
    """Writes y, mean, variance and count; inputs: z to seed as in `channel_forward`."""
    device = tuning.device(y)
    mean, variance, count = statistics
    with tuning.device_of(y):
        _channel_held_fwd_kernel[(problem.samples * triton.cdiv(problem.groups, tile.groups),)](
            *inputs,
            y,
            mean,
            variance,
            count if count.numel() else None,
            *(problem.channels, problem.positions, problem.groups),
            *(problem.eps, problem.alpha, problem.beta, problem.threshold),
            **problem.flags(device),
            GROUPS=tile.groups,
            UNITS=tile.units,
            RUN=tile.run,
            num_warps=tile.num_warps,
        )
