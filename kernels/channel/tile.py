"""What the channel kernels share: tiles of (channels, positions) of one sample in either layout.

A tile has UNITS channels and RUN positions. In planar memory (samples, channels, positions) it is
[UNITS, RUN], with LAST, in (samples, positions, channels), it is [RUN, UNITS]. Numbers that belong
to a channel are then a column [UNITS, 1] or a row [1, UNITS]: a planar tile reads one weight for
each of its rows, not one for each element.

Statistics belong to a channel (SHARED: batch norm, and constants), or to a sample and WIDTH
neighbouring channels (group norm; instance norm has WIDTH 1).
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..parts.tile import Place, load_place, row_offset

# Runtime integers whose value must not compile a new kernel: alignment is passed as ALIGN instead.
INTEGERS = ("samples", "channels", "positions", "groups", "chunks", "steps", "threshold")


class TileForm(NamedTuple):
    """What a kernel is compiled for besides its `Form`: the tile, and stages of its pipeline."""

    UNITS: int
    RUN: int
    STAGES: int
    GROUPS: int = 1  # that a program treats together


class At(NamedTuple):
    """Of which sample (int64), channels [UNITS] and positions a tile is, and the size of z.

    channel0 and position0 are the first; the one along the tile's rows is a multiple of 8.
    """

    sample: Any
    channel: Any
    channel_mask: Any
    channel0: Any
    position0: Any
    channels: Any
    positions: Any


@triton.jit
def by_channel(v, LAST: tl.constexpr):
    """A vector over channels, [UNITS], as it lies in a tile."""
    if LAST:
        return v[None, :]
    else:
        return v[:, None]


@triton.jit
def over_positions(x, LAST: tl.constexpr):
    """The sums of a tile's channels, [UNITS, 1] or [1, UNITS]."""
    if LAST:
        return tl.sum(x, 0, keep_dims=True)
    else:
        return tl.sum(x, 1, keep_dims=True)


@triton.jit
def over_channels(v, GROUPS: tl.constexpr, LAST: tl.constexpr):
    """The sums of GROUPS runs of neighbouring channels; v is [UNITS, 1] or [1, UNITS].

    The result is [GROUPS, 1]; where each group has one channel, v itself.
    """
    if v.numel == GROUPS:
        return v
    elif GROUPS == 1:
        # Not by reshape, whose layout would spread to the whole tile (static: 25000 spilled words).
        if LAST:
            return tl.sum(v, 1, keep_dims=True)
        else:
            return tl.sum(v, 0, keep_dims=True)
    else:
        return tl.sum(tl.reshape(v, (GROUPS, v.numel // GROUPS)), 1, keep_dims=True)


@triton.jit
def to_channels(t, UNITS: tl.constexpr, LAST: tl.constexpr):
    """The opposite: what belongs to groups, as `over_channels` shapes it, for each channel."""
    GROUPS: tl.constexpr = t.numel
    if GROUPS == UNITS or GROUPS == 1:  # noqa: PLR1714 (not in the language)
        return t
    else:
        t = tl.reshape(tl.broadcast_to(t, (GROUPS, UNITS // GROUPS)), (UNITS,))
        return by_channel(t, LAST)


@triton.jit
def groups_from(group0, GROUPS: tl.constexpr, UNITS: tl.constexpr, LAST: tl.constexpr):
    """The groups from group0 on, shaped as by `over_channels`."""
    group = group0 + tl.arange(0, GROUPS)
    if GROUPS == UNITS and LAST:
        return group[None, :]
    else:
        return group[:, None]


@triton.jit
def channel_end(channels, ALIGN: tl.constexpr, LAST: tl.constexpr):
    """The number of channels, with the divisibility that the host has checked."""
    if LAST:
        return (channels // ALIGN) * ALIGN
    else:
        return channels


@triton.jit
def place(
    sample,  # int64
    channel,
    channel_mask,
    position0,
    channels,
    positions,
    ALIGN: tl.constexpr,
    LAST: tl.constexpr,
    RUN: tl.constexpr,
):
    """Where the tile from `position0` on lies: (row [M] int64, offset [M, N], mask [M, N])."""
    if LAST:
        # All positions of all samples may be one sample, of nearly 2^31 positions.
        position = tl.cast(position0, tl.int64) + tl.arange(0, RUN)
        row = sample * positions + position
        offset = row_offset(row, channels, ALIGN) + channel[None, :]
        mask = (position < positions)[:, None] & channel_mask[None, :]
    else:
        position = position0 + tl.arange(0, RUN)
        row = sample * channels + channel
        offset = row_offset(row, positions, ALIGN) + position[None, :]
        mask = channel_mask[:, None] & (position < (positions // ALIGN) * ALIGN)[None, :]
    return row, offset, mask


@triton.jit
def load_channels(ptr, index, channel_mask, LAST: tl.constexpr):
    """Numbers that belong to channels, as float32 in the shape of a tile's channels."""
    mask = by_channel(channel_mask, LAST)
    return tl.load(ptr + by_channel(index, LAST), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def statistic_of(sample, channel, groups, SHARED: tl.constexpr, WIDTH: tl.constexpr):
    """The index of the statistic of each channel of a sample."""
    if SHARED:
        return channel
    else:
        return sample * groups + channel // WIDTH


@triton.jit
def keep_present(mask, mask_ptr, sample, position0, positions, RUN: tl.constexpr):
    """(mask [RUN, UNITS] without the positions that are padding, how many are not).

    Channels-last memory alone has padding.
    """
    position = tl.cast(position0, tl.int64) + tl.arange(0, RUN)
    present = tl.load(mask_ptr + sample * positions + position, mask=position < positions, other=0)
    present = present != 0
    return mask & present[:, None], tl.sum(present.to(tl.float32), 0)


@triton.jit
def load_tile(z_ptr, mask_ptr, at, FORM: tl.constexpr, RUN: tl.constexpr):
    """A tile and where it lies; `at` is an `At`.

    Returns:
        z [M, N], float32, 0 where it is not inside.
        row, offset and mask as from `place`.
        inside [M, N]: mask without padding.
        The number of positions inside.
    """
    ALIGN: tl.constexpr = FORM.ALIGN
    LAST: tl.constexpr = FORM.LAST
    row, offset, mask = place(
        *(at.sample, at.channel, at.channel_mask, at.position0, at.channels, at.positions),
        *(ALIGN, LAST, RUN),
    )
    inside = mask
    count = tl.cast(tl.minimum(at.positions - at.position0, RUN), tl.float32)
    if mask_ptr is not None:
        inside, count = keep_present(mask, mask_ptr, at.sample, at.position0, at.positions, RUN)
    z = load_place(Place(z_ptr, offset, None, inside))
    return z, row, offset, mask, inside, count


@triton.jit
def load_values(z_ptr, mask_ptr, at, FORM: tl.constexpr, RUN: tl.constexpr):
    """z, inside and the number of positions inside, as `load_tile` has them."""
    tile = load_tile(z_ptr, mask_ptr, at, FORM, RUN)
    return tile[0], tile[4], tile[5]


@triton.jit
def tile_moments(x, inside, count, LAST: tl.constexpr):
    """(mean, sum of squared deviations) of the channels of a tile, `count` positions inside."""
    count = tl.maximum(count, 1.0)
    mean = over_positions(x, LAST) / count
    d = tl.where(inside, x - mean, 0.0)
    return mean, over_positions(d * d, LAST)


@triton.jit
def merge_moments(mean, m2, seen, new_mean, new_m2, new):
    """(mean, m2) of `seen` and `new` elements together. Chan, Golub and LeVeque, 1983."""
    share = new / tl.maximum(seen + new, 1.0)
    delta = new_mean - mean
    return mean + delta * share, m2 + new_m2 + delta * delta * (seen * share)
