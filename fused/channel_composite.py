"""The chain with a norm over samples or positions as plain torch operators."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from . import reference, synchronize
from .autograd import ChannelCodes, channel_epilogue_of
from .layout import Layout, apply_layout, undo_layout
from .running import ChannelNorm, update_running
from .spec import NORM_CODES

BATCH = NORM_CODES["batch"]


def elements_of(layout: Layout, codes: ChannelCodes) -> int:
    """How many elements there are behind each statistic of batch or instance norm."""
    positions = layout.view[1 if layout.channels_last else 2]
    return positions * (layout.view[0] if codes[0] == BATCH else 1)


def run_composite(
    x: Tensor,
    layout: Layout,
    norm: ChannelNorm,
    codes: ChannelCodes,
    mean: Tensor | None,
    variance: Tensor | None,
    across: bool,
    learns: bool,
    residual: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
) -> Tensor:
    """As `channel.run_channel`, over the three dimensions of the layout.

    Args:
        mean, variance: what the norm is by; None: the statistics of x.
        across: those of all processes.
        learns: the running statistics are updated.
    """
    epilogue = channel_epilogue_of(codes)
    z = apply_layout(x, layout)
    residual = None if residual is None else apply_layout(residual, layout)
    if across:
        found = synchronize.differentiable_statistics(z, codes[2], mask, norm.group)
        h = reference.normalize_channels(z, epilogue, *found[:2], norm.weight, norm.bias)
        plain = replace(epilogue, norm=None)
        y = reference.channel(h, plain, residual=residual, mask=mask, seed=seed)
    else:
        y = reference.channel(
            z, epilogue, mean, variance, norm.weight, norm.bias, residual, mask, seed
        )
    if learns:
        if not across:
            found = reference.channel_statistics(z.detach(), epilogue, mask)
            found = (*found[:2], found[2] if mask is not None else z.new_empty(0))
        update_running(norm, elements_of(layout, codes), *(t.detach() for t in found))
    return undo_layout(y.contiguous(), layout)
