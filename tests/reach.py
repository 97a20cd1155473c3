"""What the tests of the graph pass and of its doors share."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Log(logging.Handler):
    """What the pass says of each chain: those that became one operation, and the others."""

    def __init__(self) -> None:
        super().__init__()
        self.fused: list[str] = []
        self.left: dict[str, str] = {}

    def emit(self, record: logging.LogRecord) -> None:
        chain, reason, _ = record.args  # type: ignore[misc]
        if reason == "one operation":
            self.fused.append(str(chain))
        else:
            self.left[str(chain)] = str(reason)


def tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [*result]


def equal_to_eager(
    function: Callable[..., Any],
    *inputs: Tensor,
    tolerance: float = 1e-9,
    backend: str = "fused_eager",
    **how: Any,
) -> Any:
    """Outputs, their dtypes and strides, gradients and buffers are those of eager.

    Returns:
        The function as it was compiled.
    """
    module = function if isinstance(function, nn.Module) else None
    other = copy.deepcopy(function)
    compiled = torch.compile(other, backend=backend, **how)
    mine = [x.clone().detach().requires_grad_(x.requires_grad) for x in inputs]
    wanted, found = tensors(function(*inputs)), tensors(compiled(*mine))
    for a, b in zip(wanted, found, strict=True):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance)
    learning = [t for t in wanted if t.requires_grad]
    if learning:
        torch.stack([t.double().square().sum() for t in learning]).sum().backward()
        torch.stack([t.double().square().sum() for t in found if t.requires_grad]).sum().backward()
    pairs = [*zip(inputs, mine, strict=True)]
    if module is not None:
        pairs += zip(module.parameters(), other.parameters(), strict=True)
        for a, b in zip(module.buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance)
    for a, b in pairs:
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, rtol=10 * tolerance, atol=10 * tolerance)
    return compiled


N = 16  # features


def rows(*shape: int, grad: bool = True, dtype: torch.dtype = torch.float64) -> Tensor:
    """A random input, (6, N) where no shape is given."""
    return torch.randn(*(shape or (6, N)), dtype=dtype).requires_grad_(grad)


def llama(x: Tensor, weight: Tensor) -> Tensor:
    """Llama's RMSNorm."""
    dtype = x.dtype
    h = x.to(torch.float32)
    variance = h.pow(2).mean(-1, keepdim=True)
    h = h * torch.rsqrt(variance + 1e-6)
    return weight * h.to(dtype)
