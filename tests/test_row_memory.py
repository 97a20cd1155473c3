"""The C++ row kernels: what they read and write, and where it lies in memory."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import DTYPES, NORMS, Inputs, make_epilogue, make_inputs, run_operator

from fused import functional
from fused.backends import backend, ops
from fused.spec import Spec


def in_poisoned_buffers(plain: Inputs) -> Inputs:
    """The same rows among NaN, at an odd offset and an odd stride."""

    def surrounded(t: torch.Tensor) -> torch.Tensor:
        rows, cols = t.shape
        buffer = torch.full((1 + rows * (cols + 3),), float("nan"), dtype=t.dtype)
        return buffer[1:].view(rows, cols + 3)[:, :cols].copy_(t)

    assert plain.residual is not None
    tensors = map(surrounded, (plain.z, plain.dy, plain.residual))
    return replace(plain, **dict(zip(("z", "dy", "residual"), tensors, strict=True)))


def with_rows_far_apart(plain: Inputs) -> Inputs:
    """The same rows 2^31 elements apart, in memory that is reserved but not touched between them.

    Three rows of z and dy.
    """
    stride = (1 << 31) + 3

    def far(t: torch.Tensor) -> torch.Tensor:
        memory = torch.empty(2 * stride + t.shape[1], dtype=t.dtype)
        return memory.as_strided(t.shape, (stride, 1)).copy_(t)

    return replace(plain, z=far(plain.z), dy=far(plain.dy))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_rows_offsets_and_red_zones(dtype: torch.dtype) -> None:
    epilogue = make_epilogue("layer", "silu", 0.2)
    for cols in (1, 15, 64, 100):
        plain = make_inputs(6, cols, dtype)
        expected = run_operator(plain, epilogue)
        for name, t in run_operator(in_poisoned_buffers(plain), epilogue).items():
            assert torch.equal(t, expected[name]), (name, cols)


@pytest.mark.usefixtures("isa")
def test_in_place_writes_y_and_nothing_else() -> None:
    for dtype in DTYPES:
        inputs = make_inputs(6, 100, dtype)
        epilogue = make_epilogue("layer", "gelu", 0.2)
        expected = run_operator(inputs, epilogue)["y"]
        buffer = torch.full((6, 110), float("nan"), dtype=dtype)
        z = buffer[:, 3:103]
        z.copy_(inputs.z)
        ops.row_forward_(z, *inputs.parameters, inputs.residual, inputs.seed, *epilogue.row)
        assert torch.equal(z, expected)
        assert buffer[:, :3].isnan().all() and buffer[:, 103:].isnan().all()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("rows, cols", [(5, 65), (1, 1), (0, 8), (4, 0), (3, 1000), (70, 64)])
def test_outputs_are_written_completely(rows: int, cols: int, norm: str | None) -> None:
    backend.poison_outputs(True)
    try:
        for dtype in DTYPES:
            inputs = make_inputs(rows, cols, dtype, norm)
            epilogue = make_epilogue(norm, "gelu", 0.1)
            found = run_operator(inputs, epilogue)
            seed, codes = inputs.seed, epilogue.row
            _, statistics = ops.row_forward(inputs.z, *inputs.parameters, None, seed, *codes)
            found["statistics"] = statistics
            for name, t in found.items():
                assert not t.isnan().any(), (name, dtype)
    finally:
        backend.poison_outputs(False)


def last_level_cache() -> int:
    """Bytes, as csrc/cpu/memory.cpp reads them."""
    for level in (3, 2):
        file = Path(f"/sys/devices/system/cpu/cpu0/cache/index{level}/size")
        if file.exists() and (found := re.match(r"(\d+)K", file.read_text())):
            return int(found[1]) << 10
    return 32 << 20


def rows_that_stream(cols: int, dtype: torch.dtype) -> int:
    """Rows of an output well beyond the size from which it is written past the caches."""
    size = last_level_cache() * 3 // 4
    if size > 1 << 28:
        pytest.skip(f"an output of {size >> 20} MiB is too large for a test")
    return size // (cols * dtype.itemsize)


def check_streams_alike(inputs: Inputs, epilogue: Spec) -> None:
    """Without dropout: all rows, which stream, give the bits of parts that are too small for it."""
    rows, block, codes = inputs.z.shape[0], 512, epilogue.row

    def run(start: int, end: int) -> tuple[torch.Tensor, ...]:
        z, dy, residual = (t[start:end] for t in (inputs.z, inputs.dy, inputs.residual))
        y, statistics = ops.row_forward(z, *inputs.parameters, residual, None, *codes)
        dz = ops.row_backward(dy, z, *inputs.parameters, statistics, None, 0, *codes)[0]
        return y, dz, statistics.T

    whole = run(0, rows)
    assert all(t.data_ptr() % 64 == 0 for t in whole[:2])  # else they would not stream
    for start in range(0, rows, block):
        end = min(start + block, rows)
        for name, streamed, ordinary in zip(
            ("y", "dz", "statistics"), whole, run(start, end), strict=True
        ):
            assert torch.equal(streamed[start:end], ordinary), (name, start)


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_streaming_stores_give_the_same(dtype: torch.dtype, norm: str | None) -> None:
    """Outputs beyond the last-level cache take another store instruction, and get the same bits."""
    rows = rows_that_stream(1024, dtype)
    check_streams_alike(make_inputs(rows, 1024, dtype, norm), make_epilogue(norm, "gelu"))


@pytest.mark.slow
@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_streaming_stores_drop_by_the_same_mask(dtype: torch.dtype) -> None:
    cols = 1024
    rows = rows_that_stream(cols, dtype)
    # Neither a sigmoid nor its derivative is zero here, so what is zero has been dropped.
    inputs = make_inputs(rows, cols, dtype, None, bias=False, residual=False)
    inputs.z.clamp_(-5, 5)
    inputs.dy.fill_(1)
    found = run_operator(inputs, make_epilogue(None, "sigmoid", 0.1))
    mask = functional.dropout_mask(rows, cols, 0.1, inputs.seed)
    for name in ("y", "dz"):
        assert found[name].data_ptr() % 64 == 0
        assert torch.equal(found[name] != 0, mask), name


@pytest.mark.slow
@pytest.mark.usefixtures("isa")
def test_rows_beyond_two_to_the_31_elements() -> None:
    plain = make_inputs(3, 70, torch.bfloat16, residual=False)
    epilogue = make_epilogue("layer", "gelu", 0.1)
    expected = run_operator(plain, epilogue)
    far = with_rows_far_apart(plain)
    for name, t in run_operator(far, epilogue).items():
        assert torch.equal(t, expected[name]), name
    ops.row_forward_(far.z, *plain.parameters, None, plain.seed, *epilogue.row)
    assert torch.equal(far.z, expected["y"])
