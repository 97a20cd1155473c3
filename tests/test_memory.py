"""Large CPU outputs come from a cache of blocks that were used before."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import run_python

import fused
from fused.backends import ops
from fused.spec import make_spec

pytestmark = pytest.mark.usefixtures("cpp")
RELU = make_spec(None, 0.0, "relu", 0.0).row
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


def test_an_empty_cache_gives_the_memory_back() -> None:
    def resident() -> int:
        status = Path("/proc/self/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1]) << 10

    fused.empty_cache()
    x = torch.randn(64 << 20)[None]  # 256 MiB
    before = resident()
    y = relu(x)
    used = resident() - before
    assert 256 << 20 <= used < (256 << 20) * 1.15
    del y
    assert resident() - before > 240 << 20, "it is kept for the next output"
    fused.empty_cache()
    assert resident() - before < 16 << 20


@pytest.mark.parametrize("elements", [(1 << 20) + 1, (5 << 19) + 3])
def test_no_size_wastes_much(elements: int) -> None:
    """What is mapped for one output: the address space grows by that alone."""

    def mapped() -> int:
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")

    x = torch.randn(1, elements)
    relu(x)  # whatever the first call of this size makes besides
    fused.empty_cache()
    before = mapped()
    y = relu(x)
    assert y.nbytes <= mapped() - before < 1.15 * y.nbytes


def test_tensors_outlive_the_interpreter_and_the_cache_can_be_off() -> None:
    program = """
import torch
from fused.backends import ops
from fused.spec import make_spec
x = torch.randn(9000, 1024)
keep = [ops.row_forward(x, None, None, None, None, None, *make_spec(None, 0.0, "relu", 0.0).row)[0]
        for _ in range(3)]
assert all(torch.equal(y, x.relu()) for y in keep)
print("done")
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stdout == "done\n", ran.stderr
    ran = run_python(program, FUSED_CPU_CACHE_MB="0")
    assert ran.returncode == 0 and ran.stdout == "done\n", ran.stderr


FULL = """
import os, torch, fused
from fused.backends import ops
from fused.spec import make_spec
RELU = make_spec(None, 0.0, "relu", 0.0).row
x = torch.randn(1900, 1024)
relu = lambda rows: ops.row_forward(x[:rows], *[None] * 5, *RELU)[0]
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
relu(1200), relu(1900)  # 4.7 and 7.4 MiB: the second takes the place of the first
relu(1900)
before = resident()
fused.empty_cache()
given_back = (before - resident()) / (1 << 20)
assert 7 < given_back < 8, given_back
"""


def test_the_oldest_block_goes_when_the_cache_is_full() -> None:
    ran = run_python(FULL, FUSED_CPU_CACHE_MB="8")
    assert ran.returncode == 0, ran.stderr


FORK = """
import os, signal, threading, time, torch
from fused.backends import ops
from fused.spec import make_spec
torch.set_num_threads(1)  # OpenMP itself does not outlive a fork
RELU = make_spec(None, 0.0, "relu", 0.0).row
x = torch.randn(1100, 1024)
relu = lambda: ops.row_forward(x, None, None, None, None, None, *RELU)[0]
stop = False
def churn():
    while not stop:
        keep = [relu() for _ in range(4)]
        del keep
threads = [threading.Thread(target=churn) for _ in range(3)]
[thread.start() for thread in threads]
for _ in range(30):
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        os._exit(0 if torch.equal(relu(), x.relu()) else 1)
    assert os.waitpid(child, 0)[1] == 0, "the child did not finish"
stop = True
[thread.join() for thread in threads]
print("done")
"""


def test_a_fork_while_threads_make_outputs() -> None:
    ran = run_python(FORK)
    assert ran.stdout == "done\n", ran.stderr
