"""The interpreter's cases of gated activations on a real GPU at full size; skipped without one.

What only a GPU can show: see test_row_gpu.py. Columns are those of z, twice those of the result.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton kernels need triton")

from oracle import (
    ALL,
    Case,
    backward_arguments,
    check,
    forward_arguments,
    gated_matrix_of_cases,
    make_inputs,
    run,
)

from fused.backends import ops
from fused.run.random import keep_mask
from fused.spec import GATED_CODES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NORMS = ("layer", "rms", None)


@pytest.mark.parametrize("case", gated_matrix_of_cases(), ids=str)
def test_every_norm_activation_dtype(case: Case) -> None:
    check(replace(case, rows=301, cols=(512, 2008, 4096)[case.cols % 3]), device="cuda")


@pytest.mark.parametrize("half", [1, 63, 64, 65, 1000, 1025, 2048, 4096, 8192, 20000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_widths(norm: str | None, dtype: torch.dtype, half: int) -> None:
    check(Case(129, 2 * half, dtype, norm, "swiglu", residual=True), device="cuda")
    check(Case(129, 2 * half, dtype, norm, "geglu", bias=False), device="cuda")


@pytest.mark.parametrize("rows, half", [(1, 1024), (100_003, 16), (1_000_001, 3)])
def test_many_short_rows(rows: int, half: int) -> None:
    check(Case(rows, 2 * half, torch.bfloat16, activation="swiglu"), device="cuda")


@pytest.mark.parametrize("gap, offset", [(8, 0), (3, 0), (0, 1), (5, 3)])
@pytest.mark.parametrize("half", [1000, 1004])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_and_misaligned(dtype: torch.dtype, half: int, gap: int, offset: int) -> None:
    """1004: z's rows are whole 16-byte units in bf16, and the gate begins between two."""
    case = Case(257, 2 * half, dtype, activation="swiglu", residual=True, gap=gap, offset=offset)
    check(case, device="cuda")


@pytest.mark.parametrize("threshold", [1, 6554, 32768, 65535])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mask_is_random_py_bit_for_bit(dtype: torch.dtype, threshold: int) -> None:
    rows, half = 513, 1031
    for number in (0, -1, 2**62 + 2**33 + 7):
        seed = torch.tensor([number], device="cuda")
        z = torch.ones(rows, 2 * half, dtype=dtype, device="cuda")
        scalars = (0, 0.0, GATED_CODES["reglu"], 0.0, 0.0, threshold)
        y, statistics = ops.row_forward(z, None, None, None, None, seed, *scalars)
        dz, *_ = ops.row_backward(
            z[:, :half].contiguous(), z, None, None, None, statistics, seed, 0, *scalars
        )
        assert torch.equal(y != 0, keep_mask(rows, half, threshold, seed))
        assert torch.equal(dz, torch.cat([y, y], 1))


@pytest.mark.parametrize("wanted", range(ALL))
@pytest.mark.parametrize("half", [64, 2048, 4096, 8192])
@pytest.mark.parametrize("norm", NORMS)
def test_wanted_sums(norm: str | None, half: int, wanted: int) -> None:
    case = Case(129, 2 * half, torch.bfloat16, norm, "swiglu", bias=False, wanted=wanted)
    check(case, device="cuda")


@pytest.mark.parametrize("half", [3, 1025, 4096])
@pytest.mark.parametrize("norm", NORMS)
def test_operators(norm: str | None, half: int) -> None:
    case = Case(2000, 2 * half, torch.bfloat16, norm, "geglu_tanh", residual=True)
    x = make_inputs(case, "cuda")
    expected = run(case, x)
    y, statistics = ops.row_forward(*forward_arguments(case, x))
    gradients = ops.row_backward(*backward_arguments(case, x, statistics))
    made = [gradient for gradient in gradients if gradient.numel()]
    assert all(torch.equal(a, b) for a, b in zip([y, *made], expected.values(), strict=True))
    with pytest.raises(ValueError, match="halves the columns"):
        ops.row_forward_(*forward_arguments(case, x))


def test_more_than_2_to_the_31_elements() -> None:
    rows, half = 2**20 + 7, 1032
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GB of GPU memory")
    case = Case(rows, 2 * half, torch.bfloat16, activation="swiglu", p=0.0, bias=False)
    z = torch.randn(rows, 2 * half, dtype=torch.bfloat16, device="cuda")
    dy = torch.randn(rows, half, dtype=torch.bfloat16, device="cuda")
    small = make_inputs(replace(case, rows=4), "cuda")
    found = run(case, replace(small, z=z, dy=dy))
    tail = run(replace(case, rows=4), replace(small, z=z[-4:].clone(), dy=dy[-4:].clone()))
    assert torch.equal(found["y"][-4:], tail["y"])
    assert torch.equal(found["dz"][-4:], tail["dz"])


def test_same_bits_twice() -> None:
    case = Case(5000, 2000, torch.bfloat16, activation="swiglu")
    x = make_inputs(case, "cuda")
    first, second = run(case, x), run(case, x)
    assert all(torch.equal(first[name], second[name]) for name in first)
