"""What the C++ kernels of the channel norms read and write, and by how many threads."""

from __future__ import annotations

import math

import pytest
import torch
from channel_cases import (
    DTYPES,
    LAYOUTS,
    NORMS,
    Inputs,
    make_epilogue,
    make_inputs,
    run_operator,
)

from fused.backends import backend, ops

pytestmark = pytest.mark.usefixtures("one_thread")


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
                *(inputs.seed, *epilogue.channel),
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
                            inputs.z, inputs.mask, *epilogue.channel[:3]
                        )
                        found |= dict(zip(("mean", "variance", "count"), statistics, strict=True))
                    for name, t in found.items():
                        assert not t.isnan().any(), (name, dtype)
                        if not inputs.z.numel() and name not in ("y", "dz"):
                            assert (t == 0).all(), name
    finally:
        backend.poison_outputs(False)


@pytest.mark.slow
@pytest.mark.usefixtures("cpp")
@pytest.mark.parametrize("channels_last", [False, pytest.param(True, marks=pytest.mark.full)])
def test_elements_beyond_two_to_the_31(channels_last: bool) -> None:
    """The last sample is that far away; the others are zeros that are read, never written."""
    channels, positions = 16, 1 << 14
    samples = (1 << 31) // (channels * positions) + 2
    plain = make_inputs(1, channels, positions, torch.bfloat16, "instance", channels_last)
    epilogue = make_epilogue("instance", "relu", 0.0, channels, 1, channels_last)
    codes = epilogue.channel
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
    sums = ops.channel_sums(dy, z, *arguments)[0]
    plain_sums = ops.channel_sums(plain.dy, plain.z, *arguments)[0]
    torch.testing.assert_close(sums, plain_sums)
