"""What `python -m fused tune` measures tiles with: calls of the row and channel operators.

Each case stands for all shapes whose rules give the same tiles; its batch is what fills a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from ..backends import ops
from ..spec import WANT_NORM_BIAS, WANT_NORM_WEIGHT, make_spec

# Columns, of which each stands for all widths of the same tile.
WIDTHS = tuple(256 << i for i in range(7))  # to 16384
ROW_NORMS = ("layer", "rms")
DTYPES = (torch.bfloat16, torch.float32)
ELEMENTS = 1 << 26  # of a tensor: more than any GPU's cache
ACTIVATION, P = "gelu", 0.1
# Channels and positions: stages of convolutional networks, which between them have tiles that hold
# whole groups, walk over a group, and share it; and plain rows.
SHAPES = ((64, 3136), (256, 784), (512, 196), (1024, 49), (320, 4096), (1024, 1))
CHANNEL_NORMS = ("batch", "group", "instance")
GROUPS = 32
DIRECTIONS = ("forward", "backward")

Call = Callable[[], list[Tensor]]


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class RowCase:
    """A row kernel at one width."""

    direction: str
    cols: int
    norm: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"row_{self.direction} {self.cols} {self.norm} {short(self.dtype)}"

    def make_call(self, device: str, elements: int = ELEMENTS) -> Call:
        """Runs the operator on new random inputs, by whatever tile the rules give."""
        rows = max(1, elements // self.cols)
        z, dy = (torch.randn(rows, self.cols, device=device, dtype=self.dtype) for _ in range(2))
        weight = torch.ones(self.cols, device=device, dtype=self.dtype)
        bias = torch.zeros_like(weight) if self.norm == "layer" else None
        seed = torch.tensor([1], device=device)
        spec = make_spec(self.norm, 1e-5, ACTIVATION, P)
        given = (None, weight, bias)
        if self.direction == "forward":
            return lambda: list(ops.row_forward(z, *given, None, seed, *spec.row))
        _, found = ops.row_forward(z, *given, None, seed, *spec.row)
        wanted = WANT_NORM_WEIGHT | (WANT_NORM_BIAS if bias is not None else 0)
        return lambda: list(ops.row_backward(dy, z, *given, found, seed, wanted, *spec.row))


@dataclass(frozen=True)
class ChannelCase:
    """The kernels of a norm over samples or positions, in one of the two layouts."""

    direction: str
    channels: int
    positions: int
    last: bool
    norm: str
    dtype: torch.dtype

    def __str__(self) -> str:
        layout = "last" if self.last else "planar"
        shape = f"{self.channels}×{self.positions}"
        return f"channel_{self.direction} {shape} {layout} {self.norm} {short(self.dtype)}"

    def make_call(self, device: str, elements: int = ELEMENTS) -> Call:
        """As `RowCase.make_call`."""
        samples = max(1, elements // (self.channels * self.positions))
        sizes = (self.channels, self.positions)
        shape = (samples, *(reversed(sizes) if self.last else sizes))
        z, dy = (torch.randn(shape, device=device, dtype=self.dtype) for _ in range(2))
        weight = torch.ones(self.channels, device=device, dtype=self.dtype)
        bias = torch.zeros_like(weight)
        seed = torch.tensor([1], device=device)
        spec = make_spec(self.norm, 1e-5, ACTIVATION, P)
        groups = GROUPS if self.norm == "group" else self.channels
        scalars = spec._replace(groups=groups, channels_last=self.last).channel
        given = (weight, bias)
        if self.direction == "forward":
            return lambda: list(ops.channel_forward(z, *given, None, None, seed, *scalars))[:3]
        _, mean, variance, _ = ops.channel_forward(z, *given, None, None, seed, *scalars)
        wanted = WANT_NORM_WEIGHT | WANT_NORM_BIAS
        found = (z, mean, variance, None, *given, None, seed, wanted, False, *scalars)
        return lambda: list(ops.channel_backward(dy, *found))[:3]


Case = RowCase | ChannelCase


def row_cases() -> Iterator[RowCase]:
    """All of them, narrow ones first."""
    for cols, norm, dtype, direction in product(WIDTHS, ROW_NORMS, DTYPES, DIRECTIONS):
        yield RowCase(direction, cols, norm, dtype)


def channel_cases() -> Iterator[ChannelCase]:
    """All of them, the norms that most networks have first."""
    for norm, (channels, positions), last, dtype, direction in product(
        CHANNEL_NORMS, SHAPES, (True, False), DTYPES, DIRECTIONS
    ):
        # One position has no statistics of its own, and is not in planar memory.
        if positions > 1 or (last and norm != "instance"):
            yield ChannelCase(direction, channels, positions, last, norm, dtype)
