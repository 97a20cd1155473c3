"""Runs the tests of interpreted/ in the faithful interpreter, in two processes of their own.

TRITON_INTERPRET has to be set before triton is imported, and compiled kernels cannot live in the
same process. Interpreted kernels run on the CPU: no GPU needed.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton kernels need triton")

FILES = sorted(map(str, Path(__file__).with_name("interpreted").glob("test_*.py")))


@pytest.mark.slow
@pytest.mark.parametrize("files", [FILES[::2], FILES[1::2]], ids=["even", "odd"])
def test_interpreted(files: list[str], pytestconfig: pytest.Config) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    chosen = ["-m", pytestconfig.getoption("-m")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=short", *chosen, *files]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
