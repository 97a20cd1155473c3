"""Group and instance norm of groups that are larger than a tile: two walks, one program a group.

The second walk finds in L2 what the first has read, so that memory is read once and written once,
as long as the groups of all programs fit there (tuning.CHANNEL_LOOP_BYTES).
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
    by_channel,
    channel_end,
    groups_from,
    load_tile,
    load_values,
    merge_moments,
    over_channels,
    over_positions,
    tile_moments,
    to_channels,
)


@triton.jit
def channels_of_block(
    group0,
    unit0,
    channels,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    UNITS: tl.constexpr,
    ALIGN: tl.constexpr,
    LAST: tl.constexpr,
):
    """(channel, channel_mask) [UNITS] from place `unit0` of GROUPS groups on."""
    unit = unit0 + tl.arange(0, UNITS)
    channel = group0 * WIDTH + unit
    if (GROUPS * WIDTH) % UNITS == 0:
        return channel, channel < channel_end(channels, ALIGN, LAST)
    else:
        return channel, (unit < GROUPS * WIDTH) & (channel < channels)


@triton.jit(do_not_specialize=INTEGERS)
def _channel_loop_fwd_kernel(
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
    STAGES: tl.constexpr,
):
    """GROUPS groups of one sample; more than one where a tile is as wide as all of them."""
    group_blocks = tl.cdiv(groups, GROUPS)
    sample = (tl.program_id(0) // group_blocks).to(tl.int64)
    group0 = tl.program_id(0) % group_blocks * GROUPS
    channel, channel_mask = channels_of_block(
        group0, 0, channels, WIDTH, GROUPS, UNITS, ALIGN, LAST
    )
    # A value near those of the group, from which differences are taken (channel_statistics.py).
    x, _, count = load_values(
        *(z_ptr, mask_ptr, sample, channel, channel_mask, 0, channels, positions),
        *(ALIGN, LAST, RUN),
    )
    count = tl.maximum(count, 1.0) * min(WIDTH, UNITS)
    centre = over_channels(over_positions(x, LAST), GROUPS, LAST) / count
    mean = centre * 0.0  # of z - centre
    m2 = mean
    seen = 0.0
    present = 0.0
    for unit0 in tl.range(0, GROUPS * WIDTH, UNITS):
        channel, channel_mask = channels_of_block(
            group0, unit0, channels, WIDTH, GROUPS, UNITS, ALIGN, LAST
        )
        unit_mean = by_channel(tl.zeros((UNITS,), tl.float32), LAST)
        unit_m2 = by_channel(tl.zeros((UNITS,), tl.float32), LAST)
        present = 0.0
        for position0 in tl.range(0, positions, RUN, num_stages=STAGES):
            x, mask, new = load_values(
                *(z_ptr, mask_ptr, sample, channel, channel_mask),
                *(position0, channels, positions, ALIGN, LAST, RUN),
            )
            x = tl.where(mask, x - to_channels(centre, UNITS, LAST), 0.0)
            new_mean, new_m2 = tile_moments(x, mask, new, LAST)
            unit_mean, unit_m2 = merge_moments(unit_mean, unit_m2, present, new_mean, new_m2, new)
            present += new
        # The channels of a group together, then with those before.
        valid = by_channel(channel_mask, LAST)
        units = tl.cast(tl.minimum(WIDTH, WIDTH * GROUPS - unit0), tl.float32)
        if UNITS < WIDTH:
            units = tl.minimum(units, UNITS)
        new_mean = over_channels(tl.where(valid, unit_mean, 0.0), GROUPS, LAST) / units
        delta = tl.where(valid, unit_mean - to_channels(new_mean, UNITS, LAST), 0.0)
        new_m2 = tl.where(valid, unit_m2, 0.0) + present * delta * delta
        new_m2 = over_channels(new_m2, GROUPS, LAST)
        mean, m2 = merge_moments(mean, m2, seen, new_mean, new_m2, present * units)
        seen += present * units

    elements = present * WIDTH
    variance = m2 / tl.maximum(elements, 1.0)
    group = groups_from(group0, GROUPS, UNITS, LAST)
    tl.store(mean_ptr + sample * groups + group, centre + mean, mask=group < groups)
    tl.store(variance_ptr + sample * groups + group, variance, mask=group < groups)
    if count_ptr is not None:
        if group0 == 0:
            tl.store(count_ptr + sample, elements)
    rstd = to_channels(tl.rsqrt(variance + tl.cast(eps, tl.float32)), UNITS, LAST)
    centre = to_channels(centre, UNITS, LAST)
    mean = to_channels(mean, UNITS, LAST)
    seed = tl.load(seed_ptr) if seed_ptr is not None else None
    for unit0 in tl.range(0, GROUPS * WIDTH, UNITS):
        channel, channel_mask = channels_of_block(
            group0, unit0, channels, WIDTH, GROUPS, UNITS, ALIGN, LAST
        )
        weight, bias = load_affine(norm_weight_ptr, norm_bias_ptr, channel, channel_mask, LAST)
        scale = weight * rstd
        for position0 in tl.range(0, positions, RUN, num_stages=STAGES):
            x, row, offset, mask, inside, _count = load_tile(
                *(z_ptr, mask_ptr, sample, channel, channel_mask),
                *(position0, channels, positions, ALIGN, LAST, RUN),
            )
            write_output(
                (x - centre - mean) * scale + bias,
                residual_ptr,
                y_ptr,
                row,
                offset,
                mask,
                inside,
                seed,
                *(sample, channel, group0 * WIDTH + unit0, position0, channels, positions),
                *(alpha, beta, threshold, ACTIVATION, DROPOUT),
                *(mask_ptr is not None, PTX, PER_THREAD, LAST),
            )


def loop_forward(
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
        _channel_loop_fwd_kernel[(problem.samples * triton.cdiv(problem.groups, tile.groups),)](
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
            STAGES=problem.stages(tile),
            num_warps=tile.num_warps,
        )
