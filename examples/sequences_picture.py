"""The sequences example as a picture: lengths, drift by padding, learning curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

COLOURS = ("#1f4e79", "#2e8b57", "#d9722e")
WIDTHS = (4.5, 2.2, 2.2)  # the first lies under the second where both are zero


def picture(
    lengths: Tensor,
    factors: Sequence[float],
    drifts: Mapping[str, Any],
    curves: Mapping[str, Mapping[int, Any]],
    fixed: int,
    path: Path,
) -> None:
    """Writes a PNG.

    Args:
        lengths: (n,) of the training sequences.
        factors: lengths of the padded batch, over its longest sequence.
        drifts: name → changed and loss, one value per factor.
        curves: name → padded length (0: to the longest of each batch) → loss, one value per epoch.
        fixed: the other padded length.
    """
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure = plt.figure(figsize=(12, 8), layout="constrained")
    figure.suptitle("Padding, batch norm and layer norm\n", fontsize=14, fontweight="bold")
    subtitle = "a plane's month of flights tells its type; no dropout, the same weights and batches"
    figure.text(0.5, 0.945, subtitle, ha="center", color="#555555")
    (histogram, changed), (loss, learning) = figure.subplots(2, 2)
    _show_lengths(histogram, lengths)
    _show_drift(changed, factors, {k: [100 * v for v in d.changed] for k, d in drifts.items()})
    changed.set(title="The same batch, padded more: answers", ylabel="answers changed, per cent")
    changed.set_ylim(-1.5, None)
    changed.legend(frameon=False, loc="center right")
    _show_drift(loss, factors, {name: found.loss for name, found in drifts.items()})
    loss.set(title="The same batch, padded more: loss", ylabel="cross-entropy, nats")
    _show_learning(learning, curves, fixed)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _show_lengths(axes: Axes, lengths: Tensor) -> None:
    longest = int(lengths.max())
    axes.hist(lengths.numpy(), bins=range(1, longest + 2), align="left", color="#9aa5b1")
    padding = 1 - float(lengths.float().mean()) / longest
    axes.set(title="Training sequences", xlabel="flights in the month", ylabel="sequences")
    text = f"padded to the longest,\n{padding:.0%} of all positions are padding"
    axes.text(0.97, 0.9, text, transform=axes.transAxes, ha="right", va="top")


def _show_drift(axes: Axes, factors: Sequence[float], values: Mapping[str, list[float]]) -> None:
    for (name, line), colour, width in zip(values.items(), COLOURS, WIDTHS, strict=True):
        axes.plot(factors, line, "o-", color=colour, linewidth=width, label=name)
    axes.set_xlabel("padded length over the longest sequence (training mode)")
    axes.grid(alpha=0.25)


def _show_learning(axes: Axes, curves: Mapping[str, Mapping[int, Any]], fixed: int) -> None:
    for (name, by_padding), colour in zip(curves.items(), COLOURS, strict=True):
        for padded_to, curve in by_padding.items():
            epochs = range(1, len(curve.loss) + 1)
            wide = padded_to == fixed
            axes.plot(
                epochs,
                curve.loss,
                color=colour,
                linewidth=5 if wide else 1.8,
                alpha=0.35 if wide else 1.0,
                label=f"{name}, padded to {fixed if wide else 'the longest'}",
            )
    axes.set(title="Learning: held-out planes, evaluation mode", xlabel="epoch")
    axes.set_ylabel("cross-entropy, nats")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
