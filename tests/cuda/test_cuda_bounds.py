"""The CUDA C++ kernels, emulated, read nothing beyond the end of a tensor.

Each input ends where a page begins that must not be touched: reading it ends the process.
"""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import fields
from typing import Any

import cases
import channel_cases
import gated_cases
import pytest
import torch

pytestmark = pytest.mark.usefixtures("emulation")
_kept: list[mmap.mmap] = []


def at_the_end(t: torch.Tensor) -> torch.Tensor:
    """A copy of t whose last byte is the last before a page that must not be touched."""
    size = t.numel() * t.element_size()
    pages = -(-size // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    _kept.append(memory)
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + pages * mmap.PAGESIZE
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(end), mmap.PAGESIZE, 0) == 0
    buffer = (ctypes.c_char * size).from_address(end - size)
    return torch.frombuffer(buffer, dtype=t.dtype).view(t.shape).copy_(t)


def moved(inputs: Any) -> Any:
    """The same inputs, each of them at the end of its memory."""
    given = {f.name: getattr(inputs, f.name) for f in fields(inputs)}
    return type(inputs)(**{k: None if t is None else at_the_end(t) for k, t in given.items()})


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("norm", cases.NORMS)
def test_rows(norm: str | None, dtype: torch.dtype) -> None:
    epilogue = cases.make_epilogue(norm, "gelu", 0.1)
    for rows, cols in ((3, 1), (5, 7), (4, 64), (2, 1001), (1, 9000)):
        inputs = cases.make_inputs(rows, cols, dtype, norm)
        expected = cases.run_operator(inputs, epilogue)
        for name, t in cases.run_operator(moved(inputs), epilogue).items():
            # An odd size puts the others where packs of 16 bytes do not fit, too.
            torch.testing.assert_close(t, expected[name], msg=name)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("norm", cases.NORMS)
def test_gated_rows(norm: str | None, dtype: torch.dtype) -> None:
    epilogue = gated_cases.make_gated_epilogue(norm, "geglu", 0.1)
    for rows, half in ((3, 1), (5, 7), (4, 64), (2, 1001), (1, 4500)):
        inputs = gated_cases.make_gated_inputs(rows, half, dtype, norm)
        expected = cases.run_operator(inputs, epilogue)
        for name, t in cases.run_operator(moved(inputs), epilogue).items():
            torch.testing.assert_close(t, expected[name], msg=name)


@pytest.mark.parametrize("dtype", channel_cases.DTYPES, ids=str)
@pytest.mark.parametrize("last", channel_cases.LAYOUTS)
@pytest.mark.parametrize("norm", channel_cases.NORMS)
def test_channels(norm: str | None, last: bool, dtype: torch.dtype) -> None:
    for sizes in ((3, 6, 7), (2, 8, 64), (2, 6, 8200), (5, 130, 1)):
        epilogue = channel_cases.make_epilogue(norm, "gelu", 0.1, sizes[1], 2, last)
        inputs = channel_cases.make_inputs(*sizes, dtype, norm, last, masked=last)
        expected = channel_cases.run_operator(inputs, epilogue)
        for name, t in channel_cases.run_operator(moved(inputs), epilogue).items():
            torch.testing.assert_close(t, expected[name], msg=name)
