"""Backward of loop.py: sums of a group, then dz, which finds dy and z in L2.

The gradient of a shortcut is that of h, which the first walk writes and the second reads again.
"""

import triton
import triton.language as tl

from ..parts.tile import Place, load_place
from .epilogue import load_affine, load_gradient
from .loop import channels_of_block
from .tile import (
    INTEGERS,
    At,
    by_channel,
    load_channels,
    load_tile,
    over_channels,
    over_positions,
    to_channels,
)


@triton.jit(do_not_specialize=INTEGERS)
def _channel_loop_bwd_kernel(
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
    """GROUPS groups of one sample. partial_ptr is [2, samples, channels]: sums of g and of g x̂."""
    ALIGN: tl.constexpr = FORM.ALIGN
    LAST: tl.constexpr = FORM.LAST
    WIDTH: tl.constexpr = FORM.WIDTH
    GROUPS: tl.constexpr = TILE.GROUPS
    UNITS: tl.constexpr = TILE.UNITS
    RUN: tl.constexpr = TILE.RUN
    group_blocks = tl.cdiv(groups, GROUPS)
    sample = (tl.program_id(0) // group_blocks).to(tl.int64)
    group0 = tl.program_id(0) % group_blocks * GROUPS
    channel, channel_mask = channels_of_block(
        group0, 0, channels, WIDTH, GROUPS, UNITS, ALIGN, LAST
    )
    # Every place of a tile belongs to the same group in each block.
    statistic = sample * groups + group0 + tl.arange(0, UNITS) // (UNITS // GROUPS)
    mean = load_channels(statistics[0], statistic, channel_mask, LAST)
    variance = load_channels(statistics[1], statistic, channel_mask, LAST)
    rstd = tl.rsqrt(variance + tl.cast(scalars[0], tl.float32))
    seed = tl.load(seed_ptr) if seed_ptr is not None else None
    elements = tl.cast(positions, tl.float32) * WIDTH
    if count_ptr is not None:
        elements = tl.maximum(tl.load(count_ptr + sample), 1.0)
    M: tl.constexpr = RUN if LAST else UNITS
    N: tl.constexpr = UNITS if LAST else RUN
    mean_g = over_channels(tl.zeros_like(mean), GROUPS, LAST)
    mean_gx = mean_g
    for unit0 in tl.range(0, GROUPS * WIDTH, UNITS):
        channel0 = group0 * WIDTH + unit0
        channel, channel_mask = channels_of_block(
            group0, unit0, channels, WIDTH, GROUPS, UNITS, ALIGN, LAST
        )
        weight, bias = load_affine(parameters, channel, channel_mask, LAST)
        scale = weight * rstd
        total_g = tl.zeros((M, N), tl.float32)
        total_gd = tl.zeros((M, N), tl.float32)
        for position0 in tl.range(0, positions, RUN, num_stages=TILE.STAGES):
            d, g, _offset, _mask, _inside = load_gradient(
                *(incoming, z_ptr, mask_ptr, mean, scale, bias),
                seed,
                At(sample, channel, channel_mask, channel0, position0, channels, positions),
                *(scalars, threshold, FORM, RUN),
            )
            total_g += g
            total_gd += g * d
        sum_g = over_positions(total_g, LAST)
        sum_gx = over_positions(total_gd, LAST) * rstd
        mean_g += over_channels(sum_g * weight, GROUPS, LAST) / elements
        mean_gx += over_channels(sum_gx * weight, GROUPS, LAST) / elements
        if partial_ptr is not None:
            offset = by_channel(sample * channels + channel, LAST)
            tl.store(partial_ptr + offset, sum_g, mask=by_channel(channel_mask, LAST))
            plane = tl.cast(samples, tl.int64) * channels
            tl.store(partial_ptr + plane + offset, sum_gx, mask=by_channel(channel_mask, LAST))

    dshortcut_ptr = incoming[2]
    if dshortcut_ptr is not None:
        # All of the program's threads now see it in memory.
        tl.debug_barrier()
    slope = -to_channels(mean_gx, UNITS, LAST) * rstd * rstd
    shift = -to_channels(mean_g, UNITS, LAST) * rstd
    for unit0 in tl.range(0, GROUPS * WIDTH, UNITS):
        channel0 = group0 * WIDTH + unit0
        channel, channel_mask = channels_of_block(
            group0, unit0, channels, WIDTH, GROUPS, UNITS, ALIGN, LAST
        )
        weight, bias = load_affine(parameters, channel, channel_mask, LAST)
        scale = weight * rstd
        for position0 in tl.range(0, positions, RUN, num_stages=TILE.STAGES):
            at = At(sample, channel, channel_mask, channel0, position0, channels, positions)
            if dshortcut_ptr is None:
                d, g, offset, mask, inside = load_gradient(
                    *(incoming, z_ptr, mask_ptr, mean, scale, bias),
                    seed,
                    *(at, scalars, threshold, FORM, RUN),
                )
            else:
                d, _row, offset, mask, inside, _count = load_tile(z_ptr, mask_ptr, at, FORM, RUN)
                d -= mean
                g = load_place(Place(dshortcut_ptr, offset, None, inside))
            dz = g * scale + (d * slope + shift)
            if mask_ptr is not None:
                dz = tl.where(inside, dz, 0.0)
            tl.store(dz_ptr + offset, dz, mask=mask)
