"""What every test starts from: a seed, and the instruction sets that this machine can run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from fused.kernels import tuned

from fused import backend, gemm, small

ISAS = ("avx512", "avx2", "portable")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """FUSED_TEST_SHARD=i/n keeps the i-th of n parts of the tests, for n processes side by side."""
    shard = os.environ.get("FUSED_TEST_SHARD")
    if shard:
        part, parts = map(int, shard.split("/"))
        config.hook.pytest_deselected(
            items=[item for index, item in enumerate(items) if index % parts != part]
        )
        items[:] = items[part::parts]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _kernels_at_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests use small tensors and mean the kernels; test_small.py means small.py."""
    for limits in ("LIMITS", "WITHOUT_NORM"):
        monkeypatch.setattr(small, limits, [0] * len(getattr(small, limits)))


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Forces the C++ kernels to one instruction set."""
    before = backend.cpu_isa()
    if before is None:
        pytest.skip("the C++ extension is not built")
    try:
        backend.set_cpu_isa(request.param)
    except ValueError:
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    backend.set_cpu_isa(before)


@pytest.fixture
def cpp() -> None:
    """Skips where the C++ kernels are missing."""
    if backend.cpu_isa() is None:
        pytest.skip("the C++ extension is not built")


@pytest.fixture(name="backend", params=["cpp", "reference"])
def _backend(request: pytest.FixtureRequest) -> str:
    """A backend to ask for by its name, one that CPU tensors have."""
    if request.param == "cpp" and backend.cpu_isa() is None:
        pytest.skip("the C++ extension is not built")
    return request.param


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads that wait for each other cost small tensors more time than they save."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def bench_harness(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """bench/ can be imported, and the number of threads is restored."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1]))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fused_mode() -> Iterator[None]:
    """FUSED_GEMM=fused."""
    with mock.patch.multiple(gemm, mode="fused", enabled=True):
        yield


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where `FUSED_TUNING` has the rules look for what was measured; there is nothing yet."""
    path = tmp_path / "tuning.json"
    monkeypatch.setenv("FUSED_TUNING", str(path))
    tuned.forget()
    yield path
    tuned.forget()
