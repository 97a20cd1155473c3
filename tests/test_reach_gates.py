"""The graph pass: a tensor gated by another, and halves of one with the gate first."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reach import Log, N, equal_to_eager, rows
from torch import Tensor, nn

import fused
from fused.graph import policy

pytestmark = pytest.mark.usefixtures("fresh_compiler")


class Llama(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(N, 24, bias=False, dtype=dtype) for _ in range(2))
        self.down, self.act = nn.Linear(24, N, bias=False, dtype=dtype), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


class Phi(nn.Module):
    """Both in one Linear, the gate first."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Linear(N, 48, dtype=torch.float64)
        self.down = nn.Linear(24, N, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).chunk(2, dim=-1)
        return self.down(up * F.silu(gate))


@pytest.mark.parametrize("model", [Llama, Phi])
def test_mlps(model: Callable[[], nn.Module], log: Log) -> None:
    equal_to_eager(model(), rows(2, 3, N))
    assert log.fused == ["swiglu"]


def test_under_autocast(log: Log) -> None:
    model, x = Llama(torch.float32), rows(5, N, dtype=torch.float32)

    def cast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float()

    expected = cast(x)
    torch.testing.assert_close(
        torch.compile(cast, backend="fused_eager")(x), expected, rtol=2e-2, atol=2e-2
    )
    assert log.fused == ["swiglu"]


@pytest.mark.parametrize(
    ("call", "chain"),
    [
        (lambda x: torch.sigmoid(x) * (x + 1), "glu"),
        (lambda x: (x + 1) * F.gelu(x, approximate="tanh"), "geglu_tanh"),
        (lambda x: (x + 1).mul(F.relu(x)), "reglu"),
        (lambda x: F.dropout(F.gelu(x) * (x + 1), 1.0), "geglu → dropout"),
        (lambda x: F.gelu(x) * (x + 1) + x, "geglu"),
        (lambda x: (x + 2) * (x * torch.sigmoid(x)), "swiglu"),
        (lambda x: F.silu(x[..., : N // 2]) * x[..., N // 2 :], "swiglu"),
        (lambda x: torch.split(x, N // 2, -1)[1] * F.relu(torch.split(x, N // 2, -1)[0]), "reglu"),
        # The halves of another tensor than the gate, and a half that somebody else reads.
        (lambda x: F.silu((x + 1).chunk(2, -1)[1]) * x.chunk(2, -1)[0], "swiglu"),
        (lambda x: F.silu((h := x.chunk(2, -1))[0]) * h[1] + h[0], "swiglu"),
    ],
)
def test_what_is_a_gate(call: Callable[[Tensor], Tensor], chain: str, log: Log) -> None:
    equal_to_eager(lambda x: call(x * 2) * 3, rows(4, N))
    assert chain in log.fused


def _second_reader(x: Tensor) -> Any:
    h = F.silu(x)
    return h * (x + 1), h


def _written_later(x: Tensor) -> Tensor:
    up, gate = x * 2, x * 3
    h = F.relu(gate) * up
    return h + gate.add_(1)


def _in_place(x: Tensor) -> Tensor:
    up = x * 2
    view = up.view(-1)
    h = operator.imul(up, F.silu(x))
    return h + view.view_as(h)


@pytest.mark.parametrize(
    "function",
    [
        _second_reader,
        _written_later,
        _in_place,
        lambda x: x[:1] * F.silu(x),
        lambda x: F.mish(x) * (x + 1),
        lambda x: F.relu(x) * x,
        lambda x: x * torch.sigmoid(1.702 * x),
        lambda x: F.silu(x) * (x + 1).float(),
        lambda x: F.relu(F.layer_norm(x, (N,))) * (x + 1),
        lambda x: F.silu(x.t()) * (x.t() + 1),
        lambda x: F.silu(x) * 3.0,
    ],
)
def test_what_is_none(function: Callable[[Tensor], Any], log: Log) -> None:
    equal_to_eager(lambda x: function(x * 2), rows(4, N))
    assert not any(chain.split(" ")[0] in fused.spec.GATED_ACTIVATIONS for chain in log.fused)


def test_inference_leaves_it_to_inductor(log: Log) -> None:
    model, x = Llama().eval(), rows(4, N, grad=False)
    for backend, taken in (("fused_eager", ["swiglu"]), ("fused", [])):
        torch._dynamo.reset()
        log.fused.clear()
        with torch.no_grad():
            torch.testing.assert_close(torch.compile(model, backend=backend)(x), model(x))
        assert log.fused == taken


@pytest.mark.slow
@torch._inductor.config.patch(force_disable_caches=True)  # they hold what the pass made
def test_training_with_inductor(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compile(Llama(), backend="fused")(rows(4, N))
    assert log.left["swiglu"] == "Inductor is as fast at this size"
    torch._dynamo.reset()
    monkeypatch.setattr(policy, "_LARGE", 0)
    for model in (Llama(), Phi()):
        x = rows(4, N)
        found, expected = torch.compile(model, backend="fused")(x), model(x)
        torch.testing.assert_close(found, expected)
        of = (x, *model.parameters())
        torch.testing.assert_close(
            torch.autograd.grad(found.sum(), of), torch.autograd.grad(expected.sum(), of)
        )
    assert log.fused == ["swiglu", "swiglu"]


def test_explain_says_so() -> None:
    calls = fused.explain(Llama(), rows(4, N)).calls
    assert [c.kind for c in calls] == ["activation", "gate"]
    assert {c.ways for c in calls} == {("fused_eager",)}
    assert [c.bytes for c in calls] == [2 * 4 * 24 * 8, 3 * 4 * 24 * 8]
    other = fused.explain(lambda_module(lambda x: F.mish(x) * (x + 1)), rows(4, N)).calls
    assert (
        other[-1].kind == "gate"
        and other[-1].reason == "its activation is in another chain, or none that gates"
    )


def lambda_module(function: Callable[[Tensor], Tensor]) -> nn.Module:
    module = nn.Module()
    module.forward = function  # type: ignore[method-assign]
    return module
