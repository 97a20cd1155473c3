"""Kernels of gated activations against reference.py in float64, and their memory traffic.

As test_row_kernels.py; a case's columns are those of z, twice those of the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import pytest
import torch
from fused.kernels.tuning import gated as gated_tuning
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
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.audit.interpreter import launches
from fused.backends import launchers, ops
from fused.backends.ops import WANT_BIAS, WANT_NORM_BIAS, WANT_NORM_WEIGHT
from fused.run.random import keep_mask
from fused.spec import GATED_ACTIVATIONS, GATED_CODES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NORMS = ("layer", "rms", None)


def gated(rows: int, half: int, *rest: object, activation: str = "swiglu", **more: object) -> Case:
    """A case whose result has `half` columns."""
    return Case(rows, 2 * half, *rest, activation=activation, **more)  # type: ignore[arg-type]


@pytest.fixture
def small_tiles() -> Iterator[None]:
    """Tile limits that make halves of some dozen columns too wide for one tile."""
    rules = (gated_tuning.forward_tile, gated_tuning.backward_tile)
    names = ("FORWARD_TILE", "NARROW_FORWARD_TILE", "FORWARD_LOOP", "SUMS", "SHARED", "NARROW_TILE")
    limits = dict.fromkeys((f"{name}_COLS" for name in names), 32)
    narrow = dict.fromkeys(range(4), 32)
    for rule in rules:
        rule.cache_clear()
    with mock.patch.multiple(gated_tuning, BACKWARD_TILE_COLS=narrow, **limits):
        yield
    for rule in rules:
        rule.cache_clear()


@pytest.mark.parametrize("case", gated_matrix_of_cases(), ids=str)
def test_every_norm_activation_dtype(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_odd_widths(norm: str | None, dtype: torch.dtype) -> None:
    check(gated(2, 1001, dtype, norm, residual=True))
    check(gated(2, 1025, dtype, norm, residual=True))


@pytest.mark.parametrize("rows", [1, 2, 33, 70])
def test_rows_off_the_tile(rows: int) -> None:
    check(gated(rows, 40, torch.bfloat16))


@pytest.mark.parametrize("gap, offset", [(8, 0), (3, 0), (0, 1), (5, 3)])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_strided_and_misaligned(dtype: torch.dtype, gap: int, offset: int) -> None:
    check(gated(5, 100, dtype, residual=True, gap=gap, offset=offset))


@pytest.mark.parametrize("norm", NORMS)
def test_float32_parameters_of_bf16(norm: str | None) -> None:
    check(gated(4, 65, torch.bfloat16, norm, parameter_dtype=torch.float32))


@pytest.mark.parametrize("half", [65, 128])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.usefixtures("small_tiles")
def test_rows_wider_than_a_tile(norm: str | None, dtype: torch.dtype, half: int) -> None:
    case = gated(3, half, dtype, norm, residual=True, activation="geglu")
    with launches() as log:
        wide = check(case)
    names = [launch.kernel.strip("_").removesuffix("_kernel") for launch in log]
    if norm:
        assert names == ["gated_fwd_loop", "gated_sums", "gated_bwd", "column_sum"]
    else:
        assert names == ["gated_fwd", "gated_bwd", "column_sum"]
    check(replace(case, bias=False, affine=False, gap=3, wanted=0))
    # The mask does not depend on the tile: a dropped element leaves the residual, exactly.
    x = make_inputs(case)
    keep = keep_mask(3, half, case.epilogue.threshold, x.seed)
    assert torch.equal(wide["y"][~keep], x.residual[~keep])
    assert (wide["y"][keep] != x.residual[keep]).float().mean() > 0.9


@pytest.mark.parametrize("wanted", range(ALL + 1))
@pytest.mark.parametrize("norm", NORMS)
def test_wanted_sums(norm: str | None, wanted: int) -> None:
    """Any subset, and none of the others changes by a bit."""
    case = gated(5, 33, torch.bfloat16, norm, bias=wanted % 3 == 0, wanted=wanted)
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
    check(gated(3, 100, bias=False, wanted=wanted))


@pytest.mark.parametrize("norm", NORMS)
def test_bias_inside_z_gives_the_same_gradients(norm: str | None) -> None:
    case = gated(7, 65, norm=norm)
    x = make_inputs(case)
    inside = replace(x, z=x.z + x.bias, bias=None)
    apart, together = run(case, x), run(replace(case, bias=False), inside)
    assert all(torch.equal(apart[name], together[name]) for name in apart)


def check_statistics(case: Case) -> None:
    """Those of both halves together."""
    x = make_inputs(case)
    x.z[:, case.cols // 2 :] += 3  # the halves differ
    z = x.z.double() + x.bias.double()
    _, statistics = launchers.TRITON["row_forward"](*forward_arguments(case, x))
    centred = z - z.mean(1, keepdim=True) if case.norm == "layer" else z
    rstd = (centred.square().mean(1) + case.epilogue.eps).rsqrt()
    exact = {"layer": [z.mean(1), rstd], "rms": [rstd], None: []}[case.norm]
    assert statistics.shape == (len(exact), case.rows) and statistics.dtype == torch.float32
    for found, value in zip(statistics, exact, strict=True):
        torch.testing.assert_close(found.double(), value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_statistics(norm: str | None) -> None:
    check_statistics(gated(33, 33, torch.bfloat16, norm))


@pytest.mark.parametrize("norm", NORMS[:2])
@pytest.mark.usefixtures("small_tiles")
def test_statistics_of_wide_rows(norm: str) -> None:
    check_statistics(gated(3, 100, torch.bfloat16, norm))


@pytest.mark.parametrize("activation", GATED_ACTIVATIONS)
def test_no_place_in_z(activation: str) -> None:
    case = gated(3, 8, activation=activation)
    x = make_inputs(case)
    before = x.z.clone()
    with pytest.raises(ValueError, match=f"row_forward_: {activation} halves the columns"):
        launchers.TRITON["row_forward_"](*forward_arguments(case, x))
    assert torch.equal(x.z, before)


@pytest.mark.parametrize("rows", [0, 3])
def test_odd_number_of_columns(rows: int) -> None:
    case = Case(rows, 65, activation="geglu")
    x = make_inputs(case)
    with pytest.raises(ValueError, match=r"row_forward: geglu halves .* even number .* got 65"):
        launchers.TRITON["row_forward"](*forward_arguments(case, x))
    with pytest.raises(ValueError, match=r"row_backward: geglu halves .* even number .* got 65"):
        launchers.TRITON["row_backward"](*backward_arguments(case, x, torch.zeros(2, rows)))


def test_no_shortcut() -> None:
    case = Case(3, 64, activation="geglu", shortcut=True)
    x = make_inputs(case)
    with pytest.raises(ValueError, match=r"row_forward: geglu takes no shortcut .* residual"):
        launchers.TRITON["row_forward"](*forward_arguments(case, x))
    with pytest.raises(ValueError, match=r"row_backward: geglu takes no shortcut .* residual"):
        launchers.TRITON["row_backward"](*backward_arguments(case, x, torch.zeros(2, 3)))


@pytest.mark.parametrize("wanted", [ALL, WANT_NORM_WEIGHT, 0])
@pytest.mark.parametrize("rows, half", [(3, 20), (0, 4), (4, 0)])
@pytest.mark.parametrize("norm", NORMS)
def test_fake_kernels_foretell_shapes_and_dtypes(
    norm: str | None, rows: int, half: int, wanted: int
) -> None:
    case = gated(rows, half, torch.bfloat16, norm, parameter_dtype=torch.float32, wanted=wanted)
    x = make_inputs(case)
    forward = forward_arguments(case, x)
    real = launchers.TRITON["row_forward"](*forward)
    backward = backward_arguments(case, x, real[1])
    real += launchers.TRITON["row_backward"](*backward)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = ops.row_forward(*forward) + ops.row_backward(*backward)
    for r, f in zip(real, fake, strict=True):
        assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())


# (0.1 keeps most, 65535/65536 keeps nearly none, 1 keeps none)
@pytest.mark.parametrize("threshold", [1, 6554, 32768, 65535, 65536])
@pytest.mark.parametrize("rows, half", [(37, 9), (3, 100)])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_mask_is_random_py_bit_for_bit(
    dtype: torch.dtype, rows: int, half: int, threshold: int
) -> None:
    """It lies over the result's columns; the backward gives it to both halves."""
    seed = torch.tensor([2**62 + 2**33 + 7])
    z, dy = torch.ones(rows, 2 * half, dtype=dtype), torch.ones(rows, half, dtype=dtype)
    scalars = (0, 0.0, GATED_CODES["reglu"], 0.0, 0.0, threshold)
    y, statistics = launchers.TRITON["row_forward"](z, None, None, None, None, seed, *scalars)
    dz, *_ = launchers.TRITON["row_backward"](
        dy, z, None, None, None, statistics, seed, 0, *scalars
    )
    assert torch.equal(y != 0, keep_mask(rows, half, threshold, seed) & (threshold < 65536))
    assert torch.equal(dz, torch.cat([y, y], 1))


@pytest.mark.parametrize("norm", NORMS[:2])
@pytest.mark.parametrize("kind", ["large mean", "constant row", "one outlier", "denormals", "1e15"])
def test_adversarial_rows(norm: str, kind: str) -> None:
    case = gated(4, 100, norm=norm, bias=False, p=0.0)
    x = make_inputs(case)
    noise = x.z
    z = {
        "large mean": noise + 1e4,
        "constant row": torch.full_like(noise, 3.7),
        "one outlier": torch.where(torch.arange(200) == 177, 1e5, noise),
        "denormals": noise * 1e-40,
        "1e15": noise * 1e15,
    }[kind]
    check(case, replace(x, z=z))


def test_infinite_and_nan_rows_stay_in_their_rows() -> None:
    case = gated(4, 33, activation="reglu", p=0.0)
    x = make_inputs(case)
    z = x.z.clone()
    z[1, 3], z[2, 50] = float("inf"), float("nan")
    result = run(case, replace(x, z=z))
    oracle = check(case, x)
    for name in ("y", "dz"):
        assert result[name][1:3].isnan().any(dim=1).all()
        assert torch.equal(result[name][[0, 3]], oracle[name][[0, 3]])


@pytest.mark.parametrize("rows, half", [(0, 8), (4, 0), (0, 0)])
def test_empty(rows: int, half: int) -> None:
    case = gated(rows, half)
    with launches() as log:
        result = run(case, make_inputs(case))
    assert not log
    assert result["y"].shape == (rows, half) and result["dz"].shape == (rows, 2 * half)
    assert all((result[name] == 0).all() for name in ("dnorm_weight", "dnorm_bias", "dbias"))


def test_rows_beyond_2_to_the_31_elements() -> None:
    # Virtual memory only: the pages between the rows are never touched.
    stride = 2**30 + 8
    case = gated(3, 32, torch.bfloat16, residual=True)
    x = make_inputs(case)

    def apart(t: torch.Tensor) -> torch.Tensor:
        flat = torch.empty(2 * stride + t.shape[1], dtype=t.dtype)
        return flat.as_strided(t.shape, (stride, 1)).copy_(t)

    far = replace(x, z=apart(x.z), dy=apart(x.dy), residual=apart(x.residual))
    result = run(case, far)
    for name, value in run(case, x).items():
        assert torch.equal(result[name], value), name


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("half", [100, 1001])
def test_every_byte_moves_once(norm: str | None, half: int) -> None:
    case = gated(3, half, torch.bfloat16, norm, residual=True)
    x = make_inputs(case)
    with launches() as log:
        run(case, x)
    forward, backward = log[0], log[1]
    size = x.dy.nbytes
    assert x.z.nbytes == 2 * size
    # Layer norm reads the first element of a row, which its tile holds, once more from L1.
    assert forward.loaded["z_ptr"] == 2 * size + (3 * 2 if norm == "layer" else 0)
    assert forward.loaded["residual_ptr"] == forward.stored["y_ptr"] == size
    statistics = {"layer": 2, "rms": 1, None: 0}[norm] * 3 * 4
    assert sum(forward.stored.values()) == size + statistics
    assert backward.loaded["z_ptr"] == backward.stored["dz_ptr"] == 2 * size
    assert backward.loaded["dy_ptr"] == size


def test_same_bits_twice() -> None:
    case = gated(33, 33, torch.bfloat16)
    first, second = run(case, make_inputs(case)), run(case, make_inputs(case))
    assert all(torch.equal(first[name], second[name]) for name in first)
