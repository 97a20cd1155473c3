"""Summaries of the GPU suites as markdown (tables.py has the CPU's and says what ratios mean)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fused.spec import GATED_ACTIVATIONS

from .cells import SHAPES
from .harness import AGAIN, Row
from .tables import (
    ABSENT,
    BASELINES,
    by_mode,
    channel_summary,
    host_summary,
    kept,
    linear_summary,
    losing_text,
    name_of,
    norm_summary,
    ratios,
    select,
    table,
)

# Tensors of the input's size that cannot but be read or written once.
TENSORS = {"forward": 2, "backward": 3, "training": 5}
# Of the size of a gated activation's result: its input has twice as many features.
GATED_TENSORS = {"forward": 3, "backward": 5, "training": 8}
PEERS = BASELINES[3:]
REPLAYED = " replayed"
CELL = ("chain", "norm", "activation", "dtype", "M", "K", "N", "p", "shape", "layout")


def bandwidth(r: Row) -> float:
    """GB/s of the tensors that have to be moved, by the median time."""
    size = r.M * r.N * getattr(torch, r.dtype).itemsize
    tensors = GATED_TENSORS if r.activation in GATED_ACTIVATIONS else TENSORS
    return tensors[r.mode.removesuffix(REPLAYED)] * size / r.median_us / 1e3


def _bandwidths(rows: Sequence[Row], provider: str) -> str:
    return ", ".join(f"{bandwidth(r):.0f}" for r in select(rows, provider=provider)) or ABSENT


def rows_summary(rows: Sequence[Row]) -> str:
    """A line per chain, dtype and number of columns: GB/s, and the speed-up."""
    header = ["chain", "dtype", "columns", "forward, GB/s", "`copy_`, GB/s", "/ eager", "/ compile"]
    header += ["backward, GB/s", "share of add", "/ eager", "/ compile", "bytes kept"]
    lines = []
    for chain, norm, act, dtype, N in dict.fromkeys(
        (r.chain, r.norm, r.activation, r.dtype, r.N) for r in rows
    ):
        own = select(rows, chain=chain, norm=norm, activation=act, dtype=dtype, N=N)
        line = [f"{chain} {norm} {act}", dtype, str(N)]
        for mode, limit in (("forward", "copy_"), ("backward", "add")):
            of_mode = select(own, mode=mode)
            line.append(_bandwidths(of_mode, "fused"))
            if mode == "forward":
                line.append(_bandwidths(of_mode, limit))
            else:
                line.append(ratios(select(of_mode, provider=limit), marked=False))
            line += [ratios(select(of_mode, provider=b)) for b in BASELINES[:2]]
        lines.append([*line, kept(own)])
    about = (
        "GB/s: of the tensors that have to be moved (forward two, backward three; of a gated result"
        " three and five) over the median time; the measured copy moves two as well. Speed-up over"
        " eager and torch.compile. Bytes kept: for backward, an element, besides the input: eager →"
        " fused."
    )
    return f"{about}\n\n{table(header, lines)}\n\n{losing_text(rows)}"


def blocks_summary(rows: Sequence[Row]) -> str:
    """A line per size, a column per norm."""
    norms = list(dict.fromkeys((r.norm, r.activation) for r in rows))
    header = ["chain", "M × K × N", "dtype", *(" ".join(pair) for pair in norms), "bytes kept"]
    lines = []
    for chain, dtype, M, K, N in dict.fromkeys((r.chain, r.dtype, r.M, r.K, r.N) for r in rows):
        own = select(rows, chain=chain, dtype=dtype, M=M, K=K, N=N, mode="training")
        line = [chain, f"{M} × {K} × {N}", dtype]
        for norm, activation in norms:
            cell = select(own, norm=norm, activation=activation)
            found = [ratios(select(cell, provider=b)) for b in BASELINES[:3]]
            found.append(ratios(select(cell, provider="gemms"), marked=False))
            line.append(" / ".join(found) if cell else ABSENT)
        lines.append([*line, kept(own)])
    about = (
        "A training step; fused's speed-up over eager / torch.compile / its mode max-autotune /"
        " share of the matrix products alone. Bytes kept: an output element, the median of the"
        " norms, eager → fused."
    )
    return f"{about}\n\n{table(header, lines)}\n\n{losing_text(rows)}"


SPEED_UPS = (
    "Fused's speed-up over eager / over torch.compile. Bytes kept: for backward, an element,"
    " besides inputs and parameters: eager → fused."
)


def images_summary(rows: Sequence[Row]) -> str:
    """A line per norm, size, layout and dtype."""
    return "\n\n".join((SPEED_UPS, by_mode(rows), losing_text(rows)))


def shapes_summary(rows: Sequence[Row]) -> str:
    """The same, a table for each kind of chain."""
    parts = [SPEED_UPS]
    for eager in dict.fromkeys(SHAPES[r.chain] for r in rows):
        parts += [f"{eager}:", by_mode([r for r in rows if SHAPES[r.chain] == eager])]
    return "\n\n".join((*parts, losing_text(rows)))


def peers_summary(rows: Sequence[Row]) -> str:
    """A line per norm and number of columns: GB/s of each library, in a training step's parts."""
    names = [name for name in ("fused", *BASELINES) if select(rows, provider=name)]
    header = ["norm", "columns", *(f"{name}, backward GB/s (× step)" for name in names)]
    lines = []
    for norm, N in dict.fromkeys((r.norm, r.N) for r in rows):
        own = select(rows, norm=norm, N=N)
        line = [norm, str(N)]
        for name in names:
            text = _bandwidths(select(own, mode="backward"), name)
            step = ratios(select(own, provider=name, mode="training"))
            line.append(text if name == "fused" or text == ABSENT else f"{text} ({step})")
        lines.append(line)
    missing = [name for name in PEERS if name not in names]
    about = (
        "The norm alone, bfloat16, forward and backward: GB/s of the backward part, and in brackets"
        " fused's speed-up over the library in the whole step."
    )
    if missing:
        about += f" Not measured, because they could not be imported: {', '.join(missing)}."
    return f"{about}\n\n{table(header, lines)}\n\n{losing_text(rows)}"


def replays_text(rows: Sequence[Row]) -> str:
    """By calls and by replays, a line per cell; "" where no replay was timed."""
    header = ["cell", "µs, calls", "µs, replays", "GB/s, replays", "`copy_` or add, GB/s"]
    header += [
        "/ eager, calls",
        "replays",
        "/ compile, calls",
        "replays",
        "noise, calls",
        "replays",
    ]
    lines = []
    for r in select(rows, provider="fused"):
        own = [o for o in rows if o.mode == r.mode + REPLAYED and cell_of(o) == cell_of(r)]
        fused = select(own, provider="fused")
        if not fused:
            continue
        limits = [o for o in rows if o.mode.endswith(REPLAYED) and cell_of(o) == cell_of(r)]
        limits = [o for o in limits if o.provider in ("copy_", "add")]
        moved = [f"{bandwidth(o):.0f}" for o in (*fused, *limits)] if not r.K else []
        line = [name_of(r), f"{r.median_us:.1f}", f"{fused[0].median_us:.1f}"]
        line += [*moved, ABSENT, ABSENT][:2]
        called = [o for o in rows if o.mode == r.mode and cell_of(o) == cell_of(r)]
        for baseline in BASELINES[:2]:
            line += [ratios(select(part, provider=baseline)) for part in (called, own)]
        for part in (called, own):
            again = select(part, provider=AGAIN)
            spread = [f"{o.over_fused_p20:.3f}–{o.over_fused_p80:.3f}" for o in again]
            line.append(spread[0] if spread else ABSENT)
        lines.append(line)
    if not lines:
        return ""
    about = (
        "Called from Python, and replayed from CUDA graphs, where the host's time does not count."
        " Noise: the middle three fifths of fused's time over its own, measured twice."
    )
    return f"{about}\n\n{table(header, lines)}"


def cell_of(r: Row) -> tuple[object, ...]:
    """What the rows of a cell have in common, besides their mode."""
    return (*(getattr(r, name) for name in CELL), r.machine)


def _with_replays(summary: Callable[[Sequence[Row]], str]) -> Callable[[Sequence[Row]], str]:
    """A suite's summary of what was called, then that of what was replayed."""

    def summarize(rows: Sequence[Row]) -> str:
        called = [r for r in rows if not r.mode.endswith(REPLAYED)]
        return "\n\n".join(filter(None, (summary(called), replays_text(rows))))

    return summarize


SUMMARIES: dict[str, Callable[[Sequence[Row]], str]] = {
    "norm": norm_summary,
    "linear": linear_summary,
    "channel": channel_summary,
    "shapes": shapes_summary,
    "host": host_summary,
    "rows": _with_replays(rows_summary),
    "blocks": _with_replays(blocks_summary),
    "images": _with_replays(images_summary),
    "peers": _with_replays(peers_summary),
}
