"""Which backend is asked for: per thread and task, over the process's default."""

from __future__ import annotations

import asyncio
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fused
from fused import functional
from fused.backends import backend, first_kernel


def test_blocks_that_overlap_in_two_threads() -> None:
    opened, closed = threading.Event(), threading.Event()
    seen: list[str] = []

    def other() -> None:
        seen.append(backend.requested())  # not what the thread that started it asks for
        with fused.use_backend("cpp"):
            opened.set()
            closed.wait()
            seen.append(backend.requested())
        seen.append(backend.requested())

    thread = threading.Thread(target=other)
    before = backend.requested()
    with fused.use_backend("reference"):
        thread.start()
        opened.wait()
        assert backend.requested() == "reference"
    closed.set()
    thread.join()
    assert seen == [before, "cpp", before]
    assert backend.requested() == before
    assert backend._open_requests == ()


def test_tasks_do_not_disturb_each_other() -> None:
    async def ask(name: str) -> str:
        with fused.use_backend(name):
            await asyncio.sleep(0)
            return backend.requested()

    async def both() -> list[str]:
        return await asyncio.gather(ask("reference"), ask("cpp"))

    assert asyncio.run(both()) == ["reference", "cpp"]


def test_an_error_inside_a_block_ends_it() -> None:
    before = backend.requested()
    with pytest.raises(KeyError), fused.use_backend("reference"):
        raise KeyError
    assert backend.requested() == before


def test_the_reason_says_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_chosen", {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with fused.use_backend("reference"):
            assert "'reference' is asked for" in backend.reason("cpu", torch.float32)
        with fused.use_backend("triton"):
            assert backend.reason("cpu", torch.float32) == (
                "triton serves cuda tensors, not cpu, and backend 'triton' is asked for"
            )
        assert backend.reason("meta", torch.float32) == "no kernel serves meta"
        assert "cpp serves float32" in backend.reason("cpu", torch.float8_e5m2)


def test_a_backend_that_cannot_serve_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_chosen", {})
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            with fused.use_backend("triton"):
                functional.norm_act(torch.randn(2, 4), activation="relu")
    assert len(seen) == 1 and "triton serves cuda tensors, not cpu" in str(seen[0].message)


# ---- GPUs, which here are made up ----


class FakeGPUs:
    """torch.cuda with four GPUs of which 2 is current; what is done with them in `seen`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current, self.seen = 2, []  # type: tuple[int, list[str]]
        self.wrong: set[int] = set()
        self.capturing = False
        arange = torch.arange
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "device", self.device)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda i: self.seen.append(f"wait {i}"))

        def on_device(*args: float, device: str) -> Tensor:
            self.seen.append(device)
            return arange(*args)

        monkeypatch.setattr(torch, "arange", on_device)
        monkeypatch.setattr(first_kernel, "find_spec", lambda name: name)
        monkeypatch.setattr(first_kernel, "TRITON", {"row_forward": self.row_forward})
        for name in ("_chosen", "_cuda_launchers"):
            monkeypatch.setattr(backend, name, {})

    @contextmanager
    def device(self, index: int) -> Iterator[None]:
        before, self.current = self.current, index
        yield
        self.current = before

    def row_forward(self, z: Tensor, *args: object) -> tuple[Tensor, Tensor]:
        self.seen.append(f"launch on {self.current}")
        y = torch.nn.functional.layer_norm(z, (16,))
        return (y.neg() if self.current in self.wrong else y), z


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGPUs]:
    backend.gpu_reason.cache_clear()
    yield FakeGPUs(monkeypatch)
    backend.gpu_reason.cache_clear()


def test_the_first_kernel_of_each_gpu_is_waited_for_and_compared(gpus: FakeGPUs) -> None:
    gpus.wrong = {1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert backend.choose("cuda", torch.float32, 3) == "triton"
        assert gpus.seen == ["cuda:3", "launch on 3", "wait 3"], "no other GPU is touched"
        for _ in range(2):
            assert backend.choose("cuda", torch.bfloat16, 3) == "triton"
            assert backend.choose("cuda", torch.float32, 1) == "reference"
        assert gpus.seen[3:] == ["cuda:1", "launch on 1", "wait 1"], "once on each"
        assert "first Triton kernel failed (its values are wrong by up to 3.3" in backend.reason(
            "cuda", torch.float32, 1
        )
    assert backend.cuda_launchers(torch.float32, 3) is backend.TRITON
    with pytest.raises(RuntimeError, match="no kernel serves cuda float32"):
        backend.cuda_launchers(torch.float32, 1)
    del gpus.seen[:]
    assert backend.choose("cuda", torch.float32) == "triton"
    assert gpus.seen == ["cuda:2", "launch on 2", "wait 2"], "where none is said: the current one"


def test_a_first_kernel_inside_an_export(gpus: FakeGPUs) -> None:
    """Its tensors are real, where those that are exported are not."""
    with FakeTensorMode():
        assert backend.why_not("triton", "cuda", torch.float32, 0) == ""
    assert gpus.seen == ["cuda:0", "launch on 0", "wait 0"]


def test_a_captured_stream_is_not_waited_for(gpus: FakeGPUs) -> None:
    gpus.capturing = True
    assert backend.why_not("triton", "cuda", torch.float32, 0) == ""
    assert gpus.seen == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_first_kernel_that_gives_no_number(
    gpus: FakeGPUs, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    made: Callable[..., object] = lambda z, *args: (torch.full_like(z, value), z)  # noqa: E731
    monkeypatch.setattr(first_kernel, "TRITON", {"row_forward": made})
    assert "its values are wrong" in backend.why_not("triton", "cuda", torch.float32, 0)


def test_a_fault_that_shows_when_it_is_waited_for(
    gpus: FakeGPUs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(index: int) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\n...")

    monkeypatch.setattr(torch.cuda, "synchronize", fault)
    assert backend.why_not("triton", "cuda", torch.float32, 0) == (
        "a first Triton kernel failed (CUDA error: an illegal memory access was encountered);"
        " check the driver and the C compiler"
    )
