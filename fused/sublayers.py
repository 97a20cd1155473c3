"""Functions for what stands between the sublayers of a transformer; public in functional.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .run.add_norm import add_norm as run_add_norm
from .run.autocast import float32_under_autocast
from .run.checks import (
    check_float,
    check_parameter,
    check_scale_dtype,
    checked_probability,
    checked_seed,
    checked_spec,
    contiguous,
)
from .spec import ROW_NORMS, norm_name


def add_norm(
    x: Tensor,
    residual: Tensor,
    *,
    norm: str = "layer",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float | None = None,
    p: float = 0.0,
    training: bool = True,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Dropout, addition and norm as one operation, as a transformer's sublayer ends or begins.

        h = residual + dropout(x),  y = norm(h)

    Args:
        x: (..., N), floating point.
        residual: of x's shape.
        norm: "layer" or "rms", over the N features.
        norm_weight, norm_bias: (N,) or None.
        eps: added to the variance; torch's default where None.
        p: dropout probability; acts when `training` is true.
        seed: the dropout seed, an int or an int64 tensor of one element; drawn from torch's
            generator where None. The mask is `dropout_mask` over the rows of N features.

    Returns:
        y and h, each of x's shape, in the dtypes that eager gives. y is the norm of h as it is
        stored, so that it can be computed again from h.

    Raises:
        ValueError: another norm, p outside [0, 1], a tensor whose shape does not fit.
        TypeError: a tensor that is not floating point, or parameters of another dtype.
    """
    operation = "add_norm"
    name = norm_name(norm)
    if name not in ROW_NORMS:
        known = " or ".join(map(repr, ROW_NORMS))
        raise ValueError(f"{operation}: norm must be {known}, got {norm!r}")
    check_float("x", operation, x)
    if not x.dim():
        raise ValueError(f"{operation}: x must have a dimension of features, got a scalar")
    check_parameter(operation, "residual", residual, tuple(x.shape), x)
    check_parameter(operation, "norm_weight", norm_weight, tuple(x.shape[-1:]), x)
    check_parameter(operation, "norm_bias", norm_bias, tuple(x.shape[-1:]), x)
    dtype = torch.promote_types(x.dtype, residual.dtype)
    dtype = torch.float32 if float32_under_autocast(x.device.type, dtype, name) else dtype
    check_scale_dtype(operation, "norm_weight", norm_weight, dtype)
    check_scale_dtype(operation, "norm_bias", norm_bias, dtype)
    p = checked_probability(operation, p) * bool(training)
    spec = checked_spec(operation, name, eps, dtype, None, p, {})
    affine = contiguous(norm_weight), contiguous(norm_bias)
    return run_add_norm(
        spec, x, residual, None, None, *affine, checked_seed(operation, seed, x.device)
    )
