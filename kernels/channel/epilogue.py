"""What the channel kernels do to a tile between the norm's statistics and memory.

    h = d scale + bias + shortcut,   d = z - mean,   scale = weight rstd
    y = residual + dropout(activation(h))

The difference comes first: folded into one addend, mean · scale would cancel where the mean is far
larger than the deviation.
"""

import triton
import triton.language as tl

from ..parts.output import Drop, output_gradient
from ..parts.tile import Place, add_place, load_place
from .tile import by_channel, load_channels, load_tile


@triton.jit
def load_affine(parameters, channel, channel_mask, LAST: tl.constexpr):
    """(weight, bias) of the channels; 1 and 0 where they are absent."""
    weight_ptr, bias_ptr = parameters
    weight = by_channel(tl.full(channel.shape, 1.0, tl.float32), LAST)
    bias = weight * 0.0
    if weight_ptr is not None:
        weight = load_channels(weight_ptr, channel, channel_mask, LAST)
    if bias_ptr is not None:
        bias = load_channels(bias_ptr, channel, channel_mask, LAST)
    return weight, bias


@triton.jit
def load_normalizer(
    statistics,
    parameters,
    index,  # statistic_of the channels
    channel,
    channel_mask,
    scalars,
    LAST: tl.constexpr,
):
    """(mean, rstd, weight, bias) of the channels."""
    mean = load_channels(statistics[0], index, channel_mask, LAST)
    variance = load_channels(statistics[1], index, channel_mask, LAST)
    weight, bias = load_affine(parameters, channel, channel_mask, LAST)
    return mean, tl.rsqrt(variance + tl.cast(scalars[0], tl.float32)), weight, bias


@triton.jit
def drop_rows(row, at, FORM: tl.constexpr):
    """row, col0 and cols of a tile's `Drop`."""
    LAST: tl.constexpr = FORM.LAST
    if FORM.DROPOUT == "channels":
        return at.sample, by_channel(at.channel, LAST), at.channels
    elif LAST:
        return row, at.channel0, at.channels
    else:
        return row, at.position0, at.positions


@triton.jit
def load_gradient(
    incoming,
    z_ptr,
    mask_ptr,
    mean,
    scale,
    bias,
    seed,
    at,
    scalars,
    threshold,
    FORM: tl.constexpr,
    RUN: tl.constexpr,
):
    """The gradient of a tile of h = d scale + bias + shortcut from that of y; `at` is an `At`.

    incoming: dy; the shortcut, and where its gradient goes, which is that of h; or None.
    mean, scale, bias: as they lie in a tile; None without a norm, where d = z and h = z + shortcut.

    Returns:
        d and g [M, N], float32, where g is 0 outside; offset, mask and inside as `load_tile`.
    """
    dy_ptr, shortcut_ptr, dshortcut_ptr = incoming
    d, row, offset, mask, inside, _count = load_tile(z_ptr, mask_ptr, at, FORM, RUN)
    h = d
    if mean is not None:
        d -= mean
        h = d * scale + bias
    h = add_place(h, Place(shortcut_ptr, offset, None, inside))
    g = load_place(Place(dy_ptr, offset, None, inside))
    mask_row, col0, cols = drop_rows(row, at, FORM)
    part = Drop(seed, mask_row, col0, cols, threshold)
    g = output_gradient(g, h, None, part, scalars, FORM)
    if FORM.MASKED:
        g = tl.where(inside, g, 0.0)
    if dshortcut_ptr is not None:
        tl.store(dshortcut_ptr + offset, g, mask=mask)
    return d, g, offset, mask, inside
