"""The channel operators for CUDA tensors, forward, by the CUDA C++ kernels (schemas: ops.py).

Statistics are made of parts of z and merged; with the parameters they give coefficients of each
channel, by which another kernel goes over z. Backward is in cuda_channel_backward.py, the
arithmetic in csrc/cuda/channel_*.cuh.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .cuda_library import (
    STORAGES,
    ChannelProblem,
    CoefficientProblem,
    StatisticsProblem,
    compute_dtype,
    launch,
    pointer,
    storage,
)
from .cuda_row import chunks_of
from .spec import ACTIVATION_NAMES, NORM_CODES, is_gated

# Positions of a row that one team of threads goes over.
_POSITIONS_OF_CHUNK = 8192
PLANES, PLANES_OF_FORWARD = 6, 4  # csrc/cuda/channel.h: CoefficientPlane

Statistics = tuple[Tensor | None, Tensor | None]


def problem_of(
    z: Tensor, segments: int, mask: Tensor | None, seed: Tensor | None, scalars: tuple[Any, ...]
) -> ChannelProblem:
    """How the kernels walk over z, with statistics of so many segments: 1, or each sample's.

    Raises:
        ValueError: the activation is gated.
    """
    _, _, last, _, activation, alpha, beta, threshold, channel_dropout = scalars
    if is_gated(activation):
        raise ValueError(
            f"fused: {ACTIVATION_NAMES[activation]} halves the columns, which row_forward and"
            " row_backward alone do"
        )
    samples, rows, cols = z.shape
    positions, channels = (rows, cols) if last else (cols, rows)
    if last:
        rows = samples * positions // segments
        chunks = chunks_of(rows, channels, segments)
        length = -(-rows // chunks)
        chunks = -(-rows // length)
    else:
        chunks = -(-positions // _POSITIONS_OF_CHUNK)
        length = positions if chunks == 1 else -(-positions // (8 * chunks)) * 8
        chunks = -(-positions // length)
    return ChannelProblem(
        z=z.data_ptr(),
        mask=pointer(mask),
        seed=pointer(seed) if threshold else None,
        samples=samples,
        channels=channels,
        positions=positions,
        last=last,
        segments=segments,
        chunks=chunks,
        length=length,
        storage=STORAGES[z.dtype],
        activation=activation,
        threshold=threshold,
        channel_dropout=channel_dropout,
        alpha=alpha,
        beta=beta,
    )


def chunks_of_segment(problem: ChannelProblem) -> int:
    """The parts whose sums are one segment's."""
    if problem.last:
        return problem.chunks
    return problem.samples * problem.chunks // problem.segments


def _statistics(
    z: Tensor, mask: Tensor | None, norm: int, groups: int, last: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """mean, variance and count as the operator channel_statistics returns them."""
    compute = compute_dtype(z)
    segments = 1 if norm == NORM_CODES["batch"] else z.shape[0]
    mean, variance = (z.new_empty((segments, groups), dtype=compute) for _ in range(2))
    count = z.new_empty((0 if mask is None else segments,), dtype=compute)
    if z.numel() == 0:
        return mean.zero_(), variance.zero_(), count.zero_()
    problem = problem_of(z, segments, mask, None, (norm, groups, last, 0.0, 0, 0.0, 0.0, 0, False))
    chunks = chunks_of_segment(problem)
    partial = z.new_empty((2, segments, chunks, problem.channels), dtype=torch.float64)
    counts = z.new_empty((segments, chunks), dtype=torch.float64)
    problem.partial, problem.counts = partial.data_ptr(), counts.data_ptr()
    launch("channel_moments", problem, z)
    merge = StatisticsProblem(
        partial=partial.data_ptr(),
        counts=counts.data_ptr(),
        mean=mean.data_ptr(),
        variance=variance.data_ptr(),
        count=None if mask is None else count.data_ptr(),
        segments=segments,
        chunks=chunks,
        channels=problem.channels,
        groups=groups,
        wide=compute == torch.float64,
    )
    launch("channel_merge", merge, z)
    return mean, variance, count


def coefficients_of(
    z: Tensor,
    statistics: Statistics,
    parameters: tuple[Tensor | None, Tensor | None],
    scalars: tuple[Any, ...],
    sums: Tensor | None = None,
    count: Tensor | None = None,
) -> Tensor | None:
    """(planes, segments, channels) in the compute dtype; None without a norm."""
    mean, variance = statistics
    if scalars[0] == 0 or mean is None or variance is None:
        return None
    (segments, groups), channels = mean.shape, z.shape[2 if scalars[2] else 1]
    planes = PLANES_OF_FORWARD if sums is None else PLANES
    out = z.new_empty((planes, segments, channels), dtype=compute_dtype(z))
    weight, bias = parameters
    problem = CoefficientProblem(
        mean=mean.data_ptr(),
        variance=variance.data_ptr(),
        norm_weight=pointer(weight),
        norm_bias=pointer(bias),
        sums=pointer(sums),
        count=pointer(count),
        out=out.data_ptr(),
        mean_storage=storage(mean),
        variance_storage=storage(variance),
        weight_storage=storage(weight),
        bias_storage=storage(bias),
        sums_storage=storage(sums),
        count_storage=storage(count),
        segments=segments,
        groups=groups,
        channels=channels,
        elements=z.numel() // (segments * groups),
        wide=out.dtype == torch.float64,
        eps=scalars[3],
    )
    launch("channel_coefficients", problem, z)
    return out


def segments_of(statistics: Statistics) -> int:
    return 1 if statistics[0] is None else statistics[0].shape[0]


def channel_statistics(
    z: Tensor, mask: Tensor | None, norm: int, groups: int, channels_last: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance of batch, group or instance norm.

    Args:
        z: three dimensions, contiguous.
        mask: (samples, positions), bool, with channels_last alone; or None.
        norm, groups, channels_last: as `spec.ChannelEpilogue.channel_codes`.

    Returns:
        float32 (float64 for float64): mean and variance, (samples, groups) or for batch norm
        (1, channels); count, (samples,) or (1,), the elements behind each, (0,) without mask.
    """
    return _statistics(z, mask, norm, groups, channels_last)


def channel_forward(
    z: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    *scalars: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y = residual + dropout(activation(norm(z))), by the statistics of z itself.

    Args:
        z, residual: three dimensions, contiguous; one dtype.
        norm_weight, norm_bias: (channels,), contiguous, any floating dtype, or None.
        mask: (samples, positions), bool, with channels_last alone; or None.
        seed: int64 (1,); may be None where threshold is 0.
        scalars: as `spec.ChannelEpilogue.channel_codes`.

    Returns:
        y of z's shape and dtype; mean, variance and count as `channel_statistics`.
    """
    mean, variance, count = _statistics(z, mask, *scalars[:3])
    rest = (norm_weight, norm_bias, residual, mask, seed, *scalars)
    return channel_apply(z, mean, variance, *rest), mean, variance, count


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

    Args:
        mean, variance: (samples, groups) or (1, channels), contiguous, any floating dtype; both
            None without a norm.
        out: where y goes, laid out as z; it may be z itself. None: a new tensor.
        The others are those of `channel_forward`.

    Returns:
        y of z's shape and dtype.
    """
    y = z.new_empty(z.shape) if out is None else out
    if z.numel() == 0:
        return y
    statistics = mean, variance
    coefficients = coefficients_of(z, statistics, (norm_weight, norm_bias), scalars)
    problem = problem_of(z, segments_of(statistics), mask, seed, scalars)
    problem.coefficients, problem.residual = pointer(coefficients), pointer(residual)
    problem.out = y.data_ptr()
    launch("channel_forward", problem, z)
    return y


def channel_apply_(z: Tensor, *args: Any) -> None:
    """`channel_apply` that writes y over z."""
    channel_apply(z, *args, out=z)
