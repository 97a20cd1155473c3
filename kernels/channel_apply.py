"""The epilogue of the channel norms by statistics that are known: one reading, one writing.

    y = residual + dropout(activation((z - mean) rstd weight + bias))

y may be z itself: a tile is read before it is written, and no program reads another's tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .channel_epilogue import load_normalizer, write_output
from .channel_problem import Problem
from .channel_statistics import segment_of_program
from .channel_tile import INTEGERS, channel_end, load_tile, statistic_of


@triton.jit(do_not_specialize=INTEGERS)
def _channel_apply_kernel(
    z_ptr,
    mean_ptr,
    variance_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    residual_ptr,
    mask_ptr,
    seed_ptr,
    y_ptr,
    samples,
    channels,
    positions,
    groups,
    chunks,
    steps,
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
    UNITS: tl.constexpr,
    RUN: tl.constexpr,
):
    """One chunk of `steps` tiles of a segment of `samples` samples."""
    blocks = tl.cdiv(positions, RUN)
    segment, _chunk, channel0, tile0, tile1 = segment_of_program(
        channels, chunks, steps, samples * blocks, UNITS
    )
    channel = channel0 + tl.arange(0, UNITS)
    channel_mask = channel < channel_end(channels, ALIGN, LAST)
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
    seed = tl.load(seed_ptr) if seed_ptr is not None else None
    for tile in tl.range(tile0, tile1):
        sample = segment * samples + tl.cast(tile, tl.int32) // blocks
        position0 = tl.cast(tile, tl.int32) % blocks * RUN
        h, row, offset, mask, inside, _count = load_tile(
            *(z_ptr, mask_ptr, sample, channel, channel_mask),
            *(position0, channels, positions, ALIGN, LAST, RUN),
        )
        if mean_ptr is not None:
            h = (h - mean) * scale + bias
        write_output(
            h,
            residual_ptr,
            y_ptr,
            row,
            offset,
            mask,
            inside,
            seed,
            *(sample, channel, channel0, position0, channels, positions),
            *(alpha, beta, threshold, ACTIVATION, DROPOUT),
            *(mask_ptr is not None, PTX, PER_THREAD, LAST),
        )


def apply(
    z: Tensor,
    statistics: tuple[Tensor | None, Tensor | None],
    parameters: tuple[Tensor | None, Tensor | None],
    residual: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    y: Tensor,
    problem: Problem,
) -> None:
    """Writes y, which may be z.

    Args:
        statistics: mean and variance, of any floating dtype; None without a norm.
        parameters: norm_weight and norm_bias, (channels,) or None.
    """
    device = tuning.device(z)
    walk = problem.walk
    tile = walk.tile("apply", device)
    chunks, steps = walk.chunks(tile, "apply", device)
    with tuning.device_of(z):
        _channel_apply_kernel[(walk.blocks(tile) * chunks,)](
            z,
            *statistics,
            *parameters,
            residual,
            mask,
            seed if problem.threshold else None,
            y,
            *(walk.samples, walk.channels, walk.positions, problem.groups, chunks, steps),
            *(problem.eps, problem.alpha, problem.beta, problem.threshold),
            **problem.flags(device),
            SHARED=problem.shared,
            UNITS=tile.units,
            RUN=tile.run,
            num_warps=tile.num_warps,
        )
