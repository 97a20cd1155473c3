"""The C++ extension: missing, broken, older than the Python code, or alone."""

from __future__ import annotations

import shutil
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from processes import (
    EXTENSION,
    PACKAGE,
    assert_one_warning_per_dtype,
    needs_extension,
    probe,
    run_python,
)

from fused.backends import ops
from fused.backends.schemas import SCHEMAS


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
    with (package / "backends" / "schemas.py").open("a") as file:
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
for path in PATHS:
    torch.ops.load_library(path)
z = torch.randn(5, 16)
row_forward = torch.ops.fused_lnad.row_forward
y, _ = row_forward(z, None, None, None, None, None, 1, 1e-5, 0, 0.0, 0.0, 0)
torch.testing.assert_close(y, torch.nn.functional.layer_norm(z, (16,)))
assert "fused" not in sys.modules
import fused
assert fused.backends.backend.cpu_isa()
y = fused.functional.norm_act(z, norm="layer")
torch.testing.assert_close(y, torch.nn.functional.layer_norm(z, (16,)))
"""


@needs_extension
def test_the_extension_alone_defines_the_operators(tmp_path: Path) -> None:
    """Without the Python package; loaded twice, and another copy of it; then with the package."""
    copy = Path(shutil.copy(EXTENSION, tmp_path))
    for paths in ([EXTENSION, EXTENSION], [copy], [copy, EXTENSION]):
        done = run_python(f"PATHS = {[*map(str, paths)]}\n{ALONE}")
        assert done.returncode == 0, done.stderr


@needs_extension
def test_the_extension_can_be_loaded_after_python_defined_the_operators() -> None:
    done = run_python(
        "import torch, fused\nfrom fused.backends import ops\n"
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
