"""The walking kernel of the channel norms' backward: sums over a segment, gradients of z, or both.

With g the gradient of the norm's output (mask again, activation derivative) and x̂ the normalised z,

    dnorm_bias = Σ g,   dnorm_weight = Σ g x̂,
    dz = (g weight - mean(g weight) - x̂ mean(g weight x̂)) rstd

where the means run over the elements of a statistic: one walk for the sums, another for dz. By
constants, or without a norm, dz = g weight rstd needs no sums, and one walk does both.

Formula: Ioffe and Szegedy, "Batch normalization", 2015, section 3.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuning import rules as tuning
from .epilogue import load_gradient, load_normalizer
from .problem import Problem
from .statistics import segment_of_program
from .tile import (
    INTEGERS,
    At,
    by_channel,
    channel_end,
    load_channels,
    over_positions,
    statistic_of,
)


class Made(NamedTuple):
    """Which sums over a segment a walk makes: of g, of g x̂, and of g weight rstd."""

    g: bool = False
    gx: bool = False
    dz: bool = False


NONE_MADE = Made()


@triton.jit
def slope_and_offset(
    sums,
    segment,
    index,
    channel_mask,
    weight,
    rstd,
    LAST: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The terms of dz = g scale + d slope + offset that come from the statistics.

    The sums are those of a statistic: of g and g x̂, or where several channels share one (WIDTH
    above 1) of g weight and g weight x̂. With them: how many elements are behind each, a pointer
    or None, and the number where it is None.
    """
    sum_g_ptr, sum_gx_ptr, count_ptr, elements = sums
    count = tl.cast(elements, tl.float32)
    if count_ptr is not None:
        count = tl.load(count_ptr + segment).to(tl.float32)
    share = rstd / tl.maximum(count, 1.0)
    if WIDTH == 1:
        share *= weight
    offset = -share * load_channels(sum_g_ptr, index, channel_mask, LAST)
    slope = -share * rstd * load_channels(sum_gx_ptr, index, channel_mask, LAST)
    return slope, offset


@triton.jit(do_not_specialize=INTEGERS)
def _channel_bwd_kernel(
    incoming,
    z_ptr,
    statistics,
    parameters,
    mask_ptr,
    seed_ptr,
    sums,
    dz_ptr,
    partial_ptr,
    samples,
    channels,
    positions,
    groups,
    chunks,
    steps,
    scalars,
    threshold,
    FORM: tl.constexpr,
    MADE: tl.constexpr,
    TILE: tl.constexpr,
):
    """One chunk of `steps` tiles of a segment of `samples` samples.

    incoming: as of `load_gradient`.
    partial_ptr is [sums made, segments, chunks, channels]: of g, of g x̂, of g weight rstd. dz_ptr
    is None where only they are wanted; sum_g_ptr, sum_gx_ptr are None where dz does not need them.
    """
    UNITS: tl.constexpr = TILE.UNITS
    ALIGN: tl.constexpr = FORM.ALIGN
    LAST: tl.constexpr = FORM.LAST
    SHARED: tl.constexpr = FORM.SHARED
    WIDTH: tl.constexpr = FORM.WIDTH
    RUN: tl.constexpr = TILE.RUN
    blocks = tl.cdiv(positions, RUN)
    segment, chunk, channel0, tile0, tile1 = segment_of_program(
        channels, chunks, steps, samples * blocks, UNITS
    )
    channel = channel0 + tl.arange(0, UNITS)
    channel_mask = channel < channel_end(channels, ALIGN, LAST)
    mean, scale, bias = None, None, None
    if statistics[0] is not None:
        index = statistic_of(segment, channel, groups, SHARED, WIDTH)
        mean, rstd, weight, bias = load_normalizer(
            statistics, parameters, index, channel, channel_mask, scalars, LAST
        )
        scale = weight * rstd
        if sums[0] is not None:
            slope, shift = slope_and_offset(
                sums, segment, index, channel_mask, weight, rstd, LAST, WIDTH
            )
    seed = tl.load(seed_ptr) if seed_ptr is not None else None
    M: tl.constexpr = RUN if LAST else UNITS
    N: tl.constexpr = UNITS if LAST else RUN
    if MADE.g or MADE.dz:
        total_g = tl.zeros((M, N), tl.float32)
    if MADE.gx:
        total_gd = tl.zeros((M, N), tl.float32)
    for tile in tl.range(tile0, tile1, num_stages=TILE.STAGES):
        sample = segment * samples + tl.cast(tile, tl.int32) // blocks
        position0 = tl.cast(tile, tl.int32) % blocks * RUN
        d, g, offset, mask, inside = load_gradient(
            incoming,
            z_ptr,
            mask_ptr,
            mean,
            scale,
            bias,
            seed,
            At(sample, channel, channel_mask, channel0, position0, channels, positions),
            *(scalars, threshold, FORM, RUN),
        )
        if MADE.g or MADE.dz:
            total_g += g
        if MADE.gx:
            total_gd += g * d
        if dz_ptr is not None:
            if statistics[0] is not None:
                g *= scale
            if sums[0] is not None:
                g += d * slope + shift
                if mask_ptr is not None:
                    g = tl.where(inside, g, 0.0)
            tl.store(dz_ptr + offset, g, mask=mask)

    if partial_ptr is not None:
        plane = tl.cast(tl.num_programs(0) // tl.cdiv(channels, UNITS), tl.int64) * channels
        offset = by_channel((segment * chunks + chunk) * channels + channel, LAST)
        channel_mask_2d = by_channel(channel_mask, LAST)
        if MADE.g or MADE.dz:
            sum_g = over_positions(total_g, LAST)
        if MADE.g:
            tl.store(partial_ptr + offset, sum_g, mask=channel_mask_2d)
            partial_ptr += plane
        if MADE.gx:
            sum_gx = over_positions(total_gd, LAST) * rstd
            tl.store(partial_ptr + offset, sum_gx, mask=channel_mask_2d)
            partial_ptr += plane
        if MADE.dz:
            if statistics[0] is not None:
                sum_g *= scale
            tl.store(partial_ptr + offset, sum_g, mask=channel_mask_2d)


def walk_backward(
    inputs: tuple[Any, ...],
    problem: Problem,
    *,
    made: Made = NONE_MADE,
    sums: tuple[Tensor, Tensor] | None = None,
    count: Tensor | None = None,
    dz: Tensor | None = None,
) -> Tensor:
    """One walk over dy and z, and over a shortcut and its gradient.

    Args:
        inputs: (dy, shortcut, dshortcut), z, (mean, variance), (weight, bias), mask, seed.
        made: whether to sum g, g x̂ and g weight rstd over a segment (problem.walk).
        sums: float32, of g and g x̂ for each statistic, or where channels share one of g weight and
            g weight x̂. With them, and count (None: from the shape), dz is that of statistics of z.
        dz: where it goes, or None.

    Returns:
        float32 (sums made, segments, chunks, channels).
    """
    z: Tensor = inputs[1]
    device = tuning.device(z)
    kind = "sums" if any(made) else "gradient"
    walk = problem.walk
    tile = walk.tile(kind, device)
    chunks, steps = walk.chunks(tile, kind, device)
    shape = (sum(made), walk.segments, chunks, walk.channels)
    partial = z.new_empty(shape, dtype=torch.float32)
    with tuning.device_of(z):
        _channel_bwd_kernel[(walk.blocks(tile) * chunks,)](
            *inputs,
            (*(sums or (None, None)), count, float(problem.elements)),
            dz,
            partial if any(made) else None,
            *(walk.samples, walk.channels, walk.positions, problem.groups, chunks, steps),
            *(problem.scalars, problem.threshold),
            FORM=problem.form(device, inputs[4]),
            MADE=made,
            TILE=problem.tile_form(tile),
            num_warps=tile.num_warps,
        )
    return partial
