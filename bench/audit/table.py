"""A line for each kernel: for the terminal, and for docs/audit.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..tables import ABSENT, table
from . import exceptions
from .report import Measured, Report
from .roofline import headroom
from .targets import TARGETS

_FIRST = "layer norm takes differences from the first element of each row, with its bias"
# Of which the line shows the instructions an element.
SHOWN = "sm_90"
HEADER = ["kernel", "binaries", "registers", "spilled", "shared", "conversions", "instructions"]
HEADER += ["bytes", *TARGETS]


@dataclass(frozen=True)
class Line:
    """A kernel: the most of all its binaries, and by target its first headline."""

    kernel: str
    binaries: int
    registers: int
    spills: int
    shared: int
    conversions: int
    per_element: float | None
    bytes_ratio: float | None
    headroom: dict[str, float | None]

    def cells(self) -> list[str]:
        def number(value: float | None) -> str:
            return ABSENT if value is None else f"{value:.2f}"

        per_element = ABSENT if self.per_element is None else f"{self.per_element:.1f}"
        counts = (self.binaries, self.registers, self.spills, self.shared, self.conversions)
        room = [number(self.headroom.get(target)) for target in TARGETS]
        name = self.kernel.strip("_").removesuffix("_kernel")
        return [name, *map(str, counts), per_element, number(self.bytes_ratio), *room]


def headline(binaries: Iterable[Measured], kernel: str, target: str) -> Measured | None:
    """What speaks for a kernel on a target: its first headline, else its first binary."""
    found = [m for m in binaries if (m.kernel, m.target) == (kernel, target)]
    return next((m for m in found if m.headline), found[0] if found else None)


def bytes_ratio(report: Report, kernel: str) -> float | None:
    """Bytes moved by all interpreted launches of a kernel over the sizes of the tensors."""
    streams = [s for s in report.streams if s.kernel == kernel]
    return sum(s.moved for s in streams) / sum(s.size for s in streams) if streams else None


def lines_of(report: Report) -> list[Line]:
    """A line for each kernel, in the order of the families."""
    lines = []
    for kernel in dict.fromkeys(m.kernel for m in report.binaries):
        own = [m for m in report.binaries if m.kernel == kernel]
        heads = {target: headline(own, kernel, target) for target in TARGETS}
        shown = heads[SHOWN]
        lines.append(
            Line(
                kernel=kernel,
                binaries=len(own),
                registers=max(m.binary.registers for m in own if m.target.startswith("sm")),
                spills=sum(m.binary.spills for m in own),
                shared=max(m.binary.shared for m in own),
                conversions=max(m.binary.conversions for m in own),
                per_element=None if shown is None else shown.instructions_per_element,
                bytes_ratio=bytes_ratio(report, kernel),
                headroom={t: None if m is None else headroom(m) for t, m in heads.items()},
            )
        )
    return lines


def aligned(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns for the terminal: names to the left, numbers to the right."""
    sizes = [max(len(line[i]) for line in (header, *lines)) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(size) if i else cell.ljust(size)
            for i, (cell, size) in enumerate(zip(line, sizes, strict=True))
        )
        for line in (header, *lines)
    )


def terminal(report: Report) -> str:
    """The table, and what its columns are."""
    cells = [line.cells() for line in lines_of(report)]
    about = (
        "registers, shared, conversions: the most of all binaries (registers of NVIDIA's targets); "
        f"instructions: an element, {SHOWN};\nbytes: moved over the least; {', '.join(TARGETS)}: "
        "ESTIMATED headroom of arithmetic over memory, by data sheets, not measured"
    )
    return f"{aligned(HEADER, cells)}\n{about}"


def markdown(report: Report) -> str:
    """The same table for docs/audit.md."""
    cells = [[f"`{name}`", *rest] for name, *rest in (line.cells() for line in lines_of(report))]
    about = f"triton {report.triton}, {len(report.binaries)} binaries."
    return f"{about}\n\n{table(HEADER, cells)}"


def markdown_of_exceptions() -> str:
    """What exceptions.py lets pass, for docs/audit.md."""
    lines = [
        [f"`{kernel}`", f"`{argument}` is read {limit:g} times at most", reason]
        for (kernel, argument), (limit, reason) in exceptions.READINGS.items()
    ]
    lines += [
        [call, f"{limit:.2f} of the least bytes", reason]
        for call, (limit, reason) in exceptions.CALLS.items()
    ]
    lines += [
        [f"`{kernel}`", f"{limit} layout conversions at most", reason]
        for kernel, (limit, reason) in (exceptions.CONVERSIONS | exceptions.WALKS).items()
    ]
    lines += [
        [f"triton {version}", f"{limit} spilled words and bytes", reason]
        for version, (limit, reason) in exceptions.SPILLS_OF_VERSION.items()
    ]
    lines += [
        [f"`{kernel}`", f"{limit} loads of fewer than 4 bytes", reason]
        for kernel, (limit, reason) in exceptions.NARROW_LOADS.items()
    ]
    lines += [
        [f"`{kernel}`", "loads of fewer than 4 bytes: two, and one for each row", _FIRST]
        for kernel in exceptions.FIRST_ELEMENTS
    ]
    lines += [
        [f"`{kernel}`", "stores of fewer than 4 bytes", reason]
        for kernel, reason in exceptions.NARROW_STORES.items()
    ]
    return table(["kernel or call", "allowed", "why"], lines)
