"""What `plan` says of the calls so far and of the next."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fused


def test_a_reason_is_forgotten_when_the_chain_fuses_again() -> None:
    net = fused.Sequential(nn.LayerNorm(16), nn.ReLU())
    for _ in range(2):
        net(torch.randn(3, 16))
        assert net.plan()[0].reason == ""
        with pytest.raises(RuntimeError):
            net(torch.randn(3, 16).double())
        assert net.plan()[0].reason == "LayerNorm: it has float32, its input float64"


def test_modes_that_alternate() -> None:
    net = fused.Sequential(nn.LayerNorm(64), nn.ReLU(), nn.Dropout(0.5))
    x = torch.randn(4, 64)
    whole = nn.functional.relu(nn.functional.layer_norm(x, (64,)))
    for _ in range(3):
        dropped = net.train()(x)
        assert not torch.equal(dropped, whole)
        torch.testing.assert_close(dropped[dropped != 0], 2 * whole[dropped != 0])
        for _ in range(2):
            torch.testing.assert_close(net.eval()(x), whole)
    net[0].eps = 9.0
    torch.testing.assert_close(
        net(x), nn.functional.relu(nn.functional.layer_norm(x, (64,), eps=9.0))
    )


def test_the_plan_tells_now_from_the_last_call() -> None:
    net = fused.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU())
    assert str(net.plan()).endswith("gelu: fused")
    jagged = torch.nested.nested_tensor([torch.randn(n, 6) for n in (2, 3)], layout=torch.jagged)
    net(jagged)
    last = "the last call was not: the input is a NestedTensor"
    assert str(net.plan()).endswith(f"gelu: fused; 0 calls fused, 1 not; {last}")
    net(torch.randn(2, 6))
    assert str(net.plan()).endswith("gelu: fused; 1 calls fused, 1 not")
    net[2].register_forward_hook(lambda *_: None)
    expected = "not fused now: child '2': it has forward hooks; 1 calls fused, 1 not"
    assert str(net.plan()).endswith(expected)


def test_the_plan_of_a_lone_norm() -> None:
    assert "a chain needs two or more of Linear, norm" in str(fused.NormAct(8, norm="layer").plan())
    assert "not part of a chain" in str(fused.Sequential(nn.Conv2d(3, 3, 1)).plan())
