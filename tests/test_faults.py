"""Something is missing, broken or unwritable: right numbers all the same, or one clear sentence.

Each case runs in a process of its own. The probe there compares the public functions and modules
with nn.Sequential in float64, and reports the warnings it saw.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import fused
from fused import ops
from fused.schemas import SCHEMAS

PACKAGE = Path(fused.__file__).parent
EXTENSION = PACKAGE / "_C.abi3.so"

PROBE = """
import json, sys, warnings
{prelude}
import torch
from torch import nn
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fused

    device = {device!r}
    torch.manual_seed(0)
    error = 0.0
    for dtype, norm in ((torch.float32, nn.LayerNorm(48)), (torch.float32, nn.RMSNorm(48)),
                        (torch.bfloat16, nn.LayerNorm(48))):
        plain = nn.Sequential(nn.Linear(32, 48), norm, nn.GELU()).double().to(device)
        model = fused.Sequential(nn.Linear(32, 48), type(norm)(48), nn.GELU()).to(device)
        model.load_state_dict(plain.state_dict())
        model.to(dtype)
        plain.load_state_dict(model.state_dict())
        x = torch.randn(7, 32, device=device, dtype=dtype, requires_grad=True)
        x64 = x.detach().double().requires_grad_()
        for _ in range(3):
            y, y64 = model(x), plain(x64)
        y.backward(torch.ones_like(y))
        y64.backward(torch.ones_like(y64))
        pairs = [(y, y64), (x.grad, x64.grad)]
        pairs += [(p.grad, q.grad) for p, q in zip(model.parameters(), plain.parameters())]
        ulp = torch.finfo(dtype).eps
        for got, want in pairs:
            worst = (got.double() - want).abs().max() / want.abs().max()
            error = max(error, float(worst) / ulp)

    z = torch.randn(9, 40, device=device)
    seed = torch.tensor([1234567], device=device)
    dropped = fused.functional.norm_act(z, norm="layer", activation="relu", p=0.25, seed=seed)
    keep = fused.functional.dropout_mask(9, 40, 0.25, seed)
    want = torch.relu(nn.functional.layer_norm(z, (40,))) * keep / 0.75
    torch.testing.assert_close(dropped, want)
{after}
    print(json.dumps({{
        "ulps": error,
        "package": fused.__file__,
        "isa": fused.backend.cpu_isa(),
        "triton": "triton" in sys.modules and sys.modules["triton"] is not None,
        "warnings": [str(w.message) for w in caught if "fused" in str(w.message)],
    }}))
"""


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONSAFEPATH": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def probe(prelude: str = "", after: str = "", device: str = "cpu", **environment: str) -> Any:
    """Runs the probe and checks its numbers; returns its report."""
    indented = "\n".join(f"    {line}" for line in after.splitlines())
    code = PROBE.format(prelude=prelude, after=indented, device=device)
    done = run_python(code, **environment)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["ulps"] < 64, report  # relative to the largest element; a wrong formula is 1e5
    return report


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the installed package, for PYTHONPATH, without the extension."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "kernels")
    shutil.copytree(PACKAGE, tmp_path / "fused", ignore=ignore)
    spec = find_spec("fused.kernels")
    assert spec is not None and spec.submodule_search_locations
    kernels = tmp_path / "fused" / "kernels"
    shutil.copytree(next(iter(spec.submodule_search_locations)), kernels, ignore=ignore)
    return tmp_path / "fused"


needs_extension = pytest.mark.skipif(not EXTENSION.exists(), reason="the extension is not built")


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
        "from fused import backend; print(backend.why_not('triton', 'cuda', torch.float32))"
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
from fused import backend

FAILURES = [
    RuntimeError("0 active drivers ([]). There should only be one."),
    subprocess.CalledProcessError(1, ["gcc", "driver.c"]),
    PermissionError(13, "Permission denied", "/home/nobody/.triton"),
    ImportError("libcuda.so.1: cannot open shared object file"),
    triton.errors.TritonError("ptxas failed"),
]

def row_forward(*args, **kwargs):
    raise FAILURES[0]

kernels, row = types.ModuleType("fused.kernels"), types.ModuleType("fused.kernels.row")
kernels.row, row.row_forward = row, row_forward
sys.modules |= {"fused.kernels": kernels, "fused.kernels.row": row}
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


# ---- the extension ----


def assert_one_warning_per_dtype(report: Any, reason: str) -> None:
    assert report["isa"] is None
    assert len(report["warnings"]) == 2, report["warnings"]
    for dtype, warning in zip(("float32", "bfloat16"), report["warnings"], strict=True):
        assert warning.startswith(f"fused: cpu {dtype} runs in plain torch")
        assert reason in warning
        assert "\n" not in warning


def test_extension_disabled() -> None:
    assert_one_warning_per_dtype(probe(FUSED_DISABLE_EXT="1"), "FUSED_DISABLE_EXT=1 is set")


def test_extension_missing(package: Path) -> None:
    report = probe(PYTHONPATH=str(package.parent))
    assert report["package"].startswith(str(package))
    assert_one_warning_per_dtype(report, "pip install --no-build-isolation")


@pytest.mark.parametrize("content", ["garbage", "cut off", "another library"])
def test_extension_corrupt(package: Path, content: str) -> None:
    """A broken copy, or a library of another version that lacks what the package calls."""
    broken = package / "_C.abi3.so"
    if content == "another library":
        modules = Path(sysconfig.get_path("stdlib")) / "lib-dynload"
        libraries = sorted(modules.glob("_bisect*.so"))
        if not libraries:
            pytest.skip("this Python has no extension modules of its own")
        shutil.copy(libraries[0], broken)
    elif content == "cut off" and EXTENSION.exists():
        broken.write_bytes(EXTENSION.read_bytes()[:40])
    else:
        broken.write_bytes(b"not a library" * 100)
    report = probe(PYTHONPATH=str(package.parent))
    assert report["package"].startswith(str(package))
    assert_one_warning_per_dtype(report, "pip install --no-build-isolation")


@needs_extension
@pytest.mark.parametrize("change", ["new operator", "new argument", "no schemas"])
def test_extension_of_older_sources(package: Path, change: str) -> None:
    """A library that lacks an operator, or defines one otherwise, or none at all."""
    content = EXTENSION.read_bytes()
    if change == "no schemas":
        for name in SCHEMAS:
            content = content.replace(
                b"\0" + name.encode() + b"(Tensor", b"\0" + b" " * len(name) + b"(Tensor"
            )
    (package / "_C.abi3.so").write_bytes(content)
    lacks = "row_new" if change == "new operator" else "row_forward"
    with (package / "schemas.py").open("a") as file:
        if change == "new operator":
            file.write('SCHEMAS["row_new"] = "row_new(Tensor z) -> Tensor"\n')
        elif change == "new argument":
            file.write('SCHEMAS["row_forward"] = SCHEMAS["row_forward"].replace("z", "z, int n")\n')
    defined = "assert torch.ops.fused_lnad.row_forward.default"
    report = probe(PYTHONPATH=str(package.parent), after=defined)
    assert report["package"].startswith(str(package))
    assert_one_warning_per_dtype(report, f"is older than the Python code (no {lacks}")


ALONE = """
import sys, torch
for path in sys.argv[1:]:
    torch.ops.load_library(path)
z = torch.randn(5, 16)
row_forward = torch.ops.fused_lnad.row_forward
y, _ = row_forward(z, None, None, None, None, None, 1, 1e-5, 0, 0.0, 0.0, 0)
torch.testing.assert_close(y, torch.nn.functional.layer_norm(z, (16,)))
assert "fused" not in sys.modules
import fused
assert fused.backend.cpu_isa()
y = fused.functional.norm_act(z, norm="layer")
torch.testing.assert_close(y, torch.nn.functional.layer_norm(z, (16,)))
"""


@needs_extension
def test_the_extension_alone_defines_the_operators(tmp_path: Path) -> None:
    """Without the Python package; loaded twice, and another copy of it; then with the package."""
    copy = Path(shutil.copy(EXTENSION, tmp_path))
    for paths in ([EXTENSION, EXTENSION], [copy], [copy, EXTENSION]):
        done = subprocess.run(
            [sys.executable, "-c", ALONE, *map(str, paths)],
            env=os.environ | {"PYTHONSAFEPATH": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr


@needs_extension
def test_the_extension_can_be_loaded_after_python_defined_the_operators() -> None:
    done = run_python(
        "import torch, fused\nfrom fused import ops\n"
        f"torch.ops.load_library({str(EXTENSION)!r})\n"
        "z = torch.randn(5, 16)\n"
        "print(ops.row_forward(z, *[None] * 5, 1, 1e-5, 0, 0.0, 0.0, 0)[0].shape)\n",
        FUSED_DISABLE_EXT="1",
    )
    assert done.stdout.strip() == "torch.Size([5, 16])", done.stderr


@needs_extension
def test_errors_of_the_extension_do_not_tell_where_it_was_built() -> None:
    z = torch.randn(4, 8)
    with pytest.raises(RuntimeError) as caught:
        ops.row_forward(z.t(), *[None] * 5, 1, 1e-5, 0, 0.0, 0.0, 0)
    assert str(caught.value) == "fused: z must have contiguous rows"
    with pytest.raises(RuntimeError) as caught:
        ops.channel_apply(z, *[None] * 7, 0, 1, False, 1e-5, 0, 0.0, 0.0, 0, False)
    assert str(caught.value).startswith("fused: ") and "csrc" not in str(caught.value)


@needs_extension
def test_extension_without_an_activation(package: Path) -> None:
    shutil.copy(EXTENSION, package)
    with (package / "spec.py").open("a") as file:
        file.write('ACTIVATION_NAMES[max(ACTIVATION_NAMES) + 1] = "new_glu"\n')
    report = probe(PYTHONPATH=str(package.parent))
    assert_one_warning_per_dtype(report, "is older than the Python code (no new_glu); install")


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
    done = run_python("import fused\nprint(fused.backend.cpu_isa())", **{name: value})
    isa = done.stdout.strip()
    assert isa in ("avx512", "avx2", "portable")
    (warning,) = [line for line in done.stderr.splitlines() if "Warning: " in line]
    assert f"UserWarning: fused: {name}={value!r} is not" in warning
    assert warning.endswith(f"; {used or isa} is used")


FORCED = """
import torch
import torch.nn.functional as F
from fused import backend, functional

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
    done = run_python("from fused import backend; print(backend.requested())", FUSED_BACKEND="")
    assert (done.returncode, done.stdout.strip()) == (0, "auto"), done.stderr
