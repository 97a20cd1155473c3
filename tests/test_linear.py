"""The whole Linear block against float64: every gradient, held to twice eager's error."""

from __future__ import annotations

import math

import pytest
import torch
from cases import NORMS, make_epilogue
from tolerances import assert_close
from torch import Tensor, nn

import fused
from fused.run import reference

pytestmark = pytest.mark.usefixtures("cpp")

EPS = 1e-5
ROWS, INPUTS, FEATURES = 65, 128, 200
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = ("gelu", "relu")


def make_block(norm: str | None, activation: str | None, dtype: torch.dtype) -> fused.LinearNormAct:
    """A block whose parameters have all been moved away from where torch starts them."""
    block = fused.LinearNormAct(
        INPUTS, FEATURES, norm=norm, activation=activation, eps=EPS, dtype=dtype
    )
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if name == "norm.weight":
                parameter.normal_(1.0, 0.3)
            elif name != "linear.weight":
                parameter.normal_()
    return block


def run_block(
    block: fused.LinearNormAct, x: Tensor, residual: Tensor, dy: Tensor
) -> dict[str, Tensor]:
    """Output and every gradient of the fused block."""
    leaves = {"dx": x.clone().requires_grad_(), "dresidual": residual.clone().requires_grad_()}
    leaves |= {f"d{name}": p for name, p in block.named_parameters()}
    y = block(leaves["dx"], leaves["dresidual"])
    gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    assert block.plan()[0].fused_calls == 1
    return {"y": y.detach()} | dict(zip(leaves, gradients, strict=True))


def run_plain(
    block: fused.LinearNormAct,
    activation: str | None,
    x: Tensor,
    residual: Tensor,
    dy: Tensor,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """The same by nn.Linear and the reference, from the same values in another dtype."""
    linear = nn.Linear(INPUTS, FEATURES, dtype=dtype)
    linear.load_state_dict(block.linear.state_dict())
    leaves = {"dx": x.to(dtype), "dresidual": residual.to(dtype)}
    leaves |= {
        f"d{n}": p.detach().to(dtype) for n, p in block.named_parameters() if n.startswith("norm")
    }
    leaves = {name: t.clone().requires_grad_() for name, t in leaves.items()}
    norm = None
    if block._modules.get("norm") is not None:
        norm = "layer" if isinstance(block.norm, nn.LayerNorm) else "rms"
    y = reference.row(
        linear(leaves["dx"]),
        make_epilogue(norm, activation),
        None,
        leaves.get("dnorm.weight"),
        leaves.get("dnorm.bias"),
        leaves["dresidual"],
    )
    leaves |= {f"dlinear.{name}": p for name, p in linear.named_parameters()}
    gradients = torch.autograd.grad(y, list(leaves.values()), dy.to(dtype))
    return {"y": y.detach()} | dict(zip(leaves, gradients, strict=True))


def check(
    block: fused.LinearNormAct, activation: str | None, x: Tensor, residual: Tensor, dy: Tensor
) -> None:
    dtype = x.dtype
    found = run_block(block, x, residual, dy)
    oracle = run_plain(block, activation, x, residual, dy, torch.float64)
    eager = run_plain(block, activation, x, residual, dy, dtype)
    assert found.keys() == oracle.keys() == eager.keys()
    assert torch.equal(found["dresidual"], dy)
    for name, result in found.items():
        assert result.dtype == dtype and oracle[name].abs().max() > 0, name
        # Sums over the rows have terms of both signs, and the size of the terms.
        summed = name.endswith((".weight", ".bias"))
        magnitude = float(dy.abs().max()) * math.sqrt(ROWS) if summed else 0.0
        assert_close(name, result, oracle[name], eager[name], dtype, magnitude)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_twice_eager(dtype: torch.dtype, norm: str | None, activation: str) -> None:
    block = make_block(norm, activation, dtype)
    x = torch.randn(ROWS, INPUTS).to(dtype)
    residual, dy = (torch.randn(ROWS, FEATURES).to(dtype) for _ in range(2))
    check(block, activation, x, residual, dy)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_that_cancels_a_mean(dtype: torch.dtype, norm: str | None, activation: str) -> None:
    """z is small and its two terms are not: neither may be rounded before they are added."""
    block = make_block(norm, activation, dtype)
    x = (torch.randn(ROWS, INPUTS) + 64).to(dtype)
    with torch.no_grad():
        mean = (x.double() @ block.linear.weight.double().T).mean(dim=0)
        block.linear.bias.copy_(-mean)
    assert block.linear.bias.abs().max() > 8
    residual, dy = (torch.randn(ROWS, FEATURES).to(dtype) for _ in range(2))
    check(block, activation, x, residual, dy)
