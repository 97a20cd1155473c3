"""The chain as functions: the only place that checks what a user passed."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .autograd import Codes
from .dispatch import (
    autocast_dtype,
    chain,
    default_eps,
    float32_under_autocast,
    linear_chain,
    make_codes,
)
from .random import dropout_mask as _dropout_mask
from .spec import is_nan

__all__ = ["dropout_mask", "linear_norm_act", "norm_act"]

_HALF = (torch.bfloat16, torch.float16)


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
    wider = dtype in _HALF  # the parameters may be wider than a 16-bit input
    if t is not None and t.dtype != dtype and not (wider and t.dtype == torch.float32):
        also = " or float32" if wider else ""
        raise TypeError(
            f"{operation}: {name} must have the input's dtype ({dtype}){also}, got {t.dtype}"
        )


def check_residual(operation: str, residual: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """Raises unless the residual can be added to an output of this shape, on like's device."""
    _check_parameter(operation, "residual", residual, shape, like)


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
    if not isinstance(p, Real):
        raise TypeError(f"{operation}: p must be a number, got {type(p).__name__}")
    if not 0.0 <= float(p) <= 1.0:
        raise ValueError(f"{operation}: dropout probability has to be between 0 and 1, but got {p}")
    return float(p)


def _checked_codes(
    operation: str,
    norm: str | None,
    eps: float | None,
    dtype: torch.dtype,
    activation: str | None,
    p: float,
    parameters: dict[str, float],
) -> Codes:
    if eps is not None and not isinstance(eps, Real):
        raise TypeError(f"{operation}: eps must be a number, got {type(eps).__name__}")
    if eps is not None and is_nan(eps):
        raise ValueError(f"{operation}: eps must be a number, got {eps}")
    # The compiler warns of caches.
    make = make_codes.__wrapped__ if torch.compiler.is_dynamo_compiling() else make_codes
    return make(
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
    dtype = _after_cast(x, cast)
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and _after_cast(t, cast) != dtype:
            also = ", or use torch.autocast" if cast is None else ""
            raise TypeError(
                f"{operation}: {name} must have the dtype of x ({x.dtype}), got {t.dtype}; "
                f"convert one of them{also}"
            )
    if float32_under_autocast(x.device.type, dtype, norm is not None):
        dtype = torch.float32
    _check_scale_dtype(operation, "norm_weight", norm_weight, dtype)
    _check_scale_dtype(operation, "norm_bias", norm_bias, dtype)
    _check_norm_parameters(operation, norm, norm_weight, norm_bias)
    if residual is not None:
        _check_parameter(operation, "residual", residual, (*x.shape[:-1], features), x)
    p = _checked_probability(operation, p) * bool(training)
    codes = _checked_codes(operation, norm, eps, dtype, activation, p, activation_parameters)
    seed_tensor = _checked_seed(operation, seed, x.device)
    norm_weight = None if norm_weight is None else norm_weight.contiguous()
    norm_bias = None if norm_bias is None else norm_bias.contiguous()
    bias = None if bias is None else bias.contiguous()
    return linear_chain(x, weight, bias, norm_weight, norm_bias, residual, seed_tensor, codes)


def _after_cast(t: Tensor, cast: torch.dtype | None) -> torch.dtype:
    """The dtype in which autocast passes t to a matrix product; it never casts float64."""
    return t.dtype if cast is None or t.dtype == torch.float64 else cast


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
    widened = float32_under_autocast(z.device.type, z.dtype, norm is not None)
    dtype = torch.float32 if widened else z.dtype
    _check_scale_dtype(operation, "norm_weight", norm_weight, dtype)
    _check_scale_dtype(operation, "norm_bias", norm_bias, dtype)
    _check_norm_parameters(operation, norm, norm_weight, norm_bias)
    if residual is not None:
        _check_parameter(operation, "residual", residual, tuple(z.shape), z)
    p = _checked_probability(operation, p) * bool(training)
    codes = _checked_codes(operation, norm, eps, z.dtype, activation, p, activation_parameters)
    seed_tensor = _checked_seed(operation, seed, z.device)
    norm_weight = None if norm_weight is None else norm_weight.contiguous()
    norm_bias = None if norm_bias is None else norm_bias.contiguous()
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
