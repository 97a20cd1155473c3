"""Gated activations in Sequential, the blocks and the functions: nn.Sequential's results.

What the operators compute is tests/test_gated.py's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from sequentials import assert_same, outcome, pair
from torch import Tensor, nn

import fused
from fused import reference
from fused.functional import dropout_mask, linear_norm_act, norm_act
from fused.nn import GeGLU, ReGLU, SwiGLU
from fused.spec import GATED_ACTIVATIONS

GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "glu": torch.sigmoid,
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": lambda b: F.gelu(b, approximate="tanh"),
    "reglu": F.relu,
}
MODULES = [nn.GLU(), SwiGLU(), GeGLU(), GeGLU(approximate="tanh"), ReGLU()]


class Plain(nn.Module):
    """A gated activation by torch's own operators, along a dimension."""

    def __init__(self, name: str, dim: int = -1) -> None:
        super().__init__()
        self.name, self.dim = name, dim

    def forward(self, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, self.dim)
        return value * GATES[self.name](gate)


def plain_of(modules: list[nn.Module], names: dict[type, str]) -> nn.Sequential:
    """The same children with every gated activation by torch's operators."""
    return nn.Sequential(
        *(Plain(names[type(m)], m.dim) if type(m) in names else m for m in modules)
    )


@pytest.fixture(params=["cpp", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "cpp" and fused.backend.cpu_isa() is None:
        pytest.skip("the C++ extension is not built")
    return request.param


NAMES = {SwiGLU: "swiglu", ReGLU: "reglu", nn.GLU: "glu"}


def test_every_gate_of_the_list_is_tested() -> None:
    assert list(GATES) == list(GATED_ACTIVATIONS)


@pytest.mark.parametrize("name", GATES)
def test_reference_is_torchs_operators(name: str) -> None:
    h = torch.randn(3, 5, 8)
    assert torch.equal(reference.activate(h, name), Plain(name)(h))


@pytest.mark.parametrize("module", MODULES, ids=str)
@pytest.mark.parametrize("norm", [None, nn.LayerNorm(32), nn.RMSNorm(32)], ids=str)
def test_every_module_is_recognised(norm: nn.Module | None, module: nn.Module) -> None:
    children = [nn.Linear(16, 32), *([norm] if norm else []), module, nn.Dropout(0.0)]
    name = module.activation if hasattr(module, "activation") else "glu"
    plain = nn.Sequential(*(Plain(name) if c is module else c for c in children))
    net = fused.Sequential(*children)
    for shape in ((6, 16), (2, 3, 16), (16,), (0, 16)):
        assert_same(plain, net, x=torch.randn(shape))
    entry = net.plan()[0]
    assert entry.fused and entry.fused_calls == 4 and name in entry.chain


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    "modules, shape",
    [
        ([nn.Linear(12, 16), nn.BatchNorm1d(16), nn.GLU()], (7, 12)),
        ([nn.Linear(12, 16), nn.BatchNorm1d(16), SwiGLU(1)], (7, 12)),
        ([nn.Linear(12, 16), nn.GroupNorm(4, 16), ReGLU()], (7, 12)),
        ([nn.BatchNorm2d(16), nn.GLU(1)], (3, 16, 5, 4)),
        ([nn.BatchNorm2d(16), SwiGLU(-3)], (3, 16, 5, 4)),
        ([nn.GroupNorm(4, 16), SwiGLU(1)], (3, 16, 5)),
        ([nn.InstanceNorm1d(16, affine=True), ReGLU(1)], (3, 16, 5)),
        ([nn.InstanceNorm1d(16), nn.GLU(0)], (16, 5)),
        ([nn.BatchNorm3d(4), nn.GLU(1)], (2, 4, 3, 2, 2)),
    ],
    ids=str,
)
def test_behind_norms_over_samples_and_positions(
    modules: list[nn.Module], shape: tuple[int, ...], training: bool, backend: str
) -> None:
    modules = [*copy.deepcopy(modules), nn.Dropout(0.0)]
    plain, net = plain_of(modules, NAMES).train(training), fused.Sequential(*modules)
    net.train(training)
    with fused.use_backend(backend):
        assert_same(plain, net, x=torch.randn(shape))
        counted = getattr(modules[-3], "num_batches_tracked", None)
        if training and counted is not None:
            assert counted == 2  # once by each of the two
    if backend == "cpp":
        assert net.plan()[0].fused_calls == 1


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_channels_last_stays_channels_last(norm: str, cpp: None) -> None:
    make = nn.BatchNorm2d(8) if norm == "batch" else nn.GroupNorm(2, 8)
    modules = [make, SwiGLU(1), nn.Dropout(0.0)]
    plain, net = plain_of(modules, NAMES), fused.Sequential(*modules)
    x = torch.randn(2, 8, 5, 3).to(memory_format=torch.channels_last)
    assert_same(plain, net, x=x)
    assert net(x).is_contiguous(memory_format=torch.channels_last)
    assert plain(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "dim, shape", [(1, (2, 6, 5)), (0, (4, 3)), (-2, (2, 3, 4, 5)), (1, (3, 4))]
)
@pytest.mark.parametrize("module", [SwiGLU, GeGLU, ReGLU])
def test_modules_by_themselves(
    module: Callable[..., nn.Module], dim: int, shape: tuple[int, ...], backend: str
) -> None:
    own = module(dim)
    name = {**NAMES, GeGLU: "geglu"}[type(own)]
    with fused.use_backend(backend):
        for x in (torch.randn(shape), torch.randn(*shape, 2)[..., 0]):
            if x.shape[dim] % 2:
                with pytest.raises(ValueError, match="is odd"):
                    own(x)
                continue
            for ours, theirs in zip(outcome(own, x), outcome(Plain(name, dim), x), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_modules_take_what_kernels_do_not() -> None:
    assert ReGLU()(torch.arange(-3, 3)).tolist() == [0, -2, -2]
    assert isinstance(SwiGLU()(nn.Parameter(torch.randn(4))), Tensor)
    with pytest.raises(ValueError, match="approximate"):
        GeGLU(approximate="sigmoid")


# ---- dropout ----


@pytest.mark.parametrize("name", GATES)
def test_mask_lies_over_the_halved_features(name: str, backend: str) -> None:
    z, seed = torch.randn(9, 26), 5
    with fused.use_backend(backend):
        y = norm_act(z, activation=name, p=0.4, seed=seed)
        kept = norm_act(z, activation=name)
    keep = dropout_mask(9, 13, 0.4, seed)
    scale = 65536 / (65536 - round(0.4 * 65536))
    torch.testing.assert_close(y, kept * keep * scale)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
def test_mask_behind_a_gate_over_channels(last: bool, backend: str) -> None:
    """A sample is a row of the mask, or channels-last a position is."""
    z, seed, p = torch.randn(3, 8, 5, 2), 7, 0.5
    z = z.to(memory_format=torch.channels_last) if last else z
    with fused.use_backend(backend):
        y = norm_act(z, norm="batch", activation="reglu", p=p, seed=seed)
        kept = norm_act(z, norm="batch", activation="reglu")
    if last:
        keep = dropout_mask(3 * 10, 4, p, seed).view(3, 5, 2, 4).permute(0, 3, 1, 2)
    else:
        keep = dropout_mask(3, 4 * 10, p, seed).view(3, 4, 5, 2)
    torch.testing.assert_close(y, kept * keep * 2)


@pytest.mark.parametrize("norm", [None, "layer", "batch"])
def test_dropout_of_channels(norm: str | None, backend: str) -> None:
    block = fused.LinearNormAct(6, 4, norm=norm, activation="swiglu", channel_dropout=0.5)
    with fused.use_backend(backend):
        y = block(torch.randn(64, 3, 6))
    dropped = (y == 0).all(1)
    assert torch.equal((y == 0).any(1), dropped) and 0.3 < dropped.float().mean() < 0.7


def test_the_mask_is_the_same_in_backward(backend: str) -> None:
    z = torch.randn(8, 20, requires_grad=True)
    with fused.use_backend(backend):
        y = norm_act(z, activation="reglu", p=0.5, seed=4)
        (dz,) = torch.autograd.grad(y.sum(), z)
    dropped = ~dropout_mask(8, 10, 0.5, 4)
    assert not dz[:, :10][dropped].any() and not dz[:, 10:][dropped].any()


# ---- blocks and functions ----


@pytest.mark.parametrize("norm", [None, "layer", "rms", "batch", "instance", "group"])
@pytest.mark.parametrize("name", GATES)
def test_blocks(name: str, norm: str | None, backend: str) -> None:
    options = {"num_groups": 2} if norm == "group" else {}
    block = fused.LinearNormAct(6, 8, norm=norm, activation=name, dropout=0.0, **options)
    assert block.linear.out_features == 16
    x, residual = torch.randn(4, 5, 6), torch.randn(4, 5, 8)
    plain = nn.Sequential(*(Plain(name) if c is block.act else c for c in block.children()))
    with fused.use_backend(backend):
        found = block(x, residual)
        torch.testing.assert_close(found, plain(x) + residual, rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match=r"residual must be \(4, 5, 8\)"):
            block(x, torch.randn(4, 5, 16))
        mask = torch.rand(4, 5) > 0.3
        masked = block(x, residual, mask)
    assert not masked[~mask].any()
    if norm in (None, "layer", "rms"):
        torch.testing.assert_close(masked[mask], found[mask], rtol=1e-5, atol=1e-5)


def test_an_mlp_of_gated_blocks() -> None:
    mlp = fused.MLP(6, [8, 4], 3, norm="rms", activation="swiglu", dropout=0.0)
    assert [m.out_features for m in mlp.modules() if isinstance(m, nn.Linear)] == [16, 8, 3]
    assert mlp(torch.randn(5, 6)).shape == (5, 3)


def test_virtual_batches(backend: str) -> None:
    """TabNet's block: Linear, batch norm over parts of the batch, GLU."""
    block = fused.LinearNormAct(6, 8, norm="batch", virtual_batch_size=4, activation="glu")
    x = torch.randn(8, 6)
    with fused.use_backend(backend):
        y = block(x)
    z = block.linear(x)
    parts = [F.batch_norm(part, None, None, training=True) for part in z.chunk(2)]
    torch.testing.assert_close(y, F.glu(torch.cat(parts)), rtol=1e-5, atol=1e-5)


def test_jagged_sequences(backend: str) -> None:
    block = fused.LinearNormAct(6, 8, norm="rms", activation="geglu")
    parts = [torch.randn(n, 6) for n in (3, 5, 1)]
    with fused.use_backend(backend):
        y = block(torch.nested.nested_tensor(parts, layout=torch.jagged))
        expected = [block(part) for part in parts]
    for ours, theirs in zip(y.unbind(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("norm", [None, "layer", "rms", "batch"])
def test_functions_equal_modules(norm: str | None, backend: str) -> None:
    x, weight, bias = torch.randn(5, 6), torch.randn(12, 6), torch.randn(12)
    scale = None if norm is None else torch.rand(12) + 0.5
    with fused.use_backend(backend):
        y = linear_norm_act(x, weight, bias, norm=norm, norm_weight=scale, activation="swiglu")
        z = F.linear(x, weight, bias)
        same = norm_act(z, norm=norm, norm_weight=scale, activation="swiglu")
    torch.testing.assert_close(y, same, rtol=1e-5, atol=1e-5)
    assert y.shape == (5, 6)


def test_a_row_of_several_dimensions(backend: str) -> None:
    z, scale = torch.randn(4, 3, 8), torch.rand(3, 8) + 0.5
    with fused.use_backend(backend):
        y = norm_act(z, norm="layer", norm_weight=scale, activation="swiglu")
    expected = Plain("swiglu")(F.layer_norm(z, (3, 8), scale))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "call",
    [
        lambda: norm_act(torch.randn(3, 7), activation="swiglu"),
        lambda: linear_norm_act(torch.randn(3, 4), torch.randn(5, 4), activation="glu"),
        lambda: fused.NormAct(5, norm="layer", activation="reglu"),
    ],
)
def test_odd_features_are_refused(call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="halves the features; they must be an even number"):
        call()


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


@pytest.mark.parametrize("backward", [False, True])
def test_strided_inputs(backward: bool) -> None:
    plain, net = pair([nn.GLU(), nn.Dropout(0.0)])
    x = torch.randn(8, 6).t()
    assert_same(plain, net, x=x)
    assert "not contiguous" in net.plan()[0].reason
    plain, net = pair([nn.Linear(6, 8), nn.GLU()])
    assert_same(plain, net, x=torch.randn(6, 5).t())
    assert net.plan()[0].fused_calls == 1


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
