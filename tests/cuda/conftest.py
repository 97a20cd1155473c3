"""The fixtures by which tests of the C++ kernels run on the emulated CUDA C++ kernels instead."""

from __future__ import annotations

import sys
from typing import Any

import emulated
import pytest
import torch

from fused.backends import cuda_library

# Modules of tests/ that call the operators.
CALLERS = ("cases", "channel_cases", "test_row_memory", "test_gated", "test_channel")
CALLERS += ("test_channel_memory",)


@pytest.fixture
def emulation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators' callers get the launchers, on CPU tensors, with outputs that begin as NaN."""
    if emulated.compiler() is None:
        pytest.skip("no C++ compiler")
    library = emulated.library()
    monkeypatch.setattr(cuda_library, "load", lambda: (library, ""))
    for name in CALLERS:
        if name in sys.modules:
            monkeypatch.setattr(sys.modules[name], "ops", emulated.LAUNCHERS)
    new_empty = torch.Tensor.new_empty

    def poisoned(t: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return new_empty(t, *args, **kwargs).fill_(float("nan"))

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


@pytest.fixture
def isa(emulation: None) -> str:
    return "emulated"


@pytest.fixture
def cpp(emulation: None) -> None:
    pass
