"""What `compare` found: a table, a picture, and one sentence that says what to use."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from .clock import GAIN

__all__ = ["Comparison", "Row"]


@dataclass(frozen=True)
class Row:
    """One way; NaN where it was not measured.

    Attributes:
        name: of the way.
        error: why it does not run; empty where it does.
        step: seconds of a step, the median of the rounds.
        speed: eager's time over its own, the median of the rounds' ratios; above 1 is faster.
        first: seconds of the first step, compilation included, from empty caches.
        peak: bytes at the peak of a step, above those before it.
        outputs, gradients: the largest difference from eager, dropout off, relative to the largest
            element of the tensor, of gradients to that of the module; buffers count as outputs.
    """

    name: str
    error: str = ""
    step: float = math.nan
    speed: float = math.nan
    first: float = math.nan
    peak: float = math.nan
    outputs: float = math.nan
    gradients: float = math.nan

    def cells(self) -> list[str]:
        """The figures as a table shows them; for a way that does not run, its error."""
        if self.error:
            return [self.error]
        shown = [
            f"{self.step * 1e3:.3f}",
            f"{self.speed:.2f}",
            f"{self.first:.2f}",
            f"{self.peak / 2**20:.1f}",
            f"{self.outputs:.1e}",
            f"{self.gradients:.1e}",
        ]
        return ["–" if cell == "nan" else cell for cell in shown]


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; print it, or draw it with `plot`.

    Attributes:
        rows: one `Row` for each way, eager first.
        title: what was measured, and where.
        tolerance: the largest difference with which a way is recommended.
    """

    rows: list[Row]
    title: str
    tolerance: float

    @property
    def best(self) -> Row:
        """The fastest way within tolerance; eager where no other gains at least 3 %."""
        able = [
            row
            for row in self.rows[1:]
            if row.speed >= GAIN
            and row.outputs <= self.tolerance
            and not row.gradients > self.tolerance
        ]
        return max(able, key=lambda row: row.speed, default=self.rows[0])

    @property
    def advice(self) -> str:
        """What to use, in one sentence."""
        best, eager = self.best, self.rows[0]
        if best is eager:
            return (
                f"Stay with eager: no other way is {GAIN:.2f} times as fast with differences"
                f" within {self.tolerance:.0e}."
            )
        pays, saved = best.first - eager.first, eager.step * (1 - 1 / best.speed)
        after = f", and pays for its first step after {max(1, math.ceil(pays / saved)):,} steps"
        return (
            f"Use {best.name}: it is {best.speed:.2f} times as fast as eager"
            f"{after if pays > 0 else ''}."
        )

    def __str__(self) -> str:
        heads = ["step ms", "speed", "first s", "peak MiB", "Δ outputs", "Δ gradients"]
        lines = [("way", heads), *((row.name, row.cells()) for row in self.rows)]
        width = max(len(name) for name, _ in lines)
        full = [cells for _, cells in lines if len(cells) == len(heads)]
        widths = [max(map(len, column)) for column in zip(*full, strict=True)]
        table = []
        for name, cells in lines:
            aligned = widths if len(cells) == len(heads) else [0]
            shown = [cell.rjust(w) for cell, w in zip(cells, aligned, strict=True)]
            table.append("  ".join([name.ljust(width), *shown]))
        return "\n".join([self.title, *table, self.advice])

    def plot(self, path: str | Path) -> None:
        """Draws the ways' speeds as bars; the file's ending says the format.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("Comparison.plot draws with matplotlib; install it first") from error
        rows = [row for row in reversed(self.rows) if not row.error]
        figure = Figure(figsize=(8, 1.2 + 0.4 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        colors = ["tab:green" if row is self.best else "tab:gray" for row in rows]
        bars = axes.barh([row.name for row in rows], [row.speed for row in rows], color=colors)
        labels = [f"{row.speed:.2f}   {row.step * 1e3:.3g} ms" for row in rows]
        axes.bar_label(bars, labels, padding=4)
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set_xlim(0, 1.3 * max(row.speed for row in rows))
        axes.set_xlabel("times as fast as eager")
        axes.set_title(self.title, fontsize="small")
        figure.savefig(path, dpi=150)
