"""What every test starts from: a seed, and the instruction sets that this machine can run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from itertools import combinations
from pathlib import Path
from unittest import mock

import pytest
import torch
from fused.kernels import tuned

from fused import backend, gemm, small

ISAS = ("avx512", "avx2", "portable")


def _values(item: pytest.Item) -> list[tuple[str, str]]:
    """The parameters of a test's case; those of a dataclass are its fields."""
    callspec = getattr(item, "callspec", None)
    found = {}
    for name, value in (callspec.params if callspec else {}).items():
        if is_dataclass(value):
            found |= {f"{name}.{f.name}": repr(getattr(value, f.name)) for f in fields(value)}
        else:
            found[name] = repr(value)
    return sorted(found.items())


def _covering(items: list[pytest.Item]) -> set[pytest.Item]:
    """Of each test as many cases as it takes until every pair of its parameters' values has met."""
    functions: dict[tuple[object, str], list[tuple[pytest.Item, set[object]]]] = {}
    for item in items:
        values = _values(item)
        pairs: set[object] = set(combinations(values, 2)) if len(values) > 1 else set(values)
        name = getattr(item, "originalname", item.name)
        functions.setdefault((item.path, name), []).append((item, pairs))
    kept = set()
    for cases in functions.values():
        missing = set().union(*(pairs for _, pairs in cases))
        while True:
            best, new = max(cases, key=lambda case: len(case[1] & missing))
            kept.add(best)
            missing -= new
            if not missing:
                break
    return kept


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """FUSED_TEST_COVER=1 keeps a covering set of each test's cases, "rest" what it leaves out;
    FUSED_TEST_SHARD=i/n the i-th of n parts, for n processes side by side.
    """
    chosen = list(items)
    cover, shard = os.environ.get("FUSED_TEST_COVER"), os.environ.get("FUSED_TEST_SHARD")
    if cover:
        kept = _covering(items)
        chosen = [item for item in items if (item in kept) == (cover != "rest")]
    if shard:
        part, parts = map(int, shard.split("/"))
        chosen = chosen[part::parts]
    if len(chosen) < len(items):
        left = set(chosen)
        config.hook.pytest_deselected(items=[item for item in items if item not in left])
        items[:] = chosen


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
