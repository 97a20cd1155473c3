"""The public functions: layouts, dtypes, seeds, backends, and what they refuse."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fused
from fused import functional
from fused.backends import backend
from fused.run.autocast import float32_under_autocast
from fused.spec import ACTIVATIONS


def eager(x, weight, bias, norm_weight, norm_bias, residual):  # type: ignore[no-untyped-def]
    z = F.layer_norm(F.linear(x, weight, bias), weight.shape[:1], norm_weight, norm_bias)
    y = F.gelu(z)
    return y if residual is None else residual + y


@pytest.mark.parametrize("name", ["auto", "cpp", "reference"])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5), (0, 5), (2, 0, 5)], ids=str)
def test_shapes_on_every_backend(shape: tuple[int, ...], name: str) -> None:
    x, weight, bias = torch.randn(shape), torch.randn(7, 5), torch.randn(7)
    norm_weight, norm_bias = torch.randn(7), torch.randn(7)
    residual = torch.randn(*shape[:-1], 7)
    with fused.use_backend(name):
        y = functional.linear_norm_act(
            x, weight, bias, norm="layer", norm_weight=norm_weight, norm_bias=norm_bias,
            activation="gelu", residual=residual,
        )  # fmt: skip
    expected = eager(x, weight, bias, norm_weight, norm_bias, residual)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_backends_give_the_same_under_one_seed() -> None:
    x, weight = torch.randn(33, 20), torch.randn(70, 20)
    results = []
    for name in ("cpp", "reference"):
        w = weight.clone().requires_grad_()
        with fused.use_backend(name):
            y = functional.linear_norm_act(x, w, norm="rms", activation="silu", p=0.4, seed=9)
            y.square().sum().backward()
        results.append((y.detach(), w.grad))
    assert torch.equal(results[0][0] == 0, results[1][0] == 0)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_seeds_of_every_kind() -> None:
    z = torch.ones(4, 64)

    def run(seed: object) -> torch.Tensor:
        return functional.norm_act(z, activation="relu", p=0.5, seed=seed)  # type: ignore[arg-type]

    assert torch.equal(run(5), run(torch.tensor(5)))
    assert torch.equal(run(5), run(torch.tensor([5])))
    assert torch.equal(run(-1), run((1 << 64) - 1))
    assert torch.equal(run(5) != 0, functional.dropout_mask(4, 64, 0.5, 5))
    assert not torch.equal(run(5), run(6))


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "sliced": lambda t: torch.cat([t, t], dim=-1)[..., : t.shape[-1]],
    "offset by one": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    "every second": lambda t: t.repeat_interleave(2, dim=-1)[..., ::2],
    "expanded": lambda t: t[:1].expand(t.shape),
}


@settings(max_examples=60, deadline=None)
@given(
    rows=st.sampled_from([1, 2, 5, 33]),
    cols=st.sampled_from([1, 2, 7, 8, 9, 31, 64, 65, 129]),
    layouts=st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 3),
    norm=st.sampled_from([None, "layer", "rms"]),
    affine=st.booleans(),
    needs=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_any_layout(rows, cols, layouts, norm, affine, needs):  # type: ignore[no-untyped-def]
    z, residual, dy = (LAYOUTS[name](torch.randn(rows, cols)) for name in layouts)
    weight = torch.randn(cols) if affine and norm else None
    results = []
    for name in ("cpp", "reference"):
        leaves = [
            None if t is None else t.detach().requires_grad_(need)
            for t, need in zip((z, weight, residual), needs, strict=True)
        ]
        with fused.use_backend(name):
            y = functional.norm_act(
                leaves[0], norm=norm, norm_weight=leaves[1], activation="tanh", p=0.3, seed=4,
                residual=leaves[2],
            )  # fmt: skip
        if y.requires_grad:
            y.backward(dy)
        results.append([y.detach()] + [t.grad for t in leaves if t is not None])
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and cols > 1:  # one column: eager's gradient is rounding noise
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-4)


@settings(max_examples=40, deadline=None)
@given(
    lead=st.sampled_from([(1,), (5,), (33,), (2, 3), (1, 4), (3, 1), (2, 1, 3)]),
    inputs=st.sampled_from([1, 3, 8, 17]),
    features=st.sampled_from([2, 7, 8, 31, 64, 65]),
    layouts=st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 4),
    norm=st.sampled_from([None, "layer", "rms"]),
    affine=st.booleans(),
    needs=st.tuples(*[st.booleans()] * 6),
)
def test_any_layout_behind_a_linear(lead, inputs, features, layouts, norm, affine, needs):  # type: ignore[no-untyped-def]
    shapes = ((*lead, inputs), (features, inputs), (*lead, features), (*lead, features))
    x, weight, residual, dy = (
        LAYOUTS[name](torch.randn(shape)) for name, shape in zip(layouts, shapes, strict=True)
    )
    bias = torch.randn(2 * features)[::2]
    scale, shift = (
        torch.randn(features, 2)[:, 0] if affine and norm is not None else None for _ in range(2)
    )
    results = []
    for name in ("cpp", "reference"):
        leaves = [
            None if t is None else t.detach().requires_grad_(need)
            for t, need in zip((x, weight, bias, scale, shift, residual), needs, strict=True)
        ]
        with fused.use_backend(name):
            y = functional.linear_norm_act(
                *leaves[:3], norm=norm, norm_weight=leaves[3], norm_bias=leaves[4],
                activation="tanh", p=0.3, seed=4, eps=1e-2, residual=leaves[5],
            )  # fmt: skip
        assert y.shape == (*lead, features)
        if y.requires_grad:
            y.backward(dy)
        results.append([y.detach()] + [t.grad for t in leaves if t is not None])
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-4)


@settings(max_examples=30, deadline=None)
@given(
    lead=st.sampled_from([(2, 3), (1, 4), (3, 1), (2, 1, 3)]),
    cols=st.sampled_from([2, 8, 31, 65]),
    layouts=st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 3),
    outer=st.booleans(),
    norm=st.sampled_from([None, "layer", "rms"]),
)
def test_any_layout_of_higher_rank(lead, cols, layouts, outer, norm):  # type: ignore[no-untyped-def]
    z, residual, dy = (LAYOUTS[name](torch.randn(*lead, cols)) for name in layouts)
    if outer:  # the leading dimensions lie in the other order
        z = z.transpose(0, 1).contiguous().transpose(0, 1)
    results = []
    for name in ("cpp", "reference"):
        leaves = [t.detach().requires_grad_() for t in (z, residual)]
        with fused.use_backend(name):
            y = functional.norm_act(
                leaves[0], norm=norm, activation="tanh", p=0.3, seed=4, eps=1e-2,
                residual=leaves[1],
            )  # fmt: skip
        assert y.shape == z.shape
        results.append([y.detach(), *torch.autograd.grad(y, leaves, dy)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("reduction", [torch.sum, torch.mean])
def test_expanded_gradient(reduction: object) -> None:
    x = torch.randn(6, 10, requires_grad=True)
    reduction(functional.norm_act(x, norm="layer", activation="silu")).backward()  # type: ignore[operator]
    expected = torch.autograd.grad(reduction(F.silu(F.layer_norm(x, (10,)))), x)[0]  # type: ignore[operator]
    torch.testing.assert_close(x.grad, expected)


def test_the_input_is_never_changed() -> None:
    x, weight, residual = torch.randn(4, 8), torch.randn(8, 8), torch.randn(4, 8)
    copies = [t.clone() for t in (x, weight, residual)]
    with torch.no_grad():
        functional.linear_norm_act(x, weight, activation="relu", residual=residual, p=0.5)
        functional.norm_act(x, norm="layer", activation="relu", residual=residual)
    for t, copy in zip((x, weight, residual), copies, strict=True):
        assert torch.equal(t, copy)


X, W = torch.randn(4, 512), torch.randn(256, 512)
WRONG = [
    (lambda: functional.linear_norm_act(X, torch.randn(256, 128)), ValueError,
     "weight must be (N, 512) to match x (4, 512), got (256, 128)"),
    (lambda: functional.linear_norm_act(X, W[0]), ValueError, "weight must be (N, K)"),
    (lambda: functional.linear_norm_act(X, W, torch.randn(3)), ValueError,
     "bias must be (256,), got (3,)"),
    (lambda: functional.linear_norm_act(X, W, norm="layer", norm_weight=torch.randn(4)),
     ValueError, "norm_weight must be (256,)"),
    (lambda: functional.linear_norm_act(X, W, norm_weight=torch.randn(256)), ValueError,
     "need a norm"),
    (lambda: functional.linear_norm_act(X, W, norm="layr"), ValueError, "known: 'layer', 'rms'"),
    (lambda: functional.linear_norm_act(X, W, activation="swish"), ValueError, "silu, mish"),
    (lambda: functional.linear_norm_act(X, W, activation="relu", p=1.2), ValueError,
     "between 0 and 1, but got 1.2"),
    (lambda: functional.linear_norm_act(X, W, p="a"), TypeError, "p must be a number"),
    (lambda: functional.linear_norm_act(X.long(), W), TypeError, "x must be floating point"),
    (lambda: functional.linear_norm_act(X.double(), W), TypeError, "weight must have the dtype"),
    (lambda: functional.linear_norm_act([1.0], W), TypeError, "x must be a tensor, got list"),
    (lambda: functional.linear_norm_act(X, W, residual=torch.randn(4, 4)), ValueError,
     "residual must be (4, 256)"),
    (lambda: functional.linear_norm_act(X, W, activation="elu", beta=1.0), TypeError,
     "takes alpha; got 'beta'"),
    (lambda: functional.linear_norm_act(X, W, activation="elu", alhpa=1.0), TypeError,
     "linear_norm_act: unknown argument 'alhpa'; did you mean 'alpha'?"),
    (lambda: functional.linear_norm_act(X, W, activation="elu", alpha="x"), TypeError,
     "alpha must be a number"),
    (lambda: functional.linear_norm_act(X, W.to("meta")), ValueError, "on one device"),
    (lambda: functional.norm_act(torch.tensor(1.0)), ValueError, "z must be"),
    (lambda: functional.norm_act(X, norm="layer", normalized_shape=(4, 7)), ValueError,
     "z must be (..., 4, 7), got (4, 512)"),
    (lambda: functional.norm_act(X, norm="layer", norm_weight=torch.randn(512).double()),
     TypeError, "input's dtype (torch.float32), got torch.float64"),
    (lambda: functional.norm_act(X.half(), norm="rms", norm_weight=torch.randn(512).double()),
     TypeError, "or float32, got torch.float64"),
    (lambda: functional.norm_act(X.double(), norm="layer", norm_weight=torch.randn(512)),
     TypeError, "input's dtype (torch.float64), got torch.float32"),
    (lambda: functional.norm_act(X, p=2.0, training=False), ValueError,
     "between 0 and 1, but got 2.0"),
    (lambda: functional.norm_act(X, norm="layer", eps=float("nan")), ValueError,
     "eps must be a number, got nan"),
    (lambda: functional.norm_act(X, norm="layer", eps="x"), TypeError, "eps must be a number"),
    (lambda: functional.norm_act(X, activation="elu", alpha=float("nan")), TypeError,
     "alpha must be a number, got nan"),
    (lambda: functional.norm_act(X, p=0.5, seed=1.5), TypeError, "seed must be an int"),
    (lambda: functional.norm_act(X, p=0.5, seed=torch.ones(2)), ValueError, "one element"),
    (lambda: functional.dropout_mask(-1, 4, 0.5, 1), ValueError, "must not be negative"),
    (lambda: functional.dropout_mask(1, 4, 1.5, 1), ValueError, "between 0 and 1"),
    (lambda: fused.use_backend("cudnn").__enter__(), ValueError, "known: auto, triton"),
    (lambda: fused.fuse_(3), TypeError, "must be an nn.Module"),
    (lambda: backend.set_cpu_isa("neon"), ValueError, "known: avx512"),
]  # fmt: skip


@pytest.mark.parametrize("call, error, text", WRONG, ids=[text for _, _, text in WRONG])
def test_wrong_input_gets_one_clear_error(call: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        call()  # type: ignore[operator]


def test_numbers_of_numpy() -> None:
    z, half = torch.ones(4, 64), np.float32(0.5)
    y = functional.norm_act(z, activation="elu", alpha=half, eps=np.float64(1e-5), p=half, seed=5)
    assert torch.equal(y, functional.norm_act(z, activation="elu", alpha=0.5, p=0.5, seed=5))
    net = fused.Sequential(nn.ELU(half), nn.Dropout(half))
    assert net.plan()[0].fused and net(z).shape == z.shape


def test_what_cuda_autocast_widens() -> None:
    """By torch's list, ATen/autocast_mode.h; the next test asks torch itself."""
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    try:
        widened = {
            name
            for name, a in ACTIVATIONS.items()
            if float32_under_autocast("cuda", torch.bfloat16, None, name)
        }
        assert widened == {"softplus", "relu_squared"}
        assert float32_under_autocast("cuda", torch.float16, "layer")
        assert not float32_under_autocast("cuda", torch.float64, "layer")
        assert not float32_under_autocast("cpu", torch.bfloat16, "layer")
    finally:
        torch.set_autocast_enabled("cuda", before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_cuda_autocast_gives_eagers_dtypes(name: str) -> None:
    activation = fused.NormAct(8, activation=name)[0].cuda()
    linear = nn.Linear(8, 8, device="cuda")
    for modules in ([linear, activation], [activation, nn.Dropout(0.5)]):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(4, 8, device="cuda", dtype=dtype)
            with torch.autocast("cuda", torch.bfloat16):
                assert fused.Sequential(*modules)(x).dtype == nn.Sequential(*modules)(x).dtype


def test_autocast_never_casts_float64() -> None:
    x, weight = torch.randn(4, 8).double(), torch.randn(6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert functional.linear_norm_act(x, weight.double(), norm="rms").dtype == torch.float64
        with pytest.raises(TypeError, match="weight must have the dtype of x"):
            functional.linear_norm_act(x, weight)


def test_autocast() -> None:
    x, weight = torch.randn(4, 8), torch.randn(6, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = functional.linear_norm_act(x, weight, norm="layer", activation="relu")
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_frozen_statistics_with_dropout(norm: str) -> None:
    """One flag each: a norm by its running statistics, behind which dropout acts."""
    z = torch.randn(8, 6, 40)
    mean, variance = torch.randn(6), torch.rand(6) + 0.5
    before = mean.clone(), variance.clone()
    given = {"norm": norm, "running_mean": mean, "running_var": variance, "seed": 3}
    plain = functional.norm_act(z, **given, training=False)
    y = functional.norm_act(z, **given, p=0.5, use_input_stats=False)
    keep = y != 0
    assert 0.4 < keep.float().mean() < 0.6
    torch.testing.assert_close(y, torch.where(keep, 2 * plain, 0))
    assert torch.equal(mean, before[0]) and torch.equal(variance, before[1])
    functional.norm_act(z, **given, training=False, p=0.9, use_input_stats=True)
    assert not torch.equal(mean, before[0])
    with pytest.raises(
        ValueError, match="use_input_stats=False needs running_mean and running_var"
    ):
        functional.norm_act(z, norm=norm, use_input_stats=False)
    with pytest.raises(ValueError, match="use_input_stats does not belong to norm='layer'"):
        functional.norm_act(z, norm="layer", use_input_stats=True)
