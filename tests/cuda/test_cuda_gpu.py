"""The CUDA C++ kernels on a real GPU at full size; skipped without one.

What only a GPU can show: CUDA's elementary functions, races between threads, offsets beyond 2^31
elements, and that the dispatcher finds these kernels, forward and backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import channel_cases
import pytest
import torch
from cases import EVERY_ACTIVATION, NORMS, Inputs, make_epilogue, make_inputs, run_operator
from gated_cases import GATED, make_gated_epilogue, make_gated_inputs
from test_row import check

import fused
from fused.backends import backend, cuda_channel_backward, cuda_row, ops
from fused.run.random import keep_mask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.usefixtures("cuda"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EVERY_LAYOUT = pytest.mark.parametrize("last", channel_cases.LAYOUTS, ids=["planar", "last"])
# samples, channels, positions, groups
SHAPES = [
    (64, 64, 3136, 32),
    (64, 256, 196, 32),
    (64, 512, 49, 32),
    (8, 320, 4096, 32),
    (2, 24, 50000, 4),
    (4099, 512, 1, 16),
    (33, 30, 1001, 5),
]


@pytest.fixture
def cuda() -> Iterator[None]:
    reason = backend.why_not("cuda", "cuda", torch.float32)
    if reason:
        pytest.skip(reason)
    with fused.use_backend("cuda"):
        yield


def on_gpu(inputs: Inputs) -> Inputs:
    given = {f.name: getattr(inputs, f.name) for f in fields(inputs)}
    return Inputs(**{name: None if t is None else t.cuda() for name, t in given.items()})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", EVERY_ACTIVATION)
def test_rows_of_every_activation(
    activation: str | None, norm: str | None, dtype: torch.dtype
) -> None:
    for cols in (256, 1000, 2048):
        inputs = on_gpu(make_inputs(301, cols, dtype, norm))
        check(inputs, make_epilogue(norm, activation, 0.1), str(cols))


@pytest.mark.parametrize("cols", [1, 3, 63, 64, 65, 1025, 4096, 8192, 16384, 40000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_rows_of_every_width(norm: str | None, dtype: torch.dtype, cols: int) -> None:
    for rows in (1, 129, 5000):
        inputs = on_gpu(make_inputs(rows, cols, dtype, norm))
        check(inputs, make_epilogue(norm, "silu", 0.1), str(rows))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", GATED)
def test_rows_of_every_gate(activation: str, norm: str | None, dtype: torch.dtype) -> None:
    for half in (128, 500, 1024):
        inputs = on_gpu(make_gated_inputs(301, half, dtype, norm))
        check(inputs, make_gated_epilogue(norm, activation, 0.1), str(half))


@pytest.mark.parametrize("half", [1, 3, 12, 63, 64, 65, 1025, 4096, 8192, 20000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_gated_rows_of_every_width(norm: str | None, dtype: torch.dtype, half: int) -> None:
    for rows in (1, 129, 5000):
        inputs = on_gpu(make_gated_inputs(rows, half, dtype, norm))
        check(inputs, make_gated_epilogue(norm, "swiglu", 0.1), str(rows))


@pytest.mark.parametrize("activation", EVERY_ACTIVATION)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EVERY_LAYOUT
@pytest.mark.parametrize("norm", channel_cases.NORMS)
def test_channels_of_every_activation(
    norm: str | None, last: bool, dtype: torch.dtype, activation: str | None
) -> None:
    epilogue = channel_cases.make_epilogue(norm, activation, 0.2, 48, 6, last)
    x = channel_cases.make_inputs(7, 48, 260, dtype, norm, last, device="cuda")
    channel_cases.check(x, epilogue)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@EVERY_LAYOUT
@pytest.mark.parametrize("norm", ["batch", "group", "instance"])
def test_channels_of_every_shape(
    norm: str, last: bool, dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> None:
    if norm == "instance" and shape[2] == 1:
        pytest.skip("one element has no spread")
    *sizes, groups = shape
    for masked in (False, True) if last else (False,):
        for whole in (False, True):
            epilogue = channel_cases.make_epilogue(norm, "silu", 0.1, sizes[1], groups, last, whole)
            x = channel_cases.make_inputs(*sizes, dtype, norm, last, masked=masked, device="cuda")
            channel_cases.check(x, epilogue, f"masked={masked} whole={whole}")


@pytest.mark.parametrize("threshold", [1, 6554, 32768, 65535])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mask_is_random_py_bit_for_bit(dtype: torch.dtype, threshold: int) -> None:
    rows, cols = 513, 1031
    for number in (0, -1, 2**62 + 2**33 + 7):
        seed = torch.tensor([number], device="cuda")
        z = torch.ones(rows, cols, dtype=dtype, device="cuda")
        y, _ = ops.row_forward(z, None, None, None, None, seed, 0, 0.0, 0, 0.0, 0.0, threshold)
        assert torch.equal(y != 0, keep_mask(rows, cols, threshold, seed))
        codes = make_gated_epilogue(None, "reglu")._replace(threshold=threshold).row
        y, _ = ops.row_forward(z[:, 1:], None, None, None, None, seed, *codes)
        assert torch.equal(y != 0, keep_mask(rows, cols // 2, threshold, seed))


@pytest.mark.parametrize("cols", [3, 64, 1000, 1025, 4096, 16384, 40000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_in_place(norm: str | None, dtype: torch.dtype, cols: int) -> None:
    """A race between a row's reading and its writing would show here and nowhere else."""
    x, codes = on_gpu(make_inputs(2000, cols, dtype, norm)), make_epilogue(norm, "gelu", 0.1).row
    y, _ = ops.row_forward(x.z, *x.parameters, x.residual, x.seed, *codes)
    ops.row_forward_(x.z, *x.parameters, x.residual, x.seed, *codes)
    assert torch.equal(x.z, y)


@EVERY_LAYOUT
@pytest.mark.parametrize("norm", ["batch", "group", "instance"])
def test_same_bits_twice(norm: str, last: bool) -> None:
    for *sizes, groups in SHAPES:
        epilogue = channel_cases.make_epilogue(norm, "gelu", 0.1, sizes[1], groups, last)
        x = channel_cases.make_inputs(*sizes, torch.bfloat16, norm, last, device="cuda")
        first, second = (channel_cases.run_operator(x, epilogue) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)
    for inputs, epilogue in (
        (make_inputs(5000, 1000, torch.bfloat16), make_epilogue("layer", "gelu", 0.1)),
        (make_gated_inputs(5000, 1000, torch.bfloat16), make_gated_epilogue("layer", "glu", 0.1)),
    ):
        first, second = (run_operator(on_gpu(inputs), epilogue) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_more_than_2_to_the_31_elements() -> None:
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GB of GPU memory")
    rows, cols = 2**20 + 7, 2056
    z = torch.randn(rows, cols, dtype=torch.bfloat16, device="cuda")
    x = replace(on_gpu(make_inputs(4, cols, torch.bfloat16, bias=False, residual=False)), z=z, dy=z)
    epilogue = make_epilogue("layer", "gelu")
    found = run_operator(x, epilogue)
    tail = run_operator(replace(x, z=z[-4:].clone(), dy=z[-4:].clone()), epilogue)
    assert torch.equal(found["y"][-4:], tail["y"])
    assert torch.equal(found["dz"][-4:], tail["dz"])


def test_modules_run_forward_and_backward_by_these_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where backward is called outside of the block that asked for them."""
    launched: list[str] = []
    for module in (cuda_row, cuda_channel_backward):
        launch = module.launch

        def spy(name: str, *args: Any, _launch: Any = launch) -> None:
            launched.append(name)
            _launch(name, *args)

        monkeypatch.setattr(module, "launch", spy)
    for norm, expected in (
        ("layer", ["row_forward", "row_backward"]),
        ("batch", ["channel_backward"] * 2),
    ):
        block = fused.LinearNormAct(32, 64, norm=norm, activation="gelu", dropout=0.1).cuda()
        launched.clear()
        y = block(torch.randn(128, 32, device="cuda"))
        with fused.use_backend("auto"):
            y.square().sum().backward()
        assert launched == expected
        assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


def test_a_captured_graph_repeats() -> None:
    block = fused.LinearNormAct(64, 64, norm="layer", activation="gelu").cuda().eval()
    x = torch.randn(32, 64, device="cuda")
    with torch.no_grad():
        expected = block(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = block(x)
        graph.replay()
    assert torch.equal(y, expected)
