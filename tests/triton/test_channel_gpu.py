"""The channel kernels on a real GPU at full size; skipped without one.

What only a GPU can show: the approximate PTX instructions, layouts, races between programs and
threads, offsets beyond 2^31 elements, and that the dispatcher finds these kernels.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton kernels need triton")

import channel_cases
from channel_cases import EVERY_ACTIVATION, LAYOUTS, NORMS, make_epilogue, make_inputs
from channel_oracle import check_with_shortcut

from fused.backends import ops
from fused.run.random import keep_mask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EVERY_LAYOUT = pytest.mark.parametrize("last", LAYOUTS, ids=["planar", "last"])
STATISTICAL = pytest.mark.parametrize("norm", ["batch", "group", "instance"])
# samples, channels, positions, groups: held, looped and split groups; rows of every alignment
SHAPES = [
    (64, 64, 3136, 32),
    (64, 256, 196, 32),
    (64, 512, 49, 32),
    (64, 512, 4, 32),
    (8, 320, 4096, 32),
    (200, 96, 3000, 3),
    (2, 24, 50000, 4),
    (4099, 512, 1, 16),
    (33, 30, 1001, 5),
]


def check(
    norm: str | None,
    last: bool,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    activation: str | None = "gelu",
    p: float = 0.1,
    channel_dropout: bool = False,
    **options: bool,
) -> None:
    samples, channels, positions, groups = shape
    epilogue = make_epilogue(norm, activation, p, channels, groups, last, channel_dropout)
    x = make_inputs(samples, channels, positions, dtype, norm, last, device="cuda", **options)
    channel_cases.check(x, epilogue, f"{norm} {last} {shape} {dtype} {activation} {options}")


@pytest.mark.parametrize("activation", EVERY_ACTIVATION)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EVERY_LAYOUT
@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_layout_dtype_activation(
    norm: str | None, last: bool, dtype: torch.dtype, activation: str | None
) -> None:
    check(norm, last, (7, 48, 260, 6), dtype, activation, p=0.2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@EVERY_LAYOUT
@pytest.mark.parametrize("norm", NORMS)
def test_shortcut(
    norm: str | None, last: bool, dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> None:
    if norm == "instance" and shape[2] == 1:
        pytest.skip("one element has no spread")
    *sizes, groups = shape
    epilogue = make_epilogue(norm, "relu", 0.1, sizes[1], groups, last)
    x = make_inputs(*sizes, dtype, norm, last, device="cuda")
    check_with_shortcut(x, epilogue, torch.randn_like(x.z), f"{norm} {last} {shape} {dtype}")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@EVERY_LAYOUT
@STATISTICAL
def test_shapes(
    norm: str, last: bool, dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> None:
    if norm == "instance" and shape[2] == 1:
        pytest.skip("one element has no spread")
    check(norm, last, shape, dtype)
    if last:
        check(norm, last, shape, dtype, "relu", masked=True)


@pytest.mark.parametrize("shape", SHAPES[::2], ids=str)
@pytest.mark.parametrize("channel_dropout", [False, True], ids=["elements", "channels"])
@EVERY_LAYOUT
@pytest.mark.parametrize("norm", NORMS)
def test_constants_and_channel_dropout(
    norm: str | None, last: bool, channel_dropout: bool, shape: tuple[int, int, int, int]
) -> None:
    check(norm, last, shape, torch.bfloat16, channel_dropout=channel_dropout, constant=True)


@pytest.mark.parametrize("threshold", [1, 6554, 65535])
@pytest.mark.parametrize("channel_dropout", [False, True], ids=["elements", "channels"])
@EVERY_LAYOUT
def test_mask_is_random_py_bit_for_bit(last: bool, channel_dropout: bool, threshold: int) -> None:
    samples, rows, cols = 5, 131, 1031
    channels = cols if last else rows
    scalars = (0, channels, last, 0.0, 0, 0.0, 0.0, threshold, channel_dropout)
    for dtype, number in itertools.product(DTYPES, (0, -1, 2**62 + 2**33 + 7)):
        seed = torch.tensor([number], device="cuda")
        z = torch.ones(samples, rows, cols, dtype=dtype, device="cuda")
        y = ops.channel_apply(z, None, None, None, None, None, None, seed, *scalars)
        if channel_dropout:
            keep = keep_mask(samples, channels, threshold, seed)
            keep = (keep[:, None, :] if last else keep[:, :, None]).expand(z.shape)
        else:
            keep = keep_mask(samples * rows, cols, threshold, seed).view(z.shape)
        assert torch.equal(y != 0, keep)


@pytest.mark.parametrize("shape", SHAPES[::2], ids=str)
@EVERY_LAYOUT
def test_in_place(last: bool, shape: tuple[int, int, int, int]) -> None:
    """A race between a tile's reading and its writing would show here and nowhere else."""
    samples, channels, positions, _ = shape
    epilogue = make_epilogue("batch", "gelu", 0.1, channels, 1, last)
    x = make_inputs(
        samples, channels, positions, torch.bfloat16, "batch", last, constant=True, device="cuda"
    )
    constants = (x.mean, x.variance, *x.parameters, x.residual, None, x.seed)
    y = ops.channel_apply(x.z, *constants, *epilogue.channel)
    ops.channel_apply_(x.z, *constants, *epilogue.channel)
    assert torch.equal(x.z, y)


@EVERY_LAYOUT
@STATISTICAL
def test_more_than_2_to_the_31_elements(norm: str, last: bool) -> None:
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GB of GPU memory")
    samples, channels, positions = 1040, 64, 32784
    epilogue = make_epilogue(norm, "relu", 0.0, channels, 8, last)
    shape = (samples, positions, channels) if last else (samples, channels, positions)
    z = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
    codes = epilogue.channel
    found = ops.channel_forward(z, None, None, None, None, None, *codes)
    statistics = (*found[1:3], None)
    dz, *_ = ops.channel_backward(z, z, *statistics, None, None, None, None, 0, False, *codes)
    tail = slice(-2, None)
    if norm == "batch":
        mean, variance = (t.double().cpu() for t in found[1:3])
        whole = z.transpose(1, 2) if last else z
        for i in (0, channels - 1):
            exact = whole[:, i].double()
            assert abs(float(mean[0, i]) - float(exact.mean())) < 1e-6
            assert abs(float(variance[0, i]) / float(exact.var(correction=0)) - 1) < 1e-6
        y = ops.channel_apply(
            z[tail].contiguous(), *found[1:3], None, None, None, None, None, *codes
        )
        assert torch.equal(found[0][tail], y)
        return
    part = z[tail].contiguous()
    again = ops.channel_forward(part, None, None, None, None, None, *codes)
    torch.testing.assert_close(found[0][tail], again[0], rtol=1e-2, atol=1e-2)
    rest = (None, None, None, None, 0, False)
    dpart, *_ = ops.channel_backward(part, part, *again[1:3], None, *rest, *codes)
    torch.testing.assert_close(dz[tail], dpart, rtol=1e-2, atol=1e-2)


@EVERY_LAYOUT
@STATISTICAL
def test_same_bits_twice(norm: str, last: bool) -> None:
    for samples, channels, positions, groups in SHAPES[:6]:
        epilogue = make_epilogue(norm, "gelu", 0.1, channels, groups, last)
        shape = (samples, channels, positions)
        x = make_inputs(*shape, torch.bfloat16, norm, last, device="cuda")
        first, second = (channel_cases.run_operator(x, epilogue) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)


@EVERY_LAYOUT
def test_parts_of_batch_norm(last: bool) -> None:
    epilogue = make_epilogue("batch", "gelu", 0.1, 48, 1, last)
    x = make_inputs(40, 48, 1000, torch.bfloat16, "batch", last, device="cuda")
    whole = channel_cases.run_operator(x, epilogue)
    for name, part in channel_cases.run_in_parts(replace(x), epilogue).items():
        assert torch.equal(part, whole[name]), name
