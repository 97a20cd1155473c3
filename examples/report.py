"""What the reports of two builds share: medians, ratios, rows of a table, parts of a picture."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from training import PARTS, Run

import fused
from fused.backends.backend import choose

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = {"eager": "#4c6a92", "fused": "#d9722e"}
HEAD = f"{'':34}{'eager':>12}{'fused':>12}{'eager/fused':>14}"


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
        """The last value of a metric of the curve, of every repeat."""
        return tuple(run.curve[metric][-1] for run in self.runs)


def describe_machine(device: torch.device, dtype: torch.dtype) -> str:
    """The processor, the backend and the versions that the timings belong to."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        information = Path("/proc/cpuinfo")
        lines = information.read_text().splitlines() if information.exists() else []
        models = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
        model = models[0] if models else platform.machine()
        name = f"{model}, {torch.get_num_threads()} threads"
    backend = choose(device.type, dtype)
    return f"{name}; torch {torch.__version__}, fused-lnad {fused.__version__}, backend {backend}"


def speed_up(eager: Sequence[Run], fused: Sequence[Run]) -> tuple[float, float, float]:
    """Ratio of the times of neighbouring chunks of steps: median, 20th and 80th percentile."""
    times = [
        np.concatenate([np.array(run.clock.chunks) for run in runs]) for runs in (eager, fused)
    ]
    low, median, high = np.percentile(times[0] / times[1], [20, 50, 80])
    return float(median), float(low), float(high)


def row(label: str, eager: float, fused: float, digits: int, ratio: bool = False) -> str:
    """A line under HEAD."""
    last = f"{eager / fused:14.2f}" if ratio and fused else ""
    return f"{label:34}{eager:12,.{digits}f}{fused:12,.{digits}f}{last}"


def cost_rows(eager: Build, fused: Build, batch: int, samples: str = "samples") -> list[str]:
    """Throughput, the step and its parts, and memory; `batch` counts what `samples` names."""
    a, b = eager.step_ms(), fused.step_ms()
    lines = [row(f"training {samples} per second", batch / a[-1] * 1e3, batch / b[-1] * 1e3, 0)]
    lines.append(row("one step (median), ms", a[-1], b[-1], 2, ratio=True))
    parts = zip(PARTS, a, b, strict=False)  # without the whole step
    lines += [row(f"  {part}, ms", *ms, 2, ratio=True) for part, *ms in parts]
    kept = eager.kept / 1e6, fused.kept / 1e6
    return [*lines, row("kept for backward, MB per batch", *kept, 2, ratio=True)]


def save_picture(
    path: Path, title: str, subtitle: str, draw: Callable[[Figure], None], height: float = 8
) -> None:
    """A PNG with a title, a grey line under it and what `draw` puts into the figure."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure = plt.figure(figsize=(12, height), layout="constrained")
    figure.suptitle(f"{title}\n", fontsize=14, fontweight="bold")
    figure.text(0.5, 1 - 0.44 / height, subtitle, ha="center", fontsize=10, color="#555555")
    draw(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_curves(
    axes: Axes, builds: Sequence[Build], metric: str, label: str, style: str, over: str = "epoch"
) -> None:
    """A metric of every run, over another one."""
    # Eager is drawn broad and pale, fused thin on top: where they agree, both stay visible.
    for build in builds:
        broad = build.name == "eager"
        for k, run in enumerate(build.runs):
            axes.plot(
                run.curve[over],
                run.curve[metric],
                style,
                color=COLOURS[build.name],
                linewidth=3.5 if broad else 1.3,
                alpha=0.4 if broad else 0.95,
                label=f"{build.name}, {label}" if k == 0 else None,
            )


def draw_parts(axes: Axes, builds: Sequence[Build]) -> None:
    """Bars of the parts of a step."""
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


def draw_memory(axes: Axes, builds: Sequence[Build]) -> None:
    """Bars of what a forward keeps for backward."""
    names = [build.name for build in builds]
    values = [build.kept / 1e6 for build in builds]
    bars = axes.bar(names, values, 0.6, color=[COLOURS[name] for name in names])
    axes.bar_label(bars, fmt="%.1f", padding=2)
    axes.margins(y=0.12)
    axes.set(title="Kept for backward, per batch", ylabel="megabytes")
