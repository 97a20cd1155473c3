"""The benchmark harness: what it writes; and a few calls worth watching.

    pytest tests/test_bench.py --benchmark-enable

times the watched calls; otherwise they run once, like any test. Nothing is asserted about time.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from bench_cases import make_cell, make_with_wrong_eager
from torch import nn

import fused

ROOT = Path(__file__).resolve().parents[1]


pytestmark = pytest.mark.usefixtures("bench_harness")


# ---- a run ----

ONLY = ("host", "--only", "^N-A-D layer relu", "--seconds", "0.01")


def test_a_run_writes_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from bench import results
    from bench.__main__ import main

    for _ in range(2):  # the second replaces what the first wrote
        assert main([*ONLY, "--out", str(tmp_path)]) == 0
    rows = results.read(tmp_path / "host.csv")
    modes = {"forward", "inference", "training", "backward"}
    got = [(r.mode, r.provider) for r in rows]
    assert sorted(got) == sorted((m, p) for m in modes for p in ("eager", "fused"))
    for r in rows:
        assert (r.chain, r.M, r.K, r.N, r.p, r.threads) == ("N-A-D", 8, 0, 64, 0.1, 1)
        assert 0 < r.p20_us <= r.median_us <= r.p80_us
        assert r.over_fused == 1 if r.provider == "fused" else float(r.over_fused) > 0
        assert float(r.error) < 2e-5
        assert r.commit and r.machine and r.date and r.torch == torch.__version__
        # Fused keeps mean and rstd of 8 rows and the seed; eager also copies and masks.
        if r.mode == "training":
            assert r.kept_bytes == 72 if r.provider == "fused" else int(r.kept_bytes) > 4096
    printed = capsys.readouterr().out
    assert printed.count("host: 3 cells") == 2
    assert "3/3" in printed


def test_a_refusal_is_printed_and_the_status_is_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench import __main__ as command

    def make(*given: Any, max_autotune: bool) -> list[Any]:
        return make_with_wrong_eager("output")(*given)

    monkeypatch.setattr(command, "make_providers", make)
    assert command.main([*ONLY, "--out", str(tmp_path)]) == 1
    assert "REFUSED eager: output: relative error" in capsys.readouterr().out


def test_the_rest_is_what_quick_leaves_out() -> None:
    from bench.__main__ import main
    from bench.cells import CPU_SUITES
    from bench.gpu_cells import is_quick

    given: list[Any] = []
    with mock.patch("bench.__main__.run_suite", lambda name, cells, *_: not given.append(cells)):
        for option in ("--quick", "--rest"):
            main(["norm", option])
    assert sorted(map(str, given[0] + given[1])) == sorted(map(str, CPU_SUITES["norm"]()))
    assert all(map(is_quick, given[0])) and not any(map(is_quick, given[1]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_a_gpu_nothing_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench.__main__ import main

    assert main(["rows", "--device", "cuda", "--out", str(tmp_path)]) == 0
    assert "no CUDA device, so nothing was measured" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_the_commit_can_be_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from bench.machine import commit_of

    monkeypatch.delenv("FUSED_BENCH_COMMIT", raising=False)
    assert commit_of(tmp_path) == "unknown"
    monkeypatch.setenv("FUSED_BENCH_COMMIT", "0123456789ab")
    assert commit_of(tmp_path) == commit_of() == "0123456789ab"


def test_the_time_limit_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from bench.__main__ import main

    assert main([*ONLY, "--out", str(tmp_path), "--max-seconds", "0"]) == 0
    assert "stopped by its time limit; 3 cells not measured" in capsys.readouterr().out
    assert not (tmp_path / "host.csv").exists()


def test_large_inputs_are_rotated_past_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import harness

    cell = make_cell(M=64, N=256)  # 64 KiB
    for cache, count in ((1 << 20, 1), (1 << 18, 9), (1 << 16, 3), (1 << 12, 2)):
        monkeypatch.setattr(harness, "last_level_cache", lambda device, cache=cache: cache)
        ring = harness.make_ring(cell, "cpu")
        assert len(ring) == count
        assert len({inputs.x.data_ptr() for inputs in ring}) == count


def test_ratios_are_medians_of_the_rounds_ratios() -> None:
    """A disturbance of one round on both sides must not move the ratio."""
    from bench.harness import _rows
    from bench.machine import this_machine

    times = {
        ("fused", "forward"): [1.0, 1.0, 10.0, 1.0, 2.0],
        ("eager", "forward"): [3.0, 3.0, 30.0, 3.0, 6.0],
    }
    facts = {
        name: {"error": 0.0, "kept_bytes": "", "ring": 1, "calls": 1} for name in ("fused", "eager")
    }
    ours, eager = _rows(make_cell(mode="forward"), this_machine("cpu"), times, facts)
    assert (ours.median_us, eager.median_us) == (1e6, 3e6)
    assert (eager.over_fused, eager.over_fused_p20, eager.over_fused_p80) == (3, 3, 3)


def test_calls_and_replays_are_both_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, with calls in place of replays; eager cannot be captured."""
    from dataclasses import replace

    from bench import harness, timing
    from bench.machine import this_machine
    from bench.providers import make_providers

    captured: list[int] = []

    def capture(walk: Any) -> Any:
        captured.append(len(captured))
        if len(captured) == 2:
            raise RuntimeError("operation not permitted when stream is capturing\n...")
        return walk

    clocks, make_ring, make_chain = harness.Clock, harness.make_ring, harness.make_chain
    monkeypatch.setattr(timing, "capture", capture)
    monkeypatch.setattr(harness, "Clock", lambda device, host: clocks("cpu"))
    monkeypatch.setattr(harness, "make_chain", lambda cell, device: make_chain(cell, "cpu"))
    monkeypatch.setattr(harness, "make_ring", lambda cell, device: make_ring(cell, "cpu"))
    machine = replace(this_machine("cpu"), device="cuda")

    def make(*given: Any) -> Any:
        return [p for p in make_providers(*given) if p.name in ("fused", "eager", "add")]

    outcome = harness.measure(make_cell(M=40), machine, 0.0, make)
    assert outcome.refused == {"eager replayed": "operation not permitted when stream is capturing"}
    got = {(r.provider, r.mode): r for r in outcome.rows}
    called = {
        (name, m) for name in ("fused", "eager", harness.AGAIN) for m in ("training", "backward")
    }
    replays = {(name, "training replayed") for name in ("fused", harness.AGAIN)}
    assert set(got) == called | replays | {("add", "backward"), ("add", "backward replayed")}
    assert got["fused", "training replayed"].over_fused == 1
    again = got[harness.AGAIN, "training replayed"]
    assert 0 < again.over_fused_p20 <= again.over_fused <= again.over_fused_p80
    # A replay walks over the ring several times; its time is that of one step.
    one, all_steps = got["fused", "training"], got["fused", "training replayed"]
    assert all_steps.median_us < 4 * one.median_us


def test_every_quick_suite_has_cells() -> None:
    from bench.gpu_cells import SUITES, is_quick

    for name, cells in SUITES.items():
        found = list(cells())
        assert len(set(found)) == len(found)
        assert 0 < sum(map(is_quick, found)) <= 20, name


PAGE = "before\n<!-- bench:{0} -->\nold\n<!-- /bench:{0} -->\nafter\n"


# ---- the report ----


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
    pages = [tmp_path / "README.md", tmp_path / "docs" / "benchmarks.md"]
    pages[1].parent.mkdir()
    for page in pages:
        page.write_text("".join(PAGE.format(suite) for suite in SUITES))
    write_report(tmp_path, tmp_path)
    once = [page.read_text() for page in pages]
    write_report(tmp_path, tmp_path)
    assert [page.read_text() for page in pages] == once, "writing again must change nothing"
    for text in once:
        assert "old" not in text
        assert text.count("before") == text.count("after") == len(SUITES)
        assert "0.50 ▼" in text
        assert "torch " + torch.__version__ in text
    assert "| 8192 × 256 | float32 | 0.1 | 2.50 (0.50) ▼ |" in once[0]
    # The geometric mean of one cell at 0.5 and fifteen at 2.5.
    assert "| batch | 0.1 | 2.26 (0.50) ▼ |" in once[0]
    assert "| batch | none | 2.50 (2.50) |" in once[0]
    assert "norm: N-A-D" not in once[0]
    assert "Fused is slower (▼) in 1 of" in once[0]
    assert "Roofline, bfloat16" in once[0]
    for suite in (*SUITES, "roofline"):
        picture = tmp_path / "docs" / "images" / f"{suite}.png"
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert f"docs/images/{suite}.png" in once[0]


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


def test_other_columns_are_refused(tmp_path: Path) -> None:
    from bench import results

    path = tmp_path / "norm.csv"
    path.write_text("suite,time\nnorm,1\n")
    with pytest.raises(ValueError, match="has other columns"):
        results.read(path)


@pytest.mark.parametrize("page", ["README.md", "docs/benchmarks.md"])
def test_the_pages_have_a_place_for_every_suite(page: str) -> None:
    from bench.gpu_cells import SUITES

    text = (ROOT / page).read_text()
    for suite in SUITES:
        assert text.count(f"<!-- bench:{suite} -->") == text.count(f"<!-- /bench:{suite} -->") == 1


# ---- calls worth watching: pytest tests/test_bench.py --benchmark-enable ----

watched = pytest.mark.skipif(
    find_spec("pytest_benchmark") is None, reason="pytest-benchmark is not installed"
)


@watched
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_watch_norm_act_forward(benchmark: Any, dtype: torch.dtype) -> None:
    z, weight, bias = torch.randn(2048, 512, dtype=dtype), torch.ones(512), torch.zeros(512)
    options = {"norm": "layer", "norm_weight": weight, "norm_bias": bias}
    y = benchmark(fused.functional.norm_act, z, **options, activation="gelu", p=0.1, seed=1)
    assert y.shape == z.shape


@watched
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_watch_norm_act_backward(benchmark: Any, dtype: torch.dtype) -> None:
    z = torch.randn(2048, 512, dtype=dtype, requires_grad=True)
    weight = torch.ones(512, requires_grad=True)
    y = fused.functional.norm_act(
        z, norm="rms", norm_weight=weight, activation="silu", p=0.1, seed=1
    )
    dy = torch.randn_like(y)
    dz, dweight = benchmark(torch.autograd.grad, y, (z, weight), dy, retain_graph=True)
    assert (dz.shape, dweight.shape) == (z.shape, weight.shape)


@watched
@pytest.mark.parametrize("training", [False, True])
def test_watch_tiny_call(benchmark: Any, training: bool) -> None:
    net = fused.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU(), nn.Dropout(0.1))
    x = torch.randn(8, 64)
    with torch.set_grad_enabled(training):
        y = benchmark(net.train(training), x)
    assert y.shape == (8, 64)
