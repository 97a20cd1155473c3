"""The emulation itself: what it must notice, since no GPU is there to do so."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from emulated import FLAGS, compiler

# What the threads do between writing and reading each other's values.
MEETS, READS_TOO_EARLY = "__syncthreads();", ";"
STAY_AWAY = [
    "if (threadIdx.x < 40) __syncthreads();",
    "if (threadIdx.x == 3) return; __syncthreads();",
    "__syncthreads(); if (threadIdx.x == 3) return;",
]
CHOICES = [MEETS, READS_TOO_EARLY, *STAY_AWAY]
PROGRAM = """
#include <cuda_runtime.h>

#include <cstdlib>

__global__ void kernel(int* out, int choice) {
  __shared__ int seen[64];
  seen[threadIdx.x] = threadIdx.x;
  %s
  out[threadIdx.x] = seen[63 - threadIdx.x] + __shfl_xor_sync(0xFFFFFFFFu, threadIdx.x, 1);
}

int main(int, char** arguments) {
  int out[64];
  cudaLaunchConfig_t config{dim3(1), dim3(64)};
  const int error = cudaLaunchKernelEx(&config, kernel, out, std::atoi(arguments[1]));
  for (int i = 0; !error && i < 64; ++i) {
    if (out[i] != 63 - i + (i ^ 1)) return 1;
  }
  return error ? 2 : 0;
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All choices in one program: compiling takes much longer than running."""
    command = compiler()
    if command is None:
        pytest.skip("no C++ compiler")
    program = tmp_path_factory.mktemp("emulation") / "program"
    source = program.with_suffix(".cpp")
    cases = [f"if (choice == {number}) {{ {code} }}" for number, code in enumerate(CHOICES)]
    source.write_text(PROGRAM % "\n  ".join(cases))
    flags = [flag for flag in FLAGS if flag != "-shared"]
    subprocess.run([*command, *flags, str(source), "-o", str(program)], check=True)
    return program


def run(program: Path, choice: str) -> subprocess.CompletedProcess[str]:
    command = [str(program), str(CHOICES.index(choice))]
    return subprocess.run(command, capture_output=True, text=True)


def test_threads_wait_for_each_other(program: Path) -> None:
    assert run(program, MEETS).returncode == 0
    assert run(program, READS_TOO_EARLY).returncode == 1


@pytest.mark.parametrize("choice", STAY_AWAY)
def test_threads_that_do_not_come_are_an_error(program: Path, choice: str) -> None:
    done = run(program, choice)
    assert done.returncode == 2
    assert "wait for others that do not come" in done.stderr
