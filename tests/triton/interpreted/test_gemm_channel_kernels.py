"""Linear with batch or group norm behind it, against float64, in the interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from fused.kernels.gemm.channel import linear_channel_forward
from fused.kernels.tuning import gemm as gemm_tuning
from fused.kernels.tuning import rules as tuning
from gemm_oracle import Case, check, forward_arguments, make_inputs, matrix_of_cases, run
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.audit.interpreter import launches
from fused.backends import gemm, launchers, ops
from fused.run.random import keep_mask

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def _cpu_as_gpu() -> Iterator[None]:
    """The operator runs the launcher for CPU tensors, and gemm.py takes those for a GPU's."""
    library = torch.library.Library("fused_lnad", "IMPL")
    library.impl("linear_channel_forward", launchers.LINEAR["linear_channel_forward"], "CPU")
    device = tuning.INTERPRETER.arch, tuning.INTERPRETER.warp_size
    with mock.patch.multiple(gemm, _is_on_gpu=lambda x: True, _device=lambda index: device):
        yield
    library._destroy()


@pytest.fixture
def small_tiles() -> Iterator[None]:
    """So that a hundred rows are several chunks, and their columns several tiles."""
    tile = gemm_tuning.GemmTile(32, 64, 32, 2, 8, 32)
    with mock.patch.object(gemm_tuning, "batch_tile", lambda *args: tile):
        yield


@pytest.mark.parametrize("case", matrix_of_cases(("batch",)), ids=str)
def test_every_activation_dtype(case: Case) -> None:
    check(replace(case, rows=9))


@pytest.mark.parametrize("rows, inner, cols", [(2, 8, 8), (130, 40, 136), (33, 8, 200)])
@EVERY_DTYPE
@pytest.mark.usefixtures("small_tiles")
def test_shapes_off_the_tile(dtype: torch.dtype, rows: int, inner: int, cols: int) -> None:
    check(Case(rows, inner, cols, dtype, "batch", residual=True))


@pytest.mark.parametrize("kind", ["noise", "large mean", "constant", "one outlier"])
@pytest.mark.parametrize("rows", [5, 130])
@pytest.mark.usefixtures("small_tiles")
def test_statistics_are_those_of_the_stored_z(rows: int, kind: str) -> None:
    case = Case(rows, 64, 64, torch.float32, "batch", p=0.0, bias=False)
    x = make_inputs(case)
    z = {
        "noise": x.x,
        "large mean": x.x + 1e4,
        "constant": torch.full_like(x.x, 3.7),
        "one outlier": torch.where(torch.arange(rows)[:, None] == 3, 1e5, x.x),
    }[kind]
    # weight is the identity, so that z is x.
    x = replace(x, x=z, weight=torch.eye(64))
    y, found, mean, variance = linear_channel_forward(*forward_arguments(case, x))
    assert torch.equal(found, z)
    assert mean.shape == variance.shape == (1, 64)
    exact = z.double()
    torch.testing.assert_close(mean[0].double(), exact.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(variance[0].double(), exact.var(0, correction=0), rtol=1e-5, atol=0)
    if kind == "constant":
        assert (variance == 0).all()
    codes = case.channel_epilogue.channel
    parameters = (x.norm_weight, x.norm_bias, None, None, None)
    given = (z.view(case.view), mean, variance, *parameters)
    assert torch.equal(y.view(case.view), launchers.TRITON["channel_apply"](*given, *codes))


@EVERY_DTYPE
@pytest.mark.usefixtures("small_tiles")
def test_the_mask_is_that_of_the_channel_kernels(dtype: torch.dtype) -> None:
    case = Case(70, 24, 72, dtype, "batch", activation=None, p=0.5)
    x = make_inputs(case)
    y, z, *_ = linear_channel_forward(*forward_arguments(case, x))
    keep = keep_mask(70, 72, case.epilogue.threshold, x.seed)
    assert (y[~keep] == 0).all()
    assert (y[keep] != 0).float().mean() > 0.9
    again, none, *_ = linear_channel_forward(*forward_arguments(case, x, save_z=False))
    assert torch.equal(again, y) and none.shape == (0,)
    exact = F.linear(x.x.double(), x.weight.double(), x.bias.double())
    eps = torch.finfo(dtype).eps
    assert float((z - exact).abs().max()) <= 4 * eps * float(exact.abs().max())


@pytest.mark.usefixtures("small_tiles")
def test_every_byte_moves_once_and_z_twice() -> None:
    case = Case(70, 24, 64, norm="batch", residual=True)
    x = make_inputs(case)
    with launches() as log:
        linear_channel_forward(*forward_arguments(case, x))
    product, merge, apply = log
    assert [launch.kernel for launch in log] == [
        "_gemm_batch_kernel",
        "_channel_finish_kernel",
        "_channel_apply_kernel",
    ]
    size = x.residual.nbytes
    assert product.loaded["x_ptr"] == x.x.nbytes
    assert product.stored["z_ptr"] == apply.loaded["z_ptr"] == apply.stored["y_ptr"] == size
    assert product.stored["partial_ptr"] == 3 * 3 * 64 * 4  # three chunks of 32 rows
    assert merge.loaded["partial_ptr"] <= 6 * 3 * 64 * 4


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_rows_beyond_2_to_the_31_elements(norm: str) -> None:
    # Virtual memory only: the pages between the rows are never touched.
    case = Case(3, 64, 64, norm=norm)
    x = make_inputs(case)
    stride = 2**30 + 8
    wide = torch.empty(3 * stride, dtype=x.x.dtype).as_strided((3, 64), (stride, 1)).copy_(x.x)
    found = linear_channel_forward(*forward_arguments(case, replace(x, x=wide)))
    for a, b in zip(found, linear_channel_forward(*forward_arguments(case, x)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("save_z", [True, False])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_fake_kernel_foretells_shapes_and_dtypes(norm: str, save_z: bool) -> None:
    case = Case(5, 16, 32, norm=norm)
    arguments = forward_arguments(case, make_inputs(case), save_z)
    real = ops.linear_channel_forward(*arguments)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = ops.linear_channel_forward(*arguments)
    for r, f in zip(real, fake, strict=True):
        assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())


GROUP_CASES = [
    replace(case, cols=(64, 192, 32)[i % 3], groups=(8, 3, 4)[i % 3], rows=9)
    for i, case in enumerate(matrix_of_cases(("group",)))
]


@pytest.mark.parametrize("case", GROUP_CASES, ids=str)
def test_groups_with_every_activation_dtype(case: Case) -> None:
    with launches() as log:
        check(case)
    assert [launch.kernel for launch in log] == ["_gemm_group_kernel"]


@pytest.mark.parametrize("width, groups", [(8, 1), (8, 40), (64, 3), (128, 2), (256, 2)])
@EVERY_DTYPE
def test_groups_off_the_tile(dtype: torch.dtype, width: int, groups: int) -> None:
    check(Case(35, 24, width * groups, dtype, "group", groups=groups, residual=True))


@pytest.mark.parametrize("save_z", [True, False])
@pytest.mark.parametrize("width, groups", [(8, 20), (32, 5), (256, 1)])
@EVERY_DTYPE
def test_the_epilogue_of_groups_is_that_of_the_channel_kernels(
    dtype: torch.dtype, width: int, groups: int, save_z: bool
) -> None:
    """The same mask, and the same values but for the order of sums."""
    case = Case(40, 24, width * groups, dtype, "group", p=0.5, groups=groups)
    x = make_inputs(case)
    z = linear_channel_forward(*forward_arguments(case, x))[1]
    with launches() as log:
        y, _, mean, variance = linear_channel_forward(*forward_arguments(case, x, save_z))
    codes = case.channel_epilogue.channel
    given = (z.view(case.view), x.norm_weight, x.norm_bias, None, None, x.seed, *codes)
    expected = ops.channel_forward(*given)
    torch.testing.assert_close(mean, expected[1])
    torch.testing.assert_close(variance, expected[2])
    torch.testing.assert_close(y.view(case.view), expected[0])
    keep = keep_mask(*z.shape, case.epilogue.threshold, x.seed)
    assert (y[~keep] == 0).all()
    size = z.nbytes
    assert (log[0].stored["z_ptr"], log[0].stored["y_ptr"]) == (
        (size, size) if save_z else (0, 2 * size)
    )


def test_constant_groups_have_no_variance() -> None:
    case = Case(5, 64, 64, torch.float32, "group", p=0.0, bias=False)
    x = replace(make_inputs(case), x=torch.full((5, 64), 3.7), weight=torch.eye(64))
    _, _, mean, variance = linear_channel_forward(*forward_arguments(case, x))
    assert (variance == 0).all() and (mean == x.x[0, 0]).all()


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.usefixtures("small_tiles")
def test_same_bits_twice(norm: str) -> None:
    case = Case(70, 24, 64, norm=norm)
    x = make_inputs(case)
    first, second = run(case, x), run(case, x)
    assert all(torch.equal(first[name], second[name]) for name in first)
