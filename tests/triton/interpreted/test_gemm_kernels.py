"""Linear with the row epilogue in one kernel, against float64, in the interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from fused.kernels.gemm import row as gemm_row
from fused.kernels.gemm import tile as gemm_tile
from fused.kernels.gemm.row import linear_row_forward
from fused.kernels.tuning import gemm as gemm_tuning
from fused.kernels.tuning import rules as tuning
from gemm_oracle import (
    Case,
    check,
    forward_arguments,
    make_inputs,
    matrix_of_cases,
    run,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.audit.interpreter import launches
from fused.backends import gemm, launchers, ops
from fused.run.random import keep_mask

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NORMS = ("layer", "rms", None)
EVERY_NORM = pytest.mark.parametrize("norm", NORMS)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def _cpu_as_gpu() -> Iterator[None]:
    """The operator runs the launcher for CPU tensors, and gemm.py takes those for a GPU's."""
    library = torch.library.Library("fused_lnad", "IMPL")
    library.impl("linear_row_forward", launchers.LINEAR["linear_row_forward"], "CPU")
    device = tuning.INTERPRETER.arch, tuning.INTERPRETER.warp_size
    with mock.patch.multiple(gemm, _is_on_gpu=lambda x: True, _device=lambda index: device):
        yield
    library._destroy()


@pytest.mark.parametrize("case", matrix_of_cases(), ids=str)
def test_every_norm_activation_dtype(case: Case) -> None:
    check(case)


@pytest.mark.parametrize(
    "rows, inner, cols", [(1, 8, 8), (130, 64, 128), (3, 136, 256), (70, 8, 24)]
)
@EVERY_DTYPE
@EVERY_NORM
def test_shapes_off_the_tile(
    norm: str | None, dtype: torch.dtype, rows: int, inner: int, cols: int
) -> None:
    check(Case(rows, inner, cols, dtype, norm, residual=True))


@pytest.mark.parametrize("gap", [8, 3])
@EVERY_NORM
def test_row_strides(norm: str | None, gap: int) -> None:
    """With a gap that is no multiple of 16 bytes the kernels still read right, but slowly."""
    case = Case(5, 40, 72, norm=norm, residual=True, gap=gap)
    x = make_inputs(case)
    found = linear_row_forward(*forward_arguments(case, x))
    packed = replace(x, x=x.x.contiguous(), residual=x.residual.contiguous())
    for a, b in zip(found, linear_row_forward(*forward_arguments(case, packed)), strict=True):
        assert torch.equal(a, b)
    if gap == 8:
        check(case)


@pytest.mark.parametrize("inner, cols", [(41, 40), (40, 41), (7, 5), (1, 1), (0, 16)])
@EVERY_NORM
def test_any_width_is_right_in_the_launcher(norm: str | None, inner: int, cols: int) -> None:
    """gemm.py does not send such widths here; the launcher must not depend on it."""
    case = Case(5, inner, cols, torch.float32, norm, p=0.0)
    x = make_inputs(case)
    y, z, _ = linear_row_forward(*forward_arguments(case, x))
    torch.testing.assert_close(z, torch.nn.functional.linear(x.x, x.weight, x.bias))
    assert torch.equal(y, epilogue_of(case, x, z)[0])


def epilogue_of(case: Case, x: object, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the pass behind the library's GEMM makes of z."""
    (
        _,
        _,
        _,
        *parameters,
        residual,
        seed,
        _,
    ) = forward_arguments(case, x)[:8]
    return launchers.TRITON["row_forward"](z, None, *parameters, residual, seed, *case.epilogue.row)


@pytest.mark.parametrize("cols", [8, 64, 200, 256])
@EVERY_DTYPE
@EVERY_NORM
def test_the_epilogue_is_that_of_the_row_kernel(
    norm: str | None, dtype: torch.dtype, cols: int
) -> None:
    """The same bits for the same z, so the same mask, whatever the tile."""
    case = Case(20, 24, cols, dtype, norm, residual=True)
    x = make_inputs(case)
    y, z, statistics = linear_row_forward(*forward_arguments(case, x))
    expected = epilogue_of(case, x, z)
    assert torch.equal(y, expected[0])
    assert torch.equal(statistics, expected[1])
    same, none, again = linear_row_forward(*forward_arguments(case, x, save_z=False))
    assert torch.equal(same, y) and torch.equal(again, statistics) and none.shape == (0,)


@pytest.mark.parametrize("threshold", [1, 6554, 32768, 65535, 65536])
@pytest.mark.parametrize("rows, cols", [(70, 16), (3, 200)])
def test_mask_is_random_py_bit_for_bit(rows: int, cols: int, threshold: int) -> None:
    for number in (0, -1, 2**62 + 2**33 + 7):
        seed = torch.tensor([number])
        scalars = (0, 0.0, 0, 0.0, 0.0, threshold)
        x, bias = torch.zeros(rows, 8), torch.ones(cols)
        arguments = (x, torch.zeros(cols, 8), bias, None, None, None, seed, False)
        y, *_ = linear_row_forward(*arguments, *scalars)
        if threshold == 65536:
            assert (y == 0).all()
        else:
            assert torch.equal(y != 0, keep_mask(rows, cols, threshold, seed))


@EVERY_NORM
def test_same_bits_for_any_number_of_rows(norm: str | None) -> None:
    case = Case(70, 40, 40, norm=norm)
    x = make_inputs(case)
    whole = linear_row_forward(*forward_arguments(case, x))[0]
    part = linear_row_forward(*forward_arguments(case, replace(x, x=x.x[:3])))[0]
    assert torch.equal(whole[:3], part)


@pytest.mark.parametrize("kind", ["large mean", "constant row", "one outlier"])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_adversarial_rows(norm: str, kind: str) -> None:
    case = Case(4, 64, 64, torch.float32, norm, p=0.0, bias=False)
    x = make_inputs(case)
    # weight is the identity, so that z is x.
    x = replace(x, weight=torch.eye(64))
    z = {
        "large mean": x.x + 1e4,
        "constant row": torch.full_like(x.x, 3.7),
        "one outlier": torch.where(torch.arange(64) == 7, 1e5, x.x),
    }[kind]
    x = replace(x, x=z)
    y, found, statistics = linear_row_forward(*forward_arguments(case, x))
    assert torch.equal(found, z)
    assert torch.equal(y, epilogue_of(case, x, z)[0])
    if kind == "constant row" and norm == "layer":
        eps = torch.tensor(case.epilogue.eps)
        torch.testing.assert_close(statistics[1], eps.rsqrt().expand(4), rtol=1e-6, atol=0)


def test_infinite_and_nan_rows_stay_in_their_rows() -> None:
    case = Case(4, 40, 64, torch.float32, activation="relu", p=0.0)
    x = make_inputs(case)
    clean = run(case, x)
    x.x[1, 3], x.x[2, 5] = float("inf"), float("nan")
    spoiled = run(case, x)
    for name in ("y", "x"):
        assert spoiled[name][1:3].isnan().any(dim=1).all()
        assert torch.equal(spoiled[name][[0, 3]], clean[name][[0, 3]])


@pytest.mark.parametrize("rows, cols", [(0, 8), (4, 0)])
def test_empty(rows: int, cols: int) -> None:
    case = Case(rows, 8, cols)
    with launches() as log:
        y, z, statistics = linear_row_forward(*forward_arguments(case, make_inputs(case)))
    assert not log
    assert y.shape == z.shape == (rows, cols)
    assert statistics.shape == (2, rows)


def test_rows_of_inputs_beyond_2_to_the_31_elements() -> None:
    # Virtual memory only: the pages between the rows are never touched.
    case = Case(3, 64, 64, residual=True)
    x = make_inputs(case)

    def spread(t: torch.Tensor) -> torch.Tensor:
        stride = 2**31 // (len(t) - 1) // 8 * 8 + 8
        wide = torch.empty(len(t) * stride, dtype=t.dtype).as_strided(t.shape, (stride, 1))
        return wide.copy_(t)

    far = replace(x, x=spread(x.x), weight=spread(x.weight), residual=spread(x.residual))
    found = linear_row_forward(*forward_arguments(case, far))
    for a, b in zip(found, linear_row_forward(*forward_arguments(case, x)), strict=True):
        assert torch.equal(a, b)


def test_rows_of_outputs_beyond_2_to_the_31_elements() -> None:
    """Of a matrix with so many rows, the last tile alone: the others are untouched memory."""
    rows, cols = 2**24 + 5, 256
    case = Case(rows, 8, cols, p=0.5)
    x = make_inputs(replace(case, rows=1))
    x = replace(x, x=x.x.expand(rows, 8))
    tile = gemm_tile.tile_of_program

    def last_tile(index, rows, cols, whole, block_m, block_n):
        return tile(index + (rows - 1) // block_m, rows, cols, whole, block_m, block_n)

    one_program = SimpleNamespace(cdiv=lambda a, b: 1)
    with (
        mock.patch.object(gemm_tile, "tile_of_program", last_tile),
        mock.patch.object(gemm_row, "triton", one_program),
    ):
        y, z, statistics = linear_row_forward(*forward_arguments(case, x))
    row = replace(x, x=x.x[:1])
    expected = linear_row_forward(*forward_arguments(replace(case, rows=1, p=0.0), row))
    assert torch.equal(z[-5:], expected[1].expand(5, cols))
    assert torch.equal(statistics[:, -1:], expected[2])
    groups = cols // 8
    seed_rows = keep_mask_from(rows - 5, 5, groups, case.epilogue.threshold, x.seed)
    assert torch.equal(y[-5:] != 0, seed_rows & (expected[0] != 0))


def keep_mask_from(
    first: int, rows: int, groups: int, threshold: int, seed: torch.Tensor
) -> torch.Tensor:
    """keep_mask of a matrix of 8 · groups columns, its rows from `first` on."""
    from fused.run.random import philox

    counter = torch.arange(first * groups, (first + rows) * groups).view(rows, groups)
    words = philox(seed, counter)
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, dim=-1).view(rows, groups * 8) >= threshold


@pytest.mark.parametrize("save_z", [True, False])
@EVERY_NORM
def test_every_byte_of_the_inputs_moves_once(norm: str | None, save_z: bool) -> None:
    case = Case(20, 72, 64, norm=norm, residual=True)
    x = make_inputs(case)
    with launches() as log:
        linear_row_forward(*forward_arguments(case, x, save_z))
    (launch,) = log
    assert launch.loaded["x_ptr"] == x.x.nbytes
    assert launch.loaded["weight_ptr"] == x.weight.nbytes
    assert launch.loaded["residual_ptr"] == x.residual.nbytes
    # z takes the way over memory: its own, or that of y.
    size = x.residual.nbytes
    stored = (launch.stored["z_ptr"], launch.stored["y_ptr"])
    assert stored == ((size, size) if save_z else (0, 2 * size))
    first = 20 * 2 if norm == "layer" else 0
    assert launch.loaded["z_ptr" if save_z else "y_ptr"] == size + first
    statistics = {"layer": 2, "rms": 1, None: 0}[norm] * 20 * 4
    assert launch.stored["statistics_ptr"] == statistics


@pytest.mark.parametrize("rows, cols", [(3, 40), (0, 8), (4, 0)])
@pytest.mark.parametrize("save_z", [True, False])
@EVERY_NORM
def test_fake_kernel_foretells_shapes_and_dtypes(
    norm: str | None, save_z: bool, rows: int, cols: int
) -> None:
    case = Case(rows, 16, cols, norm=norm)
    arguments = forward_arguments(case, make_inputs(case), save_z)
    real = ops.linear_row_forward(*arguments)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = ops.linear_row_forward(*arguments)
    for r, f in zip(real, fake, strict=True):
        assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())


@pytest.fixture
def descriptors() -> Iterator[None]:
    """The kernel by tensor descriptors, on tiles that leave parts of rows and columns over."""
    tile = gemm_tuning.GemmTile(32, 64, 32, 2, 4)
    with mock.patch.object(gemm_tuning, "plain_tile", lambda *args: tile):
        yield


@pytest.mark.parametrize("rows, inner, cols", [(1, 8, 8), (40, 72, 136), (33, 40, 64)])
@EVERY_DTYPE
@pytest.mark.usefixtures("descriptors")
def test_descriptors_off_the_tile(dtype: torch.dtype, rows: int, inner: int, cols: int) -> None:
    with launches() as log:
        check(Case(rows, inner, cols, dtype, None, residual=True, gap=8))
    assert log[0].kernel == "_gemm_tma_kernel"


@pytest.mark.parametrize("case", matrix_of_cases((None,)), ids=str)
@pytest.mark.usefixtures("descriptors")
def test_descriptors_with_every_activation_dtype(case: Case) -> None:
    check(case)


@EVERY_DTYPE
@pytest.mark.parametrize("save_z", [True, False])
def test_descriptors_give_what_pointers_give(dtype: torch.dtype, save_z: bool) -> None:
    """The same epilogue, mask included; z up to the order of its sums."""
    case = Case(40, 24, 136, dtype, None, p=0.5, residual=True)
    x = make_inputs(case)
    pointers = linear_row_forward(*forward_arguments(case, x, save_z))
    tile = gemm_tuning.GemmTile(32, 64, 64, 2, 4)
    with mock.patch.object(gemm_tuning, "plain_tile", lambda *args: tile), launches() as log:
        found = linear_row_forward(*forward_arguments(case, x, save_z))
    assert [launch.kernel for launch in log] == ["_gemm_tma_kernel"]
    assert log[0].stored["y_desc"] == log[0].loaded["residual_desc"] == x.residual.nbytes
    assert log[0].stored["z_desc"] == (x.residual.nbytes if save_z else 0)
    for a, b in zip(found, pointers, strict=True):
        torch.testing.assert_close(a, b)
    if save_z:
        assert torch.equal(found[0], epilogue_of(case, x, found[1])[0])


@pytest.mark.usefixtures("descriptors")
def test_what_descriptors_cannot_address_goes_by_pointers() -> None:
    case = Case(5, 40, 72, norm=None, residual=True)
    x = make_inputs(case)
    shifted = torch.empty(5 * 40 + 1, dtype=x.x.dtype)[1:].view(5, 40).copy_(x.x)
    for other in (replace(x, x=shifted), make_inputs(replace(case, gap=3))):
        with launches() as log:
            linear_row_forward(*forward_arguments(case, other))
        assert log[0].kernel == "_gemm_row_kernel"


@pytest.mark.parametrize("threshold", [1, 32768, 65535])
@pytest.mark.usefixtures("descriptors")
def test_mask_by_descriptors_is_random_py_bit_for_bit(threshold: int) -> None:
    rows, cols = 40, 136
    for dtype, number in ((torch.float32, 0), (torch.bfloat16, -1), (torch.float16, 2**62 + 7)):
        seed = torch.tensor([number])
        x, weight = torch.zeros(rows, 8, dtype=dtype), torch.zeros(cols, 8, dtype=dtype)
        bias = torch.ones(cols, dtype=dtype)
        scalars = (0, 0.0, 0, 0.0, 0.0, threshold)
        y, *_ = linear_row_forward(x, weight, bias, None, None, None, seed, False, *scalars)
        assert torch.equal(y != 0, keep_mask(rows, cols, threshold, seed))
