"""The README's table: eight cells that show what to expect, one of them a loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from . import results
from .cells import CPU_SUITES, Cell, P
from .harness import Row
from .tables import ABSENT, BASELINES, LOSING, caption, group_by, ratios, select, table

STEP, IMAGES = "training", "16×64×64×64"
CELLS = (
    Cell("linear", "L-N-A-D", "layer", "gelu", "float32", 8192, 256, 256, P, STEP),
    Cell("linear", "L-N-A-D", "layer", "gelu", "bfloat16", 4096, 1024, 1024, P, STEP),
    Cell("linear", "L-N-A-D", "rms", "swiglu", "bfloat16", 2048, 1024, 2048, P, STEP),
    Cell("linear", "L-N-A", "rms", "silu", "bfloat16", 8192, 512, 512, 0.0, "inference"),
    Cell("norm", "N-A-D", "layer", "gelu", "bfloat16", 8192, 0, 1024, P, STEP),
    Cell("norm", "N-A-D", "rms", "silu", "float32", 8192, 0, 1024, P, STEP),
    Cell("channel", "N-A-D", "batch", "relu", "float32", 65536, 0, 64, P, STEP, IMAGES),
    Cell("host", "L-N-A-D", "batch", "relu", "float32", 8, 64, 64, P, STEP),
)
NAMES = {"layer": "LayerNorm", "rms": "RMSNorm", "batch": "BatchNorm"}
NAMES |= {"gelu": "GELU", "silu": "SiLU", "swiglu": "SwiGLU", "relu": "ReLU"}
ABOUT = (
    "How many times faster fused is than eager PyTorch / than `torch.compile`. A training step is"
    f" forward and backward; {LOSING} marks a loss; {ABSENT} was not measured. Sizes are rows ×"
    " features, with a Linear rows × features in × features out, of images samples × channels ×"
    " height × width. The last row has tensors so small that only the cost of the call counts."
)


def describe(cell: Cell) -> str:
    """A cell in words."""
    stages = ["Linear"] * cell.has_linear + [NAMES[cell.norm], NAMES[cell.activation]]
    stages += ["Dropout"] * cell.drops
    size = cell.shape or "×".join(str(n) for n in (cell.M, cell.K, cell.N) if n)
    return f"{' → '.join(stages)}, {cell.mode}, {size.replace('×', ' × ')}, {cell.dtype}"


def rows_of(cell: Cell, rows: Sequence[Row]) -> list[Row]:
    """What was measured of a cell."""
    return select(rows, **asdict(cell))


def speed_up(cell: Cell, rows: Sequence[Row]) -> str:
    """Over eager / over torch.compile."""
    own = rows_of(cell, rows)
    found = [ratios(select(own, provider=b)) for b in BASELINES[:2]]
    return ABSENT if found == [ABSENT] * 2 else " / ".join(found)


def without_dropout(cell: Cell) -> Cell:
    return replace(cell, chain=cell.chain.removesuffix("-D"), p=0.0)


def summary(rows: Sequence[Row]) -> str:
    """The table, of the latest machine that measured every cell; "" where none did."""
    for group in group_by(rows, "device", "machine", "isa"):
        if not all(rows_of(cell, group) for cell in CELLS):
            continue
        lines, used = [], []
        for cell in CELLS:
            plain = without_dropout(cell)
            used += rows_of(cell, group) + rows_of(plain, group)
            dropped = speed_up(cell, group) if cell.drops else ABSENT
            lines.append([describe(cell), dropped, speed_up(plain, group)])
        header = ["chain, mode, size, dtype", f"dropout {P}", "without dropout"]
        return f"{ABOUT}\n\n{table(header, lines)}\n\n{caption(used)}."
    return ""


def read_all(folder: Path) -> list[Row]:
    """The rows of the CPU suites."""
    found = (r for suite in CPU_SUITES for r in results.read(folder / f"{suite}.csv"))
    return [r for r in found if r.device == "cpu"]
