"""`python -m fused tune`: the rules' tiles against their neighbours, measured on this GPU.

The rules of kernels/tuning.py count registers and bytes; what they cannot know is how a GPU
schedules. For each width, norm and dtype this measures tiles of half and twice the rows, by half
and twice the warps, and writes those that are clearly faster to a table that the rules read
(kernels/tuned.py). A tile that cannot be compiled or gives other results than the rule's is left
out.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Columns, of which each stands for all widths of the same tile.
WIDTHS = tuple(256 << i for i in range(7))  # to 16384
NORMS = ("layer", "rms")
DTYPES = (torch.bfloat16, torch.float32)
ELEMENTS = 1 << 26  # of a tensor: more than any GPU's cache
# A neighbour has to be so much faster, in the median of so many turns, to take the rule's place.
GAIN, TURNS, CALLS = 1.03, 7, 5
ACTIVATION, P = "gelu", 0.1


@dataclass(frozen=True)
class Case:
    """A kernel at one width: which rule is asked, and what its key is."""

    kernel: str  # row_forward, row_backward
    cols: int
    norm: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.kernel} {self.cols} {self.norm} {str(self.dtype).removeprefix('torch.')}"


Tile = tuple[int, int]  # rows, warps


def cases() -> Iterator[Case]:
    """All of them, narrow ones first."""
    for cols, norm, dtype, kernel in product(
        WIDTHS, NORMS, DTYPES, ("row_forward", "row_backward")
    ):
        yield Case(kernel, cols, norm, dtype)


def neighbours(tile: Tile, cols: int, warp_size: int) -> list[Tile]:
    """Half and twice the rows, half and twice the warps; between 4 and 64 elements a thread."""
    rows, warps = tile
    found = []
    for r, w in product((rows // 2, rows, rows * 2), (warps // 2, warps, warps * 2)):
        fits = r >= 1 and 1 <= w <= 1024 // warp_size
        if (r, w) != tile and fits and 4 <= r * cols / (w * warp_size) <= 64:
            found.append((r, w))
    return found


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    """How many times faster `theirs` is, by the median of the turns' ratios."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


Measure = Callable[[list[Callable[[], Any]]], list[list[float]]]


def measure_on_gpu(calls: list[Callable[[], Any]]) -> list[list[float]]:
    """Milliseconds of each call in each turn, by CUDA events."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for turn in range(TURNS):
        for index in (*range(turn % len(calls), len(calls)), *range(turn % len(calls))):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(CALLS):
                calls[index]()
            end.record()
            end.synchronize()
            times[index].append(start.elapsed_time(end) / CALLS)
    return times


def make_call(case: Case, device: str, elements: int = ELEMENTS) -> Callable[[], list[Tensor]]:
    """Runs the case's operator on new random inputs, by whatever tile the rules give."""
    from . import ops
    from .dispatch import make_codes

    rows = max(1, elements // case.cols)
    z, dy = (torch.randn(rows, case.cols, device=device, dtype=case.dtype) for _ in range(2))
    weight = torch.ones(case.cols, device=device, dtype=case.dtype)
    bias = torch.zeros_like(weight) if case.norm == "layer" else None
    seed = torch.tensor([1], device=device)
    codes = make_codes(case.norm, 1e-5, ACTIVATION, P)
    given = (None, weight, bias)
    if case.kernel == "row_forward":
        return lambda: list(ops.row_forward(z, *given, None, seed, *codes))
    _, found = ops.row_forward(z, *given, None, seed, *codes)
    wanted = ops.WANT_NORM_WEIGHT | (ops.WANT_NORM_BIAS if bias is not None else 0)
    return lambda: list(ops.row_backward(dy, z, *given, found, seed, wanted, *codes))


def best_tile(
    case: Case, call: Callable[[], list[Tensor]], warp_size: int, measure: Measure
) -> tuple[str, Tile, Tile | None, float]:
    """The key, the rule's tile, a clearly faster one or None, and how many times faster it is."""
    from .kernels import tuned

    with tuned.asked() as asked:
        expected = call()
    key, tile = next((k, t) for k, t in asked if k.startswith(case.kernel))
    fitting = []
    for other in neighbours(tile, case.cols, warp_size):
        with tuned.instead({key: other}):
            try:
                found = call()
            except Exception:  # of the compiler: too many registers, too much shared memory
                continue
        if all(torch.allclose(a, b, 1e-2, 1e-2) for a, b in zip(found, expected, strict=True)):
            fitting.append(other)

    def with_tile(other: Tile) -> Callable[[], Any]:
        def run() -> Any:
            with tuned.instead({key: other}):
                return call()

        return run

    times = measure([with_tile(t) for t in (tile, *fitting)])
    gains = {t: median_ratio(times[0], own) for t, own in zip(fitting, times[1:], strict=True)}
    best = max(gains, key=lambda t: gains[t], default=None)
    if best is None or gains[best] < GAIN:
        return key, tile, None, gains[best] if best else 1.0
    return key, tile, best, gains[best]


def main(out: Path | None = None, max_seconds: float = 600.0) -> int:
    """Measures and writes the table; returns the exit status."""
    if not torch.cuda.is_available():
        print("python -m fused tune: torch sees no CUDA device, so there is nothing to measure")
        return 0
    from . import backend

    reason = backend.why_not("triton", "cuda", torch.float32)
    if reason:
        print(f"python -m fused tune: {reason}", file=sys.stderr)
        return 1
    from .kernels import tuned

    path = out or tuned.table_path()
    if path is None:
        print("python -m fused tune: FUSED_TUNING turns the table off", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name()
    warp_size = torch.cuda.get_device_properties(0).warp_size
    tiles = tuned.read(path) if path.is_file() else {}
    of_gpu: dict[str, list[int]] = {}
    started, left = time.monotonic(), list(cases())
    while left and time.monotonic() - started < max_seconds:
        case = left.pop(0)
        key, tile, best, gain = best_tile(case, make_call(case, "cuda"), warp_size, measure_on_gpu)
        verdict = "stays" if best is None else f"→ {best[0]} rows, {best[1]} warps"
        print(f"{case}: {tile[0]} rows, {tile[1]} warps {verdict} ({gain:.2f}×)", flush=True)
        if best is not None:
            of_gpu[key] = list(best)
    if left:
        print(f"tune: stopped by its time limit; {len(left)} cases not measured")
    tuned.write(path, {**tiles, name: of_gpu})
    tuned.forget()
    print(f"tune: {len(of_gpu)} tiles differ from the rules', written to {path}")
    return 0
