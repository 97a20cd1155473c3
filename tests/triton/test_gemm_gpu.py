"""The GEMM kernels' cases on a real GPU at full size; skipped without one.

What only a GPU can show: matrix instructions and their pipelines, that a program's threads see the
z that it has written, layouts, and that the dispatcher finds these kernels.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton kernels need triton")

from gemm_oracle import (
    Case,
    check,
    forward_arguments,
    fused_gemm,
    make_inputs,
    matrix_of_cases,
    run,
)
from torch import nn

import fused
from fused.backends import ops
from fused.run.random import keep_mask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NORMS = ("layer", "rms", None)
EVERY_NORM = (*NORMS, "batch", "group")


@pytest.mark.parametrize("case", matrix_of_cases(EVERY_NORM), ids=str)
def test_every_norm_activation_dtype(case: Case) -> None:
    cols = (64, 256 if case.norm == "group" else 200, 256)[case.cols % 3]
    check(replace(case, rows=301, inner=case.inner * 8, cols=cols), device="cuda")


@pytest.mark.parametrize("rows, inner", [(1, 8), (129, 1000), (5000, 256), (100_003, 64)])
@pytest.mark.parametrize("cols", [8, 64, 136, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", EVERY_NORM)
def test_shapes(norm: str | None, dtype: torch.dtype, cols: int, rows: int, inner: int) -> None:
    if norm == "batch" and rows == 1:
        pytest.skip("one element has no spread")
    if norm == "group":
        inner, cols = max(inner, 64), max(16, cols // 16 * 16)
        check(Case(rows, inner, cols, dtype, norm, groups=cols // 8), device="cuda")
    if norm == "group" and cols & (cols - 1):
        return  # two groups of no power of two
    check(Case(rows, inner, cols, dtype, norm, residual=True), device="cuda")


@pytest.mark.parametrize("cols", [512, 320])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("norm", EVERY_NORM)
def test_wide_rows(norm: str | None, dtype: torch.dtype, cols: int) -> None:
    if norm in ("layer", "rms") and torch.cuda.get_device_capability()[0] in (10, 11):
        pytest.skip("kernels/tuning/gemm.py has no tile for this GPU")
    groups = 10 if cols == 320 else 2
    check(Case(2049, 768, cols, dtype, norm, gap=8, groups=groups), device="cuda")


@pytest.mark.parametrize("cols", [64, 256, 1000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_the_epilogue_is_that_of_the_row_kernel(
    norm: str | None, dtype: torch.dtype, cols: int
) -> None:
    """A race between a tile's writing and its reading would show here and nowhere else."""
    if norm and cols > 256:
        pytest.skip("no tile holds the rows")
    case = Case(70_000, 128, cols, dtype, norm, residual=True)
    x = make_inputs(case, "cuda")
    y, z, statistics = ops.linear_row_forward(*forward_arguments(case, x))
    _, _, _, *parameters, residual, seed, _ = forward_arguments(case, x)[:8]
    expected = ops.row_forward(z, None, *parameters, residual, seed, *case.epilogue.row)
    assert torch.equal(y == 0, expected[0] == 0)
    torch.testing.assert_close(y, expected[0])
    torch.testing.assert_close(statistics, expected[1])
    for save_z in (True, False):
        again = ops.linear_row_forward(*forward_arguments(case, x, save_z))
        assert torch.equal(again[0], y)


@pytest.mark.parametrize("threshold", [1, 6554, 65535])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mask_is_random_py_bit_for_bit(dtype: torch.dtype, threshold: int) -> None:
    rows, cols = 513, 1032
    for number in (0, -1, 2**62 + 2**33 + 7):
        seed = torch.tensor([number], device="cuda")
        x = torch.zeros(rows, 64, dtype=dtype, device="cuda")
        weight, bias = x.new_zeros(cols, 64), x.new_ones(cols)
        scalars = (0, 0.0, 0, 0.0, 0.0, threshold)
        y, *_ = ops.linear_row_forward(x, weight, bias, None, None, None, seed, False, *scalars)
        assert torch.equal(y != 0, keep_mask(rows, cols, threshold, seed))


@pytest.mark.parametrize("tf32", [False, True])
def test_float32_products_are_as_exact_as_torch_is_told(tf32: bool) -> None:
    case = Case(300, 4096, 64, torch.float32, None, activation=None, p=0.0)
    x = make_inputs(case, "cuda")
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        y, *_ = ops.linear_row_forward(*forward_arguments(case, x))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    exact = torch.nn.functional.linear(x.x.double(), x.weight.double(), x.bias.double())
    error = float((y - exact).abs().max())
    assert (error > 2e-4) == tf32 and error < 0.05


def test_more_than_2_to_the_31_elements() -> None:
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GB of GPU memory")
    rows, cols = 2**23 + 7, 264
    x = torch.randn(rows, 16, dtype=torch.bfloat16, device="cuda")
    weight = torch.randn(cols, 16, dtype=torch.bfloat16, device="cuda")
    for codes, width in ((0, 264), (1, 256)):
        scalars = (codes, 1e-5, 1, 0.0, 0.0, 0)
        rest = (None, None, None, None, None, True, *scalars)
        whole = ops.linear_row_forward(x, weight[:width], *rest)
        tail = ops.linear_row_forward(x[-4:].clone(), weight[:width], *rest)
        assert torch.equal(whole[0][-4:], tail[0]) and torch.equal(whole[1][-4:], tail[1])


def test_statistics_of_batch_norm() -> None:
    case = Case(100_003, 64, 200, torch.float32, "batch", p=0.0)
    x = make_inputs(case, "cuda")
    x = replace(x, bias=x.bias + 1000.0)
    _, z, mean, variance = ops.linear_channel_forward(*forward_arguments(case, x))
    torch.testing.assert_close(mean[0].double(), z.double().mean(0), rtol=1e-6, atol=0)
    exact = z.double().var(0, correction=0)
    torch.testing.assert_close(variance[0].double(), exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("groups", [1, 4, 32])
@pytest.mark.parametrize("save_z", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_epilogue_of_groups_is_that_of_the_channel_kernels(
    dtype: torch.dtype, save_z: bool, groups: int
) -> None:
    case = Case(70_000, 128, 256, dtype, "group", p=0.5, groups=groups)
    x = make_inputs(case, "cuda")
    z = ops.linear_channel_forward(*forward_arguments(case, x))[1]
    y, _, mean, variance = ops.linear_channel_forward(*forward_arguments(case, x, save_z))
    codes = case.channel_epilogue.channel
    given = (z.view(case.view), x.norm_weight, x.norm_bias, None, None, x.seed, *codes)
    expected = ops.channel_forward(*given)
    torch.testing.assert_close(mean, expected[1])
    torch.testing.assert_close(variance, expected[2])
    torch.testing.assert_close(y.view(case.view), expected[0])
    assert (y[~keep_mask(*z.shape, case.epilogue.threshold, x.seed)] == 0).all()


@pytest.mark.parametrize("norm", EVERY_NORM)
def test_same_bits_twice_and_for_any_batch(norm: str | None) -> None:
    case = Case(5000, 256, 256, norm=norm)
    x = make_inputs(case, "cuda")
    first, second = run(case, x), run(case, x)
    assert all(torch.equal(first[name], second[name]) for name in first)
    if norm == "batch":
        return
    operator = ops.linear_channel_forward if case.is_channel else ops.linear_row_forward
    y = operator(*forward_arguments(case, replace(x, x=x.x[:3])))[0]
    assert torch.equal(first["y"][:3], y)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_trains_as_by_the_library(compiled: bool) -> None:
    torch.manual_seed(3)
    net = fused.Sequential(
        *(nn.Linear(64, 256), nn.LayerNorm(256), nn.GELU(), nn.Dropout(0.1)),
        *(nn.Linear(256, 128), nn.RMSNorm(128), nn.SiLU()),
    ).cuda()
    x = torch.randn(300, 64, device="cuda", requires_grad=True)
    run_net = torch.compile(net, fullgraph=True) if compiled else net
    leaves = [x, *net.parameters()]
    outcomes = []
    for fuses in (True, False):
        torch.manual_seed(7)
        torch._dynamo.reset()
        if fuses:
            with fused_gemm():
                y = run_net(x)
        else:
            y = run_net(x)
        outcomes.append([y, *torch.autograd.grad(y.square().mean(), leaves)])
    for a, b in itertools.zip_longest(*outcomes):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
