"""Large CPU outputs come from a cache of blocks that were used before."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fused import ops
from fused.dispatch import make_codes

pytestmark = pytest.mark.usefixtures("cpp")
RELU = make_codes(None, 0.0, "relu", 0.0)
LARGE = (1536, 1024)  # 6 MiB of float32


def relu(x: torch.Tensor) -> torch.Tensor:
    return ops.row_forward(x, None, None, None, None, None, *RELU)[0]


def test_a_freed_block_serves_the_next_output() -> None:
    x = torch.randn(LARGE)
    y = relu(x)
    address = y.data_ptr()
    assert address % (2 << 20) == 0  # huge pages
    view = y[3:]
    del y
    again = relu(x)  # the view keeps the block
    assert again.data_ptr() != address
    assert torch.equal(view, x[3:].relu()) and torch.equal(again, x.relu())
    del view
    assert relu(-x).data_ptr() == address


def test_a_much_smaller_output_takes_another_block() -> None:
    y = relu(torch.randn(8 * LARGE[0], LARGE[1]))
    address = y.data_ptr()
    del y
    assert relu(torch.randn(LARGE)).data_ptr() != address


def test_tensors_outlive_the_interpreter_and_the_cache_can_be_off() -> None:
    program = """
import torch
from fused import ops
from fused.dispatch import make_codes
x = torch.randn(9000, 1024)
keep = [ops.row_forward(x, None, None, None, None, None, *make_codes(None, 0.0, "relu", 0.0))[0]
        for _ in range(3)]
assert all(torch.equal(y, x.relu()) for y in keep)
print("done")
"""
    for megabytes in ("0", "512", "nonsense"):
        ran = subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"FUSED_CPU_CACHE_MB": megabytes},
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0 and ran.stdout == "done\n", ran.stderr
