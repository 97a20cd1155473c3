"""The arguments of the channel operators as the launchers see them, and how a kernel walks over z.

Pure Python; nothing here reads a tensor's values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import triton
from torch import Tensor

from ...spec import ACTIVATION_NAMES, NORM_NAMES
from ..parts.output import Form
from ..tuning import channel as channel_tuning
from ..tuning import rules as tuning
from .tile import TileForm


@dataclass(frozen=True)
class Walk:
    """z seen as segments of samples, walked over in tiles of one sample.

    A segment is what a program keeps to. Channels last, samples that need not be told apart are
    one sample of all their positions; `run_limit` is then None, because the number of samples must
    not be compiled in, else the number of positions.
    """

    segments: int
    samples: int  # of a segment
    channels: int
    positions: int
    last: bool
    run_limit: int | None
    align: int

    def tile(self, kind: str, device: tuning.Device) -> channel_tuning.ChannelTile:
        """The tile of a kernel of `channel_tuning.KINDS`."""
        return channel_tuning.walk_tile(
            self.channels, self.run_limit, self.last, self.align, kind, device
        )

    def chunks(
        self, tile: channel_tuning.ChannelTile, kind: str, device: tuning.Device
    ) -> tuple[int, int]:
        """(programs that share the tiles of a segment and block of channels, tiles of each)."""
        tiles = self.samples * triton.cdiv(self.positions, tile.run)
        return channel_tuning.walk_chunks(tiles, self.blocks(tile), tile, kind, device)

    def blocks(self, tile: channel_tuning.ChannelTile) -> int:
        """Segments times blocks of channels."""
        return self.segments * triton.cdiv(self.channels, tile.units)


@dataclass(frozen=True)
class Problem:
    """Shape and scalars of one call. `shared`: statistics belong to channels, not to samples."""

    samples: int
    channels: int
    positions: int
    last: bool
    itemsize: int
    norm: str | None
    groups: int
    shared: bool
    eps: float
    activation: str | None
    alpha: float
    beta: float
    threshold: int
    channel_dropout: bool

    @property
    def width(self) -> int:
        """Channels to a statistic."""
        return 1 if self.shared else self.channels // self.groups

    @property
    def align(self) -> int:
        cols = self.channels if self.last else self.positions
        return tuning.alignment(cols, self.itemsize)

    def tile_form(self, tile: channel_tuning.ChannelTile | channel_tuning.GroupTile) -> TileForm:
        """A tile as the kernels take it."""
        wide = self.align * self.itemsize == 16
        stages = channel_tuning.stages(tile.units * tile.run, wide)
        return TileForm(tile.units, tile.run, stages, getattr(tile, "groups", 1))

    @property
    def scalars(self) -> tuple[float, float, float]:
        return self.eps, self.alpha, self.beta

    @property
    def dropout(self) -> str | None:
        if not self.threshold:
            return None
        return "channels" if self.channel_dropout else "elements"

    @property
    def elements(self) -> int:
        """Behind each statistic, where no mask says otherwise."""
        return self.positions * self.width * (self.samples if self.shared else 1)

    @property
    def walk(self) -> Walk:
        """Samples with statistics of their own are segments; else there is one segment."""
        channels, positions, last, align = self.channels, self.positions, self.last, self.align
        if not self.shared:
            return Walk(self.samples, 1, channels, positions, last, positions, align)
        if last and self.dropout != "channels":
            return Walk(1, 1, channels, self.samples * positions, last, None, align)
        return Walk(1, self.samples, channels, positions, last, positions, align)

    def group_tile(
        self, backward: bool, device: tuning.Device, shortcut: bool = False
    ) -> tuple[str, channel_tuning.GroupTile | None]:
        """`channel_tuning.group_tile`; shared statistics are always split."""
        if self.shared:
            return "split", None
        shape = (self.samples, self.channels, self.positions, self.groups)
        layout = (self.last, self.itemsize)
        return channel_tuning.group_tile(shape, *layout, backward, device, shortcut)

    def form(self, device: tuning.Device, mask: Tensor | None) -> Form:
        """The form of every kernel for this problem."""
        return Form(
            *(self.norm, self.activation, self.dropout, self.align, device.arch > 0),
            PER_THREAD=min(8, 16 // self.itemsize),
            MASKED=mask is not None,
            LAST=self.last,
            SHARED=self.shared,
            WIDTH=self.width,
        )


def problem_of(
    shape: Sequence[int],
    itemsize: int,
    mean: Tensor | None,
    norm: int,
    groups: int,
    channels_last: bool,
    eps: float = 0.0,
    activation: int = 0,
    alpha: float = 0.0,
    beta: float = 0.0,
    threshold: int = 0,
    channel_dropout: bool = False,
) -> Problem:
    """The problem behind an operator's arguments, in their order; of z the shape and itemsize.

    Statistics of the shape (1, channels) are shared by all samples, whatever the norm is called:
    running statistics are constants in evaluation.
    """
    samples, rows, cols = shape
    positions, channels = (rows, cols) if channels_last else (cols, rows)
    name = NORM_NAMES[norm]
    shared = name in (None, "batch")
    if mean is not None and tuple(mean.shape) == (1, channels):
        shared = True
    return Problem(
        samples=samples,
        channels=channels,
        positions=positions,
        last=channels_last,
        itemsize=itemsize,
        norm=name,
        groups=channels if shared else groups,
        shared=shared,
        eps=eps,
        activation=ACTIVATION_NAMES[activation],
        alpha=alpha,
        beta=beta,
        threshold=threshold,
        channel_dropout=channel_dropout,
    )
