"""Which backend is asked for: per thread and task, over the process's default."""

from __future__ import annotations

import asyncio
import threading
import warnings

import pytest
import torch

import fused
from fused import backend, functional


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
