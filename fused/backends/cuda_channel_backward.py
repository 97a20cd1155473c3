"""The channel operators for CUDA tensors, backward; cuda_channel.py says what they take.

With g the gradient of the norm's output, one pass over dy and z makes Σ g and Σ g·x̂, another dz; by
constants, or without a norm, dz needs no sums, and one pass does both. The arithmetic is in
csrc/cuda/channel_epilogue.cuh.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from ..spec import NORM_CODES, WANT_BIAS
from .cuda_channel import (
    PLANES,
    ChannelScalars,
    chunks_of_segment,
    coefficients_of,
    epilogue_walk_of,
)
from .cuda_library import add_up, compute_dtype, launch, new_sums, returned, scalars_of, wanted_of


def _walk_backward(
    dy: Tensor,
    z: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    scalars: ChannelScalars,
    coefficients: Tensor | None,
    sums: Sequence[Tensor | None] = (None, None, None),
    dz: Tensor | None = None,
) -> None:
    """One pass over dy and z: sums of g·x̂, g and g·scale; dz; or both.

    The sums are (channels,) each, or (segments, channels). With coefficients made of sums, dz is
    that of statistics of z, else that of constants.
    """
    walk = epilogue_walk_of(z, coefficients, scalars)
    made = [t for t in sums if t is not None]
    parts = walk["segments"] * chunks_of_segment(walk)
    outer = walk["segments"] if made and made[0].dim() == 2 else 1
    shape = (len(made), outer, parts // outer, walk["channels"])
    sums_of_parts = z.new_empty(shape, dtype=compute_dtype(z))
    walk["centred"] = coefficients is not None and coefficients.shape[0] == PLANES
    walk["wanted"] = wanted_of(sums)
    tensors = {"dy": dy, "z": z, "mask": mask, "seed": seed, "coefficients": coefficients}
    tensors |= {"out": dz, "partial": sums_of_parts}
    launch("channel_backward", z, tensors, walk)
    add_up(sums_of_parts, made)


def _sums(coefficients: Tensor | None, walk: Callable[..., None]) -> Tensor:
    """(2, segments, channels) in the compute dtype: of g and g·x̂."""
    assert coefficients is not None
    sums = coefficients.new_empty((2, *coefficients.shape[1:]))
    walk(coefficients, (sums[1], sums[0], None))
    return sums


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
) -> tuple[Tensor, ...]:
    """dz, dnorm_weight, dnorm_bias, dbias and nothing, given the gradient dy of y.

    A bias in front of group norm is refused: its gradient is not a sum of what is at hand.
    """
    given = scalars_of(ChannelScalars, scalars)
    constant = constant or not given.norm
    if given.norm == NORM_CODES["group"] and not constant and wanted & WANT_BIAS:
        raise ValueError(
            "channel_backward: the gradient of a bias in front of group norm is not offered,"
            " got wanted & WANT_BIAS; take dz.sum over samples and positions"
        )
    if not given.norm:
        norm_weight = norm_bias = mean = variance = None
    dz, empty = z.new_empty(z.shape), z.numel() == 0
    # The norm by statistics of z takes the bias out again.
    zero = (empty, empty, empty or not constant)
    channels = z.shape[2 if given.channels_last else 1]
    gradients = new_sums(z, channels, wanted, norm_weight, norm_bias, zero)
    if not empty:
        make = partial(coefficients_of, z, (mean, variance), (norm_weight, norm_bias), given)
        walk, coefficients = partial(_walk_backward, dy, z, mask, seed, given), make()
        if constant:
            walk(coefficients, gradients, dz)
        else:
            sums = _sums(coefficients, walk)
            walk(make(sums, count), dz=dz)
            for t, plane in zip(gradients, (sums[1], sums[0]), strict=False):
                if t is not None:
                    add_up(plane[None, None], [t])
    return returned(dz, gradients)


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
) -> tuple[Tensor, Tensor]:
    """The sums of batch norm's backward: (2, channels), of g and of g·x̂, in the compute dtype; and
    nothing.
    """
    given, nothing = scalars_of(ChannelScalars, scalars), z.new_empty((0,))
    if z.numel() == 0:
        channels = z.shape[2 if given.channels_last else 1]
        return z.new_zeros((2, channels), dtype=compute_dtype(z)), nothing
    coefficients = coefficients_of(z, (mean, variance), (norm_weight, norm_bias), given)
    return _sums(coefficients, partial(_walk_backward, dy, z, mask, seed, given))[:, 0], nothing


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
    """dz of batch norm, by the sums and the count of all processes together."""
    dz, given = z.new_empty(z.shape), ChannelScalars(*scalars)
    if z.numel():
        parameters = (norm_weight, norm_bias)
        coefficients = coefficients_of(z, (mean, variance), parameters, given, sums, count)
        _walk_backward(dy, z, mask, seed, given, coefficients, dz=dz)
    return dz
