"""Seeing a tensor of any rank as three dimensions in memory order, without a copy."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_IMAGE_DIMS = {4: torch.channels_last, 5: torch.channels_last_3d}


def contiguous_rows(t: Tensor) -> Tensor:
    """t itself when the elements of each row are adjacent, else a contiguous copy."""
    # Not contiguous(), which takes an empty tensor of any strides for contiguous.
    return t if t.stride(-1) == 1 else t.clone(memory_format=torch.contiguous_format)


class Layout(NamedTuple):
    """How a tensor is seen as three dimensions in memory order, and seen as itself again."""

    shape: tuple[int, ...]  # of the tensor, its dimensions in memory order
    view: tuple[int, int, int]
    channels_last: bool
    channels_moved: bool = False  # dimension 1 is the last in memory


def apply_layout(x: Tensor, layout: Layout) -> Tensor:
    """x, of the tensor's shape, as a contiguous tensor of three dimensions."""
    if layout.channels_moved:
        x = x.movedim(1, -1)
    # reshape copies what is not contiguous where it must; not where a dimension is of size 1.
    x = x.reshape(layout.view)
    return x if x.is_contiguous() else x.contiguous()


def lay_out(x: Tensor, channel_dim: int, apart: bool = True) -> tuple[Tensor, Layout]:
    """x as three dimensions, and its layout; its channels are dimension 1 or the last (-1).

    Args:
        apart: samples must not be mixed up with positions.
    """
    shape, rank, moved = tuple(x.shape), x.dim(), False
    if channel_dim == -1 or rank == 2:
        samples, channels = (shape[0] if rank > 1 else 1), shape[-1]
        positions, last = math.prod(shape[1:-1]), True
    else:
        samples, channels, *spatial = shape
        positions = math.prod(spatial)
        # torch's batch norm keeps the strides of a transposed sequence, its other norms do not.
        kept = rank > 3 or (rank == 3 and not apart)
        moved = kept and not x.is_contiguous() and _is_channels_last(x)
        last = moved or positions == 1
        if moved:
            x, shape = x.movedim(1, -1), (samples, *spatial, channels)
    if not last:
        view = samples, channels, positions
    elif apart:
        view = samples, positions, channels
    else:
        view = 1, samples * positions, channels
    x = x.reshape(view)
    return x if x.is_contiguous() else x.contiguous(), Layout(shape, view, last, moved)


def _is_channels_last(x: Tensor) -> bool:
    """Whether torch's pointwise operators would lay their output channels-last."""
    memory_format = _IMAGE_DIMS.get(x.dim())
    if memory_format is None:
        return x.dim() == 3 and x.mT.is_contiguous()
    if x.is_contiguous(memory_format=memory_format):
        return True
    return torch._prims_common.suggest_memory_format(x) is memory_format
