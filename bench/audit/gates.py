"""What must hold of every kernel; each gate returns what breaks it.

compiles       every case does
spills         no registers are spilled
widths         16-byte accesses, and none below 4 bytes, where rows and addresses allow them
conversions    tiles of one row are not rearranged between threads
matrix         matrix products are made by matrix units
bounds         no access outside a tensor
traffic        every byte moves once between memory and the GPU
instructions   as many as in the committed report, within 5 %
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

from .exceptions import (
    CALLS,
    CONVERSIONS,
    FIRST_ELEMENTS,
    MORE_SHARED,
    NARROW_LOADS,
    NARROW_STORES,
    READINGS,
    ROW_SHARED,
    SPILLS_OF_VERSION,
    WALKS,
)
from .launch import PARTIAL
from .report import Measured, Report, Stream

TOLERANCE = 0.05
_WIDE = ("16", "32")
_NARROW = ("1", "2")


def _count(widths: dict[str, int], wanted: Iterable[str]) -> int:
    return sum(widths.get(width, 0) for width in wanted)


def spills(report: Report) -> list[str]:
    """There is no exception but that of a version of Triton."""
    found = []
    every = SPILLS_OF_VERSION.get(report.triton)
    allowed = 0 if every is None else every.limit
    for m in report.binaries:
        total, inside = m.binary.spills, m.binary.body_spills
        if total > allowed:
            found.append(f"{m}: {total} spilled words or bytes of stack, {inside} in the body")
    return found


def widths(m: Measured) -> Iterator[str]:
    if not m.aligned:
        return
    loads, stores = m.binary.load_widths, m.binary.store_widths
    if not _count(loads, _WIDE):
        yield f"{m}: no 16-byte loads: {loads}"
    if m.writes and not _count(stores, _WIDE):
        yield f"{m}: no 16-byte stores: {stores}"
    allowed: float = 0
    if m.kernel in FIRST_ELEMENTS:
        allowed = 2 + m.tile_rows  # and that of the bias
    elif m.kernel in NARROW_LOADS and m.tile_rows != 1:
        allowed = NARROW_LOADS[m.kernel].limit
    narrow = loads.get("2", 0) + (0 if m.masked else loads.get("1", 0))
    if narrow > allowed:
        yield f"{m}: {narrow} narrow loads, {allowed:g} allowed: {loads}"
    if _count(stores, _NARROW) and m.kernel not in NARROW_STORES:
        yield f"{m}: narrow stores: {stores}"


def conversions(m: Measured) -> Iterator[str]:
    if not m.aligned:
        return
    if m.kernel in WALKS:
        allowed = WALKS[m.kernel].limit if m.sums else 0
    elif m.tile_rows == 1:
        allowed = CONVERSIONS[m.kernel].limit if m.kernel in CONVERSIONS else 0
        if m.binary.shared > ROW_SHARED and m.kernel not in MORE_SHARED:
            yield f"{m}: {m.binary.shared} bytes of shared memory, {ROW_SHARED} allowed"
    else:
        return
    if m.binary.conversions > allowed:
        yield f"{m}: {m.binary.conversions} layout conversions, {allowed:g} allowed"


def matrix(m: Measured) -> Iterator[str]:
    if m.binary.products and not m.binary.matrix and not m.exact:
        yield f"{m}: {m.binary.products} matrix products, no instruction of a matrix unit"


def kernel_traffic(stream: Stream) -> Iterator[str]:
    """One launch: a tensor is read or written whole, and once."""
    allowed = READINGS.get((stream.kernel, stream.argument))
    limit = allowed.limit if allowed else 1.0
    if not 1.0 <= stream.ratio <= limit + 1e-9:
        yield (
            f"{stream.call}, {stream.kernel}: {stream.argument} moves {stream.ratio:.3f} times its"
            f" size, allowed 1 to {limit:g}"
        )


def call_ratios(streams: Iterable[Stream]) -> dict[str, float]:
    """DRAM bytes of each call over the least: every tensor once.

    A launch takes a tensor from memory once, what it reads again comes from a cache (the readings
    that `exceptions.READINGS` lists). Partial sums between launches are left out: they are a few
    rows for thousands.
    """
    moved: dict[str, int] = defaultdict(int)
    least: dict[str, dict[str, int]] = defaultdict(dict)
    for s in streams:
        if s.argument != PARTIAL:
            moved[s.call] += min(s.moved, s.size)
            least[s.call][s.argument] = s.size
    return {call: moved[call] / sum(least[call].values()) for call in moved}


def traffic(report: Report) -> list[str]:
    found = list(chain.from_iterable(map(kernel_traffic, report.streams)))
    for call, ratio in call_ratios(report.streams).items():
        limit = CALLS[call].limit if call in CALLS else 1.0
        if not 1.0 <= ratio <= limit + 1e-9:
            found.append(f"{call}: {ratio:.3f} times the least bytes, {limit:.3f} allowed")
    return found


def instructions(report: Report, baseline: Report) -> list[str]:
    """Against a baseline of the same version of Triton (`why_skipped`)."""
    before = {m.key: m.binary.instructions for m in baseline.binaries}
    found = []
    for m in report.binaries:
        now, old = m.binary.instructions, before.pop(m.key, None)
        if old is None:
            found.append(f"{m}: not in the baseline")
        elif abs(now - old) > TOLERANCE * old:
            found.append(f"{m}: {now} instructions, {old} in the baseline ({now / old - 1:+.1%})")
    found += [
        f"{' '.join(map(str, key))}: in the baseline and no longer compiled" for key in before
    ]
    if found:
        found.append("if the change is meant: python -m bench.audit --accept")
    return found


def why_skipped(report: Report, baseline: Report | None) -> str | None:
    """Why instruction counts cannot be compared, or None."""
    if baseline is None:
        return "there is no baseline"
    if baseline.triton != report.triton:
        return f"the baseline is of triton {baseline.triton}, this is {report.triton}"
    return None


def _of_binaries(gate: Callable[[Measured], Iterator[str]]) -> Callable[[Report], list[str]]:
    return lambda report: list(chain.from_iterable(map(gate, report.binaries)))


GATES: dict[str, Callable[[Report], list[str]]] = {
    "compiles": lambda report: report.failed,
    "spills": spills,
    "widths": _of_binaries(widths),
    "conversions": _of_binaries(conversions),
    "matrix": _of_binaries(matrix),
    "bounds": lambda report: report.outside,
    "traffic": traffic,
}
