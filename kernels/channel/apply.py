"""The epilogue of the channel norms by statistics that are known: one reading, one writing.

    y = residual + dropout(activation((z - mean) rstd weight + bias + shortcut))

y may be z itself: a tile is read before it is written, and no program reads another's tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..parts.output import Drop, write_output
from ..parts.tile import Place, add_place
from ..tuning import rules as tuning
from .epilogue import drop_rows, load_normalizer
from .problem import Problem
from .statistics import segment_of_program
from .tile import INTEGERS, At, channel_end, load_tile, statistic_of


@triton.jit(do_not_specialize=INTEGERS)
def _channel_apply_kernel(
    z_ptr,
    statistics,
    parameters,
    residual_ptr,
    shortcut_ptr,
    mask_ptr,
    seed_ptr,
    y_ptr,
    samples,
    channels,
    positions,
    groups,
    chunks,
    steps,
    scalars,
    threshold,
    FORM: tl.constexpr,
    TILE: tl.constexpr,
):
    """One chunk of `steps` tiles of a segment of `samples` samples."""
    UNITS: tl.constexpr = TILE.UNITS
    ALIGN: tl.constexpr = FORM.ALIGN
    LAST: tl.constexpr = FORM.LAST
    SHARED: tl.constexpr = FORM.SHARED
    WIDTH: tl.constexpr = FORM.WIDTH
    RUN: tl.constexpr = TILE.RUN
    blocks = tl.cdiv(positions, RUN)
    segment, _chunk, channel0, tile0, tile1 = segment_of_program(
        channels, chunks, steps, samples * blocks, UNITS
    )
    channel = channel0 + tl.arange(0, UNITS)
    channel_mask = channel < channel_end(channels, ALIGN, LAST)
    if statistics[0] is not None:
        index = statistic_of(segment, channel, groups, SHARED, WIDTH)
        mean, rstd, weight, bias = load_normalizer(
            statistics, parameters, index, channel, channel_mask, scalars, LAST
        )
        scale = weight * rstd
    seed = tl.load(seed_ptr) if seed_ptr is not None else None
    for tile in tl.range(tile0, tile1):
        sample = segment * samples + tl.cast(tile, tl.int32) // blocks
        position0 = tl.cast(tile, tl.int32) % blocks * RUN
        at = At(sample, channel, channel_mask, channel0, position0, channels, positions)
        h, row, offset, mask, inside, _count = load_tile(z_ptr, mask_ptr, at, FORM, RUN)
        if statistics[0] is not None:
            h = (h - mean) * scale + bias
        h = add_place(h, Place(shortcut_ptr, offset, None, inside))
        mask_row, col0, cols = drop_rows(row, at, FORM)
        write_output(
            *(h, None, Drop(seed, mask_row, col0, cols, threshold)),
            *(Place(residual_ptr, offset, None, inside), Place(y_ptr, offset, None, mask)),
            *(scalars, FORM),
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
    shortcut: Tensor | None = None,
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
            statistics,
            parameters,
            residual,
            shortcut,
            mask,
            seed if problem.threshold else None,
            y,
            *(walk.samples, walk.channels, walk.positions, problem.groups, chunks, steps),
            *(problem.scalars, problem.threshold),
            FORM=problem.form(device, mask),
            TILE=problem.tile_form(tile),
            num_warps=tile.num_warps,
        )
