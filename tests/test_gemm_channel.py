"""The same as test_gemm.py for a Linear with batch or group norm behind it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from fused.kernels.tuning import gemm as gemm_tuning
from gemm_calls import HALF, gradients, recorded
from torch import Tensor, nn

import fused
from fused import functional
from fused.backends import gemm, ops
from fused.spec import NORM_CODES

pytestmark = pytest.mark.usefixtures("cpp")


def linear_channel(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    save_z: bool,
    *codes: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z = F.linear(x, weight, bias)
    view = (1, *z.shape) if codes[0] == NORM_CODES["batch"] else (len(z), 1, z.shape[1])
    r = None if residual is None else residual.view(view)
    parameters = (norm_weight, norm_bias, r, None, seed)
    y, mean, variance, _ = ops.channel_forward(z.view(view), *parameters, *codes)
    return y.view(z.shape), z if save_z else z.new_empty(0), mean, variance


@pytest.fixture
def calls() -> Iterator[list[tuple[Any, ...]]]:
    """The calls of linear_channel_forward."""
    with recorded("linear_channel_forward", linear_channel) as made:
        yield made


def block(**options: Any) -> fused.LinearNormAct:
    net = fused.LinearNormAct(40, 64, norm="batch", activation="gelu", dtype=HALF, **options)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return net


def both_ways(net: nn.Module, *args: Any, **options: Any) -> tuple[dict[str, Tensor], ...]:
    """Results and buffers by one operator, and by the library's GEMM."""
    before = {name: t.clone() for name, t in net.named_buffers()}
    found = gradients(net, *args, **options)
    found |= {name: t.clone() for name, t in net.named_buffers()}
    net.load_state_dict(before, strict=False)
    with mock.patch.object(gemm, "enabled", False):
        library = gradients(net, *args, **options)
    return found, library | dict(net.named_buffers())


def test_by_default_the_library_multiplies(calls: list[Any]) -> None:
    assert gemm_tuning.RULES == ()
    gradients(block(dropout=0.5), torch.randn(6, 40, dtype=HALF))
    assert not calls


def test_a_rule_makes_auto_choose(calls: list[Any]) -> None:
    rule = gemm_tuning.Rule("batch", HALF, 90, most_cols=64, most_inner=40)
    with (
        mock.patch.multiple(gemm, mode="auto", enabled=True),
        mock.patch.object(gemm_tuning, "RULES", (rule,)),
    ):
        gradients(block(), torch.randn(6, 40, dtype=HALF))
        assert len(calls) == 1
        wider = fused.LinearNormAct(40, 72, norm="batch", dtype=HALF)
        gradients(wider, torch.randn(6, 40, dtype=HALF))
        assert len(calls) == 1


@pytest.mark.parametrize("shape", [(18,), (3, 6)])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.usefixtures("fused_mode")
def test_training_by_one_operator(
    calls: list[Any], p: float, residual: bool, shape: tuple[int, ...]
) -> None:
    net = block(dropout=p)
    x = torch.randn(*shape, 40, dtype=HALF, requires_grad=True)
    r = torch.randn(*shape, 64, dtype=HALF, requires_grad=True) if residual else None
    found, library = both_ways(net, x, r)
    ((given_x, weight, bias, norm_weight, norm_bias, given_r, seed, save_z, *codes),) = calls
    assert given_x.shape == (18, 40) and given_x.data_ptr() == x.data_ptr()
    assert weight.data_ptr() == net.linear.weight.data_ptr()
    assert bias.data_ptr() == net.linear.bias.data_ptr()
    assert norm_weight.data_ptr() == net.norm.weight.data_ptr()
    assert norm_bias.data_ptr() == net.norm.bias.data_ptr()
    assert (given_r is not None) == residual and (seed is not None) == (p > 0) and save_z
    assert codes[:3] == [3, 64, True] and codes[-1] is False
    assert found.keys() == library.keys()
    assert "norm.running_var" in found
    for name, value in library.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)


@pytest.mark.usefixtures("fused_mode")
def test_sequential_of_rows(calls: list[Any]) -> None:
    net = fused.Sequential(nn.Linear(40, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.2))
    found, library = both_ways(net, torch.randn(18, 40, requires_grad=True))
    assert len(calls) == 1
    for name, value in library.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.usefixtures("fused_mode")
def test_group_norm_by_one_operator(calls: list[Any], p: float, residual: bool) -> None:
    net = fused.LinearNormAct(
        40, 64, norm="group", num_groups=4, activation="gelu", dropout=p, dtype=HALF
    )
    x = torch.randn(18, 40, dtype=HALF, requires_grad=True)
    r = torch.randn(18, 64, dtype=HALF, requires_grad=True) if residual else None
    found, library = both_ways(net, x, r)
    ((*_, given_r, seed, save_z),) = [args[:8] for args in calls]
    assert calls[0][8:11] == (NORM_CODES["group"], 4, True)
    assert (given_r is not None) == residual and (seed is not None) == (p > 0) and save_z
    assert found.keys() == library.keys()
    for name, value in library.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)


@pytest.mark.usefixtures("fused_mode")
def test_without_gradients_z_is_not_kept(calls: list[Any]) -> None:
    net, x = block(), torch.randn(6, 40, dtype=HALF)
    with torch.no_grad():
        y = net(x)
        assert [args[7] for args in calls] == [False]
        net.eval()(x)  # by constants: not this operator's function
        assert len(calls) == 1
        with mock.patch.object(gemm, "enabled", False):
            assert torch.equal(y, net.train()(x))


@pytest.mark.usefixtures("fused_mode")
def test_parameters_without_gradients(calls: list[Any]) -> None:
    for frozen in ("x", "linear.bias", "norm.weight", "norm.bias", "linear.weight"):
        net = block()
        x = torch.randn(6, 40, dtype=HALF, requires_grad=frozen != "x")
        if frozen != "x":
            net.get_parameter(frozen).requires_grad_(False)
        calls.clear()
        found, library = both_ways(net, x)
        assert len(calls) == (frozen != "linear.weight")
        assert found.keys() == library.keys()
        assert all(torch.equal(found[name], library[name]) for name in found)


@pytest.mark.parametrize("x_needs", [True, False])
@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.usefixtures("fused_mode")
def test_second_derivatives(calls: list[Any], norm: str, x_needs: bool) -> None:
    options: dict[str, Any] = {"num_groups": 2} if norm == "group" else {}
    net = fused.LinearNormAct(12, 16, norm=norm, activation="gelu", dropout=0.3, **options)
    x = torch.randn(6, 12, requires_grad=x_needs)

    def second() -> tuple[Tensor, ...]:
        first = gradients(net, x, create_graph=True)
        total = sum((t.square().sum() for t in first.values()), torch.zeros(()))
        return torch.autograd.grad(total, [*net.parameters(), *([x] if x_needs else [])])

    found = second()
    assert len(calls) == 1
    with mock.patch.object(gemm, "enabled", False):
        for a, b in zip(found, second(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.once
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("norm", [nn.BatchNorm1d(64), nn.GroupNorm(4, 64)], ids=str)
@pytest.mark.usefixtures("fused_mode")
def test_compiled(calls: list[Any], norm: nn.Module, backend: str) -> None:
    torch._dynamo.reset()
    net = fused.Sequential(nn.Linear(40, 64), norm, nn.ReLU())
    x = torch.randn(6, 40, requires_grad=True)
    eager = gradients(net, x)
    compiled = gradients(torch.compile(net, backend=backend, fullgraph=True, dynamic=True), x)
    assert len(calls) == 2
    compiled = {name.removeprefix("_orig_mod."): t for name, t in compiled.items()}
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, msg=name)


@pytest.mark.usefixtures("fused_mode")
def test_what_the_operator_does_not_serve_is_left_to_the_library(calls: list[Any]) -> None:
    x, weight = torch.randn(6, 3, 40, dtype=HALF), torch.randn(64, 40, dtype=HALF)

    def run(x: Tensor = x, weight: Tensor = weight, **options: Any) -> int:
        calls.clear()
        functional.linear_norm_act(x, weight, **({"norm": "batch"} | options))
        return len(calls)

    assert run() == 1
    assert run(mask=torch.ones(6, 3, dtype=torch.bool)) == 0
    assert run(p=0.5, channel_dropout=True) == 0
    assert run(virtual_batch_size=2) == 0
    assert run(norm="group", num_groups=2) == 0  # over positions
    assert run(x=x[:, 0], norm="group", num_groups=2) == 1
    assert run(x=x[:, 0], norm="group", num_groups=16) == 0  # of 4 columns
    assert run(x=x[:, 0], weight=weight[:48], norm="group", num_groups=2) == 0  # of 24
    assert run(norm="instance") == 0
    assert run(running_mean=torch.zeros(64), running_var=torch.ones(64), training=False) == 0
    assert run(weight=torch.randn(60, 40, dtype=HALF)) == 0
    assert run(x=x.double(), weight=weight.double()) == 0
    assert run(residual=torch.randn(6, 3, 64)) == 1  # of another dtype: added behind it
    with torch.autocast("cpu", torch.bfloat16):
        assert run() == 0
    net = fused.Sequential(nn.Linear(40, 64, dtype=HALF), nn.BatchNorm1d(3, dtype=HALF), nn.ReLU())
    net(x)  # channels are the positions here
    assert not calls
