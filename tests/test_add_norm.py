"""Add & norm: h = residual + dropout(x), y = norm(h), against float64 and against eager."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from add_norm_cases import by_operators, check, make
from cases import DTYPES
from torch import Tensor, nn

import fused
from fused.functional import add_norm, dropout_mask

NORMS = ("layer", "rms")
SHAPES = [(5, 1), (1, 100), (9, 63), (70, 64), (7, 200), (3, 1025), (200, 130), (2, 17000)]


@pytest.fixture(autouse=True)
def cpp():
    with fused.use_backend("cpp"):
        yield


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(shape: tuple[int, int], norm: str, dtype: torch.dtype) -> None:
    for p in (0.0, 0.3):
        check(make(*shape, dtype), norm, p)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_rows_among_nan(dtype: torch.dtype) -> None:
    def surrounded(t: Tensor) -> Tensor:
        if t.dim() == 1:
            return t
        buffer = torch.full((1 + t.shape[0] * (t.shape[1] + 3),), math.nan, dtype=t.dtype)
        return buffer[1:].view(t.shape[0], t.shape[1] + 3)[:, : t.shape[1]].copy_(t)

    plain = make(40, 100, dtype)
    wanted = by_operators(plain, "layer", 0.2)
    for name, t in by_operators([*map(surrounded, plain)], "layer", 0.2).items():
        assert torch.equal(t, wanted[name]), name


def test_rows_beyond_32_bits() -> None:
    """Three rows, 2^31 elements apart, in memory that is not touched between them."""
    stride = (1 << 31) + 3

    def far(t: Tensor) -> Tensor:
        if t.dim() == 1:
            return t
        memory = torch.empty(2 * stride + t.shape[1], dtype=t.dtype)
        return memory.as_strided(t.shape, (stride, 1)).copy_(t)

    plain = make(3, 40, torch.float16)
    wanted = by_operators(plain, "layer", 0.2)
    for name, t in by_operators([*map(far, plain)], "layer", 0.2).items():
        assert torch.equal(t, wanted[name]), name


def test_gradients_of_any_strides() -> None:
    def gradients(dy: Tensor, dh: Tensor) -> tuple[Tensor, ...]:
        x, residual = (t.double().requires_grad_() for t in make(6, 8, torch.float64)[:2])
        return torch.autograd.grad(add_norm(x, residual, p=0.3, seed=1), [x, residual], [dy, dh])

    dy, dh = torch.randn(8, 6, dtype=torch.float64).t(), torch.ones(1, 1).double().expand(6, 8)
    for a, b in zip(gradients(dy, dh), gradients(dy.contiguous(), dh.clone()), strict=True):
        assert torch.equal(a, b)


def test_the_bits_do_not_depend_on_threads() -> None:
    tensors = make(300, 257, torch.float32)
    results = []
    before = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(by_operators(tensors, "layer", 0.1))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], t) for name, t in other.items())


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("cols", [0, 5])
def test_empty(rows: int, cols: int) -> None:
    if rows and cols:
        return
    x, residual = (torch.randn(rows, cols, requires_grad=True) for _ in range(2))
    y, h = add_norm(x, residual, p=0.5)
    (y.sum() + h.sum()).backward()
    assert y.shape == h.shape == (rows, cols) and x.grad is not None


@pytest.mark.parametrize("value", [math.inf, math.nan, 1e18, 1e-40, 1e4])
def test_adversarial_values(value: float) -> None:
    tensors = make(4, 64, torch.float32)
    tensors[0][1, 3] = value
    for norm in NORMS:
        check(tensors, norm, 0.0)


def test_y_is_the_norm_of_h_as_it_is_stored() -> None:
    x, residual, weight, bias, *_ = make(32, 256, torch.bfloat16)
    y, h = add_norm(x, residual, norm_weight=weight, norm_bias=bias, p=0.2, seed=3)
    again = fused.functional.norm_act(h, norm="layer", norm_weight=weight, norm_bias=bias)
    assert torch.equal(y, again)
    keep = dropout_mask(32, 256, 0.2, 3)
    assert torch.equal(h[~keep], residual[~keep])


@pytest.mark.parametrize("dropped", [0.0, 0.3])
def test_what_is_kept_for_backward(dropped: float) -> None:
    """h, which is a result, the norm's parameters, the statistics, the seed: no mask, no copy."""
    x, residual, weight, bias, *_ = (t.requires_grad_() for t in make(64, 128, torch.float32))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        _, h = add_norm(x, residual, norm_weight=weight, norm_bias=bias, p=dropped)
    sizes = sorted(t.numel() for t in kept)
    assert sizes == sorted([h.numel(), 128, 128, 2 * 64, *([1] if dropped else [])])
    assert any(t.data_ptr() == h.data_ptr() for t in kept)


def test_nothing_dropped_gives_one_gradient_tensor() -> None:
    x, residual = (torch.randn(64, 128).requires_grad_() for _ in range(2))
    y, h = add_norm(x, residual)
    dx, dresidual = torch.autograd.grad([y.sum() * 2, h.sum()], [x, residual])
    assert dx.data_ptr() == dresidual.data_ptr() or torch.equal(dx, dresidual)


@pytest.mark.parametrize("of", ["y", "h", "both"])
def test_one_result_may_go_unused(of: str) -> None:
    x, residual, weight, bias, *_ = (
        t.double().requires_grad_() for t in make(8, 16, torch.float64)
    )
    y, h = add_norm(x, residual, norm_weight=weight, norm_bias=bias, p=0.25, seed=2)
    keep = dropout_mask(8, 16, 0.25, 2).double() / 0.75
    wanted_h = residual + x * keep
    wanted_y = F.layer_norm(wanted_h, (16,), weight, bias)
    pick = {"y": [0], "h": [1], "both": [0, 1]}[of]
    leaves = [x, residual]
    ours = torch.autograd.grad([(y, h)[i].sin().sum() for i in pick], leaves)
    theirs = torch.autograd.grad([(wanted_y, wanted_h)[i].sin().sum() for i in pick], leaves)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("norm", NORMS)
def test_double_backward(norm: str, p: float) -> None:
    x, residual, weight, *_ = (t.requires_grad_() for t in make(3, 5, torch.float64))

    def call(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return add_norm(x, residual, norm=norm, norm_weight=weight, p=p, seed=4, eps=0.1)

    assert torch.autograd.gradcheck(call, (x, residual, weight))
    assert torch.autograd.gradgradcheck(call, (x, residual, weight))


def test_transforms_forward_mode_and_compile() -> None:
    x, residual = (torch.randn(6, 4, 16, dtype=torch.float64) for _ in range(2))
    y, h = add_norm(x, residual)
    for a, b in zip(torch.vmap(add_norm)(x, residual), (y, h), strict=True):
        torch.testing.assert_close(a, b)
    _, tangents = torch.func.jvp(lambda x: add_norm(x, residual), (x,), (residual,))
    torch.testing.assert_close(tangents[1], residual)
    torch._dynamo.reset()
    compiled = torch.compile(add_norm, backend="aot_eager", fullgraph=True)
    x.requires_grad_()
    for a, b in zip(compiled(x, residual), (y, h), strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_and_mixed_dtypes() -> None:
    block, linear = fused.AddNorm(16), nn.Linear(16, 16)
    x = torch.randn(4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        z = linear(x)
        y, h = block(z, x)
        wanted_h = x + z
        wanted = block.norm(wanted_h)
    assert (y.dtype, h.dtype) == (wanted.dtype, wanted_h.dtype)
    torch.testing.assert_close(y, wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("norm", NORMS)
def test_module(norm: str) -> None:
    block = fused.AddNorm(32, norm, 0.5)
    keys = ["norm.weight", "norm.bias"] if norm == "layer" else ["norm.weight"]
    assert [*block.state_dict()] == keys
    x, residual = torch.randn(2, 7, 32), torch.randn(2, 7, 32)
    torch.manual_seed(0)
    y, h = block(x, residual)
    share = (h == residual).double().mean().item()
    assert 0.35 < share < 0.65
    torch.testing.assert_close(y, block.norm(h))
    block.eval()
    y, h = block(x, residual)
    torch.testing.assert_close(h, residual + x)
    torch.testing.assert_close(y, block.norm(h))
    again = pickle.loads(pickle.dumps(copy.deepcopy(block)))
    assert torch.equal(again(x, residual)[0], y)


def test_module_sees_hooks_and_other_inputs() -> None:
    block = fused.AddNorm(32)
    x, residual = torch.randn(4, 32), torch.randn(4, 32)
    wanted = block(x, residual)
    block.norm.register_forward_hook(lambda module, inputs, y: y * 2)
    torch.testing.assert_close(block(x, residual)[0], wanted[0] * 2)
    other = fused.AddNorm(32)
    y, _ = other(x, residual[:1])  # broadcast, as torch adds
    torch.testing.assert_close(y, other.norm(residual[:1] + x))


def test_errors() -> None:
    x = torch.randn(4, 8)
    with pytest.raises(ValueError, match="norm must be 'layer' or 'rms'"):
        add_norm(x, x, norm="batch")
    with pytest.raises(ValueError, match="norm must be 'layer' or 'rms'"):
        fused.AddNorm(8, norm="group")
    with pytest.raises(ValueError, match=r"residual must be \(4, 8\)"):
        add_norm(x, x[:2])
    with pytest.raises(ValueError, match="between 0 and 1"):
        add_norm(x, x, p=2.0)
    with pytest.raises(TypeError, match="floating point"):
        add_norm(x.long(), x)
