"""The style example as a picture: images, feature statistics, right answers."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import matplotlib
import numpy as np
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

NORM_COLOURS = {"batch": "#d9722e", "group": "#9aa5b1", "instance": "#1f4e79"}
STYLE_COLOURS = ("#222222", "#3b82c4", "#d9722e", "#2e8b57", "#a855a8", "#c0392b")
GUESSING = 10  # per cent

Accuracies = dict[str, dict[str, list[float]]]  # norm → style → one share per repeat


def show_images(
    figure: Figure, styles: dict[str, Tensor], features: dict[str, list[Tensor]], which: int
) -> None:
    """One image in every style: as it is, and one feature of it before and after the norm."""
    rows = [
        ("image", {style: images[:, 0] for style, images in styles.items()}, "gray_r"),
        ("first feature", {style: pair[0] for style, pair in features.items()}, "viridis"),
        ("after\ninstance norm", {style: pair[1] for style, pair in features.items()}, "viridis"),
    ]
    grid = figure.subplots(3, len(styles), squeeze=False)
    for line, (label, images, colours) in zip(grid, rows, strict=True):
        low = min(float(tensor[which].min()) for tensor in images.values())
        high = max(float(tensor[which].max()) for tensor in images.values())
        for axes, (style, tensor) in zip(line, images.items(), strict=True):
            drawn = axes.imshow(tensor[which].numpy(), cmap=colours, vmin=low, vmax=high)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if label == "image":
                axes.set_title(style, fontsize=11)
        line[0].set_ylabel(label, rotation=0, ha="right", va="center")
        figure.colorbar(drawn, ax=list(line), shrink=0.9, pad=0.01)


def show_statistics(axes: Axes, features: dict[str, list[Tensor]]) -> None:
    """Mean and deviation of the feature of every image; after the norm they are one point."""
    for (style, (before, after)), colour in zip(features.items(), STYLE_COLOURS, strict=True):
        axes.plot(
            before.mean((1, 2)), before.std((1, 2)), ".", color=colour, markersize=3, label=style
        )
        mean, deviation = after.mean((1, 2)), after.std((1, 2))
        axes.plot(mean, deviation, "*", color="gold", markeredgecolor="black", markersize=16)
    axes.annotate(
        "all images of all styles\nafter instance norm",
        (float(mean[0]), float(deviation[0])),
        xytext=(14, 0),
        textcoords="offset points",
        va="center",
    )
    axes.set(title="First feature of every held-out image", xlabel="mean over the positions")
    axes.set(ylabel="deviation over the positions", ylim=(-0.03, 1.1))
    axes.legend(
        frameon=False, markerscale=4, fontsize=9, loc="upper right", bbox_to_anchor=(1, 0.92)
    )
    axes.grid(alpha=0.25)


def show_accuracies(axes: Axes, right: Accuracies) -> None:
    """Right answers, a group of bars for each style."""
    styles = list(right["batch"])
    place = np.arange(len(styles))
    for k, (norm, by_style) in enumerate(right.items()):
        values = [100 * fmean(runs) for runs in by_style.values()]
        bars = axes.bar(
            place + (k - 1) * 0.28, values, 0.27, color=NORM_COLOURS[norm], label=f"{norm} norm"
        )
        axes.bar_label(bars, fmt="%.0f", fontsize=9, padding=1)
    axes.axhline(GUESSING, color="#555555", linewidth=1, linestyle=":")
    axes.set_xticks(place, [style.replace(" ", "\n", 1) for style in styles])
    axes.set(title="Right answers on held-out images (dotted: guessing)", ylabel="per cent")
    axes.set_ylim(0, 119)
    axes.legend(frameon=False, ncols=3, loc="upper right")


def picture(
    right: Accuracies,
    styles: dict[str, Tensor],
    features: dict[str, list[Tensor]],
    path: Path,
    subtitle: str,
) -> None:
    """Images, feature statistics and right answers, as a PNG."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure = plt.figure(figsize=(12, 10), layout="constrained")
    figure.suptitle(
        "Unseen styles: instance norm takes contrast and brightness out\n",
        fontsize=14,
        fontweight="bold",
    )
    figure.text(0.5, 0.955, subtitle, ha="center", color="#555555")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.15, 1))
    show_images(upper, styles, features, which=0)
    left, right_axes = lower.subplots(1, 2, width_ratios=(1, 1.5))
    show_statistics(left, features)
    show_accuracies(right_axes, right)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
