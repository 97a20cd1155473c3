"""The gates on memory close on kernels that read twice, too little, or outside."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from bench.audit.family import in_memory
from bench.audit.gates import GATES
from bench.audit.report import Report
from bench.audit.row_family import FORWARD
from bench.audit.traffic import interpreted


@triton.jit
def _copy_kernel(z_ptr, y_ptr, end, EXTRA: tl.constexpr, BLOCK_N: tl.constexpr):
    column = tl.arange(0, BLOCK_N)
    z = tl.load(z_ptr + column, mask=column < end)
    if EXTRA:
        z += tl.load(z_ptr + column, mask=column < end)
    tl.store(y_ptr + column, z, mask=column < end)


def copied(end: int, extra: bool) -> Report:
    z, y = torch.ones(100), torch.ones(100)
    found = interpreted("copy", lambda: _copy_kernel[(1,)](z, y, end, extra, BLOCK_N=128))
    return Report(streams=found.streams, outside=found.outside)


@pytest.mark.parametrize(
    "end, extra, closed",
    [(100, False, set()), (100, True, {"traffic"}), (99, False, {"traffic"})],
    ids=["once", "twice", "not all"],
)
def test_traffic(end: int, extra: bool, closed: set[str]) -> None:
    report = copied(end, extra)
    assert {name for name in ("traffic", "bounds") if GATES[name](report)} == closed


def test_bounds() -> None:
    report = copied(101, False)
    (complaint,) = GATES["bounds"](report)
    assert "copy, _copy_kernel" in complaint and "404 bytes into z_ptr" in complaint


def test_an_intermediate_result_in_memory_is_seen() -> None:
    """Two launches for what one can do: each reads once, the call moves too much."""
    z, between, y = (torch.ones(100) for _ in range(3))

    def run() -> None:
        _copy_kernel[(1,)](z, between, 100, False, BLOCK_N=128)
        _copy_kernel[(1,)](between, y, 100, False, BLOCK_N=128)

    (complaint,) = GATES["traffic"](Report(streams=interpreted("two", run).streams))
    assert "2.000 times the least" in complaint


def test_a_call_of_a_family() -> None:
    case = FORWARD.ordinary | FORWARD.small["layer"]
    found = interpreted("row forward: layer", lambda: FORWARD.call(case, in_memory))
    assert [(s.argument, s.size) for s in found.streams] == [
        (name, 5 * 200 * 2) for name in ("z_ptr", "residual_ptr", "y_ptr")
    ]
    assert not GATES["traffic"](Report(streams=found.streams))
