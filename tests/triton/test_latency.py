"""The first call: a second process compiles nothing, and neither does an import."""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

pytest.importorskip("triton")

NOTHING_YET = """
import sys
import torch
import fused
block = fused.LinearNormAct(8, 8, norm="layer", activation="gelu", dropout=0.1)
block(torch.randn(4, 8)).sum().backward()
print([name for name in sys.modules if name.startswith(("fused.kernels.row", "triton.compiler"))])
"""


@pytest.mark.usefixtures("bench_harness")
@pytest.mark.parametrize("name, least", [("none", 3), ("rms, swiglu", 3)])
def test_the_second_process_compiles_nothing(name: str, least: int, tmp_path: Path) -> None:
    from bench import latency

    given = Namespace(target="sm_90", device="cpu")
    cold = latency.in_new_process(name, given, str(tmp_path))
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.cubin")}
    warm = latency.in_new_process(name, given, str(tmp_path))
    assert len(made) >= least == len(cold["kernels"])
    assert made == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.cubin")}
    assert cold["kernels"] == warm["kernels"]


def test_a_failure_is_told() -> None:
    from bench import latency

    with pytest.raises(RuntimeError, match=r"(?s)layer: .*KeyError: 'sm_1'"):
        latency.in_new_process("layer", Namespace(target="sm_1", device="cpu"), "")


def test_importing_and_cpu_tensors_bring_no_kernel(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", NOTHING_YET], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
