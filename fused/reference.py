"""The chain in plain torch: oracle of the tests, baseline of the benchmarks, last-resort backend.

    y = residual + dropout(activation(norm(z + bias)))        over (rows, cols), norm along a row

and, with norms over samples or positions, over three dimensions in memory order (`channel`).

It runs the operators that nn.Sequential would run, in the input's dtype, so in float64 it is the
oracle and in any other dtype it is eager itself; only the dropout mask is this library's
(random.py). Autograd differentiates it, twice if need be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .random import keep_mask
from .spec import GATED_ACTIVATIONS, ChannelEpilogue, Epilogue, dropout_scale

_ACTIVATIONS: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "relu": lambda h, a, b: F.relu(h),
    "relu6": lambda h, a, b: F.relu6(h),
    "leaky_relu": lambda h, a, b: F.leaky_relu(h, a),
    "elu": lambda h, a, b: F.elu(h, a),
    "selu": lambda h, a, b: F.selu(h),
    "gelu": lambda h, a, b: F.gelu(h),
    "gelu_tanh": lambda h, a, b: F.gelu(h, approximate="tanh"),
    "silu": lambda h, a, b: F.silu(h),
    "mish": lambda h, a, b: F.mish(h),
    "sigmoid": lambda h, a, b: torch.sigmoid(h),
    "tanh": lambda h, a, b: torch.tanh(h),
    "hardswish": lambda h, a, b: F.hardswish(h),
    # F.hardsigmoid has 1/6 in float32 even in its float64 gradient.
    "hardsigmoid": lambda h, a, b: F.relu6(h + 3) / 6,
    "softplus": F.softplus,
    "relu_squared": lambda h, a, b: F.relu(h).square(),
}


def activate(h: Tensor, activation: str | None, alpha: float = 0.0, beta: float = 0.0) -> Tensor:
    """The activation by its name in spec.py, with its two operator parameters.

    A gated one halves the last dimension.
    """
    if activation is None:
        return h
    if activation not in GATED_ACTIVATIONS:
        return _ACTIVATIONS[activation](h, alpha, beta)
    if activation == "glu":
        return F.glu(h)
    value, gate = h.chunk(2, -1)
    return value * _ACTIVATIONS[GATED_ACTIVATIONS[activation].gate](gate, alpha, beta)


def normalize(z: Tensor, epilogue: Epilogue, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Layer or RMS normalisation along the last dimension."""
    if epilogue.norm == "layer":
        shape = z.shape[-1:]
        if torch.jit.is_tracing():  # the older ONNX exporter takes constants alone
            shape = torch.Size(map(int, shape))
        return F.layer_norm(z, shape, weight, bias, epilogue.eps)
    if epilogue.norm == "rms":
        h = F.rms_norm(z, z.shape[-1:], weight, epilogue.eps)
        return h if bias is None else h + bias
    return z


def _laid_as(keep: Tensor, y: Tensor) -> Tensor:
    """keep, where y is a DTensor as one that is sharded alike; the first process's seed counts."""
    if not hasattr(y, "device_mesh"):
        return keep
    from torch.distributed.tensor import Replicate, distribute_tensor

    given: Any = y
    shards = [p if p.is_shard() else Replicate() for p in given.placements]
    return distribute_tensor(keep, given.device_mesh, shards)


def dropout(y: Tensor, threshold: int, seed: Tensor) -> Tensor:
    """Multiplies kept elements by the scale and dropped ones by zero; y is (rows, cols)."""
    compute = torch.promote_types(y.dtype, torch.float32)
    keep = _laid_as(keep_mask(y.shape[0], y.shape[1], threshold, seed), y)
    return (y.to(compute) * (keep.to(compute) * dropout_scale(threshold))).to(y.dtype)


def row(
    z: Tensor,
    epilogue: Epilogue,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    residual: Tensor | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """The epilogue of the row norms.

    Args:
        z: (rows, cols), floating point.
        bias, norm_weight, norm_bias: (cols,) or None.
        residual: of the result's shape or None, added last.
        seed: int64 (1,), needed when `epilogue.threshold` is not 0.

    Returns:
        (rows, cols), behind a gated activation (rows, cols / 2), in the dtype that eager gives.
    """
    h = z if bias is None else z + bias
    h = normalize(h, epilogue, norm_weight, norm_bias)
    y = activate(h, epilogue.activation, epilogue.alpha, epilogue.beta)
    if epilogue.threshold:
        assert seed is not None
        y = dropout(y, epilogue.threshold, seed)
    return y if residual is None else residual + y


def channel_statistics(
    z: Tensor, epilogue: ChannelEpilogue, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The statistics of batch, group or instance norm.

    Args:
        z: (samples, channels, positions) or, channels last, (samples, positions, channels).
        mask: (samples, positions), bool; channels last only. False positions are left out.

    Returns:
        mean and biased variance, (samples, groups) or for batch norm (1, channels), in float32
        (float64 for float64); count (samples,) or (1,), the elements behind each. Where there are
        none, all three are zero.
    """
    x = z.to(torch.promote_types(z.dtype, torch.float32))
    if not epilogue.channels_last:
        x = x.transpose(1, 2)
    samples, positions, channels = x.shape
    present = x.new_ones(samples, positions) if mask is None else mask.to(x.dtype)
    if epilogue.norm == "batch":
        x, present = x.reshape(1, -1, channels), present.reshape(1, -1)
    x = x.reshape(*x.shape[:2], epilogue.groups, channels // epilogue.groups)
    weight = present[:, :, None, None]
    count = present.sum(1) * x.shape[3]
    divisor = count.clamp(min=1)[:, None]
    # Not multiplied by zero: a position that is left out may hold inf or NaN.
    mean = torch.where(weight > 0, x, 0).sum((1, 3)) / divisor
    difference = torch.where(weight > 0, x - mean[:, None, :, None], 0)
    return mean, difference.square().sum((1, 3)) / divisor, count


def channel(
    z: Tensor,
    epilogue: ChannelEpilogue,
    mean: Tensor | None = None,
    variance: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """The epilogue of the norms over samples or positions, or of no norm.

    Args:
        z: (samples, channels, positions) or, channels last, (samples, positions, channels).
        mean, variance: (1, channels), to normalise with; None: those of z itself.
        norm_weight, norm_bias: (channels,) or None.
        residual: of z's shape or None, added last.
        mask: (samples, positions), bool, or None; channels last only. False positions take no part
            and come out as zero.
        seed: int64 (1,), needed when `epilogue.threshold` is not 0.

    Returns:
        of z's shape, in the dtype that eager gives.
    """
    x = z.transpose(1, 2) if epilogue.channels_last else z  # (samples, channels, positions)
    h = x
    if mean is not None and variance is not None:
        h = F.batch_norm(
            x, mean.view(-1), variance.view(-1), norm_weight, norm_bias, False, 0.0, epilogue.eps
        )
    elif mask is not None and epilogue.norm is not None:
        h = _masked_norm(x, epilogue, norm_weight, norm_bias, mask)
    elif epilogue.norm == "batch":
        h = torch.batch_norm(x, norm_weight, norm_bias, None, None, True, 0.0, epilogue.eps, False)
    elif epilogue.norm == "group":
        h = torch.group_norm(x, epilogue.groups, norm_weight, norm_bias, epilogue.eps)
    elif epilogue.norm == "instance":
        h = torch.instance_norm(
            x, norm_weight, norm_bias, None, None, True, 0.0, epilogue.eps, False
        )
    y = activate(h, epilogue.activation, epilogue.alpha, epilogue.beta)
    y = y.transpose(1, 2) if epilogue.channels_last else y
    if epilogue.threshold:
        assert seed is not None
        y = _channel_dropout(y, epilogue, seed)
    y = y if residual is None else residual + y
    return y if mask is None else torch.where(mask[:, :, None], y, torch.zeros_like(y))


def _masked_norm(
    x: Tensor,
    epilogue: ChannelEpilogue,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mask: Tensor,
) -> Tensor:
    """Norm over the positions that the mask keeps; torch has none. x: (samples, channels, …)."""
    z = x.transpose(1, 2)
    # What is left out must not put inf or NaN into the gradients of the rest.
    z = torch.where(mask[:, :, None], z, torch.zeros_like(z))
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    last = replace(epilogue, channels_last=True)
    mean, variance, _ = channel_statistics(z, last, mask)
    h = normalize_channels(z, last, mean, variance, norm_weight, norm_bias)
    return h.to(x.dtype).transpose(1, 2)


def normalize_channels(
    z: Tensor,
    epilogue: ChannelEpilogue,
    mean: Tensor,
    variance: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
) -> Tensor:
    """(z - mean) / sqrt(variance + eps) · norm_weight + norm_bias, in the dtype of z.

    Args:
        z: (samples, channels, positions) or, channels last, (samples, positions, channels).
        mean, variance: (samples, groups) or (1, channels), of at least float32.
    """
    x = z if epilogue.channels_last else z.transpose(1, 2)
    width = x.shape[2] // mean.shape[1]
    mean, variance = (t.repeat_interleave(width, 1)[:, None] for t in (mean, variance))
    h = (x.to(mean.dtype) - mean) * torch.rsqrt(variance + epilogue.eps)
    if norm_weight is not None:
        h = h * norm_weight
    if norm_bias is not None:
        h = h + norm_bias
    h = h.to(z.dtype)
    return h if epilogue.channels_last else h.transpose(1, 2)


def _channel_dropout(y: Tensor, epilogue: ChannelEpilogue, seed: Tensor) -> Tensor:
    """Dropout of elements in memory order, or of whole channels of a sample."""
    samples, rows, cols = y.shape
    if not epilogue.channel_dropout:
        return dropout(y.reshape(samples * rows, cols), epilogue.threshold, seed).view(y.shape)
    channels = cols if epilogue.channels_last else rows
    keep = keep_mask(samples, channels, epilogue.threshold, seed)
    keep = _laid_as(keep[:, None, :] if epilogue.channels_last else keep[:, :, None], y)
    compute = torch.promote_types(y.dtype, torch.float32)
    factor = keep.to(compute) * dropout_scale(epilogue.threshold)
    return (y.to(compute) * factor).to(y.dtype)
