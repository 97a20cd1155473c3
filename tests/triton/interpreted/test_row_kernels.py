"""Row kernels against reference.py in float64, and their memory traffic, in the interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from fused.kernels.row.forward import row_forward
from fused.kernels.tuning import rules as tuning
from oracle import (
    ALL,
    Case,
    Inputs,
    backward_arguments,
    check,
    expected,
    forward_arguments,
    make_inputs,
    matrix_of_cases,
    run,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.audit.interpreter import launches
from fused.backends import launchers, ops
from fused.backends.ops import WANT_BIAS, WANT_NORM_BIAS, WANT_NORM_WEIGHT
from fused.run.random import keep_mask

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (0.1 keeps most, 65535/65536 keeps nearly none, 1 keeps none)
THRESHOLDS = (1, 6554, 32768, 65535, 65536)


@pytest.fixture
def small_tiles() -> Iterator[None]:
    """Tile limits that make rows of some hundred columns too wide for one tile."""
    limits = {"FORWARD_TILE_COLS": 64, "FORWARD_LOOP_COLS": 64, "ROW_SUMS_COLS": 64}
    tuning.forward_tile.cache_clear()
    tuning.backward_tile.cache_clear()
    narrow = dict.fromkeys(range(4), 64)
    with (
        mock.patch.multiple(tuning, SHARED_COLS=64, **limits),
        mock.patch.object(tuning, "BACKWARD_TILE_COLS", narrow),
    ):
        yield
    tuning.forward_tile.cache_clear()
    tuning.backward_tile.cache_clear()


@pytest.mark.parametrize("case", matrix_of_cases(), ids=str)
def test_every_norm_activation_dtype(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", [1000, 1025])
@pytest.mark.parametrize("norm", ["layer", "rms", None])
def test_odd_widths(norm: str | None, cols: int, dtype: torch.dtype) -> None:
    check(Case(3, cols, dtype, norm, residual=True))


@pytest.mark.parametrize("rows", [1, 2, 33, 70])
def test_rows_off_the_tile(rows: int) -> None:
    check(Case(rows, 40, torch.bfloat16))


@pytest.mark.parametrize("gap, offset", [(8, 0), (3, 0), (0, 1), (5, 3)])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_strided_and_misaligned(dtype: torch.dtype, gap: int, offset: int) -> None:
    check(Case(5, 200, dtype, residual=True, gap=gap, offset=offset))


@pytest.mark.parametrize(
    "rows, cols, gap, offset", [(5, 1000, 0, 0), (33, 64, 8, 0), (3, 1025, 0, 1), (5, 200, 5, 3)]
)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("norm", ["layer", "rms", None])
def test_shortcut(
    norm: str | None, dtype: torch.dtype, rows: int, cols: int, gap: int, offset: int
) -> None:
    case = Case(rows, cols, dtype, norm, "silu", 0.3, residual=True, shortcut=True, gap=gap)
    case = replace(case, offset=offset)
    x = make_inputs(case)
    with launches() as log:
        found = check(case, x)
    size = rows * cols * x.z.element_size()
    assert log[0].loaded["shortcut_ptr"] == log[1].loaded["shortcut_ptr"] == size
    assert log[1].loaded["dy_ptr"] == log[1].stored["dz_ptr"] == size
    assert log[1].stored["dshortcut_ptr"] == (size if norm else 0)
    # Dropout comes behind the shortcut.
    keep = keep_mask(rows, cols, case.epilogue.threshold, x.seed)
    assert torch.equal(found["y"][~keep], x.residual[~keep])
    gradient = found["dshortcut" if norm else "dz"]
    assert not gradient[~keep].any() and gradient[keep].any()


@pytest.mark.parametrize("norm", ["layer", "rms", None])
def test_a_shortcut_of_zeros_changes_no_bit(norm: str | None) -> None:
    case = Case(5, 200, torch.bfloat16, norm, residual=True, shortcut=True)
    x = make_inputs(case)
    plain, zeros = replace(x, shortcut=None), replace(x, shortcut=torch.zeros(5, 200).bfloat16())
    expected, found = run(replace(case, shortcut=False), plain), run(case, zeros)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("cols, gap", [(65, 0), (200, 3), (256, 0)])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("norm", ["layer", "rms", None])
@pytest.mark.usefixtures("small_tiles")
def test_shortcut_of_rows_wider_than_a_tile(
    norm: str | None, dtype: torch.dtype, cols: int, gap: int
) -> None:
    """The first kernel of the backward writes its gradient, and the second reads that as dy."""
    case = Case(3, cols, dtype, norm, residual=True, shortcut=True, gap=gap)
    with launches() as log:
        check(case)
    size = 3 * cols * dtype.itemsize
    if norm:
        _, sums, gradient, _ = log
        assert log[0].kernel == "_row_fwd_loop_kernel"
        assert sums.loaded["shortcut_ptr"] == sums.stored["dshortcut_ptr"] == size
        assert gradient.loaded["dy_ptr"] == gradient.stored["dz_ptr"] == size
        assert not gradient.loaded["shortcut_ptr"]
    assert log[0].loaded["shortcut_ptr"] == size
    check(replace(case, bias=False, affine=False, wanted=0))


@pytest.mark.parametrize("norm", ["layer", "rms", None])
def test_float32_parameters_of_bf16(norm: str | None) -> None:
    check(Case(4, 65, torch.bfloat16, norm, parameter_dtype=torch.float32))


@pytest.mark.parametrize("cols", [65, 200, 256])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("norm", ["layer", "rms", None])
@pytest.mark.usefixtures("small_tiles")
def test_rows_wider_than_a_tile(norm: str | None, dtype: torch.dtype, cols: int) -> None:
    case = Case(3, cols, dtype, norm, residual=True)
    with launches() as log:
        wide = check(case)
    names = [launch.kernel for launch in log]
    if norm:
        assert names == [
            "_row_fwd_loop_kernel",
            "_row_sums_kernel",
            "_row_bwd_kernel",
            "_column_sum_kernel",
        ]
    check(replace(case, bias=False, affine=False, gap=3, wanted=0))
    # The mask does not depend on the tile: a dropped element leaves the residual, exactly.
    x = make_inputs(case)
    keep = keep_mask(3, cols, case.epilogue.threshold, x.seed)
    assert torch.equal(wide["y"][~keep], x.residual[~keep])
    assert (wide["y"][keep] != x.residual[keep]).float().mean() > 0.9


@pytest.mark.parametrize("wanted", range(ALL + 1))
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "z contains the bias"])
@pytest.mark.parametrize("norm", ["layer", "rms", None])
def test_wanted_sums(norm: str | None, bias: bool, wanted: int) -> None:
    """Any subset, and none of the others changes by a bit."""
    case = Case(5, 65, torch.bfloat16, norm, bias=bias, wanted=wanted)
    x = make_inputs(case)
    with launches() as log:
        found = check(case, x)
    if norm is None:
        wanted &= WANT_BIAS
    assert len(found) == 2 + wanted.bit_count()
    assert (log[-1].kernel == "_column_sum_kernel") == bool(wanted)
    every = run(replace(case, wanted=ALL), x)
    assert all(torch.equal(found[name], every[name]) for name in found)


@pytest.mark.parametrize("wanted", [0, WANT_NORM_WEIGHT, WANT_BIAS, WANT_NORM_BIAS | WANT_BIAS])
@pytest.mark.usefixtures("small_tiles")
def test_wanted_sums_of_wide_rows(wanted: int) -> None:
    check(Case(3, 200, bias=False, wanted=wanted))


def test_only_parameters_that_exist_are_wanted() -> None:
    case = Case(3, 40, affine=False, bias=False)
    assert set(check(case)) == {"y", "dz", "dbias"}


def test_bias_inside_z_gives_the_same_gradients() -> None:
    case = Case(7, 65)
    x = make_inputs(case)
    inside = replace(x, z=x.z + x.bias, bias=None)
    apart, together = run(case, x), run(replace(case, bias=False), inside)
    assert all(torch.equal(apart[name], together[name]) for name in apart)


def check_statistics(case: Case) -> None:
    x = make_inputs(case)
    _, statistics = launchers.TRITON["row_forward"](*forward_arguments(case, x))
    assert statistics.dtype == torch.float32
    assert statistics.is_contiguous()
    z = x.z.double() + x.bias.double()
    centred = z - z.mean(1, keepdim=True) if case.norm == "layer" else z
    rstd = (centred.square().mean(1) + case.epilogue.eps).rsqrt()
    exact = {"layer": [z.mean(1), rstd], "rms": [rstd], None: []}[case.norm]
    assert statistics.shape == (len(exact), case.rows)
    for found, value in zip(statistics, exact, strict=True):
        torch.testing.assert_close(found.double(), value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 33])
@pytest.mark.parametrize("norm", ["layer", "rms", None])
def test_statistics(norm: str | None, rows: int) -> None:
    """Mean, then rstd, of z + bias: (2, rows), (1, rows) or (0, rows)."""
    check_statistics(Case(rows, 65, torch.bfloat16, norm))


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.usefixtures("small_tiles")
def test_statistics_of_wide_rows(norm: str) -> None:
    check_statistics(Case(3, 200, torch.bfloat16, norm))


def check_in_place(case: Case) -> None:
    """The same bits as in a new tensor, and nothing written between the rows."""
    x = make_inputs(case)
    y, statistics = row_forward(*forward_arguments(case, x))
    # Both halves of the storage: the rows of z and what lies between them.
    whole = torch.full((case.rows, case.cols + case.gap), float("nan"), dtype=case.dtype)
    z = whole[:, : case.cols].copy_(x.z)
    found, again = row_forward(*forward_arguments(case, replace(x, z=z)), out=z)
    assert found is z
    assert torch.equal(z, y)
    assert torch.equal(again, statistics)
    assert whole[:, case.cols :].isnan().all()
    z.copy_(x.z)
    assert launchers.TRITON["row_forward_"](*forward_arguments(case, replace(x, z=z))) is None
    assert torch.equal(z, y)


@pytest.mark.parametrize("rows, cols, gap", [(33, 40, 0), (3, 1025, 0), (5, 200, 3)])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("norm", ["layer", "rms", None])
def test_in_place(norm: str | None, dtype: torch.dtype, rows: int, cols: int, gap: int) -> None:
    more = rows == 5
    check_in_place(Case(rows, cols, dtype, norm, residual=more, shortcut=more, gap=gap))


@pytest.mark.parametrize("gap", [0, 3])
@pytest.mark.parametrize("norm", ["layer", "rms", None])
@pytest.mark.usefixtures("small_tiles")
def test_wide_rows_in_place(norm: str | None, gap: int) -> None:
    check_in_place(Case(3, 200, norm=norm, residual=True, shortcut=gap == 0, gap=gap))


@pytest.mark.parametrize("wanted", [ALL, WANT_NORM_WEIGHT, 0])
@pytest.mark.parametrize("rows, cols", [(3, 40), (0, 8), (4, 0)])
@pytest.mark.parametrize("norm", ["layer", "rms", None])
def test_fake_kernels_foretell_shapes_and_dtypes(
    norm: str | None, rows: int, cols: int, wanted: int
) -> None:
    """opcheck does this for the C++ kernels; it cannot reach kernels that need a GPU."""
    case = Case(rows, cols, torch.bfloat16, norm, parameter_dtype=torch.float32, wanted=wanted)
    case = replace(case, shortcut=wanted != ALL)
    x = make_inputs(case)
    forward = forward_arguments(case, x)
    real = launchers.TRITON["row_forward"](*forward)
    backward = backward_arguments(case, x, real[1])
    real += launchers.TRITON["row_backward"](*backward)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = ops.row_forward(*forward) + ops.row_backward(*backward)
    for r, f in zip(real, fake, strict=True):
        assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("rows, cols", [(37, 9), (3, 200), (2, 1031)])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_mask_is_random_py_bit_for_bit(
    dtype: torch.dtype, rows: int, cols: int, threshold: int
) -> None:
    for number in (0, 12345, -1, 2**62 + 2**33 + 7):
        seed = torch.tensor([number])
        ones = torch.ones(rows, cols, dtype=dtype)
        scalars = (0, 0.0, 0, 0.0, 0.0, threshold)
        y, statistics = launchers.TRITON["row_forward"](
            ones, None, None, None, None, seed, *scalars
        )
        dz, *_ = launchers.TRITON["row_backward"](
            ones, ones, None, None, None, statistics, seed, 0, *scalars
        )
        if threshold == 65536:
            assert (y == 0).all()
        else:
            assert torch.equal(y != 0, keep_mask(rows, cols, threshold, seed))
            scale = torch.tensor(65536 / (65536 - threshold)).to(dtype)
            assert ((y == scale) | (y == 0)).all()
        assert torch.equal(y, dz)
        if cols > 1000 or rows > 30:
            break  # one seed is enough for the large ones


def test_masks_of_different_seeds_differ() -> None:
    case = Case(4, 200, norm=None, activation=None, p=0.5, bias=False)
    x = make_inputs(case)
    first = run(case, x)["y"]
    second = run(case, replace_seed(x, x.seed + 1))["y"]
    assert not torch.equal(first, second)
    assert torch.equal(first, run(case, x)["y"])


def replace_seed(x: Inputs, seed: torch.Tensor) -> Inputs:
    return replace(x, seed=seed)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("kind", ["large mean", "constant row", "one outlier", "denormals", "1e15"])
def test_adversarial_rows(norm: str, kind: str) -> None:
    case = Case(4, 200, norm=norm, bias=False, p=0.0)
    x = make_inputs(case)
    noise = x.z
    z = {
        "large mean": noise + 1e4,
        "constant row": torch.full_like(noise, 3.7),
        "one outlier": torch.where(torch.arange(200) == 77, 1e5, noise),
        "denormals": noise * 1e-40,
        "1e15": noise * 1e15,
    }[kind]
    check(case, replace(x, z=z))


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_1e38_is_finite_wherever_eager_is(norm: str) -> None:
    """Squares overflow float32 here: eager's layer norm is NaN throughout, and so is the kernel's.

    A weaker claim than the error rule, which has nothing to compare with in that case.
    """
    case = Case(4, 200, norm=norm, bias=False, p=0.0)
    x = make_inputs(case)
    x = replace(x, z=x.z.clamp(-3, 3) * 1e38)
    result, eager = run(case, x), expected(case, x, torch.float32)
    for name, value in result.items():
        assert value[eager[name].isfinite()].isfinite().all(), name


def test_infinite_and_nan_rows_stay_in_their_rows() -> None:
    case = Case(4, 65, activation="relu", p=0.0)
    x = make_inputs(case)
    z = x.z.clone()
    z[1, 3], z[2, 5] = float("inf"), float("nan")
    result = run(case, replace(x, z=z))
    oracle = check(case, x)
    for name in ("y", "dz"):
        assert result[name][1:3].isnan().any(dim=1).all()
        assert torch.equal(result[name][[0, 3]], oracle[name][[0, 3]])


def test_dropped_infinity_is_nan_as_in_nn_dropout() -> None:
    z = torch.full((4, 64), float("inf"))
    seed = torch.tensor([5])
    y, _ = row_forward(z, None, None, None, None, seed, 0, 0.0, 0, 0.0, 0.0, 32768)
    keep = keep_mask(4, 64, 32768, seed)
    assert (y[keep] == float("inf")).all()
    assert y[~keep].isnan().all()


@pytest.mark.parametrize("rows, cols", [(0, 8), (4, 0), (0, 0)])
def test_empty(rows: int, cols: int) -> None:
    case = Case(rows, cols, shortcut=True)
    with launches() as log:
        result = run(case, make_inputs(case))
    assert not log
    assert all(result[name].shape == (rows, cols) for name in ("y", "dz", "dshortcut"))
    assert all((result[name] == 0).all() for name in ("dnorm_weight", "dnorm_bias", "dbias"))


def test_rows_beyond_2_to_the_31_elements() -> None:
    # Virtual memory only: the pages between the rows are never touched.
    stride = 2**30 + 8
    z = torch.empty(2 * stride + 64, dtype=torch.bfloat16).as_strided((3, 64), (stride, 1))
    case = Case(3, 64, torch.bfloat16)
    x = make_inputs(case)
    z.copy_(x.z)
    result = run(case, replace(x, z=z))
    for name, value in run(case, x).items():
        assert torch.equal(result[name], value), name


@pytest.mark.parametrize("cols", [200, 1025])
@pytest.mark.parametrize("norm", ["layer", "rms", None])
def test_every_byte_moves_once(norm: str | None, cols: int) -> None:
    case = Case(5, cols, torch.bfloat16, norm, residual=True)
    x = make_inputs(case)
    with launches() as log:
        run(case, x)
    forward, backward = log[0], log[1]
    size = x.z.nbytes
    assert forward.loaded["residual_ptr"] == size
    # Layer norm reads the first element of a row, which its tile holds, once more from L1.
    assert forward.loaded["z_ptr"] == size + (5 * 2 if norm == "layer" else 0)
    assert forward.stored["y_ptr"] == size
    assert backward.loaded["z_ptr"] == backward.loaded["dy_ptr"] == size
    assert backward.stored["dz_ptr"] == size
    statistics = {"layer": 2, "rms": 1, None: 0}[norm] * 5 * 4
    assert sum(forward.stored.values()) == size + statistics


def test_same_bits_twice() -> None:
    case = Case(33, 65, torch.bfloat16)
    first, second = run(case, make_inputs(case)), run(case, make_inputs(case))
    assert all(torch.equal(first[name], second[name]) for name in first)


@triton.jit
def _copy_kernel(x_ptr, y_ptr, stride, cols, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + tl.program_id(0) * stride + column, mask=column < cols)
    tl.store(y_ptr + tl.program_id(0) * BLOCK + column, x)


@pytest.mark.parametrize("cols, row_stride, match", [(66, 72, "column 65"), (64, 96, "column 71")])
def test_interpreter_stops_outside_an_argument(cols: int, row_stride: int, match: str) -> None:
    x = make_inputs(Case(3, 64, gap=8)).z
    y = torch.empty(3, 128)
    _copy_kernel[(3,)](x, y, 72, 64, BLOCK=128)
    with pytest.raises(triton.runtime.errors.InterpreterError, match=match):
        _copy_kernel[(3,)](x, y, row_stride, cols, BLOCK=128)
