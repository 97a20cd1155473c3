"""The interpreter's cases on a real GPU at full size; skipped without one.

What only a GPU can show: the approximate PTX instructions, the layouts, races between programs and
threads, the mask against fused/run/random.py, offsets beyond 2^31 elements of every tensor,
and that the dispatcher finds these kernels.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton kernels need triton")

from fused.kernels.row.forward import row_forward
from oracle import (
    ALL,
    Case,
    backward_arguments,
    check,
    forward_arguments,
    make_inputs,
    matrix_of_cases,
    run,
)

from fused.backends import ops
from fused.run.random import keep_mask

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
    check(Case(129, cols, dtype, norm, bias=False, shortcut=True), device="cuda")


@pytest.mark.parametrize("rows, cols", [(1, 1024), (100_003, 16), (1_000_001, 3)])
def test_many_short_rows(rows: int, cols: int) -> None:
    check(Case(rows, cols, torch.bfloat16), device="cuda")


@pytest.mark.parametrize("gap, offset", [(8, 0), (3, 0), (0, 1), (5, 3)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_and_misaligned(dtype: torch.dtype, gap: int, offset: int) -> None:
    case = Case(257, 1000, dtype, residual=True, shortcut=True, gap=gap, offset=offset)
    check(case, device="cuda")


@pytest.mark.parametrize("threshold", [1, 6554, 32768, 65535])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mask_is_random_py_bit_for_bit(dtype: torch.dtype, threshold: int) -> None:
    rows, cols = 513, 1031
    for number in (0, -1, 2**62 + 2**33 + 7):
        seed = torch.tensor([number], device="cuda")
        z = torch.ones(rows, cols, dtype=dtype, device="cuda")
        y, _ = row_forward(z, None, None, None, None, seed, 0, 0.0, 0, 0.0, 0.0, threshold)
        assert torch.equal(y != 0, keep_mask(rows, cols, threshold, seed))


@pytest.mark.parametrize("wanted", range(ALL))
@pytest.mark.parametrize("cols", [64, 4096, 8192, 16384])
@pytest.mark.parametrize("norm", ["layer", "rms", None])
def test_wanted_sums(norm: str | None, cols: int, wanted: int) -> None:
    check(Case(129, cols, torch.bfloat16, norm, bias=False, wanted=wanted), device="cuda")


@pytest.mark.parametrize("cols", [3, 64, 1000, 1025, 4096, 16384, 40000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", ["layer", "rms", None])
def test_operators_and_in_place(norm: str | None, dtype: torch.dtype, cols: int) -> None:
    """A race between a row's reading and its writing would show here and nowhere else."""
    case = Case(2000, cols, dtype, norm, residual=True, shortcut=cols % 2 == 0)
    x = make_inputs(case, "cuda")
    expected = run(case, x)
    y, statistics = ops.row_forward(*forward_arguments(case, x))
    gradients = ops.row_backward(*backward_arguments(case, x, statistics))
    made = [gradient for gradient in gradients if gradient.numel()]
    assert all(torch.equal(a, b) for a, b in zip([y, *made], expected.values(), strict=True))
    z = x.z.clone()
    ops.row_forward_(*forward_arguments(case, replace(x, z=z)))
    assert torch.equal(z, y)


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
