"""Mean and variance over samples and positions, in two deterministic stages.

    mean = Σ z / n,   variance = Σ (z - mean)² / n

Programs of the first stage walk over chunks of a segment and keep for each channel the mean and
the sum of squared deviations: two passes over each tile in registers, tiles merged by the formula
of Chan, Golub and LeVeque ("Algorithms for computing the sample variance", 1983), never
E[x²] - E[x]². The second stage merges the chunks, and the channels of a group.

A segment is what has statistics of its own: a sample, or for batch norm all of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuning import channel as channel_tuning
from ..tuning import rules as tuning
from .problem import Problem
from .tile import (
    INTEGERS,
    At,
    by_channel,
    channel_end,
    load_values,
    merge_moments,
    over_positions,
    tile_moments,
)


@triton.jit
def segment_of_program(channels, chunks, steps, tiles, UNITS: tl.constexpr):
    """(segment, chunk, first channel, first tile, last tile + 1) of a program that walks a chunk.

    Neighbouring programs take neighbouring channels, then chunks, then segments.
    """
    pid = tl.program_id(0)
    unit_blocks = tl.cdiv(channels, UNITS)
    chunk = pid // unit_blocks % chunks
    segment = (pid // unit_blocks // chunks).to(tl.int64)
    tile0 = chunk * steps
    return segment, chunk, pid % unit_blocks * UNITS, tile0, tl.minimum(tile0 + steps, tiles)


@triton.jit(do_not_specialize=INTEGERS)
def _channel_moments_kernel(
    z_ptr,
    mask_ptr,
    partial_ptr,
    count_ptr,
    samples,
    channels,
    positions,
    chunks,
    steps,
    FORM: tl.constexpr,
    TILE: tl.constexpr,
):
    """One chunk of `steps` tiles of a segment of `samples` samples.

    partial_ptr is [3, segments, chunks, channels]: a value near the mean, mean minus it, and m2;
    count_ptr [segments, chunks]. Differences from the mean of a chunk's first tile keep the error
    of the mean relative to the spread of the values and not to their size: constant channels have
    variance 0 exactly.
    """
    UNITS: tl.constexpr = TILE.UNITS
    RUN: tl.constexpr = TILE.RUN
    ALIGN: tl.constexpr = FORM.ALIGN
    LAST: tl.constexpr = FORM.LAST
    blocks = tl.cdiv(positions, RUN)
    segment, chunk, channel0, tile0, tile1 = segment_of_program(
        channels, chunks, steps, samples * blocks, UNITS
    )
    channel = channel0 + tl.arange(0, UNITS)
    channel_mask = channel < channel_end(channels, ALIGN, LAST)
    sample, position0 = segment * samples + tile0 // blocks, tile0 % blocks * RUN
    at = At(sample, channel, channel_mask, channel0, position0, channels, positions)
    first, _, count = load_values(z_ptr, mask_ptr, at, FORM, RUN)
    centre = over_positions(first, LAST) / tl.maximum(count, 1.0)
    mean = tl.zeros_like(centre)  # of z - centre
    m2 = tl.zeros_like(centre)
    seen = 0.0
    for tile in tl.range(tile0, tile1):
        index = tl.cast(tile, tl.int32)
        x, mask, new = load_values(
            *(z_ptr, mask_ptr),
            At(
                *(segment * samples + index // blocks, channel, channel_mask, channel0),
                *(index % blocks * RUN, channels, positions),
            ),
            *(FORM, RUN),
        )
        x = tl.where(mask, x - centre, 0.0)
        new_mean, new_m2 = tile_moments(x, mask, new, LAST)
        mean, m2 = merge_moments(mean, m2, seen, new_mean, new_m2, new)
        seen += new
    part = segment * chunks + chunk
    offset = by_channel(part * channels + channel, LAST)
    plane = tl.cast(tl.num_programs(0) // tl.cdiv(channels, UNITS), tl.int64) * channels
    mask = by_channel(channel_mask, LAST)
    tl.store(partial_ptr + offset, centre, mask=mask)
    tl.store(partial_ptr + plane + offset, mean, mask=mask)
    tl.store(partial_ptr + 2 * plane + offset, m2, mask=mask)
    if channel0 == 0:
        tl.store(count_ptr + part, seen)


@triton.jit(do_not_specialize=INTEGERS)
def _channel_finish_kernel(
    partial_ptr,
    count_ptr,
    mean_ptr,
    variance_ptr,
    present_ptr,
    channels,
    groups,
    chunks,
    WIDTH: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Merges the chunks of BLOCK_G groups of a segment: mean_ptr, variance_ptr [segments, groups].

    present_ptr, [segments] or None, receives the number of elements behind each statistic. What is
    merged is one list of chunks · WIDTH entries for each group.
    """
    group_blocks = tl.cdiv(groups, BLOCK_G)
    segment = (tl.program_id(0) // group_blocks).to(tl.int64)
    group = tl.program_id(0) % group_blocks * BLOCK_G + tl.arange(0, BLOCK_G)
    plane = tl.cast(tl.num_programs(0) // group_blocks, tl.int64) * chunks * channels
    partial_ptr += segment * chunks * channels
    count_ptr += segment * chunks
    entries = chunks * WIDTH
    centre = tl.load(partial_ptr + group * WIDTH, mask=group < groups, other=0.0)[:, None]

    total = tl.zeros((BLOCK_G, BLOCK_E), tl.float32)
    weighted = tl.zeros((BLOCK_G, BLOCK_E), tl.float32)
    for entry0 in tl.range(0, entries, BLOCK_E):
        entry = entry0 + tl.arange(0, BLOCK_E)[None, :]
        mask = (group < groups)[:, None] & (entry < entries)
        offset = (entry // WIDTH).to(tl.int64) * channels + group[:, None] * WIDTH + entry % WIDTH
        count = tl.load(count_ptr + entry // WIDTH, mask=entry < entries, other=0.0)
        delta = tl.load(partial_ptr + offset, mask=mask, other=0.0) - centre
        delta += tl.load(partial_ptr + plane + offset, mask=mask, other=0.0)
        total += count
        weighted += tl.where(mask, count * delta, 0.0)
    elements = tl.sum(total, 1, keep_dims=True)  # [BLOCK_G, 1]
    divisor = tl.maximum(elements, 1.0)
    shift = tl.sum(weighted, 1, keep_dims=True) / divisor

    m2 = tl.zeros((BLOCK_G, BLOCK_E), tl.float32)
    for entry0 in tl.range(0, entries, BLOCK_E):
        entry = entry0 + tl.arange(0, BLOCK_E)[None, :]
        mask = (group < groups)[:, None] & (entry < entries)
        offset = (entry // WIDTH).to(tl.int64) * channels + group[:, None] * WIDTH + entry % WIDTH
        count = tl.load(count_ptr + entry // WIDTH, mask=entry < entries, other=0.0)
        delta = tl.load(partial_ptr + offset, mask=mask, other=0.0) - centre
        delta += tl.load(partial_ptr + plane + offset, mask=mask, other=0.0) - shift
        m2 += tl.load(partial_ptr + 2 * plane + offset, mask=mask, other=0.0)
        m2 += tl.where(mask, count * delta * delta, 0.0)
    statistic = segment * groups + group[:, None]
    # Where there is nothing, both are 0.
    mean = tl.where(elements > 0, centre + shift, 0.0)
    tl.store(mean_ptr + statistic, mean, mask=(group < groups)[:, None])
    variance = tl.sum(m2, 1, keep_dims=True) / divisor
    tl.store(variance_ptr + statistic, variance, mask=(group < groups)[:, None])
    if present_ptr is not None:
        if tl.program_id(0) % group_blocks == 0:
            tl.store(present_ptr + segment, tl.max(elements))


def empty_statistics(
    z: Tensor, mask: Tensor | None, problem: Problem
) -> tuple[Tensor, Tensor, Tensor]:
    """New float32 tensors for mean, variance and count, in the shapes of channel_statistics."""
    rows = 1 if problem.shared else problem.samples
    shapes = ((rows, problem.groups), (rows, problem.groups), (0 if mask is None else rows,))
    mean, variance, count = (z.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return mean, variance, count


def merge_chunks(
    partial: Tensor,
    count: Tensor,
    statistics: tuple[Tensor, Tensor, Tensor | None],
    groups: int,
    device: tuning.Device,
) -> None:
    """The second stage: writes mean, variance and, where there is one, the number of elements.

    Args:
        partial: (3, segments, chunks, channels), as `_channel_moments_kernel` writes it.
        count: (segments, chunks).
        statistics: (segments, groups) twice, and (segments,).
    """
    _, segments, chunks, channels = partial.shape
    width = channels // groups
    tile = channel_tuning.merge_tile(width, device)
    _channel_finish_kernel[(segments * triton.cdiv(groups, tile.block_m),)](
        partial,
        count,
        *statistics,
        channels,
        groups,
        chunks,
        WIDTH=width,
        BLOCK_G=tile.block_m,
        BLOCK_E=tile.block_n,
        num_warps=tile.num_warps,
    )


def split_statistics(
    z: Tensor, mask: Tensor | None, problem: Problem
) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, variance, count) as the operator channel_statistics returns them."""
    device = tuning.device(z)
    walk = problem.walk
    tile = walk.tile("moments", device)
    chunks, steps = walk.chunks(tile, "moments", device)
    mean, variance, present = empty_statistics(z, mask, problem)
    partial = z.new_empty((3, walk.segments, chunks, walk.channels), dtype=torch.float32)
    count = z.new_empty((walk.segments, chunks), dtype=torch.float32)
    with tuning.device_of(z):
        _channel_moments_kernel[(walk.blocks(tile) * chunks,)](
            z,
            mask,
            partial,
            count,
            walk.samples,
            walk.channels,
            walk.positions,
            chunks,
            steps,
            FORM=problem.form(device, mask),
            TILE=problem.tile_form(tile),
            num_warps=tile.num_warps,
        )
        statistics = (mean, variance, None if mask is None else present)
        merge_chunks(partial, count, statistics, problem.groups, device)
    return mean, variance, present
