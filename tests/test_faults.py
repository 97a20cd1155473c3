"""Something is missing, broken or unwritable: right numbers all the same, or one clear sentence.

Each case runs in a process of its own. The probe there compares the public functions and modules
with nn.Sequential in float64, and reports the warnings it saw.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from processes import (
    EXTENSION,
    needs_extension,
    probe,
    run_python,
)


def test_probe_itself_is_quiet_when_nothing_is_broken() -> None:
    report = probe()
    if EXTENSION.exists():
        assert report["warnings"] == []
        assert report["isa"] is not None
    assert not report["triton"], "CPU tensors must not cost an import of triton"


# ---- triton ----


def test_no_triton() -> None:
    report = probe(prelude="sys.modules['triton'] = None")
    assert not EXTENSION.exists() or report["warnings"] == []


def test_no_triton_where_there_is_a_gpu() -> None:
    done = run_python(
        "import sys; sys.modules['triton'] = None\n"
        "import torch; torch.cuda.is_available = lambda: True\n"
        "torch.cuda.current_device = lambda: 0\n"
        "from fused.backends import backend as b; print(b.why_not('triton', 'cuda', torch.float32))"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "triton is not installed; run 'pip install triton'"


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_triton_without_a_driver() -> None:
    """What a CPU machine with triton installed looks like; asking for triton says why not."""
    report = probe(prelude="import triton", CUDA_VISIBLE_DEVICES="", FUSED_BACKEND="triton")
    # One sentence for each dtype, however many calls.
    assert len(report["warnings"]) == 2, report["warnings"]
    for warning in report["warnings"]:
        assert "plain torch" in warning
        assert "triton" in warning


FIRST_LAUNCH = """
import contextlib, subprocess, sys, types, torch, triton.errors, fused
from fused.backends import backend

FAILURES = [
    RuntimeError("0 active drivers ([]). There should only be one."),
    subprocess.CalledProcessError(1, ["gcc", "driver.c"]),
    PermissionError(13, "Permission denied", "/home/nobody/.triton"),
    ImportError("libcuda.so.1: cannot open shared object file"),
    triton.errors.TritonError("ptxas failed"),
]

def row_forward(*args, **kwargs):
    raise FAILURES[0]

names = ("fused.kernels", "fused.kernels.row", "fused.kernels.row.forward")
sys.modules |= {name: types.ModuleType(name) for name in names}
sys.modules[names[-1]].row_forward = row_forward
arange = torch.arange
torch.arange = lambda *args, device=None, **kwargs: arange(*args, **kwargs)
torch.cuda.is_available = lambda: True
torch.cuda.current_device = lambda: 0
torch.cuda.device = lambda index: contextlib.nullcontext()
torch.cuda.is_current_stream_capturing = lambda: False
while FAILURES:
    backend.gpu_reason.cache_clear()
    print(backend.why_not("triton", "cuda", torch.float32))
    FAILURES.pop(0)
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_triton_that_fails_at_the_first_launch() -> None:
    """No compiler, no Python headers, no cache folder: Triton raises all kinds of exceptions."""
    done = run_python(FIRST_LAUNCH)
    assert done.returncode == 0, done.stderr
    sentences = done.stdout.strip().splitlines()
    assert len(sentences) == 5
    assert all(sentence.startswith("a first Triton kernel failed (") for sentence in sentences)


@needs_extension
@pytest.mark.parametrize(
    ("name", "value", "used"),
    [
        ("FUSED_CPU_ISA", "sse9", ""),
        *(("FUSED_CPU_CACHE_MB", value, "512") for value in ("foo", "-5", "", "512MB", "9" * 30)),
    ],
)
def test_what_a_variable_cannot_be_is_said_once_and_ignored(
    name: str, value: str, used: str
) -> None:
    done = run_python("import fused\nprint(fused.backends.backend.cpu_isa())", **{name: value})
    isa = done.stdout.strip()
    assert isa in ("avx512", "avx2", "portable")
    (warning,) = [line for line in done.stderr.splitlines() if "Warning: " in line]
    assert f"UserWarning: fused: {name}={value!r} is not" in warning
    assert warning.endswith(f"; {used or isa} is used")


FORCED = """
import torch
import torch.nn.functional as F
from fused import functional
from fused.backends import backend

torch.manual_seed(0)
z = torch.randn(37, 65)
with backend.use_backend("cpp"):
    y = functional.norm_act(z, norm="layer", activation="gelu")
error = (y - F.gelu(F.layer_norm(z.double(), (65,)))).abs().max()
assert error < 2e-6, error
print(backend.cpu_isa())
"""


@needs_extension
def test_the_environment_chooses_the_instruction_set(isa: str) -> None:
    done = run_python(FORCED, FUSED_CPU_ISA=isa)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == isa


# ---- surroundings ----

# A path below a file cannot be made, not even by root.
UNWRITABLE = {"TRITON_CACHE_DIR": f"{__file__}/triton", "HOME": f"{__file__}/home"}


def test_unwritable_cache_and_home() -> None:
    report = probe(**UNWRITABLE)
    assert not EXTENSION.exists() or report["warnings"] == []


def test_no_compiler_on_the_path(tmp_path: Path) -> None:
    report = probe(PATH=str(tmp_path))
    assert not EXTENSION.exists() or report["warnings"] == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("broken", ["cache", "compiler", "triton"])
def test_gpu_falls_back(broken: str, tmp_path: Path) -> None:
    """Right numbers on the GPU without a cache folder, a C compiler or triton itself."""
    environment = {"TRITON_CACHE_DIR": str(tmp_path / "triton")}
    if broken == "cache":
        environment = UNWRITABLE
    elif broken == "compiler":
        environment |= {"PATH": str(tmp_path), "CC": "/nonexistent/cc"}
    prelude = "sys.modules['triton'] = None" if broken == "triton" else ""
    report = probe(prelude=prelude, device="cuda", **environment)
    assert all("plain torch" in warning for warning in report["warnings"])
    if broken == "triton":
        assert any("pip install triton" in warning for warning in report["warnings"])


def test_unknown_backend_lists_the_known_ones() -> None:
    done = run_python("import fused", FUSED_BACKEND="fast")
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1] == (
        "ValueError: unknown backend 'fast'; known: auto, triton, cuda, cpp, reference"
    )


def test_an_empty_request_is_none() -> None:
    done = run_python(
        "from fused.backends import backend as b; print(b.requested())", FUSED_BACKEND=""
    )
    assert (done.returncode, done.stdout.strip()) == (0, "auto"), done.stderr
