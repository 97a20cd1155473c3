"""Group and instance norm in one pass: a tile holds whole groups of a sample.

z is read once and y is written once. A channels-last tile has several groups side by side, so that
its rows are whole cache lines; short planar groups share a tile as well.
"""

import triton
import triton.language as tl

from ..parts.output import Drop, write_output
from ..parts.tile import Place, add_place
from .epilogue import drop_rows, load_affine
from .tile import (
    INTEGERS,
    At,
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
    """GROUPS groups of one sample."""
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
    channel, channel_mask = channels_of_groups(group0, channels, WIDTH, GROUPS, UNITS, ALIGN, LAST)
    at = At(sample, channel, channel_mask, group0 * WIDTH, 0, channels, positions)
    x, row, offset, mask, inside, present = load_tile(z_ptr, mask_ptr, at, FORM, RUN)
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
    weight, bias = load_affine(parameters, channel, channel_mask, LAST)
    rstd = to_channels(tl.rsqrt(variance + tl.cast(scalars[0], tl.float32)), UNITS, LAST)
    seed = tl.load(seed_ptr) if seed_ptr is not None else None
    h = add_place(x * (weight * rstd) + bias, Place(shortcut_ptr, offset, None, inside))
    mask_row, col0, cols = drop_rows(row, at, FORM)
    write_output(
        *(h, None, Drop(seed, mask_row, col0, cols, threshold)),
        *(Place(residual_ptr, offset, None, inside), Place(y_ptr, offset, None, mask)),
        *(scalars, FORM),
    )
