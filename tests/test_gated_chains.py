"""Gated activations in chains: what stops one, layouts and dtypes, graphs and differentiation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from gated_cases import GATES, Plain
from sequentials import assert_same, outcome, pair
from torch import Tensor, nn

import fused
from fused.functional import norm_act
from fused.nn import SwiGLU

# ---- what stops the chain ----


@pytest.mark.parametrize(
    "modules, shape, reason",
    [
        ([nn.LayerNorm(8), nn.GLU(1)], (3, 4, 8), "halves dimension 1"),
        ([nn.BatchNorm2d(4), nn.GLU()], (3, 4, 5, 6), "halves dimension -1"),
        ([nn.GLU(0), nn.Dropout(0.0)], (4, 6), "halves dimension 0"),
    ],
)
def test_another_dimension_runs_one_by_one(
    modules: list[nn.Module], shape: tuple[int, ...], reason: str
) -> None:
    plain, net = pair(modules)
    assert_same(plain, net, x=torch.randn(shape))
    entry = net.plan()[0]
    assert entry.unfused_calls == 1 and reason in entry.reason


def test_odd_features_raise_what_eager_raises() -> None:
    plain, net = pair([nn.LayerNorm(7), nn.GLU()])
    with pytest.raises(RuntimeError) as theirs:
        plain(torch.randn(2, 7))
    with pytest.raises(RuntimeError) as ours:
        net(torch.randn(2, 7))
    assert str(ours.value) == str(theirs.value)


def test_a_change_of_dimension_or_rank_is_seen() -> None:
    plain, net = pair([nn.LayerNorm(8), nn.GLU(1), nn.Dropout(0.0)])
    assert_same(plain, net, x=torch.randn(3, 8))
    assert_same(plain, net, x=torch.randn(3, 8))
    assert_same(plain, net, x=torch.randn(3, 8, 8))
    plain[1].dim = 2
    assert_same(plain, net, x=torch.randn(3, 8, 8))
    entry = net.plan()[0]
    assert (entry.fused_calls, entry.unfused_calls) == (3, 1)


def test_strided_inputs() -> None:
    plain, net = pair([nn.GLU(), nn.Dropout(0.0)])
    x = torch.randn(8, 6).t()
    assert_same(plain, net, x=x)
    assert "not contiguous" in net.plan()[0].reason
    plain, net = pair([nn.Linear(6, 8), nn.GLU()])
    assert_same(plain, net, x=torch.randn(6, 5).t())
    assert net.plan()[0].fused_calls == 1


@pytest.mark.parametrize("norm", [None, "rms", "batch"])
@pytest.mark.parametrize("layout", ["transposed", "expanded", "sliced"])
def test_strides_of_the_gradient(layout: str, norm: str | None, backend: str) -> None:
    block = fused.LinearNormAct(6, 8, norm=norm, activation="swiglu")
    plain = nn.Sequential(*(Plain("swiglu") if c is block.act else c for c in block.children()))
    gradients = {
        "transposed": torch.randn(8, 5).t(),
        "expanded": torch.randn(1, 1).expand(5, 8),
        "sliced": torch.randn(5, 16)[:, ::2],
    }
    x = torch.randn(5, 6, requires_grad=True)
    leaves = [x, *block.parameters()]
    with fused.use_backend(backend):
        found = torch.autograd.grad(block(x), leaves, gradients[layout])
    expected = torch.autograd.grad(plain(x), leaves, gradients[layout])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("norm", [None, "layer", "batch", "group"])
def test_other_dtypes(norm: str | None, dtype: torch.dtype, backend: str) -> None:
    options = {"num_groups": 2} if norm == "group" else {}
    block = fused.LinearNormAct(6, 8, norm=norm, activation="geglu", dtype=dtype, **options)
    plain = nn.Sequential(*(Plain("geglu") if c is block.act else c for c in block.children()))
    x, within = torch.randn(9, 6, dtype=dtype), {torch.bfloat16: 4e-2, torch.float16: 5e-3}
    with fused.use_backend(backend):
        found = block(x)
    assert found.dtype == dtype
    tolerance = within.get(dtype, 1e-12)
    torch.testing.assert_close(found, plain(x), rtol=tolerance, atol=tolerance)


# ---- graphs ----


def test_one_graph(cpp: None) -> None:
    block = fused.LinearNormAct(6, 8, norm="rms", activation="swiglu", dropout=0.1).eval()
    x = torch.randn(5, 6)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    found, expected = outcome(compiled, x), outcome(block, x)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("norm", [None, "layer", "rms", "batch"])
def test_gradcheck(name: str, norm: str | None, cpp: None) -> None:
    z = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    scale = torch.rand(6, dtype=torch.float64).add_(0.5).requires_grad_()
    inputs = (z,) if norm is None else (z, scale)

    def call(z: Tensor, scale: Tensor | None = None) -> Tensor:
        return norm_act(z, norm=norm, norm_weight=scale, activation=name, p=0.3, seed=2)

    assert torch.autograd.gradcheck(call, inputs)
    if name != "reglu":  # its second derivative jumps where an element is near zero
        assert torch.autograd.gradgradcheck(call, inputs)


def test_forward_mode_and_vmap_are_torchs() -> None:
    z, t = torch.randn(3, 6), torch.randn(3, 6)
    call = lambda z: norm_act(z, norm="rms", activation="swiglu")  # noqa: E731
    plain = lambda z: Plain("swiglu")(F.rms_norm(z, (6,)))  # noqa: E731
    for ours, theirs in zip(torch.func.jvp(call, (z,), (t,)), torch.func.jvp(plain, (z,), (t,)),
                            strict=True):  # fmt: skip
        torch.testing.assert_close(ours, theirs)
    stacked = torch.randn(4, 3, 6)
    torch.testing.assert_close(torch.func.vmap(call)(stacked), plain(stacked))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("dim, shape", [(-1, (5, 6)), (1, (2, 6, 5))])
def test_trace_records_torchs_operators(dim: int, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    traced = torch.jit.trace(SwiGLU(dim), x)
    assert "fused_lnad" not in str(traced.graph)
    torch.testing.assert_close(traced(x), SwiGLU(dim)(x))


def test_fuse_takes_a_gated_chain() -> None:
    model = nn.Sequential(
        nn.Sequential(nn.Linear(6, 16), nn.GLU(), nn.Dropout(0.0)), nn.Linear(8, 2)
    )
    x = torch.randn(3, 6)
    expected = outcome(model, x)
    report = fused.fuse_(model)
    assert "glu" in str(report)
    for ours, theirs in zip(outcome(model, x), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
