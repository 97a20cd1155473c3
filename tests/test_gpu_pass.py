"""bench/gpu_pass.sh: its time limits, what it does with a step that fails, and without a GPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import time
from pathlib import Path

import pytest
import torch
from processes import run_python

pytestmark = [
    pytest.mark.usefixtures("bench_harness"),
    pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash"),
]
ROOT = Path(__file__).resolve().parents[1]
LIMITS = {"first": 510, "second": 600}


@pytest.mark.parametrize("name", LIMITS)
def test_the_limits_of_a_pass_add_up(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    from bench import gpu_pass

    assert gpu_pass.main([name, "--plan"]) == 0
    *steps, total = capsys.readouterr().out.splitlines()
    seconds = [int(re.match(r" *(\d+) s  \S", line)[1]) for line in steps]  # type: ignore[index]
    assert len(seconds) == len(gpu_pass.PASSES[name])
    assert total.split() == [str(sum(seconds)), "s", "at", "most"]
    assert sum(seconds) <= LIMITS[name]
    assert steps[0].endswith("install") and len(set(steps)) == len(steps)


def test_every_command_is_bash() -> None:
    from bench import gpu_pass

    for step in (*gpu_pass.FIRST, *gpu_pass.SECOND):
        done = subprocess.run(["bash", "-n", "-c", step.command], capture_output=True, text=True)
        assert not done.returncode and not done.stderr, (step.name, done.stderr)


def test_the_cells_that_decide_and_the_rest_are_all() -> None:
    from bench.__main__ import parse_arguments
    from bench.gpu_pass import FIRST, SECOND

    for steps, option in ((FIRST, "quick"), (SECOND, "rest")):
        for step in steps:
            if step.name in ("rows", "blocks", "images", "peers"):
                given = parse_arguments(step.command.split()[3:])
                assert given.suites == [step.name] and getattr(given, option)
                assert given.max_seconds < step.seconds - 8, "what it has begun can end"


def test_a_step_that_fails_or_takes_too_long_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench import gpu_pass

    monkeypatch.setattr(gpu_pass, "GRACE", 0.5)
    steps = (
        gpu_pass.Step("broken", 20, "echo before; exit 3"),
        gpu_pass.Step("endless", 1, "trap '' TERM; sleep 600 & echo begun; wait; sleep 600"),
        gpu_pass.Step("last", 20, 'ls "$OUT"; echo "$JOBS $PYTHONUNBUFFERED"'),
    )
    monkeypatch.setitem(gpu_pass.PASSES, "first", steps)
    out, packed = tmp_path / "out", tmp_path / "out.tar.gz"
    started = time.monotonic()
    assert gpu_pass.main(["first", "--out", str(out), "--pack", str(packed)]) == 1
    assert time.monotonic() - started < 15
    found = [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]
    assert [(line["step"], line["status"]) for line in found] == [
        ("broken", 3),
        ("endless", 124),
        ("last", 0),
    ]
    assert (out / "broken.log").read_text() == "before\n"
    assert (out / "endless.log").read_text() == "begun\n"
    assert "steps.jsonl" in (out / "last.log").read_text(), "results are there before the next"
    said = capsys.readouterr().out
    assert "broken: FAILED with status 3" in said and "endless: STOPPED at its limit" in said
    assert "gpu_pass first: failed: broken, endless" in said
    with tarfile.open(packed) as archive:
        assert "out/last.log" in archive.getnames()


def test_unknown_steps_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    from bench import gpu_pass

    with pytest.raises(SystemExit):
        gpu_pass.main(["second", "rwos"])
    assert "unknown step rwos; known: install, tune, rows" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
@pytest.mark.parametrize(
    "names",
    [
        ["install", "smoke", "rows", "gemm", "cuda"],
        pytest.param(["install", "blocks", "images", "peers"], marks=pytest.mark.full),
    ],
    ids=" ".join,
)
def test_without_a_gpu_every_step_says_so(tmp_path: Path, names: list[str]) -> None:
    command = ["bench/gpu_pass.sh", "first", "--out", str(tmp_path)]
    done = subprocess.run([*command, *names], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "torch sees no CUDA device here, so nothing was measured or tested" in done.stdout
    assert done.stdout.endswith("gpu_pass first: done\n")
    for name in names[1:]:
        assert "no CUDA device" in (tmp_path / f"{name}.log").read_text(), name
    assert not list(tmp_path.glob("*.csv")) and not (tmp_path / "smoke.jsonl").exists()
    assert json.loads((tmp_path / "machine.json").read_text())["device"] == "cpu"


@pytest.mark.parametrize(
    "said, status, expected",
    [("Device not supported", 1, 0), ("ERROR SUMMARY: 2 errors", 9, 9), ("0 errors", 0, 0)],
)
def test_a_device_that_the_sanitizer_refuses_is_left_out(
    tmp_path: Path, said: str, status: int, expected: int
) -> None:
    from bench.gpu_pass import _sanitize

    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\necho '========= {said}'\nexit {status}\n")
    tool.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PY": "true", "OUT": str(tmp_path)}
    command = ["bash", "-c", _sanitize("memcheck")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == expected, done.stderr
    assert ("is left out" in done.stdout) == ("not supported" in said)


# ---- the smoke test ----


def test_smoke_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cpp: None
) -> None:
    from bench import smoke
    from fused.backends import gemm
    from fused.tools import selftest

    # What the family "gemm" sets for its process is given back to this one.
    for module, names in ((gemm, ("mode", "enabled")), (selftest, ("FEATURES_IN", "FEATURES"))):
        for name in names:
            monkeypatch.setattr(module, name, getattr(module, name))
    out = tmp_path / "smoke.jsonl"
    one = [*smoke.FAMILIES["row"][:1]]
    monkeypatch.setitem(smoke.FAMILIES, "row", one)
    monkeypatch.setitem(smoke.FAMILIES, "channel", [smoke.FAMILIES["channel"][0]])
    assert smoke.main(["row", "channel", "--device", "cpu", "--here", "--out", str(out)]) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["family"] for line in found] == ["row", "channel"]
    for line in found:
        assert (line["backend"], line["failed"]) == ("cpp", "")
        assert 0 <= line["share_of_limit"] <= 1
    # What no kernel serves is a failure, not a pass of the reference.
    assert smoke.main(["gemm", "--device", "cpu", "--here", "--out", str(out)]) == 1
    assert "no kernel serves it" in capsys.readouterr().out


def test_smoke_finds_a_wrong_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpp: None
) -> None:
    from bench import smoke
    from fused.tools import selftest

    right = selftest.norm_act
    monkeypatch.setattr(selftest, "norm_act", lambda *z, **options: right(*z, **options) * 1.5)
    out = tmp_path / "smoke.jsonl"
    assert smoke.run_family("row", "cpu", out) == 1
    for line in map(json.loads, out.read_text().splitlines()):
        assert "the dropout mask is not" in line["failed"]  # which is looked at first


# ---- which tests it runs ----


def collected(chosen: str, **environment: str) -> list[str]:
    code = """
import pytest

@pytest.mark.parametrize("a", range(4))
@pytest.mark.parametrize("b", range(4))
@pytest.mark.parametrize("c", range(4))
def test_many(a, b, c): pass

@pytest.mark.parametrize("a", range(3))
def test_few(a): pass

def test_one(): pass
"""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "test_made_up.py").write_text(code)
        shutil.copy(ROOT / "tests" / "conftest.py", folder)
        arguments = ["-q", "--collect-only", "-m", chosen]
        code = f"import os, pytest; os.chdir({folder!r}); pytest.main({arguments})"
        done = run_python(code, **environment)
    return [line for line in done.stdout.splitlines() if "::" in line]


def test_a_covering_set_of_the_tests() -> None:
    rest, *parts = (
        collected(chosen, **environment)
        for chosen, environment in (
            ("full", {}),
            ("not full", {"FUSED_TEST_SHARD": "0/2"}),
            ("not full", {"FUSED_TEST_SHARD": "1/2"}),
        )
    )
    kept = parts[0] + parts[1]
    assert len(set(kept + rest)) == len(kept) + len(rest) == 4**3 + 3 + 1
    assert sum("few" in name or "one" in name for name in kept) == 4
    many = [re.findall(r"\d+", name.partition("[")[2]) for name in kept if "many" in name]
    assert len(many) <= 24
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert len({(case[i], case[j]) for case in many}) == 16
    assert min(map(len, parts)) > 4, "each process has a part of them"
