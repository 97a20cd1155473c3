"""The chain in plain torch: oracle of the tests, baseline of the benchmarks, last-resort backend.

    y = residual + dropout(activation(norm(z + bias)))        over (rows, cols), norm along a row

It runs the operators that nn.Sequential would run, in the input's dtype, so in float64 it is the
oracle and in any other dtype it is eager itself; only the dropout mask is this library's
(random.py). Autograd differentiates it, twice if need be.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .random import keep_mask
from .spec import Epilogue, dropout_scale

_ACTIVATIONS: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "relu": lambda h, a, b: F.relu(h),
    "relu6": lambda h, a, b: F.relu6(h),
    "leaky_relu": lambda h, a, b: F.leaky_relu(h, a),
    "elu": lambda h, a, b: F.elu(h, a),
    "selu": lambda h, a, b: F.selu(h),
    "gelu": lambda h, a, b: F.gelu(h),
    "gelu_tanh": lambda h, a, b: F.gelu(h, approximate="tanh"),
    "silu": lambda h, a, b: F.silu(h),
    "mish": lambda h, a, b: F.mish(h),
    "sigmoid": lambda h, a, b: torch.sigmoid(h),
    "tanh": lambda h, a, b: torch.tanh(h),
    "hardswish": lambda h, a, b: F.hardswish(h),
    # F.hardsigmoid has 1/6 in float32 even in its float64 gradient.
    "hardsigmoid": lambda h, a, b: F.relu6(h + 3) / 6,
    "softplus": F.softplus,
    "relu_squared": lambda h, a, b: F.relu(h).square(),
}


def activate(h: Tensor, activation: str | None, alpha: float = 0.0, beta: float = 0.0) -> Tensor:
    """The activation of `spec.ACTIVATIONS` by name, with its two operator parameters."""
    return h if activation is None else _ACTIVATIONS[activation](h, alpha, beta)


def normalize(z: Tensor, epilogue: Epilogue, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Layer or RMS normalisation along the last dimension."""
    if epilogue.norm == "layer":
        return F.layer_norm(z, z.shape[-1:], weight, bias, epilogue.eps)
    if epilogue.norm == "rms":
        h = F.rms_norm(z, z.shape[-1:], weight, epilogue.eps)
        return h if bias is None else h + bias
    return z


def dropout(y: Tensor, threshold: int, seed: Tensor) -> Tensor:
    """Multiplies kept elements by the scale and dropped ones by zero; y is (rows, cols)."""
    compute = torch.promote_types(y.dtype, torch.float32)
    keep = keep_mask(y.shape[0], y.shape[1], threshold, seed)
    return (y.to(compute) * (keep.to(compute) * dropout_scale(threshold))).to(y.dtype)


def row(
    z: Tensor,
    epilogue: Epilogue,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    residual: Tensor | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """The epilogue of the row norms.

    Args:
        z: (rows, cols), floating point.
        bias, norm_weight, norm_bias: (cols,) or None.
        residual: (rows, cols) or None, added last.
        seed: int64 (1,), needed when `epilogue.threshold` is not 0.

    Returns:
        (rows, cols) in the dtype that eager gives.
    """
    h = z if bias is None else z + bias
    h = normalize(h, epilogue, norm_weight, norm_bias)
    y = activate(h, epilogue.activation, epilogue.alpha, epilogue.beta)
    if epilogue.threshold:
        assert seed is not None
        y = dropout(y, epilogue.threshold, seed)
    return y if residual is None else residual + y
