"""Tables and pictures from the CSV files.

Tables replace what stands between <!-- bench:SUITE --> and <!-- /bench:SUITE -->: a summary in
README.md, every cell in docs/benchmarks.md. Pictures go to docs/images.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from . import results
from .gpu_cells import SUITES
from .gpu_pictures import draw
from .gpu_tables import SUMMARIES
from .harness import Row
from .roofline import draw_roofline, roofline_text
from .tables import all_cells

COMMAND = "Measured by `make bench`, written by `python -m bench report`"


def group_by_machine(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of each device, machine, thread count and instruction set, the latest first."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for r in rows:
        groups.setdefault((r.device, r.machine, r.threads, r.isa), []).append(r)
    return sorted(groups.values(), key=lambda group: max(r.date for r in group), reverse=True)


def caption(rows: Sequence[Row]) -> str:
    """Machine, versions, commits and dates of a group."""

    def all_of(name: str) -> str:
        return ", ".join(dict.fromkeys(str(getattr(r, name)) for r in rows if getattr(r, name)))

    first = rows[0]
    threads = f"{first.threads} thread" + ("s" if first.threads > 1 else "")
    where = ", ".join(filter(None, (first.machine, first.clocks, threads, first.isa)))
    days = sorted({r.date[:10] for r in rows})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return f"{where}; torch {all_of('torch')}; commit {all_of('commit')}; {when}"


def fill(path: Path, suite: str, text: str) -> None:
    """Replaces what stands between a suite's markers.

    Raises:
        ValueError: the file has no such markers.
    """
    start, end = f"<!-- bench:{suite} -->", f"<!-- /bench:{suite} -->"
    content = path.read_text()
    pattern = re.compile(re.escape(start) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(content):
        raise ValueError(f"{path} has no markers {start} … {end}")
    path.write_text(pattern.sub(lambda _: f"{start}\n{text}\n{end}", content, count=1))


def _roofline(folder: Path, root: Path, blocks: Sequence[Row], about: str) -> str:
    """The roofline's text and picture, for blocks whose machine also has a measured copy."""
    first = blocks[0]
    image = f"docs/images/roofline{'' if first.device == 'cpu' else '-' + first.device}.png"
    copies = results.read(folder / "rows.csv")
    if not draw_roofline(blocks, copies, root / image, about):
        return ""
    picture = f"![roofline: products a second by bytes that must be moved]({image})"
    return f"\n\n{roofline_text(blocks, copies)}\n\n{picture}"


def write_report(folder: Path, root: Path) -> None:
    """Fills README.md and docs/benchmarks.md and draws docs/images, from the CSVs in a folder.

    The README shows each device's latest machine, the other file all of them.
    """
    for suite in SUITES:
        rows = results.read(folder / f"{suite}.csv")
        if not rows:
            print(f"{suite}: nothing measured in {folder}")
            continue
        shown: dict[str, str] = {}
        sections = []
        for group in group_by_machine(rows):
            about, device = caption(group), group[0].device
            sections.append(f"{about}\n\n{all_cells(group)}")
            if device in shown:
                continue
            image = f"docs/images/{suite}{'' if device == 'cpu' else '-' + device}.png"
            draw(suite, group, root / image, about)
            picture = f"![{suite}: speed-up by cell, losing cells in red]({image})"
            shown[device] = f"{about}.\n\n{SUMMARIES[suite](group)}\n\n{picture}"
            print(f"{suite}: {image}")
            if suite == "blocks":
                shown[device] += _roofline(folder, root, group, about)
        fill(root / "README.md", suite, "\n\n".join([f"{COMMAND}.", *shown.values()]))
        fill(root / "docs" / "benchmarks.md", suite, "\n\n".join([f"{COMMAND}.", *sections]))
