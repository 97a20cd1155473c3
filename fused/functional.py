"""The chain as functions: the only place that checks what a user passed.

`linear_norm_act` and `norm_act` check and dispatch; `run_linear_row` and `run_row` below them are
what the modules call with arguments that are known to be right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops, reference
from .autograd import Codes, LinearRowFunction, RowFunction, contiguous_rows, epilogue_of
from .backend import choose
from .random import draw_seed
from .random import dropout_mask as _dropout_mask
from .spec import make_epilogue

__all__ = ["dropout_mask", "linear_norm_act", "norm_act"]

functorch_active = torch._C._are_functorch_transforms_active
_is_tracing = torch._C._is_tracing
_forward_ad = torch.autograd.forward_ad
_AUTOCAST_DEVICES = ("cpu", "cuda")
_SCALE_DTYPES = (torch.float32,)  # a norm's parameters may be wider than a 16-bit input
# What CUDA autocast computes, and returns, in float32 (torch/csrc/autocast_mode.h).
_CUDA_AUTOCAST_FLOAT32 = {"layer", "rms"}


@lru_cache(maxsize=4096)
def make_codes(
    norm: str | None,
    eps: float,
    activation: str | None,
    p: float,
    parameters: tuple[tuple[str, float], ...] = (),
) -> Codes:
    """The operators' scalars for one chain; raises as `spec.make_epilogue` does."""
    return make_epilogue(norm, eps, activation, p, parameters).codes


def default_eps(norm: str | None, eps: float | None, dtype: torch.dtype) -> float:
    """torch's default: 1e-5 for layer; for rms the epsilon of the dtype that it computes in."""
    if eps is not None:
        return eps
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    return float(torch.finfo(compute).eps) if norm == "rms" else 1e-5


# ---- execution, on checked arguments ----


def _composite(x: Tensor) -> bool:
    """Whether the chain runs as plain torch operators rather than as one operator."""
    if functorch_active() or _forward_ad._current_level >= 0:
        return True
    if (torch.compiler.is_compiling() or _is_tracing()) and torch.onnx.is_in_onnx_export():
        return True
    return choose("cpu" if x.is_cpu else x.device.type, x.dtype) == "reference"


def _needs_gradient(*tensors: Tensor | None) -> bool:
    for t in tensors:
        if t is not None and t.requires_grad:
            return torch.is_grad_enabled()
    return False


def run_row(
    z: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    codes: Codes,
) -> Tensor:
    """y (rows, cols) from z (rows, cols); draws the seed when the chain drops and none is given."""
    if seed is None and codes[5]:
        seed = draw_seed(z.device)
    if _composite(z):
        return reference.row(z, epilogue_of(codes), bias, norm_weight, norm_bias, residual, seed)
    z = contiguous_rows(z)
    if residual is not None:
        residual = contiguous_rows(residual)
    if _needs_gradient(z, norm_weight, norm_bias, bias, residual):
        return RowFunction.apply(z, bias, norm_weight, norm_bias, residual, seed, codes)
    return ops.row_forward(z, bias, norm_weight, norm_bias, residual, seed, *codes)[0]


def run_linear_row(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    codes: Codes,
) -> Tensor:
    """y (rows, N) from x (rows, K) and weight (N, K)."""
    if seed is None and codes[5]:
        seed = draw_seed(x.device)
    if _composite(x):
        z = F.linear(x, weight, bias)
        return reference.row(z, epilogue_of(codes), None, norm_weight, norm_bias, residual, seed)
    if residual is not None:
        residual = contiguous_rows(residual)
    if _needs_gradient(weight, x, bias, norm_weight, norm_bias, residual):
        return LinearRowFunction.apply(
            x, weight, bias, norm_weight, norm_bias, residual, seed, codes
        )
    z = torch.mm(x, weight.t())
    if not z.is_cpu or torch.compiler.is_compiling():
        return ops.row_forward(z, bias, norm_weight, norm_bias, residual, seed, *codes)[0]
    ops.row_forward_(z, bias, norm_weight, norm_bias, residual, seed, *codes)
    return z


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast gives a matrix product on this device; None where it is off."""
    if device_type not in _AUTOCAST_DEVICES or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def linear_chain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    codes: Codes,
) -> Tensor:
    """`run_linear_row` for x of any rank, with eager's dtypes under autocast."""
    shape = x.shape
    cast = autocast_dtype(x.device.type)
    if cast is not None:
        x, weight = x.to(cast), weight.to(cast)
        bias = None if bias is None else bias.to(cast)
        norm = codes[0]
        if x.device.type == "cuda" and norm:
            # Eager's norm reads z in float32 there and returns float32.
            z = F.linear(x, weight, bias).float()
            return chain(z, 1, norm_weight, norm_bias, residual, seed, codes)
    if len(shape) == 2:
        if residual is not None and residual.dtype != x.dtype:
            return residual + run_linear_row(
                x, weight, bias, norm_weight, norm_bias, None, seed, codes
            )
        return run_linear_row(x, weight, bias, norm_weight, norm_bias, residual, seed, codes)
    out = (*shape[:-1], weight.shape[0])
    if residual is not None:
        residual = residual.reshape(-1, weight.shape[0])
    x = x.reshape(-1, shape[-1])
    return linear_chain(x, weight, bias, norm_weight, norm_bias, residual, seed, codes).view(out)


def chain(
    z: Tensor,
    normalized_dims: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    codes: Codes,
) -> Tensor:
    """`run_row` for z of any rank; a row is the last `normalized_dims` dimensions."""
    if residual is not None and residual.dtype != z.dtype:
        return residual + chain(z, normalized_dims, norm_weight, norm_bias, None, seed, codes)
    shape = z.shape
    if len(shape) == 2 and normalized_dims == 1:
        return run_row(z, None, norm_weight, norm_bias, residual, seed, codes)
    cols = math.prod(shape[len(shape) - normalized_dims :])
    rows = math.prod(shape[: len(shape) - normalized_dims])
    if residual is not None:
        residual = residual.reshape(rows, cols)
    if normalized_dims > 1:
        norm_weight = None if norm_weight is None else norm_weight.reshape(cols)
        norm_bias = None if norm_bias is None else norm_bias.reshape(cols)
    z = z.reshape(rows, cols)
    return run_row(z, None, norm_weight, norm_bias, residual, seed, codes).view(shape)


# ---- public functions: checks ----


def _check_float(name: str, operation: str, t: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{operation}: {name} must be a tensor, got {type(t).__name__}")
    if not t.is_floating_point():
        raise TypeError(
            f"{operation}: {name} must be floating point, got "
            f"{str(t.dtype).removeprefix('torch.')}; convert it, for example with .float()"
        )


def _check_parameter(
    operation: str, name: str, t: Tensor | None, shape: tuple[int, ...], like: Tensor
) -> None:
    if t is None:
        return
    _check_float(name, operation, t)
    if tuple(t.shape) != shape:
        raise ValueError(f"{operation}: {name} must be {shape}, got {tuple(t.shape)}")
    if t.device != like.device:
        raise ValueError(
            f"{operation}: all tensors must be on one device; the input is on {like.device}, "
            f"{name} on {t.device}"
        )


def _check_scale_dtype(operation: str, name: str, t: Tensor | None, dtype: torch.dtype) -> None:
    if t is not None and t.dtype != dtype and t.dtype not in _SCALE_DTYPES:
        raise TypeError(
            f"{operation}: {name} must have the input's dtype ({dtype}) or float32, got {t.dtype}"
        )


def _checked_seed(operation: str, seed: int | Tensor | None, device: torch.device) -> Tensor | None:
    if seed is None:
        return None
    if isinstance(seed, Tensor):
        if seed.numel() != 1 or seed.dtype != torch.int64:
            raise ValueError(
                f"{operation}: seed must be an int64 tensor of one element, got "
                f"{tuple(seed.shape)} {seed.dtype}"
            )
        if seed.device != device:
            raise ValueError(f"{operation}: seed must be on {device}, got {seed.device}")
        return seed.reshape(1)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"{operation}: seed must be an int or a tensor, got {type(seed).__name__}")
    wrapped = (seed + (1 << 63)) % (1 << 64) - (1 << 63)
    return torch.tensor([wrapped], device=device)


def _checked_probability(operation: str, p: Any) -> float:
    if not isinstance(p, (int, float)):
        raise TypeError(f"{operation}: p must be a number, got {type(p).__name__}")
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{operation}: dropout probability has to be between 0 and 1, but got {p}")
    return float(p)


def _checked_codes(
    norm: str | None,
    eps: float | None,
    dtype: torch.dtype,
    activation: str | None,
    p: float,
    parameters: dict[str, float],
) -> Codes:
    return make_codes(
        norm, default_eps(norm, eps, dtype), activation, p, tuple(sorted(parameters.items()))
    )


def linear_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float | None = None,
    activation: str | None = None,
    p: float = 0.0,
    training: bool = True,
    seed: int | Tensor | None = None,
    residual: Tensor | None = None,
    **activation_parameters: float,
) -> Tensor:
    """Linear, norm, activation and dropout as one operation.

        y = residual + dropout(activation(norm(x · weightᵀ + bias)))

    Args:
        x: (..., K), floating point.
        weight: (N, K), as nn.Linear holds it.
        bias: (N,) or None.
        norm: "layer", "rms" (both over the N features) or None.
        norm_weight, norm_bias: (N,) or None.
        eps: added to the variance; torch's default where None.
        activation: a name of `fused.spec.ACTIVATIONS`, or None.
        p: dropout probability; acts when `training` is true.
        seed: the dropout seed, an int or an int64 tensor of one element; drawn from torch's
            generator where None.
        residual: (..., N) or None, added last.
        **activation_parameters: negative_slope, alpha, beta, threshold, as torch names them.

    Returns:
        (..., N), in the dtype that nn.Sequential of the same layers gives.

    Raises:
        ValueError: shapes or devices that do not match, unknown names, p outside [0, 1].
        TypeError: dtypes that are not floating point or do not match.
    """
    operation = "linear_norm_act"
    _check_float("x", operation, x)
    _check_float("weight", operation, weight)
    if weight.dim() != 2:
        raise ValueError(f"{operation}: weight must be (N, K), got {tuple(weight.shape)}")
    features, inputs = weight.shape
    if x.dim() < 1 or x.shape[-1] != inputs:
        expected = x.shape[-1] if x.dim() else "K"
        raise ValueError(
            f"{operation}: weight must be (N, {expected}) to match x {tuple(x.shape)}, "
            f"got {tuple(weight.shape)}"
        )
    shape = (features,)
    _check_parameter(operation, "weight", weight, (features, inputs), x)
    _check_parameter(operation, "bias", bias, shape, x)
    _check_parameter(operation, "norm_weight", norm_weight, shape, x)
    _check_parameter(operation, "norm_bias", norm_bias, shape, x)
    cast = autocast_dtype(x.device.type)
    if cast is None:
        for name, t in (("weight", weight), ("bias", bias)):
            if t is not None and t.dtype != x.dtype:
                raise TypeError(
                    f"{operation}: {name} must have the dtype of x ({x.dtype}), got {t.dtype}; "
                    "convert one of them, or use torch.autocast"
                )
    dtype = cast or x.dtype
    _check_scale_dtype(operation, "norm_weight", norm_weight, dtype)
    _check_scale_dtype(operation, "norm_bias", norm_bias, dtype)
    _check_norm_parameters(operation, norm, norm_weight, norm_bias)
    if residual is not None:
        _check_parameter(operation, "residual", residual, (*x.shape[:-1], features), x)
    p = _checked_probability(operation, p) if training else 0.0
    codes = _checked_codes(norm, eps, dtype, activation, p, activation_parameters)
    seed_tensor = _checked_seed(operation, seed, x.device)
    norm_weight = None if norm_weight is None else norm_weight.contiguous()
    norm_bias = None if norm_bias is None else norm_bias.contiguous()
    bias = None if bias is None else bias.contiguous()
    return linear_chain(x, weight, bias, norm_weight, norm_bias, residual, seed_tensor, codes)


def _check_norm_parameters(
    operation: str, norm: str | None, norm_weight: Tensor | None, norm_bias: Tensor | None
) -> None:
    if norm is None and (norm_weight is not None or norm_bias is not None):
        raise ValueError(f"{operation}: norm_weight and norm_bias need a norm; norm is None")


def norm_act(
    z: Tensor,
    *,
    norm: str | None = None,
    normalized_shape: int | Sequence[int] | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float | None = None,
    activation: str | None = None,
    p: float = 0.0,
    training: bool = True,
    seed: int | Tensor | None = None,
    residual: Tensor | None = None,
    **activation_parameters: float,
) -> Tensor:
    """Norm, activation and dropout as one operation.

        y = residual + dropout(activation(norm(z)))

    Args:
        z: (..., *normalized_shape), floating point.
        norm: "layer", "rms" or None.
        normalized_shape: the trailing dimensions that are normalised together; the shape of
            `norm_weight`, else the last dimension, where None.
        norm_weight, norm_bias: of shape normalized_shape, or None.
        eps, activation, p, training, seed, **activation_parameters: as in `linear_norm_act`. The
            dropout mask is laid along the normalised dimensions.
        residual: of z's shape, or None, added last.

    Returns:
        of z's shape, in the dtype that nn.Sequential of the same layers gives.

    Raises:
        ValueError, TypeError: as `linear_norm_act`.
    """
    operation = "norm_act"
    _check_float("z", operation, z)
    if normalized_shape is None:
        shape = tuple(norm_weight.shape) if norm_weight is not None else tuple(z.shape[-1:])
    elif isinstance(normalized_shape, int):
        shape = (normalized_shape,)
    else:
        shape = tuple(normalized_shape)
    if z.dim() < 1 or not shape or tuple(z.shape[z.dim() - len(shape) :]) != shape:
        raise ValueError(
            f"{operation}: z must be (..., {', '.join(map(str, shape))}), got {tuple(z.shape)}"
        )
    _check_parameter(operation, "norm_weight", norm_weight, shape, z)
    _check_parameter(operation, "norm_bias", norm_bias, shape, z)
    _check_scale_dtype(operation, "norm_weight", norm_weight, z.dtype)
    _check_scale_dtype(operation, "norm_bias", norm_bias, z.dtype)
    _check_norm_parameters(operation, norm, norm_weight, norm_bias)
    if residual is not None:
        _check_parameter(operation, "residual", residual, tuple(z.shape), z)
    p = _checked_probability(operation, p) if training else 0.0
    codes = _checked_codes(norm, eps, z.dtype, activation, p, activation_parameters)
    seed_tensor = _checked_seed(operation, seed, z.device)
    norm_weight = None if norm_weight is None else norm_weight.contiguous()
    norm_bias = None if norm_bias is None else norm_bias.contiguous()
    if norm in _CUDA_AUTOCAST_FLOAT32 and z.is_cuda and torch.is_autocast_enabled("cuda"):
        z = z.float()
    return chain(z, len(shape), norm_weight, norm_bias, residual, seed_tensor, codes)


def dropout_mask(rows: int, cols: int, p: float, seed: int | Tensor) -> Tensor:
    """The keep mask that every backend applies to a (rows, cols) tensor under a seed.

    Args:
        rows, cols: the view of the tensor that the mask is laid over.
        p: dropout probability; the realised one is round(p · 65536) / 65536.
        seed: an int or an int64 tensor of one element.

    Returns:
        (rows, cols), bool, on the seed's device: True where the element is kept.

    Raises:
        ValueError: negative sizes, p outside [0, 1], a seed of the wrong shape or dtype.
    """
    operation = "dropout_mask"
    if rows < 0 or cols < 0:
        raise ValueError(f"{operation}: rows and cols must not be negative, got ({rows}, {cols})")
    p = _checked_probability(operation, p)
    device = seed.device if isinstance(seed, Tensor) else torch.device("cpu")
    seed_tensor = _checked_seed(operation, seed, device)
    if seed_tensor is None:
        raise TypeError(f"{operation}: a seed is needed")
    return _dropout_mask(rows, cols, p, seed_tensor)
