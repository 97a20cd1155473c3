"""Pictures of the GPU suites: bandwidth by columns, heat maps of the speed-up, memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from .gpu_tables import bandwidth
from .harness import Row
from .pictures import CPU_PICTURES, DPI, grid, heat_map, one
from .tables import BASELINES, select, size_of

LINES = {
    "fused": ("#2b6cb0", "-"),
    "eager": ("#8a94a6", "-"),
    "compile": ("#dd6b20", "-"),
    "liger": ("#38a169", "-"),
    "quack": ("#805ad5", "-"),
    "flash-attn": ("#b7791f", "-"),
    "copy_": ("#1a202c", "--"),
    "add": ("#1a202c", "--"),
}


def _bandwidths(axes: Axes, rows: Sequence[Row], title: str) -> None:
    """GB/s over the number of columns, a line for each provider; dashed the machine's limit."""
    for name, (colour, style) in LINES.items():
        found = sorted((r.N, bandwidth(r)) for r in select(rows, provider=name))
        if found:
            axes.plot(*zip(*found, strict=True), style, color=colour, marker=".", label=name)
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("columns")
    axes.set_ylabel("GB/s")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False, fontsize=8)


def draw_rows(rows: Sequence[Row]) -> None:
    """A panel for each chain, part and dtype."""
    chains = list(dict.fromkeys((r.chain, r.norm, r.activation) for r in rows))
    dtypes = list(dict.fromkeys(r.dtype for r in rows))
    shape = (len(chains) * 2, len(dtypes))
    size = (6.5 * shape[1] + 2, 3.6 * shape[0])
    _, panels = plt.subplots(*shape, figsize=size, layout="constrained", squeeze=False)
    for line, (chain, norm, activation) in enumerate(chains):
        for column, dtype in enumerate(dtypes):
            own = select(rows, chain=chain, norm=norm, activation=activation, dtype=dtype)
            for part, mode in enumerate(("forward", "backward")):
                title = f"{chain} {norm} {activation}, {dtype}, {mode}"
                _bandwidths(panels[2 * line + part][column], select(own, mode=mode), title)


def draw_peers(rows: Sequence[Row]) -> None:
    """A panel for each norm."""
    norms = list(dict.fromkeys(r.norm for r in rows))
    _, panels = plt.subplots(
        1, len(norms), figsize=(7 * len(norms), 4.5), layout="constrained", squeeze=False
    )
    for axes, norm in zip(panels[0], norms, strict=True):
        _bandwidths(axes, select(rows, norm=norm, mode="backward"), f"{norm}, bfloat16, backward")


def _speed_ups(
    rows: Sequence[Row], lines: dict[str, dict[str, object]], columns: dict[str, dict[str, object]]
) -> None:
    """Heat maps over eager and over compile, and the memory that is kept beside them."""
    height = 0.33 * len(lines) + 2.5
    _, panels = plt.subplots(1, 3, figsize=(16, height), layout="constrained", sharey=True)
    for axes, baseline in zip(panels, BASELINES[:2], strict=False):
        values = [
            [one(select(rows, provider=baseline, **line, **column)) for column in columns.values()]
            for line in lines.values()
        ]
        grid(axes, f"speed-up over {baseline}", list(lines), list(columns))
        heat_map(axes, np.array(values))
    for offset, (name, colour) in enumerate((("eager", "#8a94a6"), ("fused", "#2b6cb0"))):
        kept = []
        for line in lines.values():
            found = [
                int(r.kept_bytes) / (r.M * r.N)
                for r in select(rows, provider=name, mode="training", **line)
                if r.kept_bytes != ""
            ]
            kept.append(float(np.median(found)) if found else 0.0)
        places = np.arange(len(lines)) + 0.4 * offset - 0.2
        panels[2].barh(places, kept, 0.4, color=colour, label=name)
    panels[2].set_title("kept for backward, bytes an element", fontsize=11, loc="left")
    panels[2].spines[["top", "right"]].set_visible(False)
    panels[2].legend(frameon=False, fontsize=8)


def draw_blocks(rows: Sequence[Row]) -> None:
    """A line for each size, a column for each norm; training steps."""
    keys = dict.fromkeys((r.chain, r.dtype, r.M, r.K, r.N) for r in rows)
    lines: dict[str, dict[str, object]] = {
        f"{chain} {dtype} {M}×{K}×{N}": {"chain": chain, "dtype": dtype, "M": M, "K": K, "N": N}
        for chain, dtype, M, K, N in keys
    }
    columns: dict[str, dict[str, object]] = {
        f"{norm} {activation}": {"norm": norm, "activation": activation, "mode": "training"}
        for norm, activation in dict.fromkeys((r.norm, r.activation) for r in rows)
    }
    _speed_ups(rows, lines, columns)


def draw_sizes(rows: Sequence[Row]) -> None:
    """A line for each norm, activation, size and layout, a column for each dtype and mode."""
    names = ("norm", "activation", "M", "N", "shape", "layout")
    lines: dict[str, dict[str, object]] = {
        " ".join(filter(None, (r.norm, r.activation, size_of(r)))): {
            name: getattr(r, name) for name in names
        }
        for r in rows
    }
    modes = ("forward", "inference", "training")
    cases = dict.fromkeys((r.dtype, r.mode, r.p) for r in rows if r.mode in modes)
    columns: dict[str, dict[str, object]] = {
        f"{dtype} {mode}" + (f" p={p:g}" if p else ""): {"dtype": dtype, "mode": mode, "p": p}
        for dtype, mode, p in cases
    }
    _speed_ups(rows, lines, columns)


PICTURES: dict[str, tuple[str, Callable[[Sequence[Row]], None]]] = {
    **CPU_PICTURES,
    "rows": ("Norm → activation (→ dropout) along rows: bandwidth", draw_rows),
    "blocks": ("Training steps of Linear blocks; framed in red: slower", draw_blocks),
    "images": ("Norms over samples or positions on images; framed in red: slower", draw_sizes),
    "shapes": ("Add & norm, gates of two tensors, shortcuts; framed in red: slower", draw_sizes),
    "peers": ("The norm alone beside other libraries: bandwidth", draw_peers),
}


def draw(suite: str, rows: Sequence[Row], path: Path, caption: str) -> None:
    """Writes the picture of one suite on one machine."""
    title, make = PICTURES[suite]
    make(rows)
    figure = plt.gcf()
    figure.suptitle(f"{title}\n{caption}", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
