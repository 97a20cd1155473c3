"""How a chain with checked arguments runs: as one operator, or as plain torch operators.

`linear_chain` and `chain` take inputs of any rank and follow autocast; `run_linear_row` and
`run_row` take (rows, features) and choose; `apply_linear_row` and `apply_row` call the operator,
through autograd where a gradient is needed.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from . import gemm, ops, reference, small
from .autocast import autocast_dtype, cast_by_autocast, float32_under_autocast
from .autograd import Codes, RowFunction, contiguous_rows, epilogue_of
from .linear import LinearRowFunction
from .random import draw_seed
from .recording import composite, is_compiling
from .spec import is_gated, make_epilogue


def make_codes(
    norm: str | None,
    eps: float,
    activation: str | None,
    p: float,
    parameters: tuple[tuple[str, float], ...] = (),
) -> Codes:
    """The operators' scalars for one chain; raises as `spec.make_epilogue` does."""
    # The compiler warns of caches, and a symbol belongs to one graph.
    symbolic = isinstance(eps, torch.SymFloat) or isinstance(p, torch.SymFloat)
    make = _cached_codes.__wrapped__ if symbolic or is_compiling() else _cached_codes
    return make(norm, eps, activation, p, parameters)


@lru_cache(maxsize=4096)
def _cached_codes(
    norm: str | None,
    eps: float,
    activation: str | None,
    p: float,
    parameters: tuple[tuple[str, float], ...],
) -> Codes:
    return make_epilogue(norm, eps, activation, p, parameters).codes


def default_eps(norm: str | None, eps: float | None, dtype: torch.dtype) -> float:
    """torch's default: 1e-5 for layer; for rms the epsilon of the dtype that it computes in."""
    if eps is not None:
        return eps
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    return float(torch.finfo(compute).eps) if norm == "rms" else 1e-5


def norm_alone(codes: Codes) -> Codes:
    """The scalars of the norm, without what follows it."""
    return (*codes[:2], 0, 0.0, 0.0, 0)


def without_norm(codes: Codes) -> Codes:
    """The scalars of what follows the norm."""
    return (0, 0.0, *codes[2:])


def output_features(features: int, codes: Codes) -> int:
    """The features of a chain's result, from those of its norm's input."""
    return features // 2 if is_gated(codes[2]) else features


def needs_gradient(*tensors: Tensor | None) -> bool:
    for t in tensors:
        if t is not None and t.requires_grad:
            return torch.is_grad_enabled()
    return False


def run_row(
    z: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    codes: Codes,
) -> Tensor:
    """y (rows, cols) from z (rows, cols); draws the seed when the chain drops and none is given."""
    if seed is None and codes[5]:
        seed = draw_seed(z.device)
    if composite(z):
        return reference.row(z, epilogue_of(codes), None, norm_weight, norm_bias, residual, seed)
    return apply_row(z, norm_weight, norm_bias, residual, seed, codes)


def apply_row(
    z: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    codes: Codes,
) -> Tensor:
    """`run_row` by the operator, where that is known to serve; needs the seed."""
    if needs_gradient(z, norm_weight, norm_bias, residual):
        if not is_compiling() and small.is_small(z.numel(), z, codes):
            return small.row(z, norm_weight, norm_bias, residual, codes)
        z = contiguous_rows(z)
        if residual is not None:
            residual = contiguous_rows(residual)
            if residual is z:  # the compiler takes no tensor twice
                residual = residual.view_as(residual)
        return RowFunction.apply(z, None, norm_weight, norm_bias, residual, seed, codes)
    z = contiguous_rows(z)
    if residual is not None:
        residual = contiguous_rows(residual)
    return ops.row_forward(z, None, norm_weight, norm_bias, residual, seed, *codes)[0]


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
    """y (rows, N) from x (rows, K) and weight (N, K), or (2N, K) before a gated activation."""
    if seed is None and codes[5]:
        seed = draw_seed(x.device)
    if composite(x):
        z = F.linear(x, weight, bias)
        return reference.row(z, epilogue_of(codes), None, norm_weight, norm_bias, residual, seed)
    return apply_linear_row(x, weight, bias, norm_weight, norm_bias, residual, seed, codes)


def apply_linear_row(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    codes: Codes,
) -> Tensor:
    """`run_linear_row` by the operator, where that is known to serve; needs the seed."""
    if residual is not None:
        residual = contiguous_rows(residual)
    gated = is_gated(codes[2])
    if gemm.enabled and not gated and gemm.serves_row(x, weight, codes[0]):
        others = (bias, norm_weight, norm_bias, residual)
        # Frozen weights stay torch's: with them nn.Linear does not keep x.
        if weight.requires_grad or not needs_gradient(x, *others):
            return _apply_linear_row(x, weight, *others, seed, codes)
    elements = x.shape[0] * weight.shape[0]
    if needs_gradient(weight, x, bias, norm_weight, norm_bias, residual):
        if not is_compiling() and small.is_small(elements, x, codes):
            z = F.linear(x, weight, bias)
            return small.row(z, norm_weight, norm_bias, residual, codes)
        if bias is not None and bias.requires_grad:
            # The gradient of the bias comes with those of the norm, without another pass over dz.
            z = F.linear(x, weight, bias.detach())
        else:
            z, bias = F.linear(x, weight, bias), None
        return RowFunction.apply(z, bias, norm_weight, norm_bias, residual, seed, codes)
    z = F.linear(x, weight, bias)
    if gated or is_compiling():
        return ops.row_forward(z, None, norm_weight, norm_bias, residual, seed, *codes)[0]
    if small.is_small_inference(elements, z, codes):
        return small.row(z, norm_weight, norm_bias, residual, codes)
    ops.row_forward_(z, None, norm_weight, norm_bias, residual, seed, *codes)
    return z


def _apply_linear_row(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    codes: Codes,
) -> Tensor:
    """The same as one operator from x on, where gemm.py says that there is one."""
    if residual is x:  # the compiler takes no tensor twice
        residual = x.view_as(x)
    inputs = (x, weight, bias, norm_weight, norm_bias, residual, seed)
    if needs_gradient(*inputs):
        return LinearRowFunction.apply(*inputs, codes)
    return ops.linear_row_forward(*inputs, False, *codes)[0]


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
        x, weight = cast_by_autocast(x, cast), cast_by_autocast(weight, cast)
        bias = None if bias is None else cast_by_autocast(bias, cast)
        if float32_under_autocast(x.device.type, x.dtype, bool(codes[0]), codes[2]):
            z = F.linear(x, weight, bias)
            return chain(z, 1, norm_weight, norm_bias, residual, seed, codes)
    if len(shape) == 2:
        if residual is not None and residual.dtype != x.dtype:
            return residual + run_linear_row(
                x, weight, bias, norm_weight, norm_bias, None, seed, codes
            )
        return run_linear_row(x, weight, bias, norm_weight, norm_bias, residual, seed, codes)
    features = output_features(weight.shape[0], codes)
    out = (*shape[:-1], features)
    rows = math.prod(shape[:-1])  # not -1, which is ambiguous where there are no features
    if residual is not None:
        residual = residual.reshape(rows, features)
    x = x.reshape(rows, shape[-1])
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
    """`run_row` for z of any rank; a row is the last `normalized_dims` dimensions.

    A gated activation halves the last dimension, and is a second operation if a row is several.
    """
    if float32_under_autocast(z.device.type, z.dtype, bool(codes[0]), codes[2]):
        z = z.float()
    if residual is not None and residual.dtype != z.dtype:
        return residual + chain(z, normalized_dims, norm_weight, norm_bias, None, seed, codes)
    shape = z.shape
    if len(shape) == 2 and normalized_dims == 1:
        return run_row(z, norm_weight, norm_bias, residual, seed, codes)
    if normalized_dims > 1 and is_gated(codes[2]):
        z = chain(z, normalized_dims, norm_weight, norm_bias, None, None, norm_alone(codes))
        return chain(z, 1, None, None, residual, seed, without_norm(codes))
    cols = math.prod(shape[len(shape) - normalized_dims :])
    rows = math.prod(shape[: len(shape) - normalized_dims])
    if residual is not None:
        residual = residual.reshape(rows, output_features(cols, codes))
    if normalized_dims > 1:
        norm_weight = None if norm_weight is None else norm_weight.reshape(cols)
        norm_bias = None if norm_bias is None else norm_bias.reshape(cols)
    z = z.reshape(rows, cols)
    out = (*shape[:-1], output_features(shape[-1], codes))
    return run_row(z, norm_weight, norm_bias, residual, seed, codes).view(out)
