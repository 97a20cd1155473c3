"""What the channel kernels do to a tile between the norm's statistics and memory.

    h = d scale + bias,   d = z - mean,   scale = weight rstd
    y = residual + dropout(activation(h))

The difference comes first: folded into one addend, mean · scale would cancel where the mean is far
larger than the deviation.
"""

import triton
import triton.language as tl

from .activation import activate, activate_grad
from .channel_tile import by_channel, load_channels
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
    col0,
    cols,
    sample,
    channel,
    channels,
    threshold,
    DROPOUT: tl.constexpr,
    PER_THREAD: tl.constexpr,
    LAST: tl.constexpr,
):
    """x times dropout's multiplier: of elements, of whole channels, or (None) 1.

    Elements are those of rows x cols in memory order, the tile's from col0, a multiple of 8, on.
    """
    if DROPOUT is None:
        return x
    elif DROPOUT == "channels":
        return x * channel_multiplier(seed, sample, by_channel(channel, LAST), channels, threshold)
    else:
        return x * dropout_multiplier(
            seed, row, col0, cols, threshold, PER_THREAD, x.shape[0], x.shape[1]
        )


@triton.jit
def write_output(
    h,
    residual_ptr,
    y_ptr,
    offset,
    mask,
    inside,
    seed,
    row,
    col0,
    cols,
    sample,
    channel,
    channels,
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
        y, seed, row, col0, cols, sample, channel, channels, threshold, DROPOUT, PER_THREAD, LAST
    )
    if residual_ptr is not None:
        y += tl.load(residual_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    if MASKED:
        y = tl.where(inside, y, 0.0)
    tl.store(y_ptr + offset, y, mask=mask)


@triton.jit
def load_gradient(
    dy_ptr,
    h,
    offset,
    inside,
    seed,
    row,
    col0,
    cols,
    sample,
    channel,
    channels,
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
    """The gradient of h from that of y; 0 outside."""
    g = tl.load(dy_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    g = drop(
        g, seed, row, col0, cols, sample, channel, channels, threshold, DROPOUT, PER_THREAD, LAST
    )
    alpha = tl.cast(alpha, tl.float32)
    g = activate_grad(g, h, alpha, tl.cast(beta, tl.float32), ACTIVATION, PTX)
    if MASKED:
        g = tl.where(inside, g, 0.0)
    return g
