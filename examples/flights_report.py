"""The flights run as a table and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import matplotlib
import numpy as np
from flights_training import PARTS, Run

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

COLOURS = {"eager": "#4c6a92", "fused": "#d9722e"}


@dataclass(frozen=True)
class Build:
    """All repeats of one build, and what its forward keeps for backward.

    Attributes:
        runs: one per repeat.
        kept: bytes per batch.
    """

    name: str
    runs: Sequence[Run]
    kept: int

    def step_ms(self) -> np.ndarray:
        """Median milliseconds of each of PARTS, then of the whole step."""
        steps = np.concatenate([np.array(run.clock.steps) for run in self.runs]) * 1e3
        return np.append(np.median(steps, axis=0), np.median(steps.sum(axis=1)))

    def last(self, metric: str) -> tuple[float, ...]:
        """The last value of a metric of `Curve`, of every repeat."""
        return tuple(getattr(run.curve, metric)[-1] for run in self.runs)


def speed_up(eager: Build, fused: Build) -> tuple[float, float, float]:
    """Ratio of the times of neighbouring chunks of steps: median, 20th and 80th percentile."""
    times = [
        np.concatenate([np.array(run.clock.chunks) for run in build.runs])
        for build in (eager, fused)
    ]
    low, median, high = np.percentile(times[0] / times[1], [20, 50, 80])
    return float(median), float(low), float(high)


def table(eager: Build, fused: Build, batch: int) -> str:
    """Losses, AUC, throughput, the step and its parts, memory; side by side."""
    lines = [f"{'':34}{'eager':>12}{'fused':>12}{'eager/fused':>14}"]

    def row(label: str, a: float, b: float, digits: int, ratio: bool = True) -> None:
        last = f"{a / b:14.2f}" if ratio and b else ""
        lines.append(f"{label:34}{a:12,.{digits}f}{b:12,.{digits}f}{last}")

    repeats = len(eager.runs)
    for label, metric in (
        ("training loss", "train_loss"),
        ("validation loss", "valid_loss"),
        ("validation AUC", "valid_auc"),
    ):
        a, b = fmean(eager.last(metric)), fmean(fused.last(metric))
        row(f"{label} (mean of {repeats} runs)", a, b, 4, ratio=False)
    ms = {build.name: build.step_ms() for build in (eager, fused)}
    per_second = {name: batch / (times[-1] / 1e3) for name, times in ms.items()}
    row("training samples per second", per_second["eager"], per_second["fused"], 0, ratio=False)
    row("one step (median), ms", ms["eager"][-1], ms["fused"][-1], 2)
    for part, a, b in zip(PARTS, ms["eager"], ms["fused"], strict=False):
        row(f"  {part}, ms", a, b, 2)
    row("kept for backward, MB per batch", eager.kept / 1e6, fused.kept / 1e6, 2)
    return "\n".join(lines)


def picture(eager: Build, fused: Build, path: Path, title: str, subtitle: str) -> None:
    """Learning curves, parts of a step and memory kept for backward, as a PNG."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure = plt.figure(figsize=(12, 8), layout="constrained")
    figure.suptitle(f"{title}\n", fontsize=14, fontweight="bold")
    figure.text(0.5, 0.945, subtitle, ha="center", fontsize=10, color="#555555")
    grid = figure.add_gridspec(2, 6)
    builds = (eager, fused)
    _losses(figure.add_subplot(grid[0, :3]), builds)
    _auc(figure.add_subplot(grid[0, 3:]), builds)
    _parts(figure.add_subplot(grid[1, :4]), builds)
    _memory(figure.add_subplot(grid[1, 4:]), builds)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _curves(axes: Axes, builds: Sequence[Build], metric: str, label: str, style: str) -> None:
    # Eager is drawn broad and pale, fused thin on top: where they agree, both stay visible.
    for build in builds:
        broad = build.name == "eager"
        for k, run in enumerate(build.runs):
            axes.plot(
                run.curve.epoch,
                getattr(run.curve, metric),
                style,
                color=COLOURS[build.name],
                linewidth=3.5 if broad else 1.3,
                alpha=0.4 if broad else 0.95,
                label=f"{build.name}, {label}" if k == 0 else None,
            )


def _losses(axes: Axes, builds: Sequence[Build]) -> None:
    _curves(axes, builds, "train_loss", "training (with dropout)", "--")
    _curves(axes, builds, "valid_loss", "validation", "-")
    axes.set(title="Loss", xlabel="epochs", xlim=(0, None), ylabel="binary cross-entropy, nats")
    axes.legend(frameon=False, title=f"{len(builds[0].runs)} runs each", alignment="left")
    axes.grid(alpha=0.25)


def _auc(axes: Axes, builds: Sequence[Build]) -> None:
    _curves(axes, builds, "valid_auc", "validation", "-")
    axes.set(
        title="Validation AUC", xlabel="epochs", xlim=(0, None), ylabel="area under the ROC curve"
    )
    axes.legend(frameon=False, loc="lower right")
    axes.grid(alpha=0.25)


def _parts(axes: Axes, builds: Sequence[Build]) -> None:
    groups = [*PARTS, "whole step"]
    place = np.arange(len(groups))
    for k, build in enumerate(builds):
        colour = COLOURS[build.name]
        bars = axes.bar(
            place + (k - 0.5) * 0.4, build.step_ms(), 0.38, color=colour, label=build.name
        )
        axes.bar_label(bars, fmt="%.1f", fontsize=9, padding=2)
    axes.set(title="Time of a training step (median)", ylabel="milliseconds")
    axes.set_xticks(place, groups)
    axes.margins(y=0.12)
    axes.legend(frameon=False, loc="upper left")


def _memory(axes: Axes, builds: Sequence[Build]) -> None:
    names = [build.name for build in builds]
    values = [build.kept / 1e6 for build in builds]
    bars = axes.bar(names, values, 0.6, color=[COLOURS[name] for name in names])
    axes.bar_label(bars, fmt="%.1f", padding=2)
    axes.margins(y=0.12)
    axes.set(title="Kept for backward, per batch", ylabel="megabytes")
