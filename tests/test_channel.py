"""The C++ kernels of batch, group and instance norm against float64, by every instruction set."""

from __future__ import annotations

import pytest
import torch
from channel_cases import (
    DTYPES,
    EVERY_ACTIVATION,
    LAYOUTS,
    NORMS,
    Inputs,
    check,
    make_epilogue,
    make_inputs,
    run_in_parts,
    run_operator,
)

from fused import spec
from fused.backends import ops
from fused.run import random, reference
from fused.spec import Spec, dropout_scale

# Samples, channels, positions, groups: one of each, planes of 2 × 2 and 7 × 7, odd sizes, sizes
# around a vector, a random block and a line, one position, one group and as many as channels.
SHAPES = [
    *((1, 1, 1, 1), (3, 5, 1, 5), (4, 16, 4, 4), (3, 6, 49, 3), (2, 3, 65, 1), (2, 64, 16, 8)),
    *((5, 7, 33, 7), (2, 65, 9, 13), (70, 8, 3, 2), (300, 24, 1, 3), (1, 130, 40, 1)),
    *((3, 256, 5, 32), (2, 1000, 3, 10)),
]


# Beyond a block of sums in float (4096), a piece (65536) and what is finished in the cache.
LARGE = [(2, 2, 4099, 1), (2, 3, 66000, 3), (1, 320, 700, 4), (40, 96, 49, 32)]


pytestmark = pytest.mark.usefixtures("one_thread")


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


def keep_of(z: torch.Tensor, epilogue: Spec, seed: torch.Tensor) -> torch.Tensor:
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


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("norm", ["batch", "group", "instance"])
def test_statistics(norm: str) -> None:
    for channels_last in LAYOUTS:
        for masked in (False, True) if channels_last else (False,):
            inputs = make_inputs(3, 6, 200, torch.float32, norm, channels_last, masked=masked)
            epilogue = make_epilogue(norm, None, 0.0, 6, 2, channels_last)
            codes = epilogue.channel
            found = ops.channel_statistics(inputs.z, inputs.mask, *codes[:3])
            _, *same = ops.channel_forward(
                inputs.z, *inputs.parameters, None, inputs.mask, None, *codes
            )
            expected = reference_statistics(inputs, epilogue)
            for t, other, oracle in zip(found, same, expected, strict=True):
                assert t.shape == oracle.shape and t.dtype == torch.float32
                assert torch.equal(t, other)
                torch.testing.assert_close(t.double(), oracle, rtol=1e-6, atol=1e-6)


def reference_statistics(inputs: Inputs, epilogue: Spec) -> tuple[torch.Tensor, ...]:
    mean, variance, count = reference.channel_statistics(inputs.z.double(), epilogue, inputs.mask)
    return mean, variance, count if inputs.mask is not None else count[:0]


@pytest.mark.usefixtures("cpp")
def test_what_is_refused() -> None:
    inputs = make_inputs(2, 6, 10, torch.float32, "group", True, masked=True)
    codes = make_epilogue("group", "relu", 0.0, 6, 2, True).channel
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
        "before group norm": lambda: backward(dy, torch.ones(2), spec.WANT_BIAS),
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
