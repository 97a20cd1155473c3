"""Tables and pictures from the CSV files.

Text replaces what stands between <!-- bench:SUITE --> and <!-- /bench:SUITE -->: a suite's summary,
picture and every cell in docs/benchmarks.md, a few cells of all suites in README.md as "summary".
Pictures go to docs/images.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from . import results
from .gpu_cells import SUITES
from .gpu_pictures import draw
from .gpu_tables import SUMMARIES
from .harness import Row
from .model_tables import report as models_report
from .roofline import draw_roofline, roofline_text
from .summary import read_all, summary
from .tables import all_cells, caption, group_by

COMMAND = "Measured by `make bench`, written by `python -m bench report`"


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


def _picture(root: Path, name: str, device: str) -> tuple[Path, str]:
    """Where a device's picture goes, and the link to it from docs/benchmarks.md."""
    link = f"images/{name}{'' if device == 'cpu' else '-' + device}.png"
    return root / "docs" / link, link


def _roofline(folder: Path, root: Path, blocks: Sequence[Row], about: str) -> str:
    """The roofline's text and picture, for blocks whose machine also has a measured copy."""
    path, link = _picture(root, "roofline", blocks[0].device)
    copies = results.read(folder / "rows.csv")
    if not draw_roofline(blocks, copies, path, about):
        return ""
    picture = f"![roofline: products a second by bytes that must be moved]({link})"
    return f"\n\n{roofline_text(blocks, copies)}\n\n{picture}"


def write_report(folder: Path, root: Path) -> None:
    """Fills README.md and docs/benchmarks.md and draws docs/images, from the CSVs in a folder.

    Summaries and pictures are of each device's latest machine, the lists of cells of all machines.
    """
    for suite in SUITES:
        rows = results.read(folder / f"{suite}.csv")
        if not rows:
            print(f"{suite}: nothing measured in {folder}")
            continue
        shown: dict[str, str] = {}
        lists = []
        for group in group_by(rows, "device", "machine", "threads", "isa"):
            about, device = caption(group), group[0].device
            lists.append(f"**Every cell**, {about}:\n\n{all_cells(group)}")
            if device in shown:
                continue
            path, link = _picture(root, suite, device)
            draw(suite, group, path, about)
            picture = f"![{suite}: speed-up by cell, losing cells in red]({link})"
            shown[device] = f"{about}.\n\n{SUMMARIES[suite](group)}\n\n{picture}"
            print(f"{suite}: {path}")
            if suite == "blocks":
                shown[device] += _roofline(folder, root, group, about)
        text = "\n\n".join([f"{COMMAND}.", *shown.values(), *lists])
        fill(root / "docs" / "benchmarks.md", suite, text)
    text = models_report(folder, root)
    if text:
        fill(root / "docs" / "benchmarks.md", "models", text)
    else:
        print(f"models: nothing measured in {folder}")
    text = summary(read_all(folder))
    if text:
        fill(root / "README.md", "summary", text)
    else:
        print(f"README.md: no machine has measured all of its cells in {folder}")
