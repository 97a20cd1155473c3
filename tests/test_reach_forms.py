"""The graph pass: how models spell the parts of a chain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reach import Log, N, equal_to_eager, llama, rows
from torch import Tensor

from fused.graph.forms import FORMS, spellings
from fused.spec import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def _method(name: str) -> Callable[[Tensor], Tensor]:
    return lambda x: getattr(x, name)()


def _calls(name: str) -> list[Any]:
    """Every spelling of an activation as a function of x."""
    found = []
    for target in dict.fromkeys(spellings(name)):
        if isinstance(target, str):
            found.append(pytest.param(_method(target), id=f"method-{target}"))
        else:
            found.append(pytest.param(target, id=f"{target.__module__}-{target.__name__}"))
    return found


@pytest.mark.parametrize("call", [c for name in ACTIVATIONS for c in _calls(name)])
def test_every_spelling_of_an_activation(call: Callable[[Tensor], Tensor], log: Log) -> None:
    weight = rows(N, N, grad=False)

    def model(x: Tensor) -> Tensor:
        # What follows keeps an in-place result from being the graph's own.
        return call(F.layer_norm(F.linear(x, weight), (N,))) * 2

    equal_to_eager(model, rows())
    assert len(log.fused) == 1 and log.fused[0].startswith("linear → layer → ")


def test_every_activation_has_a_form() -> None:
    names = {form.name for form in FORMS.values()}
    assert {*ACTIVATIONS} - {"gelu_tanh", "relu_squared"} <= names


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda x: F.gelu(x, approximate="tanh"), "gelu_tanh"),
        (lambda x: F.leaky_relu(x, 0.3), "leaky_relu"),
        (lambda x: F.elu(x, alpha=0.5), "elu"),
        (lambda x: F.softplus(x, 2.0, 10), "softplus"),
        (lambda x: F.hardtanh(x, 0.0, 6.0), "relu6"),
        (lambda x: F.relu(x, inplace=True), "relu"),
        (lambda x: F.leaky_relu(x, 0.1, True), "leaky_relu"),
        (lambda x: x * torch.sigmoid(x), "silu"),
        (lambda x: x.sigmoid() * x, "silu"),
        (lambda x: F.relu(x) ** 2, "relu_squared"),
        (lambda x: torch.square(F.relu(x)), "relu_squared"),
        (lambda x: x * 0.5 * (1.0 + torch.erf(x / 2**0.5)), "gelu"),
        (lambda x: 0.5 * x * (1 + torch.erf(x * 0.7071067811865476)), "gelu"),
        (
            lambda x: 0.5 * x * (1.0 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
            "gelu_tanh",
        ),
        (
            lambda x: (
                0.5
                * x
                * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044715 * torch.pow(x, 3.0))))
            ),
            "gelu_tanh",
        ),
        (lambda x: F.glu(x, -1), "glu"),
        (lambda x: x[..., : N // 2] * F.silu(x[..., N // 2 :]), "swiglu"),
        (lambda x: x.chunk(2, -1)[0] * F.gelu(x.chunk(2, dim=-1)[1]), "geglu"),
        (lambda x: F.relu(x.split(N // 2, -1)[1]) * x[..., : N // 2], "reglu"),
    ],
)
def test_what_activations_look_like(call: Callable[[Tensor], Tensor], name: str, log: Log) -> None:
    equal_to_eager(lambda x: call(F.layer_norm(x, (N,))), rows())
    assert log.fused == [f"layer → {name}"]


def test_another_clamp_is_no_relu6(log: Log) -> None:
    equal_to_eager(lambda x: F.hardtanh(F.layer_norm(x, (N,)), 0.0, 5.0), rows())
    equal_to_eager(lambda x: F.glu(F.layer_norm(x, (N,)), 0), rows())
    assert log.fused == []


def images(x: Tensor) -> Tensor:
    return x.mT.contiguous()


WEIGHT = torch.linspace(0.5, 1.5, N, dtype=torch.float64)


@pytest.mark.parametrize(
    ("norm", "name"),
    [
        (lambda x: F.layer_norm(x, (N,), WEIGHT, WEIGHT, 1e-3), "layer"),
        (lambda x: torch.layer_norm(x, [N], WEIGHT, eps=1e-3), "layer"),
        (lambda x: F.layer_norm(x, normalized_shape=(5, N)), "layer"),
        (lambda x: F.rms_norm(x, (N,), WEIGHT), "rms"),
        (lambda x: torch.rms_norm(x, (N,), WEIGHT, 1e-4), "rms"),
        (
            lambda x: F.batch_norm(x.mT.contiguous(), None, None, WEIGHT, WEIGHT, training=True),
            "batch",
        ),
        (
            lambda x: F.batch_norm(x.mT.contiguous(), WEIGHT * 0, WEIGHT.clone(), WEIGHT, WEIGHT),
            "batch",
        ),
        (
            lambda x: torch.batch_norm(
                x.mT.contiguous(), WEIGHT, WEIGHT, None, None, True, 0.2, 1e-4, False
            ),
            "batch",
        ),
        (lambda x: F.group_norm(images(x), 4, WEIGHT, WEIGHT), "group"),
        (
            lambda x: F.instance_norm(images(x), weight=WEIGHT, bias=WEIGHT, eps=1e-3),
            "instance",
        ),
    ],
)
def test_norms_and_their_arguments(norm: Callable[[Tensor], Tensor], name: str, log: Log) -> None:
    equal_to_eager(lambda x: torch.tanh(norm(x)), rows(4, 5, N))
    assert log.fused == [f"{name} → tanh"]


def t5(x: Tensor, weight: Tensor) -> Tensor:
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    h = x * torch.rsqrt(variance + 1e-6)
    if weight.dtype in (torch.float16, torch.bfloat16):
        h = h.to(weight.dtype)
    return weight * h


def gemma(x: Tensor, weight: Tensor) -> Tensor:
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (h * (1.0 + weight.float())).type_as(x)


def plain(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(torch.mean(x * x, dim=-1, keepdim=True) + 1e-6) * weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [llama, t5, gemma, plain])
def test_rms_norm_written_out(norm: Callable[..., Tensor], dtype: torch.dtype, log: Log) -> None:
    x, weight = rows(6, N, dtype=dtype), WEIGHT.to(dtype).requires_grad_()
    # In bfloat16 eager rounds several times, the kernel once.
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    equal_to_eager(lambda x, w: F.silu(norm(x, w)), x, weight, tolerance=tolerance)
    assert log.fused == ["rms → silu"]


def test_rms_norm_over_another_dimension_is_not_taken(log: Log) -> None:
    def norm(x: Tensor) -> Tensor:
        return F.silu(x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + 1e-6))

    equal_to_eager(norm, rows())

    def read_inside(x: Tensor) -> Tensor:
        root = torch.rsqrt(x.pow(2).mean(-1, True) + 1e-6)
        return F.silu(x * root) + root

    equal_to_eager(read_inside, rows())
    assert log.fused == []
