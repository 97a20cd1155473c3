"""Backward of held.py: dy and z are read once, dz is written once."""

import triton
import triton.language as tl

from .epilogue import load_affine, load_gradient
from .held import channels_of_groups
from .tile import (
    INTEGERS,
    At,
    by_channel,
    load_channels,
    over_channels,
    over_positions,
    to_channels,
)


@triton.jit(do_not_specialize=INTEGERS)
def _channel_held_bwd_kernel(
    incoming,
    z_ptr,
    statistics,
    parameters,
    mask_ptr,
    seed_ptr,
    count_ptr,
    dz_ptr,
    partial_ptr,
    samples,
    channels,
    positions,
    groups,
    scalars,
    threshold,
    FORM: tl.constexpr,
    TILE: tl.constexpr,
):
    """The same GROUPS groups of every sample that is this program's.

    partial_ptr is [2, programs that share the samples, channels]: sums of g and of g x̂.
    """
    ALIGN: tl.constexpr = FORM.ALIGN
    LAST: tl.constexpr = FORM.LAST
    WIDTH: tl.constexpr = FORM.WIDTH
    GROUPS: tl.constexpr = TILE.GROUPS
    UNITS: tl.constexpr = TILE.UNITS
    RUN: tl.constexpr = TILE.RUN
    group_blocks = tl.cdiv(groups, GROUPS)
    group0 = tl.program_id(0) % group_blocks * GROUPS
    sample_program = tl.program_id(0) // group_blocks
    sample_programs = tl.num_programs(0) // group_blocks
    channel, channel_mask = channels_of_groups(group0, channels, WIDTH, GROUPS, UNITS, ALIGN, LAST)
    weight, bias = load_affine(parameters, channel, channel_mask, LAST)
    seed = tl.load(seed_ptr) if seed_ptr is not None else None
    total_g = bias * 0.0
    total_gx = bias * 0.0
    for index in tl.range(sample_program, samples, sample_programs, num_stages=TILE.STAGES):
        sample = tl.cast(index, tl.int64)
        statistic = sample * groups + channel // WIDTH
        mean = load_channels(statistics[0], statistic, channel_mask, LAST)
        variance = load_channels(statistics[1], statistic, channel_mask, LAST)
        rstd = tl.rsqrt(variance + tl.cast(scalars[0], tl.float32))
        d, g, offset, mask, inside = load_gradient(
            *(incoming, z_ptr, mask_ptr, mean, weight * rstd, bias),
            seed,
            At(sample, channel, channel_mask, group0 * WIDTH, 0, channels, positions),
            *(scalars, threshold, FORM, RUN),
        )
        sum_g = over_positions(g, LAST)
        sum_gx = over_positions(g * d, LAST) * rstd
        total_g += sum_g
        total_gx += sum_gx
        elements = tl.cast(positions, tl.float32) * WIDTH
        if count_ptr is not None:
            elements = tl.maximum(tl.load(count_ptr + sample), 1.0)
        mean_g = over_channels(sum_g * weight, GROUPS, LAST) / elements
        mean_gx = over_channels(sum_gx * weight, GROUPS, LAST) / elements
        mean_g = to_channels(mean_g, UNITS, LAST)
        mean_gx = to_channels(mean_gx, UNITS, LAST)
        dz = g * (weight * rstd) - (d * (mean_gx * rstd * rstd) + mean_g * rstd)
        if mask_ptr is not None:
            dz = tl.where(inside, dz, 0.0)
        tl.store(dz_ptr + offset, dz, mask=mask)
    if partial_ptr is not None:
        partial_ptr += by_channel(tl.cast(sample_program, tl.int64) * channels + channel, LAST)
        tl.store(partial_ptr, total_g, mask=by_channel(channel_mask, LAST))
        plane = tl.cast(sample_programs, tl.int64) * channels
        tl.store(partial_ptr + plane, total_gx, mask=by_channel(channel_mask, LAST))
