"""When the CUDA C++ kernels are chosen, what is said where they are not, and who runs backward."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cases import make_epilogue, make_inputs
from emulated import LAUNCHERS

import fused
from fused.backends import backend, cuda_library, cuda_row, launchers, ops

FLOAT, DOUBLE = torch.float32, torch.float64


@pytest.fixture
def reasons(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """A machine with a GPU, where these backends fail for these reasons, or not at all."""
    found = {"triton": "", "cuda": ""}
    monkeypatch.setattr(backend, "gpu_reason", lambda name, index: found[name])
    monkeypatch.setattr(backend, "_chosen", {})
    monkeypatch.setattr(backend, "_cuda_launchers", {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield found


def test_chosen_where_triton_does_not_serve(reasons: dict[str, str]) -> None:
    assert backend.choose("cuda", FLOAT) == "triton"
    assert backend.choose("cuda", DOUBLE) == "cuda"
    with fused.use_backend("cuda"):
        assert backend.choose("cuda", FLOAT) == "cuda"
        assert backend.choose("cpu", FLOAT) == "reference"
        assert "cuda serves cuda tensors, not cpu" in backend.reason("cpu", FLOAT)
    backend._chosen.clear()
    reasons["triton"] = "triton is not installed"
    assert backend.choose("cuda", FLOAT) == "cuda"
    backend._chosen.clear()
    reasons["cuda"] = "they were not built"
    assert backend.choose("cuda", FLOAT) == "reference"
    assert backend.reason("cuda", FLOAT) == "triton is not installed; they were not built"


def test_operators_take_the_launchers_of_the_backend(reasons: dict[str, str]) -> None:
    assert backend.cuda_launchers(FLOAT, 0) is launchers.TRITON
    own = backend.cuda_launchers(DOUBLE, 0)
    assert set(launchers.TRITON) <= set(ops.OPERATORS)
    # In their place plain torch, or two row operators, serve (test_gate.py, test_add_norm.py).
    missing = {f"{name}_{way}" for name in ("gate", "add_norm") for way in ("forward", "backward")}
    assert set(launchers.TRITON) - set(own) == missing
    assert own["row_forward"] is cuda_row.row_forward
    with fused.use_backend("cuda"):
        assert backend.cuda_launchers(FLOAT, 0) is own
    with fused.use_backend("reference"):  # whoever calls an operator has chosen it before
        assert backend.cuda_launchers(FLOAT, 0) is launchers.TRITON
    backend._cuda_launchers.clear()
    reasons |= {"triton": "no triton", "cuda": "no library"}
    with pytest.raises(RuntimeError, match=r"no kernel serves cuda float32 \(triton: no triton;"):
        backend.cuda_launchers(FLOAT, 0)


@pytest.mark.usefixtures("emulation")
def test_the_operators_implementation_calls_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is registered for the CUDA key, on CPU tensors."""
    asked: list[tuple[torch.dtype, int]] = []

    def found(dtype: torch.dtype, index: int) -> launchers.Launchers:
        asked.append((dtype, index))
        return vars(LAUNCHERS)

    monkeypatch.setattr(backend, "cuda_launchers", found)
    x, codes = make_inputs(3, 8, DOUBLE), make_epilogue("layer", "gelu", 0.1).row
    arguments = (x.z, *x.parameters, x.residual, x.seed, *codes)
    y, statistics = backend._for_cuda("row_forward")(*arguments)
    expected = LAUNCHERS.row_forward(*arguments)
    assert torch.equal(y, expected[0]) and torch.equal(statistics, expected[1])
    z = x.z.clone()
    assert backend._for_cuda("row_forward_")(z, *arguments[1:]) is None
    assert torch.equal(z, y)
    assert asked == [(DOUBLE, -1)] * 2  # -1: the index of CPU tensors


def test_backward_asks_for_what_forward_asked_for() -> None:
    """In a thread of autograd's own, where nothing is asked for."""
    seen: list[str] = []

    def in_thread(asked: str | None) -> None:
        def run() -> None:
            backend.as_asked(asked, lambda: seen.append(backend.requested()))
            seen.append(backend.requested())

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    before = backend.requested()
    in_thread("cuda")
    in_thread(None)
    assert seen == ["cuda", before, before, before]


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    backend.gpu_reason.cache_clear()
    cuda_library.load.cache_clear()
    try:
        assert backend.why_not("cuda", "cuda", FLOAT) == "torch sees no CUDA device"
        backend.gpu_reason.cache_clear()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(cuda_library, "LIBRARY", Path("/nonexistent/_cuda.abi3.so"))
        said = backend.why_not("cuda", "cuda", DOUBLE)
        assert said.startswith("the CUDA C++ kernels were not built; ")
        assert "run 'pip install --no-build-isolation" in said and "FUSED_NO_EXT" not in said
        assert backend.why_not("cuda", "cuda", torch.int64).startswith("cuda serves float32")
        with pytest.raises(RuntimeError, match="fused: the CUDA C\\+\\+ kernels were not built"):
            cuda_library.launch("sum", torch.empty(0), {}, {})
    finally:
        backend.gpu_reason.cache_clear()
        cuda_library.load.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_a_library_that_does_not_load_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "_cuda.abi3.so"
    broken.write_text("not a library")
    monkeypatch.setattr(cuda_library, "LIBRARY", broken)
    cuda_library.load.cache_clear()
    try:
        library, reason = cuda_library.load()
    finally:
        cuda_library.load.cache_clear()
    assert library is None
    assert reason.startswith("the library of the CUDA C++ kernels does not load (")
    monkeypatch.setenv("FUSED_DISABLE_EXT", "1")
    assert cuda_library.load() == (None, "FUSED_DISABLE_EXT=1 is set")
    cuda_library.load.cache_clear()
