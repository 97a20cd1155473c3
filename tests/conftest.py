"""What every test starts from: a seed, and the instruction sets that this machine can run."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields, is_dataclass
from itertools import combinations
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from fused.kernels.tuning import tuned

from fused.backends import backend, gemm
from fused.run import by_torch


def instruction_sets() -> list[str]:
    """Those of the C++ kernels that this machine can run."""
    before, found = backend.cpu_isa(), []
    if before is not None:
        for name in ("avx512", "avx2", "portable"):
            with suppress(ValueError):
                backend.set_cpu_isa(name)
                found.append(name)
        backend.set_cpu_isa(before)
    return found


ISAS = instruction_sets()


def pytest_report_header() -> str:
    return f"C++ kernels: {', '.join(ISAS) or 'not built'}"


@pytest.hookimpl(tryfirst=True)  # before -m is looked at
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks what goes beyond a covering set as `full`, and puts the longest tests first.

    FUSED_TEST_SHARD=i/n keeps the i-th of n parts of the tests, for n processes side by side.
    """
    products: dict[str, list[pytest.Function]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            products.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for product in products.values():
        # Emulated and interpreted threads are slow.
        slow = product[0].path.parent.name in ("cuda", "interpreted")
        once = slow or product[0].get_closest_marker("once")
        for item in beyond_covering(product, 1 if once else 2):
            item.add_marker("full")
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    shard = os.environ.get("FUSED_TEST_SHARD")
    if shard:
        part, parts = map(int, shard.split("/"))
        config.hook.pytest_deselected(
            items=[item for index, item in enumerate(items) if index % parts != part]
        )
        items[:] = items[part::parts]


def beyond_covering(product: list[pytest.Function], strength: int) -> list[pytest.Function]:
    """The cases of one test that are left out of a covering set.

    With strength 2 every value of a property meets every value of every other one in the cases that
    stay, as in bench/audit/covering.py; with strength 1 every value occurs.
    """
    values = [properties_of(item.callspec.params) for item in product]
    met = [frozenset(combinations(case, strength)) for case in values]
    missing, left = frozenset[Any]().union(*met), list(range(len(product)))
    while missing:
        # Of several that bring as much, one from far away: neighbours are alike.
        best = max(left, key=lambda case: (len(met[case] & missing), case * 7919 % len(product)))
        missing -= met[best]
        left.remove(best)
    return [product[case] for case in left] if len(values[0]) > strength else []


def properties_of(parameters: dict[str, Any]) -> list[tuple[str, str]]:
    """The parameters of a test by their names; those of a case that is a dataclass one by one."""
    found = []
    for name, value in parameters.items():
        if is_dataclass(value):
            found += [(f.name, repr(getattr(value, f.name))) for f in fields(value)]
        else:
            found.append((name, repr(value)))
    return found


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _kernels_at_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests use small tensors and mean the kernels; test_small.py means by_torch.py."""
    for limits in ("LIMITS", "WITHOUT_NORM"):
        monkeypatch.setattr(by_torch, limits, dict.fromkeys(getattr(by_torch, limits), 0))


@pytest.fixture(params=ISAS or [None])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Forces the C++ kernels to one instruction set."""
    before = backend.cpu_isa()
    if before is None:
        pytest.skip("the C++ extension is not built")
    backend.set_cpu_isa(request.param)
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
def log() -> Iterator[Any]:
    """What the graph pass says of each chain: a `reach.Log`."""
    from reach import Log  # not there where only this file is copied to

    handler, logger = Log(), logging.getLogger("fused.graph")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing is compiled yet, and random numbers are the same every time."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield


@pytest.fixture
def fused_mode() -> Iterator[None]:
    """FUSED_GEMM=fused."""
    with mock.patch.multiple(gemm, mode="fused", enabled=True):
        yield


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the rules look for what was measured; there is nothing yet."""
    path = tmp_path / "fused" / "tuning.json"
    path.parent.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("FUSED_TUNING", raising=False)
    tuned.forget()
    yield path
    tuned.forget()
