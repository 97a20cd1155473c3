"""What each suite measures: lists of cells, the most telling ones first.

A cell is one chain at one size in one mode. A run that its time limit stops has then measured the
cells that matter most.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from fused.spec import GATED_ACTIVATIONS

LETTERS = {"L": "Linear", "N": "norm", "A": "activation", "D": "dropout"}
CHANNEL_NORMS = ("batch", "group", "instance")
# Chains of two inputs, and what eager runs: S is the sum with the second, G the gate.
_ADD_NORM = "`h = residual + dropout(x); y = norm(h)`, both of them results"
_GATE = "`dropout(silu(a) * b)`, and with GELU"
SHAPES = {
    **{"D-S-N": _ADD_NORM, "S-N": _ADD_NORM, "G-D": _GATE, "G": _GATE},
    "N-S-A": "`out = bn(x); out += identity; relu(out)`, the last in place",
}
MODES = {
    "forward": "forward, training mode, no gradients",
    "inference": "forward, evaluation mode, no gradients",
    "training": "forward + backward",
    "backward": "backward, as a part of the training step",
}
P = 0.1


@dataclass(frozen=True)
class Cell:
    """One chain at one size in one mode.

    Attributes:
        chain: its stages, such as "N-A-D" (`LETTERS`); "3 L-N-A-D": three of them and a Linear;
            a key of `SHAPES`.
        norm: "layer", "rms", "batch", "group", "instance", or "" without one.
        dtype: torch's name.
        M, K, N: rows, features in (0 without a Linear), features out. Of images: all positions of
            all samples, 0, channels. A gated activation takes 2N features.
        p: dropout probability.
        mode: a key of `MODES`.
        shape: of images, samples × channels × height × width; "" for rows of features.
        layout: "channels-last", or "" for contiguous.
    """

    suite: str
    chain: str
    norm: str
    activation: str
    dtype: str
    M: int
    K: int
    N: int
    p: float
    mode: str
    shape: str = ""
    layout: str = ""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the chain's output."""
        return tuple(map(int, self.shape.split("×"))) if self.shape else (self.M, self.N)

    @property
    def gated(self) -> bool:
        return self.activation in GATED_ACTIVATIONS

    @property
    def width(self) -> int:
        """Features in front of the activation."""
        return 2 * self.N if self.gated else self.N

    @property
    def has_linear(self) -> bool:
        return "L" in self.chain

    @property
    def blocks(self) -> int:
        """How many times the chain is repeated; a last Linear follows if it is."""
        return int(self.chain.split()[0]) if " " in self.chain else 1

    @property
    def takes_two(self) -> bool:
        """Whether it has a second input, of the first one's shape."""
        return self.chain in SHAPES

    @property
    def sums(self) -> bool:
        """Whether the sum of both inputs is a second result."""
        return self.chain in ("D-S-N", "S-N")

    @property
    def rows_are_apart(self) -> bool:
        """Whether a row of the output depends on its own row of the input alone, by one chain."""
        return self.norm not in CHANNEL_NORMS and self.blocks == 1

    @property
    def drops(self) -> bool:
        return self.p > 0 and self.mode != "inference"

    @property
    def needs_gradients(self) -> bool:
        return self.mode == "training"

    def __str__(self) -> str:
        size = f"{self.M}×{self.K}×{self.N}" if self.K else self.shape or f"{self.M}×{self.N}"
        names = " ".join(filter(None, (self.chain, self.norm, self.activation, self.layout)))
        return f"{names} {self.dtype} {size} p={self.p:g} {self.mode}"


# (rows, features) of the norm suite: within the cache, beyond it, far beyond it, and an odd size.
NORM_SIZES = ((8192, 256), (8192, 1024), (4096, 4096), (5000, 1000))
# (M, K, N) of the linear suite.
LINEAR_SIZES = (
    (8192, 64, 256),
    (8192, 256, 256),
    (8192, 512, 512),
    (4096, 1024, 1024),
    (2048, 1024, 4096),
    (256, 4096, 4096),
)
AUTOTUNED_SIZES = ((8192, 256, 256), (4096, 1024, 1024))
HOST_SIZE = (8, 64)
DTYPES = ("float32", "bfloat16")
# LayerNorm + GELU and RMSNorm + SiLU are what models use; then the other pairs.
PAIRS = (
    *(("layer", "gelu"), ("rms", "silu"), ("layer", "relu")),
    *(("rms", "gelu"), ("layer", "silu"), ("rms", "relu")),
)
# SwiGLU behind RMSNorm or behind a Linear alone, then the other pairs.
GATED_PAIRS = (("rms", "swiglu"), ("", "swiglu"), ("", "glu"), ("rms", "glu"))
GATED_LINEAR_SIZES = (LINEAR_SIZES[1], *LINEAR_SIZES[3:5])
# Of the channel suite: rows of features for batch norm, and images.
CHANNEL_ROWS = ((8192, 256), (8192, 1024))
CHANNEL_IMAGES = ((16, 64, 64, 64), (4, 256, 64, 64), (2, 64, 256, 256))
NUM_GROUPS = 32
LAYOUTS = ("", "channels-last")
HOST_CHAINS = ("L-N-A-D", "L-N-A", "L-A", "N-A", "N-A-D", "A-D")


def _chain(*stages: object) -> str:
    """The letters of the stages that are present: of Linear, norm, activation, dropout."""
    return "-".join(letter for letter, stage in zip(LETTERS, stages, strict=True) if stage)


def norm_cells() -> Iterator[Cell]:
    """Norm + activation, with and without dropout; then gated activations of as wide rows."""
    for (norm, activation), dtype, (rows, cols) in product(PAIRS, DTYPES, NORM_SIZES):
        for p, mode in product((P, 0.0), ("forward", "training")):
            chain = "N-A-D" if p else "N-A"
            yield Cell("norm", chain, norm, activation, dtype, rows, 0, cols, p, mode)
    for (norm, activation), dtype, (rows, cols) in product(GATED_PAIRS, DTYPES, NORM_SIZES):
        if (norm, activation) != GATED_PAIRS[0] and (rows, cols) not in NORM_SIZES[1:3]:
            continue
        for p, mode in product((P, 0.0), ("forward", "training")):
            if (norm, activation, p) == ("", "glu", 0.0):
                continue  # nn.GLU by itself, which is left to torch
            chain, size = _chain(0, norm, activation, p), (rows, 0, cols // 2)
            yield Cell("norm", chain, norm, activation, dtype, *size, p, mode)


def linear_cells() -> Iterator[Cell]:
    """Linear + norm + activation, with and without dropout, as a training step and at inference.

    Then gated activations behind a Linear of as many features.
    """
    chains = (("L-N-A-D", "layer", "gelu", P), ("L-N-A", "rms", "silu", 0.0))
    for (chain, norm, activation, p), dtype, size in product(chains, DTYPES, LINEAR_SIZES):
        cell = Cell("linear", chain, norm, activation, dtype, *size, p, "training")
        yield cell
        yield replace(cell, mode="inference")
    # What is left of the first chain's gain without dropout.
    for dtype, size in product(DTYPES, LINEAR_SIZES):
        yield Cell("linear", "L-N-A", "layer", "gelu", dtype, *size, 0.0, "training")
    for (norm, activation), dtype, size in product(GATED_PAIRS, DTYPES, GATED_LINEAR_SIZES):
        M, K, width = size
        for p, mode in ((P, "training"), (0.0, "training"), (0.0, "inference")):
            chain = _chain(K, norm, activation, p)
            yield Cell("linear", chain, norm, activation, dtype, M, K, width // 2, p, mode)


def host_cells() -> Iterator[Cell]:
    """Chains on tensors so small that only the host's work counts."""
    rows, cols = HOST_SIZE
    pairs = (("layer", "relu"), ("rms", "silu"), ("batch", "relu"))
    for (norm, activation), chain in product(pairs, HOST_CHAINS):
        if "N" not in chain and norm != "layer":
            continue
        inputs, p = (cols, P) if "L" in chain else (0, P)
        p = p if "D" in chain else 0.0
        name = norm if "N" in chain else ""
        for mode in ("forward", "inference", "training"):
            yield Cell("host", chain, name, activation, "float32", rows, inputs, cols, p, mode)


def _channel_cells(
    norm: str, activation: str, sizes: tuple[int, ...], layout: str, modes: tuple[str, ...]
) -> Iterator[Cell]:
    channels = sizes[1]
    rows = math.prod(sizes) // channels
    shape = "×".join(map(str, sizes)) if len(sizes) > 2 else ""
    for dtype, p, mode in product(DTYPES, (P, 0.0), modes):
        chain = "N-A-D" if p else "N-A"
        size = (rows, 0, channels)
        yield Cell("channel", chain, norm, activation, dtype, *size, p, mode, shape, layout)


def channel_cells() -> Iterator[Cell]:
    """Norms over samples or positions + activation, with and without dropout.

    ReLU everywhere; SiLU, as a training step, on rows and on the first image size.
    """
    both = ("forward", "training")
    for sizes in CHANNEL_ROWS:
        yield from _channel_cells("batch", "relu", sizes, "", both)
    for sizes, norm, layout in product(CHANNEL_IMAGES, CHANNEL_NORMS, LAYOUTS):
        yield from _channel_cells(norm, "relu", sizes, layout, both)
    for sizes in CHANNEL_ROWS:
        yield from _channel_cells("batch", "silu", sizes, "", ("training",))
    for norm, layout in product(CHANNEL_NORMS, LAYOUTS):
        yield from _channel_cells(norm, "silu", CHANNEL_IMAGES[0], layout, ("training",))


def shape_cells() -> Iterator[Cell]:
    """Chains of two inputs: add & norm, batch norm with a shortcut on images, gates."""
    pairs = (("layer", ""), ("rms", ""), ("", "silu"), ("", "gelu"))
    for (norm, activation), dtype, (rows, cols) in product(pairs, DTYPES, NORM_SIZES):
        for p, mode in product((P, 0.0), ("forward", "training")):
            chain = ("D-S-N" if p else "S-N") if norm else ("G-D" if p else "G")
            yield Cell("shapes", chain, norm, activation, dtype, rows, 0, cols, p, mode)
    for sizes, layout, dtype in product(CHANNEL_IMAGES, LAYOUTS, DTYPES):
        size, shape = (math.prod(sizes) // sizes[1], 0, sizes[1]), "×".join(map(str, sizes))
        for mode in ("forward", "inference", "training"):
            cell = Cell("shapes", "N-S-A", "batch", "relu", dtype, *size, 0.0, mode, shape, layout)
            yield cell


CPU_SUITES = {
    "norm": norm_cells,
    "linear": linear_cells,
    "channel": channel_cells,
    "shapes": shape_cells,
    "host": host_cells,
}


def is_quick(cell: Cell) -> bool:
    """Whether --quick measures it: few enough compilations for a minute."""
    if cell.suite == "norm":
        shown = (cell.norm, cell.activation) == ("layer", "gelu")
        return shown and (cell.M, cell.N) == (8192, 256) and cell.p > 0
    if cell.suite == "linear":
        shown = (cell.M, cell.K, cell.N) == (8192, 64, 256)
        return shown and (cell.norm, cell.p) == ("layer", P)
    if cell.suite == "channel":
        shown = (cell.activation, cell.dtype) == ("relu", "float32") and cell.p > 0
        image = (cell.sizes, cell.layout) == (CHANNEL_IMAGES[0], "channels-last")
        return shown and (cell.sizes == CHANNEL_ROWS[0] or image)
    if cell.suite == "shapes":
        small = cell.sizes in (NORM_SIZES[0], CHANNEL_IMAGES[0]) and cell.dtype == "float32"
        shown = (cell.norm or cell.activation) in ("layer", "silu", "batch")
        return small and shown and (cell.p > 0 or cell.norm == "batch")
    return cell.norm in ("layer", "")
