"""Rows of a suite as markdown: a summary, and every cell.

Ratios are a provider's time over fused's: above 1 fused is faster. Cells in which fused is slower
than a baseline are marked ▼. Shares are a machine limit's time over fused's.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import Any

from fused.spec import GATED_ACTIVATIONS

from .cells import LAYOUTS, LINEAR_SIZES, NORM_SIZES, NUM_GROUPS, P
from .harness import Row

BASELINES = ("eager", "compile", "max-autotune", "liger", "quack", "flash-attn")
LIMITS = ("copy_", "add", "gemms")
LOSING, ABSENT = "▼", "–"
LISTED = 12  # losing cells that a summary names one by one


def select(rows: Iterable[Row], **wanted: object) -> list[Row]:
    """The rows that have these values in these columns."""
    return [r for r in rows if all(getattr(r, name) == value for name, value in wanted.items())]


def group_by(rows: Iterable[Row], *names: str) -> list[list[Row]]:
    """The rows that agree in these columns, those with the latest date first."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for r in rows:
        groups.setdefault(tuple(getattr(r, name) for name in names), []).append(r)
    return sorted(groups.values(), key=lambda group: max(r.date for r in group), reverse=True)


def caption(rows: Sequence[Row]) -> str:
    """Machine, versions, commits and dates of rows from one machine."""

    def all_of(name: str) -> str:
        return ", ".join(dict.fromkeys(str(getattr(r, name)) for r in rows if getattr(r, name)))

    threads = " or ".join(map(str, sorted({r.threads for r in rows})))
    threads += " thread" if threads == "1" else " threads"
    where = ", ".join(filter(None, (rows[0].machine, rows[0].clocks, threads, rows[0].isa)))
    days = sorted({r.date[:10] for r in rows})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return f"{where}; torch {all_of('torch')}; commit {all_of('commit')}; {when}"


def has_ratio(r: Row) -> bool:
    """Whether the row is compared with fused."""
    return r.over_fused != "" and r.provider != "fused"


def losing(rows: Iterable[Row]) -> list[Row]:
    """The comparisons in which a baseline is faster than fused."""
    return [r for r in rows if has_ratio(r) and r.provider in BASELINES and float(r.over_fused) < 1]


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A markdown table."""
    rule = ["---"] * len(header)
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *lines))


def size_of(r: Row) -> str:
    if r.shape:
        return " ".join(filter(None, (r.shape, r.layout)))
    return f"{r.M}×{r.K}×{r.N}" if "L" in r.chain else f"{r.M}×{r.N}"


def name_of(r: Row) -> str:
    """A cell in words."""
    parts = (r.chain, r.norm, r.activation, r.dtype, size_of(r), r.mode)
    return " ".join(filter(None, parts))


def ratios(
    rows: Sequence[Row],
    marked: bool = True,
    average: Callable[[list[float]], float] = statistics.median,
) -> str:
    """The average of the rows' ratios, and the lowest in brackets where they are several."""
    values = [float(r.over_fused) for r in rows if has_ratio(r)]
    if not values:
        return ABSENT
    text = f"{average(values):.2f}"
    if len(values) > 1:
        text += f" ({min(values):.2f})"
    return f"{text} {LOSING}" if marked and min(values) < 1 else text


def kept(rows: Sequence[Row]) -> str:
    """Bytes an output element that the forward pass keeps, eager → fused; medians."""
    texts = []
    for provider in ("eager", "fused"):
        found = [
            int(r.kept_bytes) / (r.M * r.N)
            for r in select(rows, provider=provider, mode="training")
            if r.kept_bytes != ""
        ]
        texts.append(f"{statistics.median(found):.1f}" if found else ABSENT)
    return " → ".join(texts)


def losing_text(rows: Sequence[Row]) -> str:
    """How many comparisons fused loses, and which."""
    compared = [r for r in rows if has_ratio(r) and r.provider in BASELINES]
    lost = losing(rows)
    if not lost:
        return f"Fused is slower in none of {len(compared)} comparisons."
    text = f"Fused is slower ({LOSING}) in {len(lost)} of {len(compared)} comparisons"
    if len(lost) > LISTED:
        return f"{text}; each has its mark in the list of every cell."
    named = [f"{name_of(r)} against {r.provider} ({float(r.over_fused):.2f})" for r in lost]
    return f"{text}: {'; '.join(named)}."


def norm_summary(rows: Sequence[Row]) -> str:
    """A line per size, dtype and dropout, over all pairs of norm and activation."""
    header = ["rows × features", "dtype", "dropout", "forward / eager", "/ compile"]
    header += ["share of `copy_`", "forward + backward / eager", "/ compile"]
    header += ["backward: share of add", "bytes kept"]
    lines, plain = [], [r for r in rows if r.activation not in GATED_ACTIVATIONS]
    for M, N in NORM_SIZES:
        for dtype in dict.fromkeys(r.dtype for r in plain):
            for p in (P, 0.0):
                own = select(plain, M=M, N=N, dtype=dtype, p=p)
                if not own:
                    continue
                line = [f"{M} × {N}", dtype, f"{p:g}" if p else "none"]
                for mode in ("forward", "training"):
                    line += [ratios(select(own, provider=b, mode=mode)) for b in BASELINES[:2]]
                    limit = "copy_" if mode == "forward" else "add"
                    line.append(ratios(select(own, provider=limit), marked=False))
                lines.append([*line, kept(own)])
    about = (
        "Fused's speed-up: the median over all pairs of LayerNorm, RMSNorm and GELU, SiLU, ReLU,"
        " and the lowest of them in brackets. Bytes kept: for backward, an element, besides the"
        " input: eager → fused."
    )
    return "\n\n".join((about, table(header, lines), *gated_summary(rows), losing_text(rows)))


def gated_summary(rows: Sequence[Row]) -> list[str]:
    """Of gated activations; nothing where none was measured."""
    gated = [r for r in rows if r.activation in GATED_ACTIVATIONS]
    about = (
        "Gated activations, whose N features come from 2N: fused's speed-up over eager / over"
        " torch.compile."
    )
    return [about, by_mode(gated)] if gated else []


def by_mode(rows: Sequence[Row]) -> str:
    """A line per norm, activation, size and dtype, a column per dropout and mode."""
    columns = [(p, mode) for p in (P, 0.0) for mode in ("forward", "inference", "training")]
    columns = [(p, mode) for p, mode in columns if select(rows, p=p, mode=mode)]
    header = ["norm, activation", "size", "dtype", *(f"{mode}, p={p:g}" for p, mode in columns)]
    with_bytes = [p for p, mode in columns if mode == "training"]
    header += [f"bytes kept, p={p:g}" for p in with_bytes]
    lines = []
    kinds = dict.fromkeys((r.norm, r.activation, size_of(r), r.dtype) for r in rows)
    for norm, activation, size, dtype in kinds:
        own = select(rows, norm=norm, activation=activation, dtype=dtype)
        own = [r for r in own if size_of(r) == size]
        line = [" ".join(filter(None, (norm, activation))), size.replace("×", " × "), dtype]
        for p, mode in columns:
            cell = select(own, p=p, mode=mode)
            found = [ratios(select(cell, provider=b)) for b in BASELINES[:2]]
            line.append(ABSENT if found == [ABSENT] * 2 else " / ".join(found))
        lines.append([*line, *(kept(select(own, p=p)) for p in with_bytes)])
    return table(header, lines)


LINEAR_COLUMNS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("LayerNorm GELU dropout, training", {"norm": "layer", "p": P, "mode": "training"}),
    ("LayerNorm GELU, training", {"norm": "layer", "p": 0.0, "mode": "training"}),
    ("RMSNorm SiLU, training", {"norm": "rms", "mode": "training"}),
    ("LayerNorm GELU, inference", {"norm": "layer", "mode": "inference"}),
    ("RMSNorm SiLU, inference", {"norm": "rms", "mode": "inference"}),
)


def linear_summary(rows: Sequence[Row]) -> str:
    """A line per size and dtype; speed-up over eager / compile / share of the GEMMs alone."""
    header = ["M × K × N", "dtype", *(title for title, _ in LINEAR_COLUMNS), "bytes kept"]
    lines, plain = [], [r for r in rows if r.activation not in GATED_ACTIVATIONS]
    for M, K, N in LINEAR_SIZES:
        for dtype in dict.fromkeys(r.dtype for r in plain):
            own = select(plain, M=M, K=K, N=N, dtype=dtype)
            if not own:
                continue
            line = [f"{M} × {K} × {N}", dtype]
            for _, wanted in LINEAR_COLUMNS:
                cell = select(own, **wanted)
                found = [ratios(select(cell, provider=b)) for b in BASELINES[:2]]
                found.append(ratios(select(cell, provider="gemms"), marked=False))
                line.append(" / ".join(found))
            lines.append([*line, kept(select(own, norm="layer", p=P))])
    about = (
        "Fused's speed-up over eager / over torch.compile / share of the matrix products alone"
        " (three in training, one at inference). Bytes kept: for backward, an output element,"
        " besides input and parameters, in the first column: eager → fused."
    )
    return "\n\n".join((about, table(header, lines), *gated_summary(rows), losing_text(rows)))


def host_summary(rows: Sequence[Row]) -> str:
    """A line per chain; microseconds of eager → fused, and the ratio."""
    modes = ("forward", "inference", "training")
    lines = []
    for chain, norm, activation in dict.fromkeys((r.chain, r.norm, r.activation) for r in rows):
        own = select(rows, chain=chain, norm=norm, activation=activation)
        line = [chain, " ".join(filter(None, (norm, activation)))]
        for mode in modes:
            times = [select(own, mode=mode, provider=name) for name in ("eager", "fused")]
            if all(times):
                eager, ours = (f"{found[0].median_us:.1f}" for found in times)
                line.append(f"{eager} → {ours} ({ratios(times[0])})")
            else:
                line.append(ABSENT)
        lines.append(line)
    about = (
        "Microseconds of a call on 8 × 64 float32 tensors, where only the host's work counts:"
        " eager → fused (speed-up). L Linear, N norm, A activation, D dropout."
    )
    return f"{about}\n\n{table(['chain', '', *modes], lines)}\n\n{losing_text(rows)}"


def channel_summary(rows: Sequence[Row]) -> str:
    """A line per norm, and one per norm, size and dtype with the layouts side by side."""
    header = ["norm", "size", "dtype", "dropout"]
    columns = [(layout, mode) for layout in LAYOUTS for mode in ("forward", "training")]
    for layout, mode in columns:
        what = "forward" if mode == "forward" else "forward + backward"
        header.append(f"{layout or 'contiguous'}, {what}")
    lines = []
    for norm, M, N, shape in dict.fromkeys((r.norm, r.M, r.N, r.shape) for r in rows):
        for dtype in dict.fromkeys(r.dtype for r in rows):
            for p in (P, 0.0):
                own = select(rows, norm=norm, M=M, N=N, shape=shape, dtype=dtype, p=p)
                if not own:
                    continue
                line = [norm, (shape or f"{M}×{N}").replace("×", " × "), dtype]
                line.append(f"{p:g}" if p else "none")
                for layout, mode in columns:
                    cell = select(own, layout=layout)
                    found = [ratios(select(cell, provider=b, mode=mode)) for b in BASELINES[:2]]
                    limit = "copy_" if mode == "forward" else "add"
                    found.append(ratios(select(cell, provider=limit), marked=False))
                    line.append(ABSENT if found == [ABSENT] * 3 else " / ".join(found))
                lines.append(line)
    about = (
        "Fused's speed-up over eager / over torch.compile / share of `copy_` (forward) or of the"
        " addition (of the backward part), which read once what these norms have to read twice;"
        " where ReLU and SiLU were measured, the median of both and the lower in brackets."
        f" GroupNorm has {NUM_GROUPS} groups. torch's InstanceNorm2d turns channels-last images"
        " into contiguous ones; fused keeps the layout."
    )
    parts = (_channel_means(rows), about, table(header, lines), losing_text(rows))
    return "\n\n".join(parts)


def _channel_means(rows: Sequence[Row]) -> str:
    """A line per norm and dropout, over everything else."""
    header = ["norm", "dropout", "forward / eager", "/ compile"]
    header += ["forward + backward / eager", "/ compile"]
    lines = []
    for norm, p in product(dict.fromkeys(r.norm for r in rows), (P, 0.0)):
        own = select(rows, norm=norm, p=p)
        if own:
            found = [
                ratios(select(own, mode=mode, provider=b), average=statistics.geometric_mean)
                for mode, b in product(("forward", "training"), BASELINES[:2])
            ]
            lines.append([norm, f"{p:g}" if p else "none", *found])
    about = "Geometric mean of the speed-up over all cells of a norm, the lowest in brackets."
    return f"{about}\n\n{table(header, lines)}"


def all_cells(rows: Sequence[Row]) -> str:
    """A line per cell: fused's time, the speed-up over each baseline, the share of each limit."""
    baselines = [b for b in BASELINES if select(rows, provider=b)]
    limits = [b for b in LIMITS if select(rows, provider=b)]
    header = ["cell", "p", "fused, µs (p20–p80)", *(f"/ {b}" for b in baselines)]
    header += [f"share of `{b}`" if b == "copy_" else f"share of {b}" for b in limits]
    cells: dict[tuple[str, float], list[Row]] = {}
    for r in rows:
        cells.setdefault((name_of(r), r.p), []).append(r)
    lines = []
    for (name, p), own in cells.items():
        time = ABSENT
        for r in select(own, provider="fused"):
            time = f"{r.median_us:.1f} ({r.p20_us:.1f}–{r.p80_us:.1f})"
        found = [ratios(select(own, provider=b), b in baselines) for b in (*baselines, *limits)]
        lines.append([name, f"{p:g}", time, *found])
    return table(header, lines)
