"""The C++ kernels of batch, group and instance norm against float64, by every instruction set."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from channel_cases import (
    DTYPES,
    EVERY_ACTIVATION,
    LAYOUTS,
    NORMS,
    Inputs,
    check,
    largest_rstd,
    make_epilogue,
    make_inputs,
    run_in_parts,
    run_operator,
    run_reference,
)
from tolerances import FLOOR, assert_close

from fused import backend, ops, random, reference
from fused.spec import ChannelEpilogue, dropout_scale

# Samples, channels, positions, groups: one of each, planes of 2 × 2 and 7 × 7, odd sizes, sizes
# around a vector, a random block and a line, one position, one group and as many as channels.
SHAPES = [
    *((1, 1, 1, 1), (3, 5, 1, 5), (4, 16, 4, 4), (3, 6, 49, 3), (2, 3, 65, 1), (2, 64, 16, 8)),
    *((5, 7, 33, 7), (2, 65, 9, 13), (70, 8, 3, 2), (300, 24, 1, 3), (1, 130, 40, 1)),
    *((3, 256, 5, 32), (2, 1000, 3, 10)),
]
# Beyond a block of sums in float (4096), a piece (65536) and what is finished in the cache.
LARGE = [(2, 2, 4099, 1), (2, 3, 66000, 3), (1, 320, 700, 4), (40, 96, 49, 32)]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other cost small tensors more time than they save."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", EVERY_ACTIVATION)
def test_every_activation(activation: str | None, norm: str | None, dtype: torch.dtype) -> None:
    for channels_last in LAYOUTS:
        for p in (0.0, 0.3):
            inputs = make_inputs(3, 6, 37, dtype, norm, channels_last)
            epilogue = make_epilogue(norm, activation, p, 6, 2, channels_last)
            check(inputs, epilogue, f"last={channels_last} p={p}")


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("channels_last", LAYOUTS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(
    shape: tuple[int, int, int, int], norm: str | None, channels_last: bool
) -> None:
    *sizes, groups = shape
    for dtype in DTYPES:
        for activation, p in (("silu", 0.0), ("tanh", 0.1), (None, 0.0)):
            inputs = make_inputs(*sizes, dtype, norm, channels_last)
            epilogue = make_epilogue(norm, activation, p, sizes[1], groups, channels_last)
            check(inputs, epilogue, f"{activation} p={p}")


@pytest.mark.usefixtures("cpp")
@pytest.mark.parametrize("channels_last", LAYOUTS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_large(shape: tuple[int, int, int, int], norm: str | None, channels_last: bool) -> None:
    *sizes, groups = shape
    for dtype, activation, p, constant in (
        (torch.float32, "silu", 0.1, False),
        (torch.float32, "relu", 0.0, False),
        (torch.float32, "silu", 0.0, True),
        (torch.bfloat16, "silu", 0.1, False),
    ):
        if constant and norm in (None, "group"):
            continue
        inputs = make_inputs(*sizes, dtype, norm, channels_last, constant=constant)
        epilogue = make_epilogue(norm, activation, p, sizes[1], groups, channels_last)
        check(inputs, epilogue, f"{activation} p={p} {dtype} constant={constant}")


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("channels_last", LAYOUTS)
@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_constant_statistics(norm: str, channels_last: bool) -> None:
    for sizes in ((3, 5, 70), (4, 16, 4), (40, 70, 1)):
        for dtype in DTYPES:
            inputs = make_inputs(*sizes, dtype, norm, channels_last, constant=True)
            epilogue = make_epilogue(norm, "silu", 0.1, sizes[1], channels_last=channels_last)
            check(inputs, epilogue, str(sizes))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_masks(norm: str | None, dtype: torch.dtype) -> None:
    """Padding takes no part, whatever is in it, and a sample may be nothing else."""
    for sizes, groups in (((4, 6, 50), 2), ((3, 70, 9), 7), ((5, 3, 1), 3), ((2, 8, 1200), 2)):
        for p, channel_dropout in ((0.1, False), (0.3, True)):
            inputs = make_inputs(*sizes, dtype, norm, True, masked=True)
            epilogue = make_epilogue(norm, "silu", p, sizes[1], groups, True, channel_dropout)
            check(inputs, epilogue, f"{sizes} {channel_dropout}")
            padding = ~inputs.mask
            found = run_operator(inputs, epilogue)
            assert (found["y"][padding] == 0).all() and (found["dz"][padding] == 0).all()


@pytest.mark.usefixtures("cpp")
def test_masks_with_constant_statistics_and_without_any_position() -> None:
    for constant in (True, False):
        inputs = make_inputs(3, 8, 20, torch.float32, "batch", True, masked=True, constant=constant)
        epilogue = make_epilogue("batch", "gelu", 0.1, 8, channels_last=True)
        check(inputs, epilogue)
        inputs.mask.fill_(False)
        for name, t in run_operator(inputs, epilogue).items():
            assert (t == 0).all(), name


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("channels_last", LAYOUTS)
def test_batch_norm_in_parts_gives_the_same_bits(channels_last: bool, masked: bool) -> None:
    if masked and not channels_last:
        pytest.skip("masks are for channels last")
    for sizes in ((4, 6, 50), (3, 5, 400), (70, 16, 4), (3, 300, 70)):
        for dtype in DTYPES:
            for activation in ("silu", "relu"):
                inputs = make_inputs(*sizes, dtype, "batch", channels_last, masked=masked)
                epilogue = make_epilogue("batch", activation, 0.1, sizes[1], 1, channels_last)
                whole = run_operator(inputs, epilogue)
                for name, t in run_in_parts(inputs, epilogue).items():
                    assert torch.equal(t, whole[name]), (name, sizes, dtype, activation)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("channels_last", LAYOUTS)
@pytest.mark.parametrize("norm", NORMS)
def test_the_mask_of_dropout_is_that_of_the_reference(
    norm: str | None, channels_last: bool
) -> None:
    """Laid over memory order: of elements, or of the channels of each sample."""
    for samples, channels, positions in (
        *((2, 3, 50), (3, 7, 4), (2, 16, 4), (4, 65, 9), (5, 24, 1), (2, 5, 130), (3, 8, 16)),
        *((9, 3, 7), (2, 2, 5000)),
    ):
        for p in (0.1, 0.5, 0.93, 1.0):
            for whole in (False, True):
                shape = (samples, channels, positions)
                z = torch.randn(shape).transpose(1, 2) if channels_last else torch.randn(shape)
                z = z.contiguous() if norm else torch.ones_like(z.contiguous())
                # What is not dropped is not zero.
                weight, bias = (torch.full((channels,), v) for v in (1e-3, 1.0))
                inputs = Inputs(z, torch.ones_like(z), *((weight, bias) if norm else ()))
                epilogue = make_epilogue(norm, None, p, channels, 1, channels_last, whole)
                found = run_operator(inputs, epilogue)
                keep = keep_of(z, epilogue, inputs.seed)
                where = f"{shape} p={p} channels={whole}"
                assert torch.equal(found["y"] != 0, keep), where
                if norm is None:
                    scale = torch.tensor(dropout_scale(epilogue.threshold))
                    assert torch.equal(found["dz"], keep * scale), where
                    assert torch.equal(found["y"], found["dz"]), where
                else:
                    kept = keep.double().sum((0, 1) if channels_last else (0, 2))
                    expected = (kept * dropout_scale(epilogue.threshold)).float()
                    torch.testing.assert_close(found["dnorm_bias"], expected, rtol=4e-6, atol=0)


def keep_of(z: torch.Tensor, epilogue: ChannelEpilogue, seed: torch.Tensor) -> torch.Tensor:
    samples, rows, cols = z.shape
    if not epilogue.channel_dropout:
        keep = random.keep_mask(samples * rows, cols, epilogue.threshold, seed)
        return keep.view(z.shape)
    channels = cols if epilogue.channels_last else rows
    keep = random.keep_mask(samples, channels, epilogue.threshold, seed)
    return (keep[:, None, :] if epilogue.channels_last else keep[:, :, None]).expand(z.shape)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("channels_last", LAYOUTS)
@pytest.mark.parametrize("norm", NORMS)
def test_dropout_of_whole_channels(norm: str | None, channels_last: bool) -> None:
    for sizes in ((3, 70, 20), (4, 16, 4), (2, 6, 3000), (30, 9, 1)):
        for dtype in DTYPES:
            inputs = make_inputs(*sizes, dtype, norm, channels_last)
            groups = next(g for g in (sizes[1] // 2, 3) if sizes[1] % g == 0)
            epilogue = make_epilogue(norm, "silu", 0.3, sizes[1], groups, channels_last, True)
            check(inputs, epilogue, f"{sizes} {dtype}")


@pytest.mark.usefixtures("cpp")
@pytest.mark.parametrize("channels_last", LAYOUTS)
@pytest.mark.parametrize("present", range(8))
@pytest.mark.parametrize("norm", ["batch", "group", "instance"])
def test_absent_parameters(norm: str, present: int, channels_last: bool) -> None:
    for positions in (4, 40):
        inputs = make_inputs(5, 6, positions, torch.float32, norm, channels_last)
        for bit, name in enumerate(("norm_weight", "norm_bias", "residual")):
            if not present >> bit & 1:
                setattr(inputs, name, None)
        check(inputs, make_epilogue(norm, "tanh", 0.2, 6, 2, channels_last))


@pytest.mark.usefixtures("cpp")
@pytest.mark.parametrize("parameter", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("constant", [False, True])
def test_wider_parameters(dtype: torch.dtype, parameter: torch.dtype, constant: bool) -> None:
    for channels_last in LAYOUTS:
        inputs = make_inputs(3, 7, 40, dtype, "batch", channels_last, constant=constant)
        epilogue = make_epilogue("batch", "gelu", 0.1, 7, channels_last=channels_last)
        narrow = run_operator(inputs, epilogue)
        for name in ("norm_weight", "norm_bias", "mean", "variance"):
            t = getattr(inputs, name)
            setattr(inputs, name, None if t is None else t.to(parameter))
        wide = run_operator(inputs, epilogue)
        assert wide["dnorm_weight"].dtype == parameter
        for name in narrow:
            assert torch.equal(narrow[name], wide[name].to(dtype))


def adversarial(kind: str) -> torch.Tensor:
    """(samples, channels, positions) = (4, 6, 50), the same channels in all samples."""
    z = torch.randn(4, 6, 50, generator=torch.Generator().manual_seed(1))
    match kind:
        case "mean 1e4":
            return z + 1e4
        case "constant channels":
            return z[:1, :, :1].expand(4, -1, 50) * 3
        case "one outlier first":
            z[0, :, 0] = 1e4
            return z
        case "one outlier last":
            z[-1, :, -1] = -1e6
            return z
        case "denormal":
            return z * 1e-40
        case "tiny deviation":
            return 1 + z * 1e-6
        case "large":
            return z * 1e15
        case "zeros":
            return z * 0
    raise AssertionError(kind)


ADVERSARIAL = ["mean 1e4", "constant channels", "one outlier first", "one outlier last"]
ADVERSARIAL += ["denormal", "tiny deviation", "large", "zeros"]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("channels_last", LAYOUTS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", ADVERSARIAL)
def test_adversarial_values(kind: str, norm: str | None, channels_last: bool) -> None:
    for activation in ("gelu", None):
        inputs = make_inputs(4, 6, 50, torch.float32, norm, channels_last, residual=False)
        inputs.z = adversarial(kind)
        inputs.z = (inputs.z.transpose(1, 2) if channels_last else inputs.z).contiguous()
        epilogue = make_epilogue(norm, activation, 0.0, 6, 6, channels_last)
        found = run_operator(inputs, epilogue)
        oracle = run_reference(inputs, epilogue, torch.float64)
        eager = run_reference(inputs, epilogue, torch.float32)
        # A mean that is rounded shifts all of a channel by half an ulp of |z|, so the normalised
        # values and what is made of them by that times rstd. Nothing else excuses more than
        # eager's error.
        rstd = largest_rstd(inputs, epilogue) if norm else 0.0
        shift = float(inputs.z.abs().max()) * rstd / (2 * FLOOR)
        terms = shift * float(inputs.dy.square().sum().sqrt())
        for name, result in found.items():
            assert result.isfinite().all(), name
            magnitude = shift if name == "y" else terms * (rstd if name == "dz" else 1.0)
            assert_close(name, result, oracle[name], eager[name], torch.float32, magnitude)
        if norm and kind in ("zeros", "constant channels"):
            # Every normalised value is zero, and no rounding error may pass for one that is not.
            assert bool((found["dnorm_weight"] == 0).all())


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("channels_last", LAYOUTS)
@pytest.mark.parametrize("norm", ["batch", "group", "instance"])
def test_a_first_mean_that_is_far_off(norm: str, channels_last: bool) -> None:
    """The statistics start from the mean of some of the elements."""
    channels, positions = (256, 256) if channels_last else (4, 4096)
    for height in (100.0, 1e4):
        inputs = make_inputs(
            *(2, channels, positions, torch.float32, norm, channels_last), residual=False
        )
        view = inputs.z.transpose(1, 2) if channels_last else inputs.z
        view[:, :, : positions // 8] += height
        check(inputs, make_epilogue(norm, None, 0.0, channels, 2, channels_last), f"{height}")


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("channels_last", LAYOUTS)
@pytest.mark.parametrize("norm", ["batch", "group", "instance"])
def test_squares_that_overflow(norm: str, channels_last: bool) -> None:
    """The variance, a float, is infinite: the limit is that of z = mean."""
    z = torch.randn(4, 6, 50).sign().mul_(1e38)
    inputs = Inputs(z, torch.randn_like(z), torch.ones(6), torch.arange(6.0))
    if channels_last:
        inputs.z, inputs.dy = (t.transpose(1, 2).contiguous() for t in (inputs.z, inputs.dy))
    epilogue = make_epilogue(norm, None, 0.0, 6, 2, channels_last)
    found = run_operator(inputs, epilogue)
    bias = inputs.norm_bias if channels_last else inputs.norm_bias[:, None]
    assert torch.equal(found["y"], bias.expand_as(z if not channels_last else found["y"]))
    assert (found["dz"] == 0).all()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("channels_last", LAYOUTS)
def test_nan_and_infinity_stay_in_their_statistic(channels_last: bool) -> None:
    for value in (math.nan, math.inf):
        for norm in ("batch", "group", "instance"):
            inputs = make_inputs(3, 6, 40, torch.float32, norm, channels_last, residual=False)
            view = inputs.z.transpose(1, 2) if channels_last else inputs.z
            view[1, 2, 3] = value
            epilogue = make_epilogue(norm, "silu", 0.0, 6, 3, channels_last)
            y = run_operator(inputs, epilogue)["y"]
            y = y.transpose(1, 2) if channels_last else y
            spoiled = torch.zeros(3, 6, 40, dtype=torch.bool)
            samples = slice(None) if norm == "batch" else 1
            spoiled[samples, 2 : 4 if norm == "group" else 3] = True
            assert torch.equal(y.isnan(), spoiled), (value, norm)


BREAKPOINTS = [0.0, -0.0, 3.0, -3.0, 6.0, -6.0, 1.0, -1.0, 20.0, 20.5, -20.0, 88.0, -88.0, 1e-30]
BREAKPOINTS += [math.inf, -math.inf, math.nan]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("activation", [None, "relu", "relu6", "hardswish", "silu"])
def test_without_a_norm_values_pass_as_they_are(activation: str | None) -> None:
    values = torch.tensor(BREAKPOINTS).expand(2, 3, -1).contiguous()
    for channels_last in LAYOUTS:
        inputs = Inputs(values, torch.ones_like(values))
        epilogue = make_epilogue(
            None, activation, 0.0, values.shape[2 if channels_last else 1], 1, channels_last
        )
        found = run_operator(inputs, epilogue)
        eager = run_reference(inputs, epilogue, torch.float32)
        for name in ("y", "dz"):
            known = ~eager[name].isnan() & (values.isfinite() if name == "dz" else True)
            torch.testing.assert_close(found[name][known], eager[name][known], rtol=1e-6, atol=0)
        if activation is None:
            assert torch.equal(found["y"].view(torch.int32), values.view(torch.int32))


@pytest.mark.usefixtures("cpp")
@pytest.mark.parametrize("channels_last", LAYOUTS)
@pytest.mark.parametrize("norm", NORMS)
def test_same_bits_at_any_thread_count(norm: str | None, channels_last: bool) -> None:
    for sizes, groups in (
        ((70, 24, 49), 3),
        ((4, 64, 900), 8),
        ((2, 6, 70000), 2),
        ((1, 96, 3000), 4),
    ):
        inputs = make_inputs(*sizes, torch.float32, norm, channels_last)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for p in (0.0, 0.1):
                epilogue = make_epilogue(norm, "silu", p, sizes[1], groups, channels_last)
                results.append(run_operator(inputs, epilogue))
        for i, other in enumerate(results[2:]):
            for name, t in other.items():
                assert torch.equal(t, results[i % 2][name]), (name, sizes)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("channels_last", LAYOUTS)
@pytest.mark.parametrize("norm", NORMS)
def test_offsets_and_red_zones(norm: str | None, channels_last: bool) -> None:
    """Tensors at an odd offset of a poisoned buffer; nothing outside of them is read or written."""
    for dtype in DTYPES:
        for sizes in ((3, 6, 7), (2, 10, 100), (4, 130, 3)):
            plain = make_inputs(*sizes, dtype, norm, channels_last)
            epilogue = make_epilogue(norm, "gelu", 0.2, sizes[1], 2, channels_last)
            expected = run_operator(plain, epilogue)
            surrounded = Inputs(plain.z, plain.dy, *plain.parameters)
            for name in ("z", "dy", "residual"):
                given = getattr(plain, name)
                buffer = torch.full((given.numel() + 40,), math.nan, dtype=dtype)
                view = buffer[3 : 3 + given.numel()].view(given.shape)
                setattr(surrounded, name, view.copy_(given))
            for name, t in run_operator(surrounded, epilogue).items():
                assert torch.equal(t, expected[name]), (name, sizes)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("channels_last", LAYOUTS)
def test_in_place_writes_y_and_nothing_else(channels_last: bool) -> None:
    for dtype in DTYPES:
        for sizes in ((3, 6, 70), (4, 16, 4)):
            inputs = make_inputs(*sizes, dtype, "batch", channels_last, constant=True)
            epilogue = make_epilogue("batch", "gelu", 0.2, sizes[1], 1, channels_last)
            expected = run_operator(inputs, epilogue)["y"]
            buffer = torch.full((inputs.z.numel() + 20,), math.nan, dtype=dtype)
            z = buffer[5:-15].view(inputs.z.shape).copy_(inputs.z)
            ops.channel_apply_(
                *(z, inputs.mean, inputs.variance, *inputs.parameters, inputs.residual, None),
                *(inputs.seed, *epilogue.channel_codes),
            )
            assert torch.equal(z, expected)
            assert buffer[:5].isnan().all() and buffer[-15:].isnan().all()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "samples, channels, positions",
    [(0, 8, 5), (4, 0, 5), (4, 8, 0), (1, 1, 1), (3, 8, 49), (5, 64, 4), (1, 32, 700)],
)
def test_outputs_are_written_completely(
    samples: int, channels: int, positions: int, norm: str | None
) -> None:
    backend.poison_outputs(True)
    try:
        for channels_last in LAYOUTS:
            for dtype in DTYPES:
                for masked in (False, channels_last):
                    inputs = make_inputs(
                        *(samples, channels, positions, dtype, norm, channels_last), masked=masked
                    )
                    groups = min(2, channels)
                    epilogue = make_epilogue(norm, "gelu", 0.1, channels, groups, channels_last)
                    found = run_operator(inputs, epilogue)
                    if norm is not None:
                        statistics = ops.channel_statistics(
                            inputs.z, inputs.mask, *epilogue.channel_codes[:3]
                        )
                        found |= dict(zip(("mean", "variance", "count"), statistics, strict=True))
                    for name, t in found.items():
                        assert not t.isnan().any(), (name, dtype)
                        if not inputs.z.numel() and name not in ("y", "dz"):
                            assert (t == 0).all(), name
    finally:
        backend.poison_outputs(False)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("norm", ["batch", "group", "instance"])
def test_statistics(norm: str) -> None:
    for channels_last in LAYOUTS:
        for masked in (False, True) if channels_last else (False,):
            inputs = make_inputs(3, 6, 200, torch.float32, norm, channels_last, masked=masked)
            epilogue = make_epilogue(norm, None, 0.0, 6, 2, channels_last)
            codes = epilogue.channel_codes
            found = ops.channel_statistics(inputs.z, inputs.mask, *codes[:3])
            _, *same = ops.channel_forward(
                inputs.z, *inputs.parameters, None, inputs.mask, None, *codes
            )
            expected = reference_statistics(inputs, epilogue)
            for t, other, oracle in zip(found, same, expected, strict=True):
                assert t.shape == oracle.shape and t.dtype == torch.float32
                assert torch.equal(t, other)
                torch.testing.assert_close(t.double(), oracle, rtol=1e-6, atol=1e-6)


def reference_statistics(inputs: Inputs, epilogue: ChannelEpilogue) -> tuple[torch.Tensor, ...]:
    mean, variance, count = reference.channel_statistics(inputs.z.double(), epilogue, inputs.mask)
    return mean, variance, count if inputs.mask is not None else count[:0]


@pytest.mark.slow
@pytest.mark.usefixtures("cpp")
@pytest.mark.parametrize("channels_last", LAYOUTS)
def test_elements_beyond_two_to_the_31(channels_last: bool) -> None:
    """The last sample is that far away; the others are zeros that are read, never written."""
    channels, positions = 16, 1 << 14
    samples = (1 << 31) // (channels * positions) + 2
    plain = make_inputs(1, channels, positions, torch.bfloat16, "instance", channels_last)
    epilogue = make_epilogue("instance", "relu", 0.0, channels, 1, channels_last)
    codes = epilogue.channel_codes
    z = torch.zeros(samples, *plain.z.shape[1:], dtype=torch.bfloat16)
    z[-1] = plain.z[0]
    found = ops.channel_statistics(z, None, *codes[:3])
    for t, expected in zip(found, ops.channel_statistics(plain.z, None, *codes[:3]), strict=True):
        assert torch.equal(t[-1:], expected) and bool((t[:-1] == 0).all())
    # A sum over all samples: of the last one alone, where dy is zero in the others.
    dy = torch.zeros_like(z)
    dy[-1] = plain.dy[0]
    codes = (3, *codes[1:])
    statistics = torch.zeros(1, channels), torch.ones(1, channels)
    arguments = *statistics, *plain.parameters, None, None, *codes
    sums = ops.channel_sums(dy, z, *arguments)
    torch.testing.assert_close(sums, ops.channel_sums(plain.dy, plain.z, *arguments))


@pytest.mark.usefixtures("cpp")
def test_what_is_refused() -> None:
    inputs = make_inputs(2, 6, 10, torch.float32, "group", True, masked=True)
    codes = make_epilogue("group", "relu", 0.0, 6, 2, True).channel_codes
    planar = (*codes[:2], False, *codes[3:])
    z, mask, dy = inputs.z, inputs.mask, inputs.dy

    def forward(z: torch.Tensor, mask: torch.Tensor | None, codes: tuple) -> None:
        ops.channel_forward(z, None, None, None, mask, None, *codes)

    def backward(dy: torch.Tensor, count: torch.Tensor | None, wanted: int) -> None:
        statistics = torch.zeros(2, 2), torch.ones(2, 2), count
        ops.channel_backward(dy, z, *statistics, None, None, mask, None, wanted, False, *codes)

    for sentence, call in {
        "positions": lambda: forward(z[0], None, codes),
        "z must be contiguous": lambda: forward(z.transpose(1, 2), None, codes),
        "mask needs channels_last": lambda: forward(z, mask, planar),
        "mask must be contiguous, bool": lambda: forward(z, mask.float(), codes),
        "do not divide": lambda: forward(z, None, (codes[0], 4, *codes[2:])),
        "not one of batch": lambda: forward(z, None, (1, *codes[1:])),
        "no statistics": lambda: forward(z, None, (0, *codes[1:])),
        "unknown activation": lambda: forward(z, None, (*codes[:4], 99, *codes[5:])),
        "needs a seed": lambda: forward(z, None, (*codes[:7], 100, False)),
        "threshold": lambda: forward(z, None, (*codes[:7], 70000, False)),
        "before group norm": lambda: backward(dy, torch.ones(2), ops.WANT_BIAS),
        "needs count": lambda: backward(dy, None, 0),
        "dy must be": lambda: backward(dy[:1], torch.ones(2), 0),
        "mean and variance must be": lambda: ops.channel_apply(
            z, torch.zeros(3, 2), torch.ones(3, 2), None, None, None, None, None, *codes
        ),
        "are needed with a norm": lambda: ops.channel_apply(
            z, None, None, None, None, None, None, None, *codes
        ),
        "residual must be": lambda: ops.channel_forward(
            z, None, None, z.double(), None, None, *codes
        ),
        "float32, bfloat16": lambda: forward(z.long(), None, codes),
        "is for batch norm": lambda: ops.channel_sums(
            dy, z, torch.zeros(2, 2), torch.ones(2, 2), None, None, mask, None, *codes
        ),
    }.items():
        with pytest.raises(RuntimeError, match=sentence):
            call()
