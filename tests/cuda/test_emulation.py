"""The emulation itself: what it must notice, since no GPU is there to do so."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from emulated import FLAGS, compiler

PROGRAM = """
#include <cuda_runtime.h>

__global__ void kernel(int* out) {
  __shared__ int seen[64];
  seen[threadIdx.x] = threadIdx.x;
  %s
  out[threadIdx.x] = seen[63 - threadIdx.x] + __shfl_xor_sync(0xFFFFFFFFu, threadIdx.x, 1);
}

int main() {
  int out[64];
  cudaLaunchConfig_t config{dim3(1), dim3(64)};
  const int error = cudaLaunchKernelEx(&config, kernel, out);
  for (int i = 0; !error && i < 64; ++i) {
    if (out[i] != 63 - i + (i ^ 1)) return 1;
  }
  return error ? 2 : 0;
}
"""


def run(tmp_path: Path, statement: str) -> subprocess.CompletedProcess[str]:
    command = compiler()
    if command is None:
        pytest.skip("no C++ compiler")
    source, program = tmp_path / "program.cpp", tmp_path / "program"
    source.write_text(PROGRAM % statement)
    flags = [flag for flag in FLAGS if flag != "-shared"]
    subprocess.run([*command, *flags, str(source), "-o", str(program)], check=True)
    return subprocess.run([str(program)], capture_output=True, text=True)


def test_threads_wait_for_each_other(tmp_path: Path) -> None:
    assert run(tmp_path, "__syncthreads();").returncode == 0
    assert run(tmp_path, "").returncode == 1  # reads what the others have not written yet


@pytest.mark.parametrize(
    "statement",
    [
        "if (threadIdx.x < 40) __syncthreads();",
        "if (threadIdx.x == 3) return; __syncthreads();",
        "__syncthreads(); if (threadIdx.x == 3) return;",
    ],
)
def test_threads_that_do_not_come_are_an_error(tmp_path: Path, statement: str) -> None:
    done = run(tmp_path, statement)
    assert done.returncode == 2
    assert "wait for others that do not come" in done.stderr
