"""Seeing a tensor of any rank as three dimensions in memory order, without a copy."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_IMAGE_DIMS = {4: torch.channels_last, 5: torch.channels_last_3d}


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


def undo_layout(y: Tensor, layout: Layout) -> Tensor:
    """What `apply_layout` was given, of what it has returned."""
    y = y.view(layout.shape)
    return y.movedim(-1, 1) if layout.channels_moved else y


def layout_of(x: Tensor, channel_dim: int, apart: bool = True) -> Layout:
    """The layout of x, whose channels are dimension 1 or the last (-1).

    Args:
        apart: samples must not be mixed up with positions.
    """
    shape = tuple(x.shape)
    if channel_dim == -1 or x.dim() == 2:
        if len(shape) == 1:
            return Layout(shape, (1, 1, shape[0]), True)
        samples, channels = shape[0], shape[-1]
        positions = math.prod(shape[1:-1])
        view = (samples, positions, channels) if apart else (1, samples * positions, channels)
        return Layout(shape, view, True)
    samples, channels, *spatial = shape
    positions = math.prod(spatial)
    moved = _is_channels_last(x)
    if moved:
        shape = (samples, *spatial, channels)
    if moved or positions == 1:
        view = (samples, positions, channels) if apart else (1, samples * positions, channels)
        return Layout(shape, view, True, moved)
    return Layout(shape, (samples, channels, positions), False)


def _is_channels_last(x: Tensor) -> bool:
    """Whether torch's pointwise operators would lay their output channels-last."""
    memory_format = _IMAGE_DIMS.get(x.dim())
    if memory_format is None or x.is_contiguous():
        return False
    if x.is_contiguous(memory_format=memory_format):
        return True
    return torch._prims_common.suggest_memory_format(x) is memory_format
