"""nvcc compiles the CUDA C++ kernels for GPUs that are not there; what it made of them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fused.backends import cuda_library

ROOT = Path(__file__).resolve().parents[2]
# By TORCH_CUDA_ARCH_LIST; empty stands for what setup.py compiles for by itself.
ARCHITECTURES = {"9.0": {"sm_90"}, "": {"sm_80", "sm_90", "sm_100"}}
KERNELS = {"row_forward", "row_means", "row_gradient", "channel_moments", "channel_forward"}
KERNELS |= {"channel_backward", "gated_forward", "gated_means", "gated_gradient"}
# As nvcc names the storage types inside of names.
TYPES = {"f", "d", "6__half", "13__nv_bfloat16"}
pytestmark = pytest.mark.skipif(
    not shutil.which("nvcc") and not Path("/usr/local/cuda/bin/nvcc").exists(), reason="no nvcc"
)


@pytest.fixture(scope="module", params=["9.0", pytest.param("", marks=pytest.mark.full)])
def architectures(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def built(architectures: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library as setup.py builds it; what is compiled already is not compiled again."""
    folder = tmp_path_factory.mktemp("cuda")
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(folder)],
        cwd=ROOT,
        env=os.environ | {"TORCH_CUDA_ARCH_LIST": architectures, "FUSED_CUDA": "1"},
        capture_output=True,
        text=True,
    )
    path = folder / "fused" / "_cuda.abi3.so"
    assert path.exists(), done.stdout + done.stderr
    assert "warning" not in done.stderr
    return path


def cuobjdump(*arguments: str) -> str:
    triton = pytest.importorskip("triton", reason="cuobjdump comes with triton")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip("this triton has no cuobjdump")
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def functions(listing: str, pattern: str) -> Iterator[tuple[str, str, str, str]]:
    """(architecture, kernel, storage type or empty, what the pattern finds after it)."""
    for section in re.split(r"^arch = ", listing, flags=re.MULTILINE)[1:]:
        architecture = section.split()[0]
        for name, found in re.findall(rf"Function\s*:?\s*(\w+){pattern}", section, re.DOTALL):
            kernel = re.match(r"_ZN5fused4cuda\d+(\w+?)_kernel", name)
            assert kernel, name
            storage = re.search(r"_kernelI(.+?)EEv", name)
            yield architecture, kernel[1], storage[1] if storage else "", found


def test_every_kernel_is_there_and_spills_nothing(built: Path, architectures: str) -> None:
    """Nothing in float32, bfloat16 and float16; float64 may, a little."""
    seen = set()
    for architecture, kernel, storage, usage in functions(
        cuobjdump("-res-usage", str(built)), r":\s*(REG:[^\n]*)"
    ):
        seen.add((architecture, kernel, storage))
        values = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)}
        where = f"{architecture} {kernel} {storage}: {usage}"
        assert values["LOCAL"] == 0 and values["STACK"] <= (32 if storage == "d" else 0), where
        assert values["REG"] <= 128, where  # two blocks to a multiprocessor
    expected = {(a, k, t) for a in ARCHITECTURES[architectures] for k in KERNELS for t in TYPES}
    assert expected <= seen
    assert {k for _, k, t in seen if not t} == {"sum", "channel_merge", "channel_coefficients"}


def test_memory_is_accessed_in_16_bytes(built: Path) -> None:
    """But for the packs of four 16-bit elements of gated backward, which are of 8."""
    listing = cuobjdump("-sass", "-arch", "sm_90", str(built))
    for _, kernel, storage, code in functions(listing, r"(.*?)\.\.\.\.\.\.\.\.\.\."):
        if storage:
            short = kernel in ("gated_means", "gated_gradient") and storage not in ("f", "d")
            assert f"LDG.E.{64 if short else 128}" in code, (kernel, storage)
            writes = kernel not in ("row_means", "gated_means", "channel_moments")
            assert (f"STG.E.{64 if short else 128}" in code) == writes, (kernel, storage)


def test_without_a_gpu_it_loads_and_says_what_is_missing(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(cuda_library, "load", lambda: (cuda_library.Library(built), ""))
    with pytest.raises(RuntimeError, match=r"row_forward cannot be launched: .*(driver|device)"):
        cuda_library.launch("row_forward", torch.empty(0), {}, {"rows": 1, "cols": 1})
