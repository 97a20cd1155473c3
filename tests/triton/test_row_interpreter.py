"""Runs the tests of interpreted/ in the faithful interpreter, one process a file.

TRITON_INTERPRET has to be set before triton is imported, and compiled kernels cannot live in the
same process. Interpreted kernels run on the CPU: no GPU needed, about 30 ms a program.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton kernels need triton")

FILES = sorted(Path(__file__).with_name("interpreted").glob("test_*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_interpreted(file: Path, pytestconfig: pytest.Config) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    chosen = ["-m", pytestconfig.getoption("-m")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=short", *chosen, str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
