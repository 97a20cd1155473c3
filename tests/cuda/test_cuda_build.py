"""What setup.py asks of nvcc, by a stand-in that writes it down; what it says where that fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Knows two architectures, notes what it is asked to compile, and fails.
NVCC = """#!/bin/sh
case "$1" in
  --version) echo stand-in; exit 0;;
  --list-gpu-arch) echo compute_80; echo compute_90; exit 0;;
esac
echo "$@" >> "$(dirname "$0")/asked"
echo "no such luck" >&2
exit 1
"""


def build(tmp_path: Path, **environment: str) -> tuple[str, str]:
    """What the stand-in was asked, and what the build said."""
    nvcc = tmp_path / "cuda/bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    given = {k: v for k, v in os.environ.items() if k != "TORCH_CUDA_ARCH_LIST"}
    given |= {"CUDA_HOME": str(tmp_path / "cuda"), "FUSED_CUDA": "1"} | environment
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path / "lib")],
        cwd=ROOT,
        env=given,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "lib/fused/_cuda.abi3.so").exists()
    asked = nvcc.with_name("asked")
    return asked.read_text() if asked.exists() else "", done.stderr


@pytest.mark.parametrize(
    ("listed", "targets"),
    [
        ("", ["80,code=sm_80", "90,code=sm_90", "90,code=compute_90"]),
        ("8.6;12.0a+PTX", ["86,code=sm_86", "120a,code=sm_120a", "120a,code=compute_120a"]),
        ("7.5", ["75,code=sm_75"]),
    ],
)
def test_architectures(tmp_path: Path, listed: str, targets: list[str]) -> None:
    asked, said = build(tmp_path, TORCH_CUDA_ARCH_LIST=listed)
    first = asked.splitlines()[0].split()
    prefix = "-gencode=arch=compute_"
    assert [f.removeprefix(prefix) for f in first if f.startswith(prefix)] == targets
    assert "no such luck" in said
    assert said.count("installing without the CUDA C++ kernels") == 1


def test_an_architecture_that_is_none_is_said(tmp_path: Path) -> None:
    asked, said = build(tmp_path, TORCH_CUDA_ARCH_LIST="9.0;Hopper")
    assert not asked
    assert "TORCH_CUDA_ARCH_LIST" in said and "'Hopper'" in said
    assert "installing without the CUDA C++ kernels" in said


def test_off(tmp_path: Path) -> None:
    asked, said = build(tmp_path, FUSED_CUDA="0")
    assert not asked and "CUDA" not in said
