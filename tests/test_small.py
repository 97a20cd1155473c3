"""Inputs so small that torch's own operators serve them: the same numbers and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import EVERY_ACTIVATION
from torch import nn

import fused
from fused.backends import ops
from fused.run import by_torch
from fused.spec import GATED_ACTIVATIONS

pytestmark = pytest.mark.usefixtures("cpp")
# Before the fixture of every test takes them away.
LIMITS, WITHOUT_NORM = dict(by_torch.LIMITS), dict(by_torch.WITHOUT_NORM)


def take_small_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_torch, "LIMITS", LIMITS)
    monkeypatch.setattr(by_torch, "WITHOUT_NORM", WITHOUT_NORM)


@pytest.fixture
def small_path(monkeypatch: pytest.MonkeyPatch) -> None:
    take_small_path(monkeypatch)


def results(block: fused.LinearNormAct, x: torch.Tensor, residual: torch.Tensor) -> list:
    torch.manual_seed(5)
    inputs = [x.clone().requires_grad_(), residual.clone().requires_grad_(), *block.parameters()]
    y = block(*inputs[:2])
    return [y, *torch.autograd.grad(y.square().sum(), inputs)]


@pytest.mark.parametrize("norm", [None, "layer", "rms"])
@pytest.mark.parametrize("activation", [*EVERY_ACTIVATION, *GATED_ACTIVATIONS])
def test_gives_what_the_kernels_give(
    activation: str | None, norm: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = fused.LinearNormAct(8, 16, norm=norm, activation=activation)
    x, residual = torch.randn(4, 8), torch.randn(4, 16)
    kernel = results(block, x, residual)
    take_small_path(monkeypatch)
    for ours, expected in zip(results(block, x, residual), kernel, strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.usefixtures("small_path")
def test_is_taken_for_small_inputs_only(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def count(*args: object) -> object:
        calls.append(args)
        return right(*args)

    right = ops.row_forward
    monkeypatch.setattr(ops, "row_forward", count)
    chain = fused.Sequential(nn.LayerNorm(64), nn.ReLU())
    x = torch.randn(8, 64)
    chain(x)
    assert not calls
    with fused.use_backend("cpp"):
        chain(x)
    assert len(calls) == 1  # who asks for a backend gets it
    chain(torch.randn(LIMITS["relu"] // 64 + 1, 64))
    assert len(calls) == 2
    with torch.no_grad():
        chain(x)
    assert len(calls) == 3  # without a gradient, one operator is the cheaper


@pytest.mark.usefixtures("small_path")
def test_inference_without_norm() -> None:
    chain = fused.Sequential(nn.Linear(8, 16), nn.ReLU()).eval()
    x = torch.randn(4, 8)
    with torch.no_grad():
        assert torch.equal(chain(x), nn.Sequential(*chain)(x))


@pytest.mark.once
@pytest.mark.usefixtures("small_path")
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("stages", ["N-A", "L-N-A", "L-A"])
def test_compiled_chains_stay_one_graph(stages: str, gradient: bool, dynamic: bool | None) -> None:
    children = {"L": nn.Linear(16, 16), "N": nn.LayerNorm(16), "A": nn.ReLU()}
    chain = fused.Sequential(*(children[stage] for stage in stages.split("-")))
    torch.compiler.reset()
    compiled = torch.compile(chain, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    plain = nn.Sequential(*chain)
    for rows in (4, 7):
        x = torch.randn(rows, 16, requires_grad=True)
        with torch.set_grad_enabled(gradient):
            y, expected = compiled(x), plain(x)
        torch.testing.assert_close(y, expected)
        if gradient:
            inputs = [x, *chain.parameters()]
            ours, theirs = (torch.autograd.grad(t.square().sum(), inputs) for t in (y, expected))
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


NETS = {
    "batch": ([nn.BatchNorm1d(8), nn.SiLU()], (6, 8)),
    "linear batch": ([nn.Linear(5, 8), nn.BatchNorm1d(8), nn.SiLU()], (6, 5)),
    "linear sequences": ([nn.Linear(5, 9), nn.BatchNorm1d(8), nn.SiLU()], (3, 8, 5)),
    "batch 2d": ([nn.BatchNorm2d(8), nn.ReLU()], (3, 8, 5, 4)),
    "group": ([nn.GroupNorm(2, 8), nn.SiLU()], (3, 8, 5)),
    "instance": ([nn.InstanceNorm1d(8, affine=True, track_running_stats=True)], (3, 8, 5)),
    "instance of one": ([nn.InstanceNorm1d(8)], (8, 5)),
    "one position": ([nn.BatchNorm2d(8), nn.ReLU()], (6, 8, 1, 1)),
    "gate": ([nn.Linear(5, 8), nn.LayerNorm(8), nn.GLU()], (6, 5)),
    "gate without a norm": ([nn.Linear(5, 8), fused.nn.ReGLU()], (6, 5)),
    "gate behind batch": ([nn.BatchNorm1d(8), nn.GLU()], (6, 8)),
    "gate of channels": ([nn.BatchNorm2d(8), fused.nn.SwiGLU(1)], (3, 8, 5, 4)),
    "channels-last": ([nn.BatchNorm2d(8), nn.ReLU()], (3, 8, 5, 4)),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("case", NETS)
def test_channels_give_what_the_kernels_give(
    case: str, p: float, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dropout mask and the running statistics included."""
    modules, shape = NETS[case]
    kernel = fused.Sequential(*modules, nn.Dropout(p)).train(training)
    ours = copy.deepcopy(kernel)
    x = torch.randn(shape)
    if case == "channels-last":
        x = x.to(memory_format=torch.channels_last)

    def run(net: nn.Module) -> list[torch.Tensor]:
        torch.manual_seed(7)
        leaf = x.clone().requires_grad_()
        y = net(leaf)
        inputs = [leaf, *net.parameters()]
        return [y, *torch.autograd.grad(y.sin().sum(), inputs), *net.buffers()]

    expected = run(kernel)
    take_small_path(monkeypatch)
    for found, right in zip(run(ours), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=2e-5, atol=2e-5)


FUNCTIONS = [
    pytest.param(shape, norm, learns, id=f"{norm}-{shape}-{learns}")
    for shape in ((6, 8), (3, 8, 5), (2, 8, 3), (0, 8), (0, 8, 5), (3, 8, 0))
    for norm in ("batch", "group", "instance")
    for learns in (False, True)
    # Group norm learns nothing; instance norm refuses one position.
    if not (norm == "group" and learns) and (norm, shape) != ("instance", (6, 8))
]


@pytest.mark.parametrize("shape, norm, learns", FUNCTIONS)
def test_functions_give_what_the_kernels_give(
    shape: tuple[int, ...], norm: str, learns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without elements, and with parameters and running statistics of other dtypes, too."""
    half, single, double = torch.bfloat16, torch.float32, torch.float64

    def run(dtype: torch.dtype, parameter: torch.dtype, running: torch.dtype) -> list:
        torch.manual_seed(7)
        x = torch.randn(shape).to(dtype).requires_grad_()
        weight = torch.rand(8).to(parameter).requires_grad_()
        options: dict = {"num_groups": 2} if norm == "group" else {}
        if learns:
            options["running_mean"] = torch.zeros(8, dtype=running)
            options["running_var"] = torch.ones(8, dtype=running)
        y = fused.functional.norm_act(
            x, norm=norm, norm_weight=weight, activation="relu", **options
        )
        gradients = torch.autograd.grad(y.square().sum(), (x, weight))
        return [y, *gradients, *(options[k] for k in options if k != "num_groups")]

    cases = [(single, single, single), (half, half, single), (half, single, single)]
    cases += [(single, single, double), (double, double, single)]
    expected = [run(*case) for case in cases]
    take_small_path(monkeypatch)
    for case, right in zip(cases, expected, strict=True):
        tolerance = 2e-2 if half in case else 2e-5
        for ours, value in zip(run(*case), right, strict=True):
            assert ours.dtype == value.dtype
            torch.testing.assert_close(ours, value, rtol=tolerance, atol=tolerance)
