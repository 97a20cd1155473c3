"""The flights run as a table and as a picture."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure
from report import (
    HEAD,
    Build,
    cost_rows,
    draw_curves,
    draw_memory,
    draw_parts,
    row,
    save_picture,
)


def table(eager: Build, fused: Build, batch: int) -> str:
    """Losses, AUC, throughput, the step and its parts, memory; side by side."""
    lines = [HEAD]
    for label, metric in (
        ("training loss", "train_loss"),
        ("validation loss", "valid_loss"),
        ("validation AUC", "valid_auc"),
    ):
        means = fmean(eager.last(metric)), fmean(fused.last(metric))
        lines.append(row(f"{label} (mean of {len(eager.runs)} runs)", *means, 4))
    return "\n".join([*lines, *cost_rows(eager, fused, batch)])


def picture(eager: Build, fused: Build, path: Path, title: str, subtitle: str) -> None:
    """Learning curves, parts of a step and memory kept for backward, as a PNG."""
    builds = (eager, fused)

    def draw(figure: Figure) -> None:
        grid = figure.add_gridspec(2, 6)
        losses, auc = figure.add_subplot(grid[0, :3]), figure.add_subplot(grid[0, 3:])
        draw_curves(losses, builds, "train_loss", "training (with dropout)", "--")
        draw_curves(losses, builds, "valid_loss", "validation", "-")
        losses.set(title="Loss", ylabel="binary cross-entropy, nats")
        losses.legend(frameon=False, title=f"{len(eager.runs)} runs each", alignment="left")
        draw_curves(auc, builds, "valid_auc", "validation", "-")
        auc.set(title="Validation AUC", ylabel="area under the ROC curve")
        auc.legend(frameon=False, loc="lower right")
        for axes in (losses, auc):
            axes.set(xlabel="epochs", xlim=(0, None))
            axes.grid(alpha=0.25)
        draw_parts(figure.add_subplot(grid[1, :4]), builds)
        draw_memory(figure.add_subplot(grid[1, 4:]), builds)

    save_picture(path, title, subtitle, draw)
