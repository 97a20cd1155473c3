"""fused.Sequential inside torch.compile, checkpointing, torch.export, torch.jit and pickles."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from sequentials import assert_close, outcome
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fused
from fused.chain.guard import ReLUSquared

ACTIVATIONS = [
    nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.LeakyReLU(0.2), nn.ELU(1.3), nn.GELU("tanh"),
    nn.Softplus(0.5, 3.0), ReLUSquared(),
]  # fmt: skip
NORMS = {"layer": nn.LayerNorm(8), "rms": nn.RMSNorm(8), "none": None}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def compiled(net: nn.Module, **options: object) -> nn.Module:
    options = {"fullgraph": True, "backend": "aot_eager"} | options
    return torch.compile(net, **options)  # type: ignore[call-overload]


def assert_compiles(net: fused.Sequential, *rest: int) -> None:
    """Compiled for any batch, it gives the outputs and gradients of eager, the mask included."""
    run = compiled(net, dynamic=True)
    for batch in (2, 5, 3):
        x = torch.randn(batch, *rest)
        torch.manual_seed(batch)
        found = outcome(run, x)
        torch.manual_seed(batch)
        assert_close(found, outcome(net, x), 1e-5)


@pytest.mark.once
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("module", ACTIVATIONS, ids=str)
def test_every_kind_of_activation_compiles(module: nn.Module, p: float) -> None:
    assert_compiles(fused.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), module, nn.Dropout(p)), 8)


@pytest.mark.once
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("linear", [True, False], ids=["linear", "no linear"])
def test_chains_compile_in_three_dimensions(norm: str, linear: bool) -> None:
    modules = [nn.Linear(8, 8) if linear else None, NORMS[norm], nn.ELU(1.3), nn.Dropout(0.3)]
    assert_compiles(fused.Sequential(*(m for m in modules if m is not None)), 3, 8)


def test_a_block_with_a_residual_compiles() -> None:
    block = fused.LinearNormAct(8, 8, norm="layer", activation="elu", alpha=0.3)
    run = compiled(block, dynamic=True)
    for batch in (2, 5, 3):
        x = torch.randn(batch, 3, 8)
        torch.testing.assert_close(run(x, x), block(x, x))


@pytest.mark.parametrize("early", [True, False], ids=["before a call", "after a call"])
def test_checkpointing_inside_a_graph(early: bool) -> None:
    net = fused.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU(), nn.Dropout(0.2))
    x = torch.randn(4, 8)
    if not early:
        net(x)
    run = compiled(lambda x: checkpoint(net, x, use_reentrant=False))
    torch.manual_seed(1)
    y = run(x)
    found = torch.autograd.grad(y.square().sum(), list(net.parameters()))
    torch.manual_seed(1)
    expected = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    assert_close(list(found), list(expected), 1e-5)


def test_the_compiler_does_not_warn_of_caches() -> None:
    net = fused.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.ELU(1.3))
    for run in (net, lambda x: fused.functional.norm_act(x, norm="layer", activation="silu")):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            compiled(run)(torch.ones(2, 8))
        assert not any("lru_cache" in str(w.message) for w in seen)


def test_a_graph_is_made_once_for_each_backend() -> None:
    made: list[bool] = []

    def count(graph: torch.fx.GraphModule, inputs: object) -> object:
        made.append("layer_norm" in graph.code)
        return graph.forward

    run = compiled(fused.Sequential(nn.LayerNorm(8), nn.ReLU()), backend=count)
    x = torch.randn(2, 8)
    for _ in range(2):
        run(x)
        with fused.use_backend("reference"):
            run(x)
        fused.functional.norm_act(x.double(), activation="relu")
    assert made == [False, True]


@pytest.mark.slow
def test_compiled_dropout_has_eagers_mask_if_inductor_draws_as_eager_does() -> None:
    block = fused.LinearNormAct(8, 64, norm="layer", dropout=0.5)
    x = torch.randn(4, 8)

    def masks(run: nn.Module) -> Tensor:
        torch.manual_seed(3)
        return run(x) == 0

    assert not torch.equal(masks(torch.compile(block)), masks(block))
    torch._dynamo.reset()
    with torch._inductor.config.patch(fallback_random=True):
        assert torch.equal(masks(torch.compile(block)), masks(block))


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict: bool) -> None:
    net = fused.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.ELU(0.4), nn.Linear(8, 2))
    x = torch.randn(3, 8)
    exported = torch.export.export(net, (x,), strict=strict).module()
    torch.testing.assert_close(exported(x), net(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_trace() -> None:
    net = fused.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.ELU(0.4), nn.Linear(8, 2))
    block = fused.LinearNormAct(2, 2, activation="relu")
    for model in (net, nn.Sequential(net, block)):
        traced = torch.jit.trace(model, (torch.randn(3, 8),))  # it compares with a second trace
        x = torch.randn(5, 8)
        torch.testing.assert_close(traced(x), model(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_script_names_the_way_out() -> None:
    model = nn.Sequential(fused.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 2))
    with pytest.raises(TypeError, match=r"after fused\.unfuse_\(model\)"):
        torch.jit.script(model)
    assert type(model[0]) is fused.Sequential
    x = torch.randn(3, 8)
    torch.testing.assert_close(torch.jit.script(fused.unfuse_(model))(x), model(x))
    with pytest.raises(TypeError, match=r"a fused LinearNormAct.* nn\.Sequential\(\*block\)"):
        torch.jit.script(fused.LinearNormAct(4, 4, activation="relu"))


def test_pickles_of_a_compiled_module() -> None:
    net = fused.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU())
    net.compile(backend="aot_eager")
    x = torch.randn(2, 8)
    expected = net(x)
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    copies = [torch.load(buffer, weights_only=False), pickle.loads(pickle.dumps(net))]
    for made in (*copies, copy.deepcopy(net)):
        torch.testing.assert_close(made(x), expected)


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.parametrize(
    "norm, dynamic",
    [
        (nn.GroupNorm(4, 16), None),
        (nn.GroupNorm(4, 16), True),
        (nn.InstanceNorm2d(16), None),
        (nn.InstanceNorm2d(16), True),
        # Not None: torch 2.13 cannot compile the second graph of nn.Sequential either.
        (nn.BatchNorm2d(16), True),
    ],
)
def test_images_of_varying_size(norm: nn.Module, dynamic: bool | None) -> None:
    """Forward and gradients are eager's, by as many graphs as of nn.Sequential."""
    torch._dynamo.reset()
    children = nn.Conv2d(3, 16, 3), norm, nn.SiLU(), nn.Conv2d(16, 8, 3)
    eager = copy.deepcopy(nn.Sequential(*children))
    graphs = []
    for kind in (nn.Sequential, fused.Sequential):
        net = copy.deepcopy(kind(*children))
        torch._dynamo.utils.counters.clear()
        compiled = torch.compile(net, dynamic=dynamic)
        other = copy.deepcopy(eager)
        for size in (12, 16, 20):
            x = torch.randn(4, 3, size, size)
            y, expected = compiled(x), other(x)
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
            y.square().mean().backward()
            expected.square().mean().backward()
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[1] <= graphs[0]
