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


def test_other_columns_are_refused(tmp_path: Path) -> None:
    from bench import results

    path = tmp_path / "norm.csv"
    path.write_text("suite,time\nnorm,1\n")
    with pytest.raises(ValueError, match="has other columns"):
        results.read(path)


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
