"""The channel operators for CUDA tensors, forward; schemas.py says what they return.

z, dy, residual and y are contiguous and have one dtype; statistics and parameters are contiguous
and have any floating dtype; the seed may be None where threshold is 0.

Statistics are made of parts of z and merged; with the parameters they give coefficients of each
channel, by which another kernel goes over z. The arithmetic is in csrc/cuda/channel_*.cuh.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..spec import ACTIVATION_NAMES, NORM_CODES, is_gated
from .cuda_library import compute_dtype, launch, scalars_of
from .cuda_row import chunks_of

# Positions of a row that one team of threads goes over.
_POSITIONS_OF_CHUNK = 8192
PLANES, PLANES_OF_FORWARD = 6, 4  # csrc/cuda/problems.h: CoefficientPlane


class ChannelScalars(NamedTuple):
    """The operators' scalars, in the order of `Spec.channel`."""

    norm: int
    groups: int
    channels_last: bool
    eps: float
    activation: int
    alpha: float
    beta: float
    threshold: int
    channel_dropout: bool


def walk_of(z: Tensor, last: bool, segments: int) -> dict[str, Any]:
    """How the kernels walk over z, with statistics of so many segments: 1, or each sample's."""
    samples, rows, cols = z.shape
    positions, channels = (rows, cols) if last else (cols, rows)
    if last:
        rows = samples * positions // segments
        length = -(-rows // chunks_of(rows, channels, segments))
        chunks = -(-rows // length)
    else:
        chunks = -(-positions // _POSITIONS_OF_CHUNK)
        length = positions if chunks == 1 else -(-positions // (8 * chunks)) * 8
        chunks = -(-positions // length)
    shape = {"samples": samples, "channels": channels, "positions": positions, "last": last}
    return {**shape, "segments": segments, "chunks": chunks, "length": length}


def chunks_of_segment(walk: dict[str, Any]) -> int:
    """The parts whose sums are one segment's."""
    of_row: int = walk["chunks"]
    return of_row if walk["last"] else walk["samples"] * of_row // walk["segments"]


def epilogue_walk_of(
    z: Tensor, coefficients: Tensor | None, scalars: ChannelScalars
) -> dict[str, Any]:
    """The same with what follows the norm; a gated activation is refused."""
    if is_gated(scalars.activation):
        raise ValueError(
            f"fused: {ACTIVATION_NAMES[scalars.activation]} halves the columns, which row_forward"
            " and row_backward alone do"
        )
    segments = 1 if coefficients is None else coefficients.shape[1]
    walk = walk_of(z, scalars.channels_last, segments)
    walk |= {"activation": scalars.activation, "alpha": scalars.alpha, "beta": scalars.beta}
    walk |= {"threshold": scalars.threshold, "channel_dropout": scalars.channel_dropout}
    return walk


def coefficients_of(
    z: Tensor,
    statistics: tuple[Tensor | None, Tensor | None],
    parameters: tuple[Tensor | None, Tensor | None],
    scalars: ChannelScalars,
    sums: Tensor | None = None,
    count: Tensor | None = None,
) -> Tensor | None:
    """(planes, segments, channels) in the compute dtype; None without a norm."""
    (mean, variance), (norm_weight, norm_bias) = statistics, parameters
    if not scalars.norm or mean is None:
        return None
    (segments, groups), channels = mean.shape, z.shape[2 if scalars.channels_last else 1]
    planes = PLANES_OF_FORWARD if sums is None else PLANES
    out = z.new_empty((planes, segments, channels), dtype=compute_dtype(z))
    tensors = {"mean": mean, "variance": variance, "norm_weight": norm_weight}
    tensors |= {"norm_bias": norm_bias, "sums": sums, "count": count, "out": out}
    numbers = {"segments": segments, "groups": groups, "channels": channels, "eps": scalars.eps}
    numbers["elements"] = z.numel() // (segments * groups)
    launch("channel_coefficients", z, tensors, numbers)
    return out


def channel_statistics(
    z: Tensor, mask: Tensor | None, norm: int, groups: int, channels_last: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and the elements behind each, in the compute dtype."""
    compute = compute_dtype(z)
    segments = 1 if norm == NORM_CODES["batch"] else z.shape[0]
    mean, variance = (z.new_empty((segments, groups), dtype=compute) for _ in range(2))
    count = z.new_empty((0 if mask is None else segments,), dtype=compute)
    if z.numel() == 0:
        return mean.zero_(), variance.zero_(), count.zero_()
    walk = walk_of(z, channels_last, segments)
    chunks, channels = chunks_of_segment(walk), walk["channels"]
    parts = {
        "partial": z.new_empty((2, segments, chunks, channels), dtype=torch.float64),
        "counts": z.new_empty((segments, chunks), dtype=torch.float64),
    }
    launch("channel_moments", z, {"z": z, "mask": mask, **parts}, walk)
    shape = {"segments": segments, "chunks": chunks, "channels": channels, "groups": groups}
    found = {"mean": mean, "variance": variance, "count": count}
    launch("channel_merge", z, {**parts, **found}, shape)
    return mean, variance, count


def channel_forward(
    z: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    *scalars: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y = residual + dropout(activation(norm(z))), by the statistics of z itself, and these."""
    given = scalars_of(ChannelScalars, scalars)
    statistics = channel_statistics(z, mask, given.norm, given.groups, given.channels_last)
    rest = (norm_weight, norm_bias, residual, mask, seed, *scalars)
    return channel_apply(z, *statistics[:2], *rest), *statistics


def channel_apply(
    z: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    *scalars: Any,
    out: Tensor | None = None,
) -> Tensor:
    """y = residual + dropout(activation(norm(z))), by given statistics.

    out: where y goes; it may be z itself. None: a new tensor.
    """
    y, given = z.new_empty(z.shape) if out is None else out, scalars_of(ChannelScalars, scalars)
    if z.numel():
        coefficients = coefficients_of(z, (mean, variance), (norm_weight, norm_bias), given)
        tensors = {"z": z, "coefficients": coefficients, "residual": residual, "out": y}
        tensors |= {"mask": mask, "seed": seed}
        launch("channel_forward", z, tensors, epilogue_walk_of(z, coefficients, given))
    return y


def channel_apply_(z: Tensor, *args: Any) -> None:
    """`channel_apply` that writes y over z."""
    channel_apply(z, *args, out=z)
