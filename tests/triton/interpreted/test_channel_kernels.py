"""Channel kernels against reference.py in float64, and their memory traffic, in the interpreter."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import channel_cases
import pytest
import torch
import triton
import triton.language as tl
from channel_cases import Inputs, make_epilogue, make_inputs, named, seed_of
from channel_oracle import (
    LAUNCHERS,
    check_with_shortcut,
    parts_with_shortcut,
    run_with_shortcut,
)
from fused.kernels.channel.tile import place
from fused.kernels.tuning import channel as tuning
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.audit.interpreter import Launch, launches
from fused.backends import ops
from fused.run.random import keep_mask
from fused.spec import ACTIVATIONS, NORM_CODES, Spec

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NORMS = ("batch", "group", "instance", None)
WAYS = [("batch", "split"), *itertools.product(("group", "instance"), ("held", "loop", "split"))]
LAYOUTS = pytest.mark.parametrize("last", [False, True], ids=["planar", "last"])
STATISTICAL = pytest.mark.parametrize("norm", NORMS[:3])
EVERY_WAY = pytest.mark.parametrize("norm, small_tiles", WAYS, indirect=["small_tiles"])


@pytest.fixture(autouse=True)
def _launchers() -> Iterator[None]:
    with mock.patch.object(channel_cases, "ops", LAUNCHERS):
        yield


@dataclass(frozen=True)
class Case:
    """One call; `groups` counts for group norm alone."""

    norm: str | None
    last: bool = False
    shape: tuple[int, int, int] = (3, 6, 35)  # samples, channels, positions
    dtype: torch.dtype = torch.float32
    activation: str | None = "gelu"
    p: float = 0.1
    groups: int = 2
    channel_dropout: bool = False
    residual: bool = True
    affine: bool = True
    masked: bool = False
    constant: bool = False

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        layout = "last" if self.last else "planar"
        shape = "x".join(map(str, self.shape))
        return f"{self.norm}-{layout}-{self.activation}-{dtype}-{shape}"

    @property
    def epilogue(self) -> Spec:
        channels = self.shape[1]
        rest = (self.groups, self.last, self.channel_dropout)
        return make_epilogue(self.norm, self.activation, self.p, channels, *rest)

    @property
    def inputs(self) -> Inputs:
        flags = (self.last, self.affine, self.residual, self.masked, self.constant)
        return make_inputs(*self.shape, self.dtype, self.norm, *flags)


def check(case: Case, inputs: Inputs | None = None) -> list[Launch]:
    """Judges a case by the one rule; returns its launches."""
    with launches() as log:
        channel_cases.check(inputs or case.inputs, case.epilogue, str(case))
    return log


def shortcut_of(x: Inputs) -> torch.Tensor:
    """A shortcut of z's shape, off every boundary; NaN where there is padding."""
    generator = torch.Generator().manual_seed(1)
    whole = torch.randn(x.z.numel() + 1, generator=generator).to(x.z.dtype)
    shortcut = whole[1:].view(x.z.shape)
    if x.mask is not None:
        shortcut[~x.mask] = float("nan")
    return shortcut


def check_shortcut(case: Case) -> tuple[list[Launch], dict[str, torch.Tensor]]:
    """Judges a case with a shortcut; returns its launches and results."""
    x = case.inputs
    with launches() as log:
        found = check_with_shortcut(x, case.epilogue, shortcut_of(x), str(case))
    if x.mask is not None and "dshortcut" in found:
        assert not found["dshortcut"][~x.mask].any()
    return log, found


def names(log: list[Launch]) -> list[str]:
    return [launch.kernel.removeprefix("_channel_").removesuffix("_kernel") for launch in log]


SPLIT = ["moments", "finish", "apply", "bwd", "_column_sum"]
GROUP_SPLIT = ["moments", "finish", "apply", "bwd", "group_sum", "_column_sum", "bwd"]


@pytest.fixture(params=["held", "loop", "split"])
def small_tiles(request: pytest.FixtureRequest) -> Iterator[str]:
    """Tiles that make a few hundred elements a long walk, by each way of group_tile."""
    kinds = {k: v._replace(elements=256, per_thread=4) for k, v in tuning.KINDS.items()}
    way = request.param
    limits: dict[str, Any] = {"KINDS": kinds, "UNITS": 16, "RUN": 16, "SHORT_RUN": 16}
    limits |= {"LOOP_ELEMENTS": 256, "LOOP_BYTES": 0 if way == "split" else tuning.LOOP_BYTES}
    if way != "held":
        limits["HELD_ELEMENTS"] = (16, 16)
    caches = (tuning.walk_tile, tuning._held_tile, tuning._loop_tile)
    for cached in caches:
        cached.cache_clear()
    with mock.patch.multiple(tuning, **limits):
        yield way
    for cached in caches:
        cached.cache_clear()


def matrix_of_cases() -> list[Case]:
    """Every norm x layout x dtype, with the other properties taken in turn."""
    cases = []
    activations = itertools.cycle((None, *ACTIVATIONS))
    for norm, last, dtype in itertools.product(NORMS, (False, True), DTYPES):
        for _ in range(2):
            i = len(cases)
            case = Case(norm, last, ((3, 6, 35), (2, 16, 9))[i % 2], dtype, next(activations))
            case = replace(case, p=(0.1, 0.5, 0.0)[i % 3], channel_dropout=i % 5 == 1)
            case = replace(case, residual=i % 7 < 3, affine=i % 4 > 0, masked=last and i % 3 > 0)
            cases.append(replace(case, constant=norm is not None and i % 4 == 2))
    return cases


@pytest.mark.parametrize("case", matrix_of_cases(), ids=str)
def test_every_norm_layout_dtype(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("shape", [(2, 3, 1), (1, 4, 1), (3, 20, 4), (2, 12, 49), (1, 4, 300)])
@LAYOUTS
@STATISTICAL
def test_odd_shapes(norm: str, last: bool, shape: tuple[int, int, int]) -> None:
    dtype = DTYPES[sum(shape) % 3]
    check(Case(norm, last, shape, dtype, "silu", groups=4 if shape[1] % 4 == 0 else 1))


@pytest.mark.parametrize(
    "channels, groups, layout",
    [
        *((24, 3, "planar"), (20, 2, "planar")),
        *((24, 3, "last"), (20, 2, "last"), (24, 3, "masked"), (32, 1, "masked")),
    ],
)
@EVERY_WAY
def test_walks_of_many_steps(
    norm: str, channels: int, groups: int, layout: str, small_tiles: str
) -> None:
    """Channels and positions beyond a tile, groups of 8, 10 and 32 channels."""
    if norm != "group":
        channels //= 4
    last, masked = layout != "planar", layout == "masked"
    case = Case(norm, last, (2, channels, 23), activation="silu", groups=groups, masked=masked)
    case = replace(case, dtype=DTYPES[channels % 3])
    log = names(check(case))
    if norm == "batch":
        assert log[:5] == SPLIT
    elif small_tiles == "split" or (last and groups == 2 and norm == "group"):
        assert log == GROUP_SPLIT
    elif small_tiles == "loop":
        assert log == ["loop_fwd", "loop_bwd", "_column_sum"]
    else:
        assert log == ["held_fwd", "held_bwd", "_column_sum"]


@pytest.mark.parametrize("channel_dropout", [False, True], ids=["elements", "channels"])
@LAYOUTS
@pytest.mark.parametrize("norm", ["batch", "group", None])
@pytest.mark.parametrize("small_tiles", ["split"], indirect=True)
def test_walks_by_constants(
    norm: str | None, last: bool, channel_dropout: bool, small_tiles: str
) -> None:
    case = Case(norm, last, (2, 20, 37), torch.bfloat16, "relu", groups=2, constant=True)
    log = names(check(replace(case, channel_dropout=channel_dropout, masked=last)))
    assert log == ["apply", "bwd", "_column_sum"]


@pytest.mark.parametrize("case", matrix_of_cases(), ids=str)
def test_shortcut_of_every_norm_layout_dtype(case: Case) -> None:
    _, found = check_shortcut(case)
    assert ("dshortcut" in found) == (case.norm is not None)


@pytest.mark.parametrize("kind", ["elements", "channels", "masked"])
@pytest.mark.parametrize("channels, last", [(24, False), (20, False), (24, True), (20, True)])
@EVERY_WAY
def test_shortcut_in_walks_of_many_steps(
    norm: str, channels: int, last: bool, kind: str, small_tiles: str
) -> None:
    """The first walk writes the gradient of the shortcut, and a second one reads it as dy."""
    groups = 3 if channels == 24 else 2
    case = Case(norm, last, (2, channels, 23), torch.bfloat16, "relu", 0.3, groups)
    case = replace(case, channel_dropout=kind == "channels", masked=last and kind == "masked")
    case = replace(case, affine=kind != "elements", residual=kind != "channels")
    log, _ = check_shortcut(case)
    size, backward = case.inputs.z.nbytes, [entry for entry in log if "bwd" in entry.kernel]
    if not case.masked:
        first = backward[0]
        assert first.loaded["shortcut_ptr"] == first.stored["dshortcut_ptr"] == size
        assert first.loaded["dy_ptr"] == moved(backward, "stored", "dz_ptr") == size
        once_more = {"loop_bwd": "dshortcut_ptr", "held_bwd": "", "bwd": "dy_ptr"}
        again = once_more[names(backward)[0]]
        assert not again or backward[-1].loaded[again] == size
        assert moved(backward, "loaded", "z_ptr") == (2 if again else 1) * size


@pytest.mark.parametrize("shape", [(2, 3, 1), (1, 4, 1), (3, 20, 4), (1, 4, 300)])
@LAYOUTS
@pytest.mark.parametrize("norm", NORMS)
def test_shortcut_of_odd_shapes(norm: str | None, last: bool, shape: tuple[int, int, int]) -> None:
    groups = 4 if shape[1] % 4 == 0 else 1
    check_shortcut(Case(norm, last, shape, DTYPES[sum(shape) % 2], "silu", groups=groups))


@LAYOUTS
def test_shortcut_in_parts_of_batch_norm(last: bool) -> None:
    case = Case("batch", last, (3, 6, 35), torch.bfloat16, masked=last)
    _, whole = check_shortcut(case)
    x = case.inputs
    for name, part in parts_with_shortcut(x, case.epilogue, shortcut_of(x)).items():
        assert torch.equal(part, whole[name]), name


@pytest.mark.parametrize("shape", [(0, 6, 5), (2, 6, 0)])
@LAYOUTS
@pytest.mark.parametrize("norm", NORMS)
def test_shortcut_of_nothing(norm: str | None, last: bool, shape: tuple[int, int, int]) -> None:
    case = Case(norm, last, shape)
    x = case.inputs
    with launches() as log:
        found = run_with_shortcut(x, case.epilogue, shortcut_of(x))
    assert not log
    for name, t in found.items():
        whole = name in ("y", "dz", "dshortcut")
        assert t.shape == x.z.shape if whole else (t == 0).all(), name


@pytest.mark.parametrize("threshold", [1, 6554, 65535, 65536])
@pytest.mark.parametrize("channel_dropout", [False, True], ids=["elements", "channels"])
@LAYOUTS
def test_mask_is_random_py_bit_for_bit(last: bool, channel_dropout: bool, threshold: int) -> None:
    samples, rows, cols = 3, 9, 41
    channels = cols if last else rows
    scalars = (0, channels, last, 0.0, 0, 0.0, 0.0, threshold, channel_dropout)
    for dtype, number in ((torch.float32, -1), (torch.bfloat16, 2**62 + 2**33 + 7)):
        seed, ones = torch.tensor([number]), torch.ones(samples, rows, cols, dtype=dtype)
        y = LAUNCHERS.channel_apply(ones, None, None, None, None, None, None, seed, *scalars)
        constants = (None,) * 6
        dz, *_ = LAUNCHERS.channel_backward(ones, ones, *constants, seed, 0, True, *scalars)
        if channel_dropout:
            keep = keep_mask(samples, channels, threshold, seed)
            keep = (keep[:, None, :] if last else keep[:, :, None]).expand(ones.shape)
        else:
            keep = keep_mask(samples * rows, cols, threshold, seed).view(ones.shape)
        scale = 65536 / (65536 - threshold) if threshold < 65536 else 0.0
        assert torch.equal(y, keep.to(dtype) * torch.tensor(scale).to(dtype))
        assert torch.equal(y, dz)


@pytest.mark.parametrize("kind", ["large mean", "constant", "one outlier"])
@LAYOUTS
@EVERY_WAY
def test_adversarial_values(norm: str, last: bool, kind: str, small_tiles: str) -> None:
    case = Case(norm, last, (2, 4, 96), p=0.0, activation=None, residual=False)
    x = case.inputs
    place_of_outlier = torch.arange(x.z.numel()).view(x.z.shape) % 384 == 5
    z = {
        "large mean": x.z + 1e4,
        "constant": torch.full_like(x.z, 3.7),
        "one outlier": torch.where(place_of_outlier, 1e5, x.z),
    }[kind]
    check(case, replace(x, z=z))


@LAYOUTS
@EVERY_WAY
def test_statistics(norm: str, last: bool, small_tiles: str) -> None:
    """Of a mean 10⁴ times the deviation, to float32's last places; and those of the forward."""
    case = Case(norm, last, (2, 4, 50), activation=None, p=0.0, masked=last)
    x, codes = case.inputs, case.epilogue.channel
    x.z += 1e4
    found = LAUNCHERS.channel_statistics(x.z, x.mask, *codes[:3])
    _, *again = LAUNCHERS.channel_forward(x.z, None, None, None, x.mask, None, *codes)
    exact = channel_cases.reference.channel_statistics(x.z.double(), case.epilogue, x.mask)
    for mean, variance, count in (found, again):
        torch.testing.assert_close(mean.double(), exact[0], rtol=1.2e-7, atol=0)
        torch.testing.assert_close(variance.double(), exact[1], rtol=1e-5, atol=0)
        assert torch.equal(count.double(), exact[2] if last else exact[2][:0])


@LAYOUTS
def test_parts_of_batch_norm(last: bool) -> None:
    """The operators between which processes exchange statistics give the same bits."""
    case = Case("batch", last, (3, 6, 35), torch.bfloat16, masked=last)
    whole = channel_cases.run_operator(case.inputs, case.epilogue)
    for name, part in channel_cases.run_in_parts(case.inputs, case.epilogue).items():
        assert torch.equal(part, whole[name]), name


@pytest.mark.parametrize("shortcut", [False, True], ids=["plain", "shortcut"])
@LAYOUTS
@pytest.mark.parametrize("norm", NORMS)
def test_in_place(norm: str | None, last: bool, shortcut: bool) -> None:
    case = Case(norm, last, (2, 6, 35), torch.bfloat16, constant=True)
    x, codes = case.inputs, case.epilogue.channel
    rest = (x.mean, x.variance, *x.parameters, x.residual, None, x.seed, *codes)
    rest += (shortcut_of(x),) if shortcut else ()
    y = LAUNCHERS.channel_apply(x.z, *rest)
    assert LAUNCHERS.channel_apply_(x.z, *rest) is None
    assert torch.equal(x.z, y)


@pytest.mark.parametrize("wanted", [0, 1, 2, 4, 5])
@pytest.mark.parametrize("constant", [False, True], ids=["statistics", "constants"])
@pytest.mark.parametrize("norm", NORMS)
def test_wanted_sums(norm: str | None, constant: bool, wanted: int) -> None:
    """Any subset, and none of the others changes by a bit."""
    case = Case(norm, True, (2, 6, 9), torch.bfloat16, constant=constant)
    x, codes = case.inputs, case.epilogue.channel
    x.norm_weight = None if norm is None else x.norm_weight.float()
    mean, variance = x.mean, x.variance
    if norm and not constant:
        mean, variance, _ = LAUNCHERS.channel_statistics(x.z, None, *codes[:3])
    constant |= norm is None

    def run(bits: int) -> dict[str, torch.Tensor]:
        statistics = (mean, variance, None)
        rest = (*x.parameters, None, x.seed, bits, constant, *codes)
        return named(x, x.z, LAUNCHERS.channel_backward(x.dy, x.z, *statistics, *rest))

    every = run(3 if norm == "group" and not constant else 7)
    if norm == "group" and not constant and wanted & ops.WANT_BIAS:
        with pytest.raises(ValueError, match="bias in front of group norm"):
            run(wanted)
        return
    found = run(wanted)
    for name, bit in (("dnorm_weight", 1), ("dnorm_bias", 2), ("dbias", 4), ("dz", wanted)):
        if name in found:
            asked = name == "dz" or wanted & bit
            assert torch.equal(found[name], every[name]) if asked else found[name].shape == (0,)


@pytest.mark.parametrize("shape", [(2, 6, 5), (0, 6, 5), (2, 6, 0)])
@LAYOUTS
@STATISTICAL
def test_fake_kernels_foretell_shapes_and_dtypes(
    norm: str, last: bool, shape: tuple[int, int, int]
) -> None:
    """opcheck does this for the C++ kernels; it cannot reach kernels that need a GPU."""
    case = Case(norm, last, shape, torch.bfloat16, masked=last)
    x, codes = case.inputs, case.epilogue.channel
    parameters, seed = (x.norm_weight.float(), x.norm_bias), seed_of(x, case.epilogue)
    forward = (x.z, *parameters, x.residual, x.mask, seed, *codes)
    real = LAUNCHERS.channel_forward(*forward)
    statistics = (*real[1:3], real[3] if last else None)
    rest = (*parameters, x.mask, seed, 3, False, *codes)
    backward = (x.dy, x.z, *statistics, *rest)
    real += LAUNCHERS.channel_backward(*backward)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = ops.channel_forward(*forward) + ops.channel_backward(*backward)
    for r, f in zip(real, fake, strict=True):
        assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())
    if not x.z.numel():
        assert all((t == 0).all() for t in real[1:3] + real[5:7])


@triton.jit
def _place_kernel(out_ptr, sample, channels, positions, LAST: tl.constexpr, RUN: tl.constexpr):
    channel = tl.arange(0, 4)
    sample = tl.cast(sample, tl.int64)
    row, offset, _ = place(
        sample, channel, channel < channels, 0, channels, positions, 1, LAST, RUN
    )
    tl.store(out_ptr + tl.arange(0, 2), tl.join(tl.max(row), tl.max(tl.ravel(offset))))


@LAYOUTS
def test_offsets_beyond_2_to_the_31(last: bool) -> None:
    out = torch.empty(2, dtype=torch.int64)
    sample, channels, positions = 2**20, 2**10, 2**12
    _place_kernel[(1,)](out, sample, channels, positions, LAST=last, RUN=8)
    row = sample * (positions if last else channels) + (7 if last else 3)
    assert out.tolist() == [row, row * (channels if last else positions) + (3 if last else 7)]


def moved(log: list[Launch], direction: str, name: str) -> int:
    return sum(getattr(launch, direction)[name] for launch in log)


@pytest.mark.parametrize("norm, readings", [("batch", 2), ("group", 1), ("instance", 1)])
@LAYOUTS
def test_every_byte_moves_as_often_as_it_must(norm: str, readings: int, last: bool) -> None:
    case = Case(norm, last, (4, 16, 70), torch.bfloat16)
    log = check(case)
    backward = next(i for i, launch in enumerate(log) if "bwd" in launch.kernel)
    size = case.inputs.z.nbytes
    # Each program of the statistics kernel reads its first tile once more, from L1.
    again = size if norm == "batch" else 0
    assert readings * size <= moved(log[:backward], "loaded", "z_ptr") <= readings * size + again
    assert moved(log[:backward], "loaded", "residual_ptr") == size
    assert moved(log[:backward], "stored", "y_ptr") == size
    assert moved(log[backward:], "loaded", "z_ptr") == readings * size
    assert moved(log[backward:], "loaded", "dy_ptr") == readings * size
    assert moved(log[backward:], "stored", "dz_ptr") == size


@LAYOUTS
@STATISTICAL
def test_same_bits_twice(norm: str, last: bool) -> None:
    case = Case(norm, last, (3, 16, 35), torch.bfloat16)
    first, second = (channel_cases.run_operator(case.inputs, case.epilogue) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert NORM_CODES[norm] == case.epilogue.channel[0]
