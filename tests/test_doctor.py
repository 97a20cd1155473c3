"""python -m fused: the doctor tells what serves each operation and notices a wrong kernel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import needs_extension, run_python

import fused
from fused import __main__ as command
from fused.backends import backend, ops
from fused.tools import doctor

DTYPES = ("float32", "bfloat16", "float16", "float64")
# Another process shall import the same package as this one.
PATHS = [str(Path(fused.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
PYTHONPATH = os.pathsep.join(PATHS)


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "fused", "doctor", "--json"],
        env=os.environ | {"PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def of_device(report: dict[str, Any], device: str) -> list[dict[str, Any]]:
    return [entry for entry in report["operations"] if entry["device"] == device]


def test_machine(report: dict[str, Any]) -> None:
    assert report["torch"] == torch.__version__
    assert report["cpu_isa"] == backend.cpu_isa()
    assert set(report) >= {"fused", "python", "triton", "compiler", "cpu", "threads", "gpu"}


def test_every_operation_is_there_once(report: dict[str, Any]) -> None:
    keys = ("operation", "norm", "mode", "device", "dtype")
    got = [tuple(entry[key] for key in keys) for entry in report["operations"]]
    norms = ("layer", "rms", None, "batch", "group", "instance")
    pairs = [(operation, norm) for operation in ("linear_norm_act", "norm_act") for norm in norms]
    pairs += [("linear_norm_gate", norm) for norm in norms[:3]]
    pairs += [("add_norm", norm) for norm in norms[:2]]
    pairs += [("shortcut", norm) for norm in norms if norm] + [("gate", None)]
    want = {
        (operation, norm, mode, device, dtype)
        for operation, norm in pairs
        for mode in ("training", "inference")
        for device in ("cpu", "cuda")
        for dtype in DTYPES
    }
    assert set(got) == want
    assert len(got) == len(want)


def test_cpu_is_tested_and_passes(report: dict[str, Any]) -> None:
    assert report["passed"] is True
    for entry in of_device(report, "cpu"):
        assert entry["passed"] is True, entry
        dtype = getattr(torch, entry["dtype"])
        assert entry["backend"] == backend.choose("cpu", dtype)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_an_absent_gpu_is_explained_and_not_a_failure(report: dict[str, Any]) -> None:
    for entry in of_device(report, "cuda"):
        assert entry["passed"] is None
        assert entry["backend"] == "reference"
        expected = (
            "triton serves float32, bfloat16, float16, not float64"
            if entry["dtype"] == "float64"
            else "torch sees no CUDA device"
        )
        assert entry["why_not"]["triton"] == expected


def test_without_the_extension_it_says_why() -> None:
    code = "from fused.__main__ import main; main(['doctor', '--json'])"
    report = json.loads(run_python(code, FUSED_DISABLE_EXT="1", PYTHONPATH=PYTHONPATH).stdout)
    assert report["cpu_isa"] is None
    assert report["environment"]["FUSED_DISABLE_EXT"] == "1"
    for entry in of_device(report, "cpu"):
        assert (entry["backend"], entry["passed"]) == ("reference", True)
        assert entry["why_not"] == {"cpp": "FUSED_DISABLE_EXT=1 is set"}


@needs_extension
def test_a_request_for_the_reference_is_named() -> None:
    with backend.use_backend("reference"):
        results = [r for r in doctor.examine() if r.device == "cpu"]
    for result in results:
        assert (result.backend, result.passed) == ("reference", True)
        assert result.why_not["cpp"].startswith("backend 'reference' is asked for")


@needs_extension
def test_a_slower_instruction_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    best = backend.cpu_isa()
    assert best is not None
    if best == "portable":
        pytest.skip("this machine has no other instruction set")
    monkeypatch.setenv("FUSED_CPU_ISA", "portable")
    backend.set_cpu_isa("portable")
    try:
        facts = doctor.machine()
        assert facts["faster_isa"][best] == "FUSED_CPU_ISA=portable is set"
        assert facts["cpu_isa"] == backend.cpu_isa() == "portable"
    finally:
        backend.set_cpu_isa(best)


def wrong_output(right: Callable[..., Any]) -> Callable[..., Any]:
    def row_forward(*args: Any) -> Any:
        y, statistics = right(*args)
        return y * 1.05, statistics

    return row_forward


def wrong_gradient(right: Callable[..., Any]) -> Callable[..., Any]:
    def row_backward(*args: Any) -> Any:
        dz, *rest = right(*args)
        return (dz * 1.05, *rest)

    return row_backward


def wrong_mask(right: Callable[..., Any]) -> Callable[..., Any]:
    def row_forward(z: Any, bias: Any, weight: Any, shift: Any, add: Any, seed: Any, *codes: Any):
        return right(z, bias, weight, shift, add, None if seed is None else seed + 1, *codes)

    return row_forward


def raises(right: Callable[..., Any]) -> Callable[..., Any]:
    def row_forward(*args: Any) -> Any:
        raise RuntimeError("the launch failed\nand more")

    return row_forward


@needs_extension
@pytest.mark.parametrize(
    ("operator", "defect", "said"),
    [
        ("row_forward", wrong_output, "the output is wrong by"),
        ("row_backward", wrong_gradient, "the gradient of"),
        ("row_forward", wrong_mask, "the dropout mask is not the one"),
        ("row_forward", raises, "the launch failed"),
        ("gate_backward", wrong_gradient, "the gradient of value"),
    ],
)
def test_a_wrong_kernel_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    operator: str,
    defect: Callable[..., Any],
    said: str,
) -> None:
    monkeypatch.setattr(ops, operator, defect(getattr(ops, operator)))
    assert command.main(["doctor"]) == 1
    printed = capsys.readouterr().out
    wrong = [line for line in printed.splitlines() if line.startswith("  WRONG")]
    assert any(said in line for line in wrong)
    assert "and more" not in printed
    assert command.main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["passed"] is False


def test_the_table_names_backend_and_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main() == 0
    printed = capsys.readouterr().out
    served = backend.choose("cpu", torch.float32)
    (line,) = [s for s in printed.splitlines() if "linear_norm_act, layer, training" in s][:1]
    assert line.split("  ")[-1].strip() == f"{served} ok"
    assert "WRONG" not in printed


# ---- python -m fused fuse ----

MODEL = """
from torch import nn

def build():
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.ReLU(), nn.BatchNorm1d(4))

ready = build()
number = 3

def sized(size):
    return build()
"""


@pytest.fixture
def model_path(tmp_path: Path) -> str:
    (tmp_path / "some_model.py").write_text(MODEL)
    return str(tmp_path)


@pytest.mark.parametrize("name", ["build", "ready"])
def test_fuse_prints_the_dry_run(
    model_path: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    monkeypatch.syspath_prepend(model_path)
    assert command.main(["fuse", f"some_model:{name}"]) == 0
    printed = capsys.readouterr().out
    assert "1 of 1 chains would be fused" in printed
    assert "linear → layer → relu" in printed


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("some_model", "expected MODULE:CALLABLE"),
        ("no_such_module:build", "cannot import"),
        ("some_model:absent", "cannot import"),
        ("some_model:number", "gives a int, not an nn.Module"),
        ("some_model:sized", "without arguments: sized() missing 1 required"),
    ],
)
def test_fuse_says_what_is_wrong(
    model_path: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    target: str,
    said: str,
) -> None:
    monkeypatch.syspath_prepend(model_path)
    assert command.main(["fuse", target]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_version_and_an_ascii_terminal(model_path: str) -> None:
    """Arrows and × cannot be shown there; nothing may fail for that."""
    code = (
        "import fused, some_model; from fused.__main__ import main, doctor\n"
        "model = fused.Sequential(*some_model.build()); print(model.plan())\n"
        "print(fused.fuse_(model)); main(['fuse', 'some_model:build'])\n"
        "doctor.examine = list; doctor.main()\n"
        "main(['--version'])"
    )
    code = f"import sys; sys.stdout.reconfigure(encoding='ascii')\n{code}"
    done = run_python(code, PYTHONPATH=os.pathsep.join([model_path, PYTHONPATH]))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("linear -> layer -> relu") == 3
    assert done.stdout.splitlines()[-1] == f"fused-lnad {fused.__version__}"
