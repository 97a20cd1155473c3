"""What the channel kernels do to a tile between the norm's statistics and memory.

    h = d scale + bias,   d = z - mean,   scale = weight rstd
    y = residual + dropout(activation(h))

The difference comes first: folded into one addend, mean · scale would cancel where the mean is far
larger than the deviation.
"""

import triton
import triton.language as tl

from .activation import activate, activate_grad
from .channel_tile import by_channel, load_channels, load_tile
from .dropout import channel_multiplier, dropout_multiplier


@triton.jit
def load_affine(weight_ptr, bias_ptr, channel, channel_mask, LAST: tl.constexpr):
    """(weight, bias) of the channels; 1 and 0 where they are absent."""
    weight = by_channel(tl.full(channel.shape, 1.0, tl.float32), LAST)
    bias = weight * 0.0
    if weight_ptr is not None:
        weight = load_channels(weight_ptr, channel, channel_mask, LAST)
    if bias_ptr is not None:
        bias = load_channels(bias_ptr, channel, channel_mask, LAST)
    return weight, bias


@triton.jit
def load_normalizer(
    mean_ptr,
    variance_ptr,
    weight_ptr,
    bias_ptr,
    index,  # statistic_of the channels
    channel,
    channel_mask,
    eps,
    LAST: tl.constexpr,
):
    """(mean, rstd, weight, bias) of the channels."""
    mean = load_channels(mean_ptr, index, channel_mask, LAST)
    variance = load_channels(variance_ptr, index, channel_mask, LAST)
    weight, bias = load_affine(weight_ptr, bias_ptr, channel, channel_mask, LAST)
    return mean, tl.rsqrt(variance + tl.cast(eps, tl.float32)), weight, bias


@triton.jit
def drop(
    x,
    seed,
    row,
    sample,
    channel,
    channel0,
    position0,
    channels,
    positions,
    threshold,
    DROPOUT: tl.constexpr,
    PER_THREAD: tl.constexpr,
    LAST: tl.constexpr,
):
    """x times dropout's multiplier: of elements, of whole channels, or (None) 1.

    x is the tile from channel0 and position0 on; the one along its rows is a multiple of 8.
    """
    if DROPOUT is None:
        return x
    elif DROPOUT == "channels":
        return x * channel_multiplier(seed, sample, by_channel(channel, LAST), channels, threshold)
    else:
        col0 = channel0 if LAST else position0
        cols = channels if LAST else positions
        return x * dropout_multiplier(
            seed, row, col0, cols, threshold, PER_THREAD, x.shape[0], x.shape[1]
        )


@triton.jit
def write_output(
    h,
    residual_ptr,
    y_ptr,
    row,
    offset,
    mask,
    inside,
    seed,
    sample,
    channel,
    channel0,
    position0,
    channels,
    positions,
    alpha,
    beta,
    threshold,
    ACTIVATION: tl.constexpr,
    DROPOUT: tl.constexpr,
    MASKED: tl.constexpr,
    PTX: tl.constexpr,
    PER_THREAD: tl.constexpr,
    LAST: tl.constexpr,
):
    """residual + dropout(activation(h)) to y; 0 where `mask` holds but not `inside`: padding."""
    y = activate(h, tl.cast(alpha, tl.float32), tl.cast(beta, tl.float32), ACTIVATION, PTX)
    y = drop(
        y,
        seed,
        *(row, sample, channel, channel0, position0, channels, positions),
        *(threshold, DROPOUT, PER_THREAD, LAST),
    )
    if residual_ptr is not None:
        y += tl.load(residual_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    if MASKED:
        y = tl.where(inside, y, 0.0)
    tl.store(y_ptr + offset, y, mask=mask)


@triton.jit
def load_gradient(
    dy_ptr,
    z_ptr,
    mask_ptr,
    mean,
    scale,
    bias,
    seed,
    sample,
    channel,
    channel_mask,
    channel0,
    position0,
    channels,
    positions,
    alpha,
    beta,
    threshold,
    ACTIVATION: tl.constexpr,
    DROPOUT: tl.constexpr,
    ALIGN: tl.constexpr,
    PTX: tl.constexpr,
    PER_THREAD: tl.constexpr,
    LAST: tl.constexpr,
    RUN: tl.constexpr,
):
    """The gradient of a tile of h = d scale + bias from that of y.

    mean, scale, bias: as they lie in a tile; None without a norm, where h = d = z.

    Returns:
        d and g [M, N], float32, where g is 0 outside; offset, mask and inside as `load_tile`.
    """
    d, row, offset, mask, inside, _count = load_tile(
        *(z_ptr, mask_ptr, sample, channel, channel_mask),
        *(position0, channels, positions, ALIGN, LAST, RUN),
    )
    h = d
    if mean is not None:
        d -= mean
        h = d * scale + bias
    g = tl.load(dy_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    g = drop(
        g,
        seed,
        *(row, sample, channel, channel0, position0, channels, positions),
        *(threshold, DROPOUT, PER_THREAD, LAST),
    )
    alpha = tl.cast(alpha, tl.float32)
    g = activate_grad(g, h, alpha, tl.cast(beta, tl.float32), ACTIVATION, PTX)
    if mask_ptr is not None:
        g = tl.where(inside, g, 0.0)
    return d, g, offset, mask, inside
