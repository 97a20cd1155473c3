"""The measured roofline of the blocks suite: products a second over the bytes that must be moved.

The ceilings are measured too: the bandwidth is that of the fastest `copy_` of the rows suite on the
same machine, the rate that of the fastest matrix products of the blocks suite (`gemms`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes

from fused.spec import GATED_ACTIVATIONS

from .gpu_pictures import LINES
from .gpu_tables import bandwidth
from .harness import Row
from .pictures import DPI
from .tables import select

PROVIDERS = ("eager", "compile", "fused")


def flops(r: Row) -> float:
    """Of a training step of Linear: the products for the output, for dx and for dweight."""
    return 6.0 * r.M * r.K * r.N


def least_bytes(r: Row) -> float:
    """Of a training step whose products are apart from one pass each way, every operand once.

    Forward x, weight, z; z, y. Backward dy, z, dz; dz, weight, dx; dz, x, dweight.
    """
    elements = 3 * r.M * r.K + 3 * r.K * r.N + 8 * r.M * r.N
    return float(elements * getattr(torch, r.dtype).itemsize)


def ceilings(blocks: Sequence[Row], rows: Sequence[Row], dtype: str) -> tuple[float, float] | None:
    """(bytes a second, FLOP a second) as measured; None where one was not."""
    products = select(_steps(blocks), provider="gemms", dtype=dtype)
    copies = select(rows, provider="copy_", mode="forward", machine=blocks[0].machine)
    if not products or not copies:
        return None
    return (
        max(map(bandwidth, copies)) * 1e9,
        max(flops(r) / r.median_us for r in products) * 1e6,
    )


def _steps(blocks: Sequence[Row]) -> list[Row]:
    """Single blocks: what a network's steps add up to says less; without gates, for one formula."""
    found = select(blocks, chain="L-N-A-D", mode="training")
    return [r for r in found if r.activation not in GATED_ACTIVATIONS]


def share(r: Row, limits: tuple[float, float]) -> float:
    """Of the roof above it that a step reaches."""
    roof = min(limits[1], limits[0] * flops(r) / least_bytes(r))
    return flops(r) / (r.median_us * 1e-6) / roof


def roofline_text(blocks: Sequence[Row], rows: Sequence[Row]) -> str:
    """A sentence for each dtype: the ceilings, and the share of the roof that each side reaches."""
    sentences = []
    for dtype in dict.fromkeys(r.dtype for r in blocks):
        own = select(_steps(blocks), dtype=dtype)
        limits = ceilings(own, rows, dtype) if own else None
        if limits is None:
            continue
        means = []
        for name in PROVIDERS:
            shares = [share(r, limits) for r in select(own, provider=name)]
            if shares:
                means.append(f"{name} {np.exp(np.mean(np.log(shares))):.2f}")
        sentences.append(
            f"Roofline, {dtype}: {limits[0] / 1e9:.0f} GB/s (the fastest `copy_`) and"
            f" {limits[1] / 1e12:.0f} TFLOP/s (the fastest products); geometric mean of the share"
            f" of the roof that a training step of a block reaches: {', '.join(means)}."
        )
    return "\n\n".join(sentences)


def _panel(axes: Axes, own: Sequence[Row], limits: tuple[float, float], dtype: str) -> None:
    intensities = [flops(r) / least_bytes(r) for r in own]
    x = np.geomspace(min(intensities) / 2, max(intensities) * 2, 200)
    axes.plot(x, np.minimum(limits[1], limits[0] * x) / 1e12, "--", color="#1a202c", label="roof")
    for name in PROVIDERS:
        found = select(own, provider=name)
        axes.plot(
            [flops(r) / least_bytes(r) for r in found],
            [flops(r) / r.median_us / 1e6 for r in found],
            ".",
            color=LINES[name][0],
            label=name,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP of the products a byte that must be moved")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(f"training step of a block, {dtype}", fontsize=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)


def draw_roofline(blocks: Sequence[Row], rows: Sequence[Row], path: Path, caption: str) -> bool:
    """Writes the picture, a panel for each dtype; False where the ceilings were not measured."""
    panels = []
    for dtype in dict.fromkeys(r.dtype for r in blocks):
        own = select(_steps(blocks), dtype=dtype)
        limits = ceilings(own, rows, dtype) if own else None
        if limits is not None:
            panels.append((own, limits, dtype))
    if not panels:
        return False
    size = (7 * len(panels), 5)
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for place, panel in zip(axes[0], panels, strict=True):
        _panel(place, *panel)
    figure.suptitle(f"Measured roofline\n{caption}", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    return True
