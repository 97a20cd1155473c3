"""Kernels of a gate of two tensors against reference.py in float64, and their memory traffic."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.audit.interpreter import launches
from fused.backends import launchers, ops
from fused.run import reference
from fused.run.random import keep_mask
from fused.spec import GATED_ACTIVATIONS, GATED_CODES, Spec

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEED = torch.tensor([2**62 + 2**33 + 7])


def matrix(rows: int, cols: int, dtype: torch.dtype, gap: int = 0, offset: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(rows * 1009 + cols + gap)
    flat = torch.randn(offset + rows * (cols + gap), generator=g).to(dtype)[offset:]
    return flat.view(rows, cols + gap)[:, :cols]


def run(
    dy: Tensor, value: Tensor, gate: Tensor, spec: Spec, joined: bool = False
) -> tuple[Tensor, ...]:
    scalars = (SEED, GATED_CODES[str(spec.activation)], spec.threshold)
    y = launchers.TRITON["gate_forward"](value, gate, *scalars)
    return y, *launchers.TRITON["gate_backward"](dy, value, gate, *scalars, joined)


def by_reference(
    dy: Tensor, value: Tensor, gate: Tensor, spec: Spec, dtype: torch.dtype
) -> list[Tensor]:
    value, gate = (t.detach().to(dtype).requires_grad_() for t in (value, gate))
    y = reference.gate(value, gate, spec, SEED)
    y.backward(dy.to(dtype))
    assert value.grad is not None and gate.grad is not None
    return [y.detach(), value.grad, gate.grad]


def check(dy: Tensor, value: Tensor, gate: Tensor, spec: Spec) -> tuple[Tensor, ...]:
    found = run(dy, value, gate, spec)
    oracle = by_reference(dy, value, gate, spec, torch.float64)
    eager = by_reference(dy, value, gate, spec, value.dtype)
    for name, f, o, e in zip(("y", "dvalue", "dgate"), found, oracle, eager, strict=True):
        assert f.dtype == value.dtype
        error = (f.double() - o).abs()
        ulp = torch.finfo(value.dtype).eps * o.abs().clamp(min=1e-2)
        allowed = 2 * (e.double() - o).abs().max() + 4 * ulp
        assert (error <= allowed).all(), name
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", GATED_ACTIVATIONS)
def test_every_gate(activation: str, dtype: torch.dtype) -> None:
    for rows, cols, threshold in ((5, 40, 6554), (2, 1030, 0)):
        given = [matrix(rows + i, cols, dtype)[i:] for i in range(3)]
        check(*given, Spec(activation=activation, threshold=threshold))


@pytest.mark.parametrize("gap, offset", [(8, 0), (3, 0), (0, 1), (5, 3)])
def test_strided_and_misaligned(gap: int, offset: int) -> None:
    dtype = torch.bfloat16
    value, gate = matrix(33, 100, dtype, gap, offset), matrix(33, 100, dtype, 100)
    check(matrix(33, 100, dtype, 4), value, gate, Spec(activation="swiglu", threshold=6554))


@pytest.mark.parametrize("cols", [33, 64])
def test_halves_of_one_tensor(cols: int) -> None:
    gate, value = matrix(40, 2 * cols, torch.bfloat16).chunk(2, 1)
    spec, dy = Spec(activation="geglu", threshold=6554), matrix(40, cols, torch.bfloat16)
    y, dvalue, dgate = check(dy, value, gate, spec)
    again, both, empty = run(dy, value, gate, spec, joined=True)
    assert torch.equal(again, y) and torch.equal(both, torch.cat([dgate, dvalue], 1))
    assert empty.shape == (0, cols)


@pytest.mark.parametrize("threshold", [1, 6554, 65535, 65536])
def test_mask_is_random_py_bit_for_bit(threshold: int) -> None:
    one = torch.ones(37, 9)
    y, dvalue, dgate = run(one, one, one, Spec(activation="reglu", threshold=threshold))
    assert torch.equal(y != 0, keep_mask(37, 9, threshold, SEED) & (threshold < 65536))
    assert torch.equal(dvalue, y) and torch.equal(dgate, y)


def test_infinite_and_nan_rows_stay_in_their_rows() -> None:
    dy, value, gate = (matrix(4 + i, 33, torch.float32)[i:].clone() for i in range(3))
    spec = Spec(activation="swiglu")
    oracle = check(dy, value, gate, spec)
    value[1, 3], gate[2, 5] = float("inf"), float("nan")
    for found, before in zip(run(dy, value, gate, spec), oracle, strict=True):
        assert torch.equal(found[[0, 3]], before[[0, 3]])


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("rows, cols", [(0, 8), (4, 0), (3, 5)])
def test_fake_kernels_and_empty_tensors(rows: int, cols: int, joined: bool) -> None:
    given = [matrix(rows, cols, torch.bfloat16) for _ in range(3)]
    scalars = (SEED, GATED_CODES["glu"], 6554)
    with launches() as log:
        real = run(*given, Spec(activation="glu", threshold=6554), joined)
    assert bool(log) == bool(rows * cols)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = ops.gate_forward(*given[1:], *scalars), *ops.gate_backward(*given, *scalars, joined)
    for r, f in zip(real, fake, strict=True):
        assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())


def test_every_byte_moves_once_and_the_same_bits_twice() -> None:
    given = [matrix(3 + i, 1001, torch.bfloat16)[i:] for i in range(3)]
    spec = Spec(activation="swiglu", threshold=6554)
    with launches() as log:
        first = run(*given, spec)
    size = given[0].nbytes
    forward, backward = log
    assert dict(forward.loaded) | {"seed_ptr": 0} == dict.fromkeys(
        ("value_ptr", "gate_ptr"), size
    ) | {"seed_ptr": 0}
    assert dict(forward.stored) == {"y_ptr": size}
    names = ("dy_ptr", "value_ptr", "gate_ptr")
    assert {n: backward.loaded[n] for n in names} == dict.fromkeys(names, size)
    assert dict(backward.stored) == {"dvalue_ptr": size, "dgate_ptr": size}
    assert all(torch.equal(a, b) for a, b in zip(first, run(*given, spec), strict=True))
