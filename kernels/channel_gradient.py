"""The walking kernel of the channel norms' backward: sums over a segment, gradients of z, or both.

With g the gradient of the norm's output (mask again, activation derivative) and x̂ the normalised z,

    dnorm_bias = Σ g,   dnorm_weight = Σ g x̂,
    dz = (g weight - mean(g weight) - x̂ mean(g weight x̂)) rstd

where the means run over the elements of a statistic: one walk for the sums, another for dz. By
constants, or without a norm, dz = g weight rstd needs no sums, and one walk does both.

Formula: Ioffe and Szegedy, "Batch normalization", 2015, section 3.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .channel_epilogue import load_gradient, load_normalizer
from .channel_problem import Problem
from .channel_statistics import segment_of_program
from .channel_tile import (
    INTEGERS,
    by_channel,
    channel_end,
    load_channels,
    over_positions,
    statistic_of,
)


@triton.jit
def slope_and_offset(
    sum_g_ptr,
    sum_gx_ptr,
    count_ptr,
    elements,
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
    above 1) of g weight and g weight x̂. `elements` are behind each, where count_ptr is None.
    """
    count = tl.cast(elements, tl.float32)
    if count_ptr is not None:
        count = tl.load(count_ptr + segment).to(tl.float32)
    share = rstd / tl.maximum(count, 1.0)
    if WIDTH == 1:
        share *= weight
    offset = -share * load_channels(sum_g_ptr, index, channel_mask, LAST)
    slope = -share * rstd * load_channels(sum_gx_ptr, index, channel_mask, LAST)
    return slope, offset


@triton.jit(do_not_specialize=(*INTEGERS, "elements"))
def _channel_bwd_kernel(
    dy_ptr,
    z_ptr,
    mean_ptr,
    variance_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    mask_ptr,
    seed_ptr,
    sum_g_ptr,
    sum_gx_ptr,
    count_ptr,
    dz_ptr,
    partial_ptr,
    samples,
    channels,
    positions,
    groups,
    chunks,
    steps,
    elements,
    eps,
    alpha,
    beta,
    threshold,
    ACTIVATION: tl.constexpr,
    DROPOUT: tl.constexpr,
    LAST: tl.constexpr,
    SHARED: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGN: tl.constexpr,
    PTX: tl.constexpr,
    PER_THREAD: tl.constexpr,
    SUM_G: tl.constexpr,
    SUM_GX: tl.constexpr,
    SUM_DZ: tl.constexpr,
    UNITS: tl.constexpr,
    RUN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One chunk of `steps` tiles of a segment of `samples` samples.

    partial_ptr is [sums made, segments, chunks, channels]: of g, of g x̂, of g weight rstd. dz_ptr
    is None where only they are wanted; sum_g_ptr, sum_gx_ptr are None where dz does not need them.
    """
    blocks = tl.cdiv(positions, RUN)
    segment, chunk, channel0, tile0, tile1 = segment_of_program(
        channels, chunks, steps, samples * blocks, UNITS
    )
    channel = channel0 + tl.arange(0, UNITS)
    channel_mask = channel < channel_end(channels, ALIGN, LAST)
    mean, scale, bias = None, None, None
    if mean_ptr is not None:
        index = statistic_of(segment, channel, groups, SHARED, WIDTH)
        mean, rstd, weight, bias = load_normalizer(
            mean_ptr,
            variance_ptr,
            norm_weight_ptr,
            norm_bias_ptr,
            index,
            channel,
            channel_mask,
            eps,
            LAST,
        )
        scale = weight * rstd
        if sum_g_ptr is not None:
            slope, shift = slope_and_offset(
                sum_g_ptr,
                sum_gx_ptr,
                count_ptr,
                elements,
                segment,
                index,
                channel_mask,
                weight,
                rstd,
                LAST,
                WIDTH,
            )
    seed = tl.load(seed_ptr) if seed_ptr is not None else None
    M: tl.constexpr = RUN if LAST else UNITS
    N: tl.constexpr = UNITS if LAST else RUN
    if SUM_G or SUM_DZ:
        total_g = tl.zeros((M, N), tl.float32)
    if SUM_GX:
        total_gd = tl.zeros((M, N), tl.float32)
    for tile in tl.range(tile0, tile1, num_stages=STAGES):
        sample = segment * samples + tl.cast(tile, tl.int32) // blocks
        position0 = tl.cast(tile, tl.int32) % blocks * RUN
        d, g, offset, mask, inside = load_gradient(
            dy_ptr,
            z_ptr,
            mask_ptr,
            mean,
            scale,
            bias,
            seed,
            *(sample, channel, channel_mask, channel0, position0, channels, positions),
            *(alpha, beta, threshold, ACTIVATION, DROPOUT, ALIGN, PTX, PER_THREAD, LAST, RUN),
        )
        if SUM_G or SUM_DZ:
            total_g += g
        if SUM_GX:
            total_gd += g * d
        if dz_ptr is not None:
            if mean_ptr is not None:
                g *= scale
            if sum_g_ptr is not None:
                g += d * slope + shift
                if mask_ptr is not None:
                    g = tl.where(inside, g, 0.0)
            tl.store(dz_ptr + offset, g, mask=mask)

    if partial_ptr is not None:
        plane = tl.cast(tl.num_programs(0) // tl.cdiv(channels, UNITS), tl.int64) * channels
        offset = by_channel((segment * chunks + chunk) * channels + channel, LAST)
        channel_mask_2d = by_channel(channel_mask, LAST)
        if SUM_G or SUM_DZ:
            sum_g = over_positions(total_g, LAST)
        if SUM_G:
            tl.store(partial_ptr + offset, sum_g, mask=channel_mask_2d)
            partial_ptr += plane
        if SUM_GX:
            sum_gx = over_positions(total_gd, LAST) * rstd
            tl.store(partial_ptr + offset, sum_gx, mask=channel_mask_2d)
            partial_ptr += plane
        if SUM_DZ:
            if mean_ptr is not None:
                sum_g *= scale
            tl.store(partial_ptr + offset, sum_g, mask=channel_mask_2d)


def walk_backward(
    inputs: tuple[Tensor | None, ...],
    problem: Problem,
    *,
    made: tuple[bool, bool, bool] = (False, False, False),
    sums: tuple[Tensor, Tensor] | None = None,
    count: Tensor | None = None,
    dz: Tensor | None = None,
) -> Tensor:
    """One walk over dy and z.

    Args:
        inputs: dy, z, mean, variance, norm_weight, norm_bias, mask, seed.
        made: whether to sum g, g x̂ and g weight rstd over a segment (problem.walk).
        sums: float32, of g and g x̂ for each statistic, or where channels share one of g weight and
            g weight x̂. With them, and count (None: from the shape), dz is that of statistics of z.
        dz: where it goes, or None.

    Returns:
        float32 (sums made, segments, chunks, channels).
    """
    z = inputs[1]
    assert z is not None
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
            *(sums or (None, None)),
            count,
            dz,
            partial if any(made) else None,
            *(walk.samples, walk.channels, walk.positions, problem.groups, chunks, steps),
            float(problem.elements),
            *(problem.eps, problem.alpha, problem.beta, problem.threshold),
            **problem.flags(device),
            SHARED=problem.shared,
            SUM_G=made[0],
            SUM_GX=made[1],
            SUM_DZ=made[2],
            UNITS=tile.units,
            RUN=tile.run,
            STAGES=problem.stages(tile),
            num_warps=tile.num_warps,
        )
    return partial
