"""The benchmarks' report: tables and pictures from made-up results."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.usefixtures("bench_harness")

PAGE = "before\n<!-- bench:{0} -->\nold\n<!-- /bench:{0} -->\nafter\n"


def make_results(folder: Path) -> None:
    """A CSV for each suite, eager losing in all cells but the first."""
    from bench import results
    from bench.gpu_cells import SUITES
    from bench.harness import Outcome, _rows
    from bench.machine import this_machine

    machine = this_machine("cpu")
    for suite, cells in SUITES.items():
        rows = []
        for index, cell in enumerate(cells()):
            limit = {"linear": "gemms", "blocks": "gemms", "host": "eager"}.get(suite, "copy_")
            times = {
                ("fused", cell.mode): [2e-3] * 7,
                (limit, cell.mode): [1e-3] * 7,
                ("eager", cell.mode): [5e-3 if index else 1e-3] * 7,
            }
            fact = {"error": 0.0, "kept_bytes": cell.M * cell.N, "ring": 1, "calls": 1}
            rows += _rows(cell, machine, times, {name: fact for name in ("fused", "eager", limit)})
        results.merge(folder / f"{suite}.csv", Outcome(cell, rows, {}), machine)


@pytest.mark.full
@pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_report(tmp_path: Path) -> None:
    from bench.gpu_cells import SUITES
    from bench.report import write_report

    make_results(tmp_path)
    pages = {tmp_path / "README.md": ["summary"], tmp_path / "docs" / "benchmarks.md": [*SUITES]}
    (tmp_path / "docs").mkdir()
    for page, names in pages.items():
        page.write_text("".join(PAGE.format(name) for name in names))
    write_report(tmp_path, tmp_path)
    readme, benchmarks = once = [page.read_text() for page in pages]
    write_report(tmp_path, tmp_path)
    assert [page.read_text() for page in pages] == once, "writing again must change nothing"
    for text, names in zip(once, pages.values(), strict=True):
        assert "old" not in text
        assert text.count("before") == text.count("after") == len(names)
        assert "torch " + torch.__version__ in text
    assert "8192 × 256 × 256, float32 | 2.50 / – | 2.50 / – |" in readme
    assert "0.50 ▼" in benchmarks
    assert "| 8192 × 256 | float32 | 0.1 | 2.50 (0.50) ▼ |" in benchmarks
    # The geometric mean of one cell at 0.5 and fifteen at 2.5.
    assert "| batch | 0.1 | 2.26 (0.50) ▼ |" in benchmarks
    assert "| batch | none | 2.50 (2.50) |" in benchmarks
    assert "Fused is slower (▼) in 1 of" in benchmarks
    assert "Roofline, bfloat16" in benchmarks
    for suite in (*SUITES, "roofline"):
        picture = tmp_path / "docs" / "images" / f"{suite}.png"
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert f"(images/{suite}.png)" in benchmarks


def test_the_summary_is_of_the_latest_machine_that_measured_all_of_it() -> None:
    from bench.harness import _rows
    from bench.machine import this_machine
    from bench.summary import CELLS, summary, without_dropout

    def rows(name: str, date: str, cells: Any, eager: float) -> list[Any]:
        fact = {"error": 0.0, "kept_bytes": 1, "ring": 1, "calls": 1}
        machine = replace(this_machine("cpu"), machine=name, date=date)
        return [
            row
            for cell in cells
            for row in _rows(
                cell,
                machine,
                {("fused", cell.mode): [1e-3] * 7, ("eager", cell.mode): [eager] * 7},
                {"fused": fact, "eager": fact},
            )
        ]

    assert len({tuple(asdict(cell).values()) for cell in CELLS}) == len(CELLS) == 8
    plain = [without_dropout(cell) for cell in CELLS if cell.drops]
    old = rows("old", "2026-01-01T00:00Z", CELLS, 5e-3)
    new = rows("new", "2026-02-02T00:00Z", CELLS, 2e-3)
    new += rows("new", "2026-02-03T00:00Z", plain, 5e-4)
    partial = rows("partial", "2026-03-03T00:00Z", CELLS[:7], 9e-3)
    text = summary([*old, *new, *partial])
    assert text.count("| 2.00 / – | 0.50 ▼ / – |") == 7
    assert "inference, 8192 × 512 × 512, bfloat16 | – | 2.00 / – |" in text
    assert text.splitlines()[-1].startswith("new, ")
    assert text.endswith("; 2026-02-02 to 2026-02-03.")
    assert summary(partial) == ""


def test_the_summary_shows_cells_that_are_measured() -> None:
    from bench.cells import CPU_SUITES
    from bench.summary import CELLS

    for cell in CELLS:
        assert cell in CPU_SUITES[cell.suite](), cell


def made_up_block(provider: str, microseconds: float, **changes: Any) -> Any:
    from bench_cases import make_cell

    from bench.harness import _rows
    from bench.machine import this_machine

    size = {"M": 1000, "K": 2000, "N": 3000, "mode": "training"} | changes
    cell = make_cell(suite="blocks", chain="L-N-A-D", **size)
    times = {(name, cell.mode): [microseconds / 1e6] * 7 for name in ("fused", provider)}
    fact = {"error": 0.0, "kept_bytes": 0, "ring": 1, "calls": 1}
    found = _rows(cell, this_machine("cpu"), times, {name: fact for name in ("fused", provider)})
    return next(r for r in found if r.provider == provider)


def test_replays_have_a_table_of_their_own() -> None:
    from bench_cases import make_cell

    from bench.gpu_tables import SUMMARIES
    from bench.harness import _rows
    from bench.machine import this_machine

    cell = make_cell(suite="rows", M=1000, N=1000, mode="forward", dtype="bfloat16")
    times: dict[Any, list[float]] = {}
    for mode, ours, eager in (("forward", 80e-6, 160e-6), ("forward replayed", 20e-6, 100e-6)):
        again = [ours * f for f in (0.98, 1.0, 1.0, 1.0, 1.03)]
        times |= {("fused", mode): [ours] * 5, ("fused again", mode): again}
        times |= {("eager", mode): [eager] * 5, ("copy_", mode): [16e-6] * 5}
    facts = {n: {"error": 0.0, "kept_bytes": "", "ring": 1, "calls": 1} for n, _ in times}
    rows = _rows(cell, this_machine("cpu"), times, facts)
    text = SUMMARIES["rows"](rows)
    line = text.splitlines()[-1]
    assert line.startswith(
        "| N-A-D layer gelu bfloat16 1000×1000 forward | 80.0 | 20.0 | 200 | 250"
    )
    assert "| 2.00 | 5.00 | – | – | 0.996–1.006 | 0.996–1.006 |" in line
    called = [r for r in rows if not r.mode.endswith("replayed")]
    assert SUMMARIES["rows"](called) == text.partition("\n\nCalled from Python")[0]


def test_roofline(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from bench.roofline import ceilings, draw_roofline, flops, least_bytes, roofline_text, share

    products = made_up_block("gemms", 1000.0)
    copy = made_up_block("copy_", 10.0, mode="forward", M=1000, N=1000)
    fused = made_up_block("fused", 4000.0)
    narrow = made_up_block("eager", 100.0, K=1, N=1000)
    assert flops(products) == 6 * 6e9
    assert least_bytes(products) == 4 * (3 * 2e6 + 3 * 6e6 + 8 * 3e6)
    blocks = [products, fused, narrow]
    limits = ceilings(blocks, [copy], "float32")
    assert limits is not None
    assert limits == pytest.approx((8e6 / 10e-6, 36e9 / 1e-3))
    assert share(products, limits) == pytest.approx(1.0)
    assert share(fused, limits) == pytest.approx(0.25)
    # Bound by memory: the time that its bytes take over the time that it took.
    assert share(narrow, limits) == pytest.approx(least_bytes(narrow) / limits[0] / 100e-6)
    assert "800 GB/s" in roofline_text(blocks, [copy])
    assert "36 TFLOP/s" in roofline_text(blocks, [copy])
    assert "fused 0.25" in roofline_text(blocks, [copy])
    picture = tmp_path / "images" / "roofline.png"
    assert draw_roofline(blocks, [copy], picture, "made up")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert not draw_roofline(blocks, [], tmp_path / "none.png", "")
    assert roofline_text(blocks, []) == ""


def test_a_page_without_markers_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from bench.report import fill

    page = tmp_path / "README.md"
    page.write_text("nothing\n")
    with pytest.raises(ValueError, match="no markers <!-- bench:norm -->"):
        fill(page, "norm", "text")


def test_the_pages_have_a_place_for_every_table() -> None:
    from bench.gpu_cells import SUITES

    pages = {"README.md": ["summary"], "docs/benchmarks.md": [*SUITES, "models"]}
    for page, names in pages.items():
        text = (ROOT / page).read_text()
        assert re.findall(r"<!-- bench:(\w+) -->", text) == re.findall(
            r"<!-- /bench:(\w+) -->", text
        )
        assert sorted(re.findall(r"<!-- bench:(\w+) -->", text)) == sorted(names)
