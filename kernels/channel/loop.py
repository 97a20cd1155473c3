"""Group and instance norm of groups that are larger than a tile: two walks, one program a group.

The second walk finds in L2 what the first has read, so that memory is read once and written once,
as long as the groups of all programs fit there (tuning.CHANNEL_LOOP_BYTES).
"""

import triton
import triton.language as tl

from ..parts.output import Drop, write_output
from ..parts.tile import Place, add_place
from .epilogue import drop_rows, load_affine
from .tile import (
    INTEGERS,
    At,
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
    parameters,
    residual_ptr,
    shortcut_ptr,
    mask_ptr,
    seed_ptr,
    y_ptr,
    statistics,
    channels,
    positions,
    groups,
    scalars,
    threshold,
    FORM: tl.constexpr,
    TILE: tl.constexpr,
):
    """GROUPS groups of one sample; more than one where a tile is as wide as all of them."""
    ALIGN: tl.constexpr = FORM.ALIGN
    mean_ptr, variance_ptr, count_ptr = statistics
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
    # A value near those of the group, from which differences are taken (statistics.py).
    first = At(sample, channel, channel_mask, group0 * WIDTH, 0, channels, positions)
    x, _, count = load_values(z_ptr, mask_ptr, first, FORM, RUN)
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
        for position0 in tl.range(0, positions, RUN, num_stages=TILE.STAGES):
            at = At(sample, channel, channel_mask, unit0, position0, channels, positions)
            x, mask, new = load_values(z_ptr, mask_ptr, at, FORM, RUN)
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
    rstd = to_channels(tl.rsqrt(variance + tl.cast(scalars[0], tl.float32)), UNITS, LAST)
    centre = to_channels(centre, UNITS, LAST)
    mean = to_channels(mean, UNITS, LAST)
    seed = tl.load(seed_ptr) if seed_ptr is not None else None
    for unit0 in tl.range(0, GROUPS * WIDTH, UNITS):
        channel, channel_mask = channels_of_block(
            group0, unit0, channels, WIDTH, GROUPS, UNITS, ALIGN, LAST
        )
        weight, bias = load_affine(parameters, channel, channel_mask, LAST)
        scale = weight * rstd
        for position0 in tl.range(0, positions, RUN, num_stages=TILE.STAGES):
            channel0 = group0 * WIDTH + unit0
            at = At(sample, channel, channel_mask, channel0, position0, channels, positions)
            x, row, offset, mask, inside, _count = load_tile(z_ptr, mask_ptr, at, FORM, RUN)
            h = (x - centre - mean) * scale + bias
            h = add_place(h, Place(shortcut_ptr, offset, None, inside))
            mask_row, col0, cols = drop_rows(row, at, FORM)
            write_output(
                *(h, None, Drop(seed, mask_row, col0, cols, threshold)),
                *(Place(residual_ptr, offset, None, inside), Place(y_ptr, offset, None, mask)),
                *(scalars, FORM),
            )
