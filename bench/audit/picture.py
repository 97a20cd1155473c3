"""The table as a picture: bytes by kernel, and the estimated headroom by kernel and target."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from ..pictures import COLOURS, DPI, grid, heat_map
from .report import Report
from .table import Line, lines_of
from .targets import TARGETS

TITLE = (
    "Triton kernels: bytes moved (interpreter), and estimated headroom of arithmetic over memory"
    " (data sheets, not measured);\nframed in red: arithmetic is the bound"
)


def _bytes(axes: Axes, lines: list[Line]) -> None:
    for i, line in enumerate(lines):
        if line.bytes_ratio is None:
            continue
        colour = COLOURS["fused" if round(line.bytes_ratio, 2) <= 1 else "eager"]
        axes.barh(i, line.bytes_ratio, 0.7, color=colour)
        axes.text(line.bytes_ratio, i, f" {line.bytes_ratio:.2f}", va="center", fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_title("bytes moved over the least; grey: read again from a cache", fontsize=11,
                   loc="left")  # fmt: skip
    axes.set_yticks(range(len(lines)), [line.cells()[0] for line in lines], fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.15)


def draw(report: Report, path: Path) -> None:
    """Writes the picture."""
    lines = lines_of(report)
    figure, (left, right) = plt.subplots(1, 2, figsize=(15, 5.5), layout="constrained", sharey=True)
    _bytes(left, lines)
    values = [[line.headroom.get(target) or np.nan for target in TARGETS] for line in lines]
    labels = [f"{target}\n{gpu.name}" for target, gpu in TARGETS.items()]
    names = [line.cells()[0] for line in lines]
    grid(
        right, "estimated headroom: what instructions allow over what memory allows", names, labels
    )
    heat_map(right, np.array(values, dtype=float))
    right.tick_params(axis="x", rotation=0)
    plt.setp(right.get_xticklabels(), ha="center")
    figure.suptitle(f"{TITLE}\ntriton {report.triton}", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
