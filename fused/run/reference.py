"""The chain in plain torch: oracle of the tests, baseline of the benchmarks, last-resort backend.

    y = residual + dropout(activation(norm(z + bias) + shortcut))   over (rows, cols), norm along
                                                                    a row

and, with norms over samples or positions, over three dimensions in memory order (`channel`).

It runs the operators that nn.Sequential would run, in the input's dtype, so in float64 it is the
oracle and in any other dtype it is eager itself; only the dropout mask is this library's
(random.py). Autograd differentiates it, twice if need be.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spec import ACTIVATIONS, GATED_ACTIVATIONS, Spec, dropout_scale
from .random import keep_mask


def activate(h: Tensor, activation: str | None, alpha: float = 0.0, beta: float = 0.0) -> Tensor:
    """The activation by its name in spec.py, with its two operator parameters.

    A gated one halves the last dimension.
    """
    if activation is None:
        return h
    entry = ACTIVATIONS.get(activation) or GATED_ACTIVATIONS[activation]
    return entry.function(h, *(alpha, beta)[: len(entry.parameters)])


def normalize(z: Tensor, spec: Spec, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Layer or RMS normalisation along the last dimension."""
    if spec.norm == "layer":
        shape = z.shape[-1:]
        if torch.jit.is_tracing():  # the older ONNX exporter takes constants alone
            shape = torch.Size(map(int, shape))
        return F.layer_norm(z, shape, weight, bias, spec.eps)
    if spec.norm == "rms":
        h = F.rms_norm(z, z.shape[-1:], weight, spec.eps)
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
    spec: Spec,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    residual: Tensor | None = None,
    seed: Tensor | None = None,
    shortcut: Tensor | None = None,
) -> Tensor:
    """The epilogue of the row norms.

    Args:
        z: (rows, cols), floating point.
        bias, norm_weight, norm_bias: (cols,) or None.
        residual: of the result's shape or None, added last.
        seed: int64 (1,), needed when `spec.threshold` is not 0.
        shortcut: of z's shape or None, added in front of the activation.

    Returns:
        (rows, cols), behind a gated activation (rows, cols / 2), in the dtype that eager gives.
    """
    h = z if bias is None else z + bias
    h = normalize(h, spec, norm_weight, norm_bias)
    h = h if shortcut is None else h + shortcut
    y = activate(h, spec.activation, spec.alpha, spec.beta)
    if spec.threshold:
        assert seed is not None
        y = dropout(y, spec.threshold, seed)
    return y if residual is None else residual + y


def gate(value: Tensor, gate: Tensor, spec: Spec, seed: Tensor | None) -> Tensor:
    """dropout(value · activation(gate)) over (rows, cols); the name of the gated activation stands
    for that of its gate."""
    y = value * activate(gate, GATED_ACTIVATIONS[str(spec.activation)].gate)
    if spec.threshold:
        assert seed is not None
        y = dropout(y, spec.threshold, seed)
    return y


def channel_statistics(
    z: Tensor, spec: Spec, mask: Tensor | None = None
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
    if not spec.channels_last:
        x = x.transpose(1, 2)
    samples, positions, channels = x.shape
    present = x.new_ones(samples, positions) if mask is None else mask.to(x.dtype)
    if spec.norm == "batch":
        x, present = x.reshape(1, -1, channels), present.reshape(1, -1)
    x = x.reshape(*x.shape[:2], spec.groups, channels // spec.groups)
    weight = present[:, :, None, None]
    count = present.sum(1) * x.shape[3]
    divisor = count.clamp(min=1)[:, None]
    # Not multiplied by zero: a position that is left out may hold inf or NaN.
    mean = torch.where(weight > 0, x, 0).sum((1, 3)) / divisor
    difference = torch.where(weight > 0, x - mean[:, None, :, None], 0)
    return mean, difference.square().sum((1, 3)) / divisor, count


def channel(
    z: Tensor,
    spec: Spec,
    mean: Tensor | None = None,
    variance: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    seed: Tensor | None = None,
    shortcut: Tensor | None = None,
) -> Tensor:
    """The epilogue of the norms over samples or positions, or of no norm.

    Args:
        z: (samples, channels, positions) or, channels last, (samples, positions, channels).
        mean, variance: (1, channels), to normalise with; None: those of z itself.
        norm_weight, norm_bias: (channels,) or None.
        residual: of z's shape or None, added last.
        mask: (samples, positions), bool, or None; channels last only. False positions take no part
            and come out as zero.
        seed: int64 (1,), needed when `spec.threshold` is not 0.
        shortcut: of z's shape or None, added in front of the activation.

    Returns:
        of z's shape, in the dtype that eager gives.
    """
    x = z.transpose(1, 2) if spec.channels_last else z  # (samples, channels, positions)
    h = x
    if mean is not None and variance is not None:
        h = F.batch_norm(
            x, mean.view(-1), variance.view(-1), norm_weight, norm_bias, False, 0.0, spec.eps
        )
    elif mask is not None and spec.norm is not None:
        h = _masked_norm(x, spec, norm_weight, norm_bias, mask)
    elif spec.norm == "batch":
        h = torch.batch_norm(x, norm_weight, norm_bias, None, None, True, 0.0, spec.eps, False)
    elif spec.norm == "group":
        h = torch.group_norm(x, spec.groups, norm_weight, norm_bias, spec.eps)
    elif spec.norm == "instance":
        h = torch.instance_norm(x, norm_weight, norm_bias, None, None, True, 0.0, spec.eps, False)
    if shortcut is not None:
        h = h + (shortcut.transpose(1, 2) if spec.channels_last else shortcut)
    y = activate(h, spec.activation, spec.alpha, spec.beta)
    y = y.transpose(1, 2) if spec.channels_last else y
    if spec.threshold:
        assert seed is not None
        y = _channel_dropout(y, spec, seed)
    y = y if residual is None else residual + y
    return y if mask is None else torch.where(mask[:, :, None], y, torch.zeros_like(y))


def _masked_norm(
    x: Tensor,
    spec: Spec,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mask: Tensor,
) -> Tensor:
    """Norm over the positions that the mask keeps; torch has none. x: (samples, channels, …)."""
    z = x.transpose(1, 2)
    # What is left out must not put inf or NaN into the gradients of the rest.
    z = torch.where(mask[:, :, None], z, torch.zeros_like(z))
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    last = spec._replace(channels_last=True)
    mean, variance, _ = channel_statistics(z, last, mask)
    h = normalize_channels(z, last, mean, variance, norm_weight, norm_bias)
    return h.to(x.dtype).transpose(1, 2)


def normalize_channels(
    z: Tensor,
    spec: Spec,
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
    x = z if spec.channels_last else z.transpose(1, 2)
    width = x.shape[2] // mean.shape[1]
    mean, variance = (t.repeat_interleave(width, 1)[:, None] for t in (mean, variance))
    h = (x.to(mean.dtype) - mean) * torch.rsqrt(variance + spec.eps)
    if norm_weight is not None:
        h = h * norm_weight
    if norm_bias is not None:
        h = h + norm_bias
    h = h.to(z.dtype)
    return h if spec.channels_last else h.transpose(1, 2)


def _channel_dropout(y: Tensor, spec: Spec, seed: Tensor) -> Tensor:
    """Dropout of elements in memory order, or of whole channels of a sample."""
    samples, rows, cols = y.shape
    if not spec.channel_dropout:
        return dropout(y.reshape(samples * rows, cols), spec.threshold, seed).view(y.shape)
    channels = cols if spec.channels_last else rows
    keep = keep_mask(samples, channels, spec.threshold, seed)
    keep = _laid_as(keep[:, None, :] if spec.channels_last else keep[:, :, None], y)
    compute = torch.promote_types(y.dtype, torch.float32)
    factor = keep.to(compute) * dropout_scale(spec.threshold)
    return (y.to(compute) * factor).to(y.dtype)
