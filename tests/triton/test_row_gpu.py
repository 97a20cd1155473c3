"""The interpreter's cases on a real GPU at full size; skipped without one.

What only a GPU can show: the approximate PTX instructions, the layouts, races between programs,
equality of the mask with fused/random.py, and offsets beyond 2^31 elements of every tensor.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton kernels need triton")

from fused.kernels.row import row_forward
from oracle import Case, check, make_inputs, matrix_of_cases, run

from fused.random import keep_mask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("case", matrix_of_cases(), ids=str)
def test_every_norm_activation_dtype(case: Case) -> None:
    check(replace(case, rows=301, cols=(256, 1000, 2048)[case.cols % 3]), device="cuda")


@pytest.mark.parametrize("cols", [1, 63, 64, 65, 1000, 1025, 4096, 8192, 16384, 40000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", ["layer", "rms", None])
def test_widths(norm: str | None, dtype: torch.dtype, cols: int) -> None:
    check(Case(129, cols, dtype, norm, residual=True), device="cuda")
    check(Case(129, cols, dtype, norm, bias=False), device="cuda")


@pytest.mark.parametrize("rows, cols", [(1, 1024), (100_003, 16), (1_000_001, 3)])
def test_many_short_rows(rows: int, cols: int) -> None:
    check(Case(rows, cols, torch.bfloat16), device="cuda")


@pytest.mark.parametrize("gap, offset", [(8, 0), (3, 0), (0, 1), (5, 3)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_and_misaligned(dtype: torch.dtype, gap: int, offset: int) -> None:
    check(Case(257, 1000, dtype, residual=True, gap=gap, offset=offset), device="cuda")


@pytest.mark.parametrize("threshold", [1, 6554, 32768, 65535])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mask_is_random_py_bit_for_bit(dtype: torch.dtype, threshold: int) -> None:
    rows, cols = 513, 1031
    for number in (0, -1, 2**62 + 2**33 + 7):
        seed = torch.tensor([number], device="cuda")
        z = torch.ones(rows, cols, dtype=dtype, device="cuda")
        y, _, _ = row_forward(z, None, None, None, None, seed, 0, 0.0, 0, 0.0, 0.0, threshold)
        assert torch.equal(y != 0, keep_mask(rows, cols, threshold, seed))


def test_more_than_2_to_the_31_elements() -> None:
    rows, cols = 2**20 + 7, 2056
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GB of GPU memory")
    case = Case(rows, cols, torch.bfloat16, p=0.0, bias=False)
    z = torch.randn(rows, cols, dtype=torch.bfloat16, device="cuda")
    small = make_inputs(replace(case, rows=4), "cuda")
    x = replace(small, z=z, dy=z)
    found = run(case, x)
    tail = run(replace(case, rows=4), replace(small, z=z[-4:].clone(), dy=z[-4:].clone()))
    assert torch.equal(found["y"][-4:], tail["y"])
    assert torch.equal(found["dz"][-4:], tail["dz"])


def test_same_bits_twice() -> None:
    case = Case(5000, 1000, torch.bfloat16)
    x = make_inputs(case, "cuda")
    first, second = run(case, x), run(case, x)
    assert all(torch.equal(first[name], second[name]) for name in first)
