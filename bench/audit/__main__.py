"""python -m bench.audit: compile every Triton kernel for every target and judge the binaries.

Needs no GPU. Prints a line for each kernel and each gate; the exit status is 1 when a gate is
closed. --accept makes what was found the committed report: the baseline of the instruction counts,
the tables of docs/audit.md and its picture.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .binary import CACHE
from .gates import GATES, instructions, why_skipped
from .measure import audit
from .report import Report
from .table import markdown, markdown_of_exceptions, terminal

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "bench" / "results" / "audit.json"
DOCUMENT = ROOT / "docs" / "audit.md"
PICTURE = ROOT / "docs" / "images" / "audit.png"
SHOWN = 20  # complaints of a gate that are printed


def committed() -> Report | None:
    """The committed report."""
    return Report.read(COMMITTED) if COMMITTED.exists() else None


def judge(report: Report, baseline: Report | None) -> bool:
    """Prints a line for each gate; returns whether all are open."""
    found = {name: gate(report) for name, gate in GATES.items()}
    skipped = why_skipped(report, baseline)
    if skipped is None and baseline is not None:
        found["instructions"] = instructions(report, baseline)
    for name, complaints in found.items():
        print(f"{name:14}{f'CLOSED, {len(complaints)}' if complaints else 'open'}")
        for complaint in complaints[:SHOWN]:
            print(f"    {complaint}")
    if skipped is not None:
        print(f"{'instructions':14}skipped: {skipped}")
    return not any(found.values())


def publish(report: Report) -> None:
    """Writes the committed report, the tables in docs/audit.md and the picture."""
    from ..report import fill  # matplotlib
    from .picture import draw

    report.write(COMMITTED)
    fill(DOCUMENT, "audit", markdown(report))
    fill(DOCUMENT, "exceptions", markdown_of_exceptions())
    draw(report, PICTURE)
    print(f"written: {COMMITTED}, {DOCUMENT}, {PICTURE}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 when a gate is closed, else 0."""
    parser = argparse.ArgumentParser(prog="python -m bench.audit", description=__doc__)
    parser.add_argument("--processes", type=int, help="that compile (default: one for each core)")
    parser.add_argument("--out", type=Path, default=CACHE, help="folder of audit.json, audit.png")
    parser.add_argument("--accept", action="store_true", help="commit what was found")
    given = parser.parse_args(arguments)
    started = time.monotonic()
    report = audit(given.processes, say=True)
    print(terminal(report))
    print(f"{len(report.binaries)} binaries in {time.monotonic() - started:.0f} s")
    fine = judge(report, None if given.accept else committed())
    if given.accept and fine:
        publish(report)
    elif given.accept:
        print("not accepted: a gate is closed")
    else:
        from .picture import draw  # matplotlib

        report.write(given.out / "audit.json")
        draw(report, given.out / "audit.png")
        print(f"written: {given.out / 'audit.json'}, {given.out / 'audit.png'}")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
