"""The channel operators for CUDA tensors, backward, by the CUDA C++ kernels (schemas: ops.py).

With g the gradient of the norm's output, one pass over dy and z makes Σ g and Σ g·x̂, another dz; by
constants, or without a norm, dz needs no sums, and one pass does both. The arithmetic is in
csrc/cuda/channel_epilogue.cuh.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .cuda_channel import (
    PLANES,
    chunks_of_segment,
    coefficients_of,
    problem_of,
    segments_of,
)
from .cuda_library import add_up, compute_dtype, launch, pointer, wanted_of
from .spec import NORM_CODES, WANT_BIAS, WANT_NORM_BIAS, WANT_NORM_WEIGHT


def _walk_backward(
    dy: Tensor,
    z: Tensor,
    coefficients: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    scalars: tuple[Any, ...],
    sums: tuple[Tensor | None, ...] = (None, None, None),
    dz: Tensor | None = None,
) -> None:
    """One pass over dy and z: sums of g·x̂, g and g·scale, (segments, channels) each; dz; or both.

    With coefficients made of sums, dz is that of statistics of z, else that of constants.
    """
    segments = 1 if coefficients is None else coefficients.shape[1]
    problem = problem_of(z, segments, mask, seed, scalars)
    problem.dy, problem.out = dy.data_ptr(), pointer(dz)
    problem.coefficients = pointer(coefficients)
    problem.centred = coefficients is not None and coefficients.shape[0] == PLANES
    problem.wanted = wanted_of(sums)
    planes = sum(t is not None for t in sums)
    shape = (planes, segments, chunks_of_segment(problem), problem.channels)
    partial = z.new_empty(shape, dtype=compute_dtype(z))
    problem.partial = partial.data_ptr()
    launch("channel_backward", problem, z)
    if planes:
        add_up(partial, sums)


def channel_backward(
    dy: Tensor,
    z: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    count: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    wanted: int,
    constant: bool,
    *scalars: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `channel_forward` or `channel_apply`, given the gradient dy of its result.

    Args:
        dy, z: three dimensions, contiguous; one dtype.
        mean, variance: as the forward had them.
        count: the elements behind each statistic, (samples,) or (1,); None: from the shape.
        wanted: sum of the WANT_ constants of spec.py: the sums to make.
        constant: mean and variance do not depend on z.
        The others are those of the forward.

    Returns:
        dz of z's shape and dtype; dnorm_weight and dnorm_bias, (channels,) in the dtypes of their
        parameters, and dbias, (channels,) in z's dtype. Those that are not wanted, or whose
        parameter does not exist, are empty, (0,), in the statistics' dtype.

    Raises:
        ValueError: a bias in front of group norm, whose gradient is not a sum of what is at hand.
    """
    norm = scalars[0]
    constant = constant or norm == 0
    if norm == NORM_CODES["group"] and not constant and wanted & WANT_BIAS:
        raise ValueError(
            "channel_backward: the gradient of a bias in front of group norm is not offered,"
            " got wanted & WANT_BIAS; take dz.sum over samples and positions"
        )
    if norm == 0:
        norm_weight = norm_bias = mean = variance = None
    compute, channels = compute_dtype(z), z.shape[2 if scalars[2] else 1]
    dz = z.new_empty(z.shape)
    # Zeros stay where there is nothing to add up, and where the norm takes the bias out again.
    owners = (
        norm_weight if wanted & WANT_NORM_WEIGHT else None,
        norm_bias if wanted & WANT_NORM_BIAS else None,
        z if wanted & WANT_BIAS else None,
    )
    stays = (z.numel() == 0, z.numel() == 0, z.numel() == 0 or not constant)
    gradients = [
        None if owner is None else (owner.new_zeros if zero else owner.new_empty)((channels,))
        for owner, zero in zip(owners, stays, strict=True)
    ]
    if z.numel():
        statistics, parameters = (mean, variance), (norm_weight, norm_bias)
        coefficients = coefficients_of(z, statistics, parameters, scalars)
        made, segments = len([t for t in owners if t is not None]), segments_of(statistics)
        if constant and segments == 1:
            _walk_backward(dy, z, coefficients, mask, seed, scalars, tuple(gradients), dz)
        elif constant:
            sums = z.new_empty((made, segments, channels), dtype=compute)
            planes = iter(sums)
            asked = tuple(None if t is None else next(planes) for t in gradients)
            _walk_backward(dy, z, coefficients, mask, seed, scalars, asked, dz)
            if made:
                add_up(sums[:, None], gradients)
        else:
            sums = _sums(dy, z, coefficients, mask, seed, scalars)
            gradient = coefficients_of(z, statistics, parameters, scalars, sums, count)
            _walk_backward(dy, z, gradient, mask, seed, scalars, dz=dz)
            for t, plane in zip(gradients, (sums[1], sums[0]), strict=False):
                if t is not None:
                    add_up(plane[None, None], [t])
    dnorm_weight, dnorm_bias, dbias = (
        z.new_empty((0,), dtype=compute) if t is None else t for t in gradients
    )
    return dz, dnorm_weight, dnorm_bias, dbias


def _sums(
    dy: Tensor,
    z: Tensor,
    coefficients: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    scalars: tuple[Any, ...],
) -> Tensor:
    """(2, segments, channels) in the compute dtype: of g and g·x̂."""
    assert coefficients is not None
    sums = coefficients.new_empty((2, *coefficients.shape[1:]))
    _walk_backward(dy, z, coefficients, mask, seed, scalars, (sums[1], sums[0], None))
    return sums


def channel_sums(
    dy: Tensor,
    z: Tensor,
    mean: Tensor,
    variance: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    *scalars: Any,
) -> Tensor:
    """The sums of batch norm's backward: (2, channels), of g and of g·x̂, in the statistics' dtype.

    The arguments are those of `channel_backward`, mean and variance (1, channels).
    """
    if z.numel() == 0:
        return z.new_zeros((2, z.shape[2 if scalars[2] else 1]), dtype=compute_dtype(z))
    coefficients = coefficients_of(z, (mean, variance), (norm_weight, norm_bias), scalars)
    return _sums(dy, z, coefficients, mask, seed, scalars)[:, 0]


def channel_gradient(
    dy: Tensor,
    z: Tensor,
    mean: Tensor,
    variance: Tensor,
    sums: Tensor,
    count: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    *scalars: Any,
) -> Tensor:
    """dz of batch norm, of z's shape and dtype, by the sums of all processes together.

    The arguments are those of `channel_sums`; sums (2, channels) and count (1,) are floating point.
    """
    dz = z.new_empty(z.shape)
    if z.numel():
        statistics, parameters = (mean, variance), (norm_weight, norm_bias)
        coefficients = coefficients_of(z, statistics, parameters, scalars, sums, count)
        _walk_backward(dy, z, coefficients, mask, seed, scalars, dz=dz)
    return dz
