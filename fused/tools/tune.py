"""`python -m fused tune`: the rules of the GPU kernels against what this GPU does.

The rules of kernels/tuning (rules.py, channel.py) count registers and bytes; what they cannot know
is how a GPU schedules. For each of their tiles that the cases of tune_cases.py use this measures
half and twice the rows, by half and twice the warps, and writes those that are clearly faster to a
table that the rules read (kernels/tuning/tuned.py). A tile that cannot be compiled or gives other
results than the rule's is left out. tune_linear.py does the same for Linears, which one kernel or
the library's GEMM can serve.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..kernels.tuning import tuned
from .clock import GAIN, Measure, measure_on_gpu, median_ratio, noise_floor
from .tune_cases import Case, channel_cases, row_cases
from .tune_linear import LinearCase, default_cases, gain_of, is_served

FAMILIES = ("rows", "channels", "linear")
Tile = tuple[int, int]  # rows, warps


def neighbours(tile: Tile, width: int, warp_size: int) -> list[Tile]:
    """Half and twice the rows, half and twice the warps; between 4 and 64 elements a thread.

    width: the elements of such a row.
    """
    rows, warps = tile
    found = []
    for r, w in product((rows // 2, rows, rows * 2), (warps // 2, warps, warps * 2)):
        fits = r >= 1 and 1 <= w <= 1024 // warp_size
        if (r, w) != tile and fits and 4 <= r * width / (w * warp_size) <= 64:
            found.append((r, w))
    return found


def tiles_of(call: Callable[[], list[Tensor]]) -> tuple[list[Tensor], list[tuned.Asked]]:
    """What a call returns, and what the rules are asked on the way, each once."""
    with tuned.asked() as asked:
        expected = call()
    return expected, list({one.key: one for one in asked}.values())


def best_tile(
    asked: tuned.Asked,
    call: Callable[[], list[Tensor]],
    expected: list[Tensor],
    warp_size: int,
    measure: Measure,
) -> tuple[Tile | None, float]:
    """A clearly faster tile than the rule's or None, and how many times faster it is.

    measure: times replays of the calls and not the calls, which clear the rules' caches.
    """
    key, tile, width = asked
    fitting = []
    for other in neighbours(tile, width, warp_size):
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

    if not fitting:
        return None, 1.0
    # The rule's tile twice, which says by how much a tile seems to differ from itself.
    rule, again, *others = measure([with_tile(t) for t in (tile, tile, *fitting)])
    gains = {t: median_ratio(rule, own) for t, own in zip(fitting, others, strict=True)}
    best = max(gains, key=lambda t: gains[t])
    clear = gains[best] >= max(GAIN, noise_floor(rule, again))
    return best if clear else None, gains[best]


def tune_tiles(
    cases: Iterator[Case],
    tiles: dict[str, list[int]],
    device: str,
    warp_size: int,
    measure: Measure,
) -> Iterator[None]:
    """Measures one tile after another into a GPU's table, each once; stops after each."""
    done: set[str] = set()
    for case in cases:
        call = case.make_call(device)
        expected, found = tiles_of(call)
        for asked in found:
            if asked.key in done:
                continue
            done.add(asked.key)
            best, gain = best_tile(asked, call, expected, warp_size, measure)
            rows, warps = asked.tile
            verdict = "stays" if best is None else f"→ {best[0]} rows, {best[1]} warps"
            print(
                f"{case}: {asked.key}: {rows} rows, {warps} warps {verdict} ({gain:.2f}×)",
                flush=True,
            )
            tiles.pop(asked.key, None)
            if best is not None:
                tiles[asked.key] = list(best)
            yield


def tune_linear(
    cases: Iterator[LinearCase], gains: dict[str, float], device: str, measure: Measure
) -> Iterator[None]:
    """Measures one Linear after another into a GPU's table; stops after each."""
    for case in cases:
        if not is_served(case, device):
            print(f"{case}: no kernel")
            continue
        gain = gain_of(case, measure, device)
        print(
            f"{case}: {'one kernel' if gain >= GAIN else 'the library'} ({gain:.2f}×)", flush=True
        )
        gains.pop(case.key, None)
        if gain >= GAIN:
            gains[case.key] = round(gain, 3)
        yield


def main(
    out: Path | None = None,
    max_seconds: float = 600.0,
    families: Sequence[str] = (),
    linear: Sequence[LinearCase] = (),
) -> int:
    """Measures and writes the table; returns the exit status.

    Args:
        max_seconds: of which each family has an equal part.
        families: of `FAMILIES`; none: all of them, or linear alone where `linear` has cases.
        linear: the Linears to measure; none: those of tune_linear.py.
    """
    if not torch.cuda.is_available():
        print("python -m fused tune: torch sees no CUDA device, so there is nothing to measure")
        return 0
    from ..backends import backend

    reason = backend.why_not("triton", "cuda", torch.float32)
    if reason:
        print(f"python -m fused tune: {reason}", file=sys.stderr)
        return 1
    path = out or tuned.table_path()
    if path is None:
        print("python -m fused tune: FUSED_TUNING turns the table off", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name()
    warp_size = torch.cuda.get_device_properties(0).warp_size
    table = tuned.read(path) if path.is_file() else tuned.Table({}, {})
    tiles, gains = table.tiles.setdefault(name, {}), table.linear.setdefault(name, {})
    given = (tiles, "cuda", warp_size, measure_on_gpu)
    steps = {
        "rows": lambda: tune_tiles(row_cases(), *given),
        "channels": lambda: tune_tiles(channel_cases(), *given),
        "linear": lambda: tune_linear(
            iter(linear) if linear else default_cases(), gains, "cuda", measure_on_gpu
        ),
    }
    chosen = families or (("linear",) if linear else FAMILIES)
    started = time.monotonic()
    for share, family in enumerate(chosen, start=1):
        for _ in steps[family]():
            if time.monotonic() - started > max_seconds * share / len(chosen):
                print(f"tune: {family} stopped by the time limit")
                break
    tuned.write(path, *table)
    tuned.forget()
    print(
        f"tune: {len(tiles)} tiles differ from the rules', {len(gains)} Linears are faster as one"
        f" kernel, written to {path}"
    )
    return 0
