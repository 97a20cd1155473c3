"""Rows of a suite as a picture: heat maps of the speed-up, bars of the host's work.

Blue is faster than the baseline, red slower; a losing cell is framed besides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.patches import Rectangle

from .cells import LINEAR_SIZES, NORM_SIZES, PAIRS, P
from .harness import Row
from .tables import BASELINES, LINEAR_COLUMNS, has_ratio, select

COLOURS = {"eager": "#8a94a6", "fused": "#2b6cb0", "losing": "#c53030"}
# The colour scale, in powers of two of the speed-up.
SLOWEST, FASTEST = -1.0, 4.0
DARK = 0.55  # share of the scale beyond which text is white
DPI = 130


def grid(axes: Axes, title: str, lines: Sequence[str], columns: Sequence[str]) -> None:
    """Title and names of a heat map."""
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right", fontsize=8)
    axes.set_yticks(range(len(lines)), lines, fontsize=8)
    axes.tick_params(length=0)


def heat_map(axes: Axes, values: np.ndarray) -> None:
    """Values are speed-ups; NaN stays empty."""
    scale = TwoSlopeNorm(0.0, SLOWEST, FASTEST)
    shown = np.clip(np.log2(values), SLOWEST, FASTEST)
    axes.imshow(shown, cmap="RdBu", norm=scale, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        if np.isnan(value):
            continue
        lost = value < 1
        colour = "white" if abs(scale(shown[i, j]) - 0.5) * 2 > DARK else "black"
        weight = "bold" if lost else "normal"
        text = f"{value:.2f}" if value < 10 else f"{value:.0f}"
        axes.text(j, i, text, ha="center", va="center", fontsize=8, color=colour, weight=weight)
        if lost:
            frame = Rectangle((j - 0.48, i - 0.46), 0.96, 0.92)
            frame.set(fill=False, edgecolor=COLOURS["losing"], linewidth=2)
            axes.add_patch(frame)


def _share_map(axes: Axes, values: np.ndarray) -> None:
    """Values are shares of a limit: there is nothing to lose."""
    axes.imshow(values, cmap="Greys", vmin=0, vmax=2.5, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        if not np.isnan(value):
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8)


def one(rows: Sequence[Row]) -> float:
    """The ratio of the only row; NaN where there is none."""
    return float(rows[0].over_fused) if rows and has_ratio(rows[0]) else float("nan")


def draw_norm(rows: Sequence[Row]) -> None:
    """Speed-up by size and dtype, by pair of norm and activation; with and without dropout."""
    dtypes = list(dict.fromkeys(r.dtype for r in rows))
    sizes = [(M, N, dtype) for M, N in NORM_SIZES for dtype in dtypes]
    columns = [(p, *pair) for p in (P, 0.0) for pair in PAIRS]
    labels = [f"{norm} {act}" + (f", p={p:g}" if p else "") for p, norm, act in columns]
    _, panels = plt.subplots(2, 2, figsize=(15, 9), layout="constrained", sharex=True, sharey=True)
    modes = (("forward", "forward"), ("training", "forward + backward"))
    for line, (mode, title) in zip(panels, modes, strict=True):
        for axes, baseline in zip(line, BASELINES[:2], strict=True):
            values = [
                [
                    one(select(rows, M=M, N=N, dtype=dtype, p=p, norm=norm, activation=activation,
                                mode=mode, provider=baseline))
                    for p, norm, activation in columns
                ]
                for M, N, dtype in sizes
            ]  # fmt: skip
            names = [f"{M}×{N} {dtype}" for M, N, dtype in sizes]
            grid(axes, f"{title}: over {baseline}", names, labels)
            heat_map(axes, np.array(values))


def draw_linear(rows: Sequence[Row]) -> None:
    """Speed-up by size and dtype, by chain and mode."""
    dtypes = list(dict.fromkeys(r.dtype for r in rows))
    sizes = [(*size, dtype) for size in LINEAR_SIZES for dtype in dtypes]
    _, panels = plt.subplots(1, 3, figsize=(15, 6), layout="constrained", sharey=True)
    titles = ("over eager", "over compile", "the matrix products alone, share of the time")
    for axes, provider, title in zip(panels, (*BASELINES[:2], "gemms"), titles, strict=True):
        values = [
            [
                one(select(rows, M=M, K=K, N=N, dtype=dtype, provider=provider, **wanted))
                for _, wanted in LINEAR_COLUMNS
            ]
            for M, K, N, dtype in sizes
        ]
        names = [f"{M}×{K}×{N} {dtype}" for M, K, N, dtype in sizes]
        labels = [title.replace(", ", "\n") for title, _ in LINEAR_COLUMNS]
        grid(axes, title, names, labels)
        (_share_map if provider == "gemms" else heat_map)(axes, np.array(values))


def draw_host(rows: Sequence[Row]) -> None:
    """Microseconds of eager and fused by chain, a panel a mode."""
    modes = ("forward", "inference", "training")
    chains = list(dict.fromkeys((r.chain, r.norm, r.activation) for r in rows))
    figure, panels = plt.subplots(1, 3, figsize=(15, 5.3), layout="constrained", sharey=True)
    for axes, mode in zip(panels, modes, strict=True):
        for offset, provider in ((-0.2, "eager"), (0.2, "fused")):
            for line, (chain, norm, activation) in enumerate(chains):
                found = select(rows, chain=chain, norm=norm, activation=activation, mode=mode)
                ours, eager = (select(found, provider=name) for name in ("fused", "eager"))
                shown = select(found, provider=provider)
                if not shown:
                    continue
                median = shown[0].median_us
                label = f" {median:.0f}"
                colour = COLOURS[provider]
                if provider == "fused" and ours and eager:
                    speed_up = one(eager)
                    label += f" ({speed_up:.2f}×)"
                    colour = COLOURS["losing"] if speed_up < 1 else colour
                axes.barh(line + offset, median, 0.38, color=colour)
                axes.text(median, line + offset, label, va="center", fontsize=8)
        names = [" ".join(filter(None, chain)) for chain in chains]
        axes.set_yticks(range(len(chains)), names, fontsize=9)
        axes.set_title(f"{mode}, µs a call", fontsize=11, loc="left")
        axes.margins(x=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    keys = {"eager": "eager", "fused": "fused", "losing": "fused, slower than eager"}
    patches = [Rectangle((0, 0), 1, 1, color=COLOURS[key]) for key in keys]
    names = list(keys.values())
    figure.legend(patches, names, loc="outside lower center", ncols=len(keys), frameon=False)


def draw_channel(rows: Sequence[Row]) -> None:
    """Speed-up by norm, size and layout, by dtype and dropout; training steps and forward."""
    dtypes = list(dict.fromkeys(r.dtype for r in rows))
    lines = list(dict.fromkeys((r.norm, r.M, r.N, r.shape, r.layout) for r in rows))
    columns = [(dtype, p) for dtype in dtypes for p in (P, 0.0)]
    labels = [dtype + (f", p={p:g}" if p else "") for dtype, p in columns]
    _, panels = plt.subplots(1, 4, figsize=(15, 9), layout="constrained", sharey=True)
    shown = [(mode, b) for mode in ("forward", "training") for b in BASELINES[:2]]
    for axes, (mode, baseline) in zip(panels, shown, strict=True):
        values = [
            [
                one(select(rows, norm=norm, M=M, N=N, shape=shape, layout=layout, dtype=dtype,
                            p=p, activation="relu", mode=mode, provider=baseline))
                for dtype, p in columns
            ]
            for norm, M, N, shape, layout in lines
        ]  # fmt: skip
        names = [" ".join(filter(None, (n, shape or f"{M}×{N}", layout)))
                 for n, M, N, shape, layout in lines]  # fmt: skip
        what = "forward" if mode == "forward" else "forward + backward"
        grid(axes, f"{what}: over {baseline}", names, labels)
        heat_map(axes, np.array(values))


CPU_PICTURES: dict[str, tuple[str, Callable[[Sequence[Row]], None]]] = {
    "norm": (
        "Norm → activation (→ dropout): how many times faster fused is; framed in red: slower",
        draw_norm,
    ),
    "linear": (
        "Linear → norm → activation: how many times faster fused is; framed in red: slower",
        draw_linear,
    ),
    "channel": (
        "Norm → ReLU (→ dropout): how many times faster fused is; framed in red: slower",
        draw_channel,
    ),
    "host": ("The host's time for chains on 8×64 tensors", draw_host),
}
