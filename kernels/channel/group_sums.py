"""Second stage of the sums of group and instance norm's backward: over chunks and channels."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..tuning import channel as channel_tuning
from ..tuning import rules as tuning
from .problem import Problem


@triton.jit(do_not_specialize=("channels", "groups", "chunks"))
def _channel_group_sum_kernel(
    partial_ptr,
    norm_weight_ptr,
    sum_g_ptr,
    sum_gx_ptr,
    channels,
    groups,
    chunks,
    WIDTH: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Σ g and Σ g x̂ over the chunks and channels of BLOCK_G groups of a segment.

    partial_ptr is [2, segments, chunks, channels]. Where several channels share a statistic, each
    is multiplied by its weight. What is added up is one list of chunks · WIDTH entries.
    """
    group_blocks = tl.cdiv(groups, BLOCK_G)
    segment = (tl.program_id(0) // group_blocks).to(tl.int64)
    group = (tl.program_id(0) % group_blocks * BLOCK_G + tl.arange(0, BLOCK_G))[:, None]
    plane = tl.cast(tl.num_programs(0) // group_blocks, tl.int64) * chunks * channels
    partial_ptr += segment * chunks * channels
    entries = chunks * WIDTH
    total_g = tl.zeros((BLOCK_G, BLOCK_E), tl.float32)
    total_gx = tl.zeros((BLOCK_G, BLOCK_E), tl.float32)
    for entry0 in tl.range(0, entries, BLOCK_E):
        entry = entry0 + tl.arange(0, BLOCK_E)[None, :]
        mask = (group < groups) & (entry < entries)
        channel = group * WIDTH + entry % WIDTH
        offset = (entry // WIDTH).to(tl.int64) * channels + channel
        g = tl.load(partial_ptr + offset, mask=mask, other=0.0)
        gx = tl.load(partial_ptr + plane + offset, mask=mask, other=0.0)
        if WIDTH > 1:
            if norm_weight_ptr is not None:
                weight = tl.load(norm_weight_ptr + channel, mask=mask, other=0.0).to(tl.float32)
                g *= weight
                gx *= weight
        total_g += g
        total_gx += gx
    statistic = segment * groups + group
    tl.store(sum_g_ptr + statistic, tl.sum(total_g, 1, keep_dims=True), mask=group < groups)
    tl.store(sum_gx_ptr + statistic, tl.sum(total_gx, 1, keep_dims=True), mask=group < groups)


def group_sums(
    partial: Tensor, norm_weight: Tensor | None, problem: Problem
) -> tuple[Tensor, Tensor]:
    """float32 (segments, groups) each, as `walk_backward` takes them."""
    _, segments, chunks, channels = partial.shape
    sums = tuple(partial.new_empty((segments, problem.groups)) for _ in range(2))
    tile = channel_tuning.merge_tile(problem.width, tuning.device(partial))
    with tuning.device_of(partial):
        _channel_group_sum_kernel[(segments * triton.cdiv(problem.groups, tile.block_m),)](
            partial,
            norm_weight,
            *sums,
            *(channels, problem.groups, chunks),
            WIDTH=problem.width,
            BLOCK_G=tile.block_m,
            BLOCK_E=tile.block_n,
            num_warps=tile.num_warps,
        )
    return sums[0], sums[1]
