"""Gated activations in Sequential, the blocks and the functions: nn.Sequential's results.

What the operators compute is tests/test_gated.py's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from gated_cases import GATES, Plain
from sequentials import assert_same, outcome
from torch import Tensor, nn

import fused
from fused.functional import dropout_mask, linear_norm_act, norm_act
from fused.nn import GeGLU, ReGLU, SwiGLU
from fused.run import reference
from fused.spec import GATED_ACTIVATIONS

MODULES = [nn.GLU(), SwiGLU(), GeGLU(), GeGLU(approximate="tanh"), ReGLU()]


def plain_of(modules: list[nn.Module], names: dict[type, str]) -> nn.Sequential:
    """The same children with every gated activation by torch's operators."""
    return nn.Sequential(
        *(Plain(names[type(m)], m.dim) if type(m) in names else m for m in modules)
    )


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
    parameter = nn.Parameter(torch.randn(4))
    torch.testing.assert_close(SwiGLU()(parameter), Plain("swiglu")(parameter))
    nested = torch.nested.nested_tensor([torch.randn(2, 4)], layout=torch.jagged)
    torch.testing.assert_close(ReGLU()(nested).values(), Plain("reglu")(nested.values()))
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


NORMALIZE: dict[str | None, Callable[[Tensor, Tensor | None], Tensor]] = {
    None: lambda z, scale: z,
    "layer": lambda z, scale: F.layer_norm(z, (12,), scale),
    "rms": lambda z, scale: F.rms_norm(z, (12,), scale),
    "batch": lambda z, scale: F.batch_norm(z, None, None, scale, training=True),
}


@pytest.mark.parametrize("norm", NORMALIZE)
def test_functions(norm: str | None, backend: str) -> None:
    x, weight, bias = torch.randn(5, 6), torch.randn(12, 6), torch.randn(12)
    scale = None if norm is None else torch.rand(12) + 0.5
    z = F.linear(x, weight, bias)
    with fused.use_backend(backend):
        y = linear_norm_act(x, weight, bias, norm=norm, norm_weight=scale, activation="swiglu")
        same = norm_act(z, norm=norm, norm_weight=scale, activation="swiglu")
    expected = Plain("swiglu")(NORMALIZE[norm](z, scale))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(same, expected, rtol=1e-5, atol=1e-5)


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
