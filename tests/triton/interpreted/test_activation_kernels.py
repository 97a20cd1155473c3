"""Every activation and its gradient as device functions, against torch, in the interpreter.

Stricter than a whole kernel's test: the rule holds in every bin of 256 neighbouring arguments, so
an error near zero or in a tail cannot hide behind a large value elsewhere.
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from fused.kernels.parts.activation import activate, activate_grad

from fused.run import reference
from fused.spec import ACTIVATIONS

INF, NAN = float("inf"), float("nan")
BIN = 256


@triton.jit
def _activation_kernel(
    h_ptr,
    dy_ptr,
    y_ptr,
    dh_ptr,
    alpha,
    beta,
    ACTIVATION: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    h, dy = tl.load(h_ptr + i), tl.load(dy_ptr + i)
    alpha, beta = tl.cast(alpha, tl.float32), tl.cast(beta, tl.float32)
    tl.store(y_ptr + i, activate(h, alpha, beta, ACTIVATION, PTX))
    tl.store(dh_ptr + i, activate_grad(dy, h, alpha, beta, ACTIVATION, PTX))


def parameters(activation: str) -> tuple[float, float]:
    values = tuple(value for _, value in ACTIVATIONS[activation].parameters)
    return (*values, 0.0, 0.0)[:2]


def kernel(
    h: torch.Tensor, activation: str, dy: torch.Tensor, ptx: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    size = -(-len(h) // 1024) * 1024
    padded, dy_padded = torch.zeros(size), torch.zeros(size)
    padded[: len(h)], dy_padded[: len(h)] = h, dy
    y, dh = torch.empty(size), torch.empty(size)
    alpha, beta = parameters(activation)
    _activation_kernel[(size // 1024,)](
        padded, dy_padded, y, dh, alpha, beta, ACTIVATION=activation, PTX=ptx, BLOCK=1024
    )
    return y[: len(h)], dh[: len(h)]


def torch_values(
    h: torch.Tensor, activation: str, dy: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    h = h.clone().requires_grad_()
    y = reference.activate(h, activation, *parameters(activation))
    return y.detach(), torch.autograd.grad(y, h, dy.to(h.dtype))[0]


@pytest.mark.parametrize("ptx", [False, True], ids=["plain", "ptx emulated"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_error_in_every_bin(activation: str, ptx: bool) -> None:
    near_zero = torch.logspace(-30, -1, 16 * BIN, base=2.0)
    h = torch.cat([-near_zero.flip(0), near_zero, torch.linspace(-30, 30, 64 * BIN)])
    h = h.sort().values
    dy = torch.ones_like(h)
    exact = torch_values(h.double(), activation, dy)
    eager = torch_values(h, activation, dy)
    found = kernel(h, activation, dy, ptx)
    for name, x, e, k in zip(("y", "dh"), exact, eager, found, strict=True):
        eager_error = (e.double() - x).abs().view(-1, BIN).amax(1, keepdim=True)
        error = (k.double() - x).abs().view(-1, BIN)
        ulp = torch.finfo(torch.float32).eps * x.abs().view(-1, BIN)
        # exp(h) as exp2(h log2(e)) rounds the product: |h|/2 ulp. Below 1e-15 the oracle itself
        # cancels (1 + erf, 1 - tanh² in float64).
        limit = 2 * eager_error + (8 + h.abs().view(-1, BIN)) * ulp + 1e-15
        worst = (error / limit).argmax()
        assert (error <= limit).all(), (
            f"{name} of {activation}({h[worst]:.7g}) = {k[worst]:.9g}, exact {x[worst]:.9g}, "
            f"{(error / limit).max():.2f} times the limit"
        )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_breakpoints_and_special_values(activation: str) -> None:
    points = [0.0, 0.5, 0.65, 3.0, 6.0, 20.0, 20.5, 88.0, 1e18, INF]
    h = torch.tensor(points + [-p for p in points])
    dy = torch.full_like(h, 0.75)
    y, dh = kernel(h, activation, dy)
    exact_y, exact_dh = (t.float() for t in torch_values(h.double(), activation, dy))
    torch.testing.assert_close(y, exact_y, rtol=1e-6, atol=1e-7, equal_nan=True)
    # torch gives NaN for 0 · inf in some gradients at ±inf; a limit instead is as good
    defined = ~exact_dh.isnan()
    torch.testing.assert_close(dh[defined], exact_dh[defined], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_propagates(activation: str) -> None:
    y, dh = kernel(torch.tensor([NAN]), activation, torch.ones(1))
    assert y.isnan().all()
    if activation == "relu":
        assert dh == 1.0  # as torch: threshold_backward zeroes where h ≤ 0


def test_gradient_is_selected_not_multiplied_where_torch_selects() -> None:
    h = torch.tensor([-1.0, 0.0])
    dy = torch.tensor([INF, NAN])
    for activation in ("relu", "relu6"):
        assert (kernel(h, activation, dy)[1] == 0).all(), activation


@pytest.mark.parametrize("activation", ["gelu_tanh", "mish", "gelu", "silu"])
def test_gradient_far_out_is_zero_or_one(activation: str) -> None:
    h = torch.tensor([1e20, -1e20, 1e38, -1e38])
    dh = kernel(h, activation, torch.ones(4))[1]
    assert dh.tolist() == pytest.approx([1.0, 0.0, 1.0, 0.0], rel=1e-6)


def test_unknown_activation_is_refused() -> None:
    with pytest.raises(Exception, match="unknown activation"):
        ones = torch.ones(1024)
        _activation_kernel[(1,)](
            ones, ones, ones, ones, 0.0, 0.0, ACTIVATION="softmax", PTX=False, BLOCK=1024
        )
