"""Backward of `channel_loop`: sums of a group, then dz, which finds dy and z in L2."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import channel_tuning, tuning
from .channel_epilogue import load_affine, load_gradient
from .channel_loop import channels_of_block
from .channel_problem import Problem
from .channel_tile import (
    INTEGERS,
    by_channel,
    load_channels,
    over_channels,
    over_positions,
    to_channels,
)


@triton.jit(do_not_specialize=INTEGERS)
def _channel_loop_bwd_kernel(
    dy_ptr,
    z_ptr,
    mean_ptr,
    variance_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    mask_ptr,
    seed_ptr,
    count_ptr,
    dz_ptr,
    partial_ptr,
    samples,
    channels,
    positions,
    groups,
    eps,
    alpha,
    beta,
    threshold,
    ACTIVATION: tl.constexpr,
    DROPOUT: tl.constexpr,
    LAST: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGN: tl.constexpr,
    PTX: tl.constexpr,
    PER_THREAD: tl.constexpr,
    GROUPS: tl.constexpr,
    UNITS: tl.constexpr,
    RUN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """GROUPS groups of one sample. partial_ptr is [2, samples, channels]: sums of g and of g x̂."""
    group_blocks = tl.cdiv(groups, GROUPS)
    sample = (tl.program_id(0) // group_blocks).to(tl.int64)
    group0 = tl.program_id(0) % group_blocks * GROUPS
    channel, channel_mask = channels_of_block(
        group0, 0, channels, WIDTH, GROUPS, UNITS, ALIGN, LAST
    )
    # Every place of a tile belongs to the same group in each block.
    statistic = sample * groups + group0 + tl.arange(0, UNITS) // (UNITS // GROUPS)
    mean = load_channels(mean_ptr, statistic, channel_mask, LAST)
    variance = load_channels(variance_ptr, statistic, channel_mask, LAST)
    rstd = tl.rsqrt(variance + tl.cast(eps, tl.float32))
    seed = tl.load(seed_ptr) if seed_ptr is not None else None
    elements = tl.cast(positions, tl.float32) * WIDTH
    if count_ptr is not None:
        elements = tl.maximum(tl.load(count_ptr + sample), 1.0)
    M: tl.constexpr = RUN if LAST else UNITS
    N: tl.constexpr = UNITS if LAST else RUN
    mean_g = over_channels(tl.zeros_like(mean), GROUPS, LAST)
    mean_gx = mean_g
    for unit0 in tl.range(0, GROUPS * WIDTH, UNITS):
        channel0 = group0 * WIDTH + unit0
        channel, channel_mask = channels_of_block(
            group0, unit0, channels, WIDTH, GROUPS, UNITS, ALIGN, LAST
        )
        weight, bias = load_affine(norm_weight_ptr, norm_bias_ptr, channel, channel_mask, LAST)
        scale = weight * rstd
        total_g = tl.zeros((M, N), tl.float32)
        total_gd = tl.zeros((M, N), tl.float32)
        for position0 in tl.range(0, positions, RUN, num_stages=STAGES):
            d, g, _offset, _mask, _inside = load_gradient(
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
            total_g += g
            total_gd += g * d
        sum_g = over_positions(total_g, LAST)
        sum_gx = over_positions(total_gd, LAST) * rstd
        mean_g += over_channels(sum_g * weight, GROUPS, LAST) / elements
        mean_gx += over_channels(sum_gx * weight, GROUPS, LAST) / elements
        if partial_ptr is not None:
            offset = by_channel(sample * channels + channel, LAST)
            tl.store(partial_ptr + offset, sum_g, mask=by_channel(channel_mask, LAST))
            plane = tl.cast(samples, tl.int64) * channels
            tl.store(partial_ptr + plane + offset, sum_gx, mask=by_channel(channel_mask, LAST))

    slope = -to_channels(mean_gx, UNITS, LAST) * rstd * rstd
    shift = -to_channels(mean_g, UNITS, LAST) * rstd
    for unit0 in tl.range(0, GROUPS * WIDTH, UNITS):
        channel0 = group0 * WIDTH + unit0
        channel, channel_mask = channels_of_block(
            group0, unit0, channels, WIDTH, GROUPS, UNITS, ALIGN, LAST
        )
        weight, bias = load_affine(norm_weight_ptr, norm_bias_ptr, channel, channel_mask, LAST)
        scale = weight * rstd
        for position0 in tl.range(0, positions, RUN, num_stages=STAGES):
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
            dz = g * scale + (d * slope + shift)
            if mask_ptr is not None:
                dz = tl.where(inside, dz, 0.0)
            tl.store(dz_ptr + offset, dz, mask=mask)


def loop_backward(
    inputs: tuple[Tensor | None, ...],
    count: Tensor | None,
    dz: Tensor,
    with_sums: bool,
    problem: Problem,
    tile: channel_tuning.GroupTile,
) -> Tensor:
    """Writes dz; inputs: as `walk_backward`. Returns float32 (2, samples, channels), of g and g x̂.

    The result is empty without `with_sums`.
    """
    device = tuning.device(dz)
    shape = (2 if with_sums else 0, problem.samples, problem.channels)
    partial = dz.new_empty(shape, dtype=torch.float32)
    with tuning.device_of(dz):
        _channel_loop_bwd_kernel[(problem.samples * triton.cdiv(problem.groups, tile.groups),)](
            *inputs,
            count,
            dz,
            partial if with_sums else None,
            *(problem.samples, problem.channels, problem.positions, problem.groups),
            *(problem.eps, problem.alpha, problem.beta, problem.threshold),
            **problem.flags(device),
            GROUPS=tile.groups,
            UNITS=tile.units,
            RUN=tile.run,
            STAGES=problem.stages(tile),
            num_warps=tile.num_warps,
        )
    return partial
