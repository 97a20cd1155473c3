"""The chain as functions: the only place that checks what a user passed (by checks.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .modules.jagged import on_jagged_values
from .run.autocast import autocast_dtype, float32_under_autocast
from .run.checks import (
    after_cast,
    check_float,
    check_keywords,
    check_mask,
    check_norm_parameters,
    check_parameter,
    check_scale_dtype,
    checked_channel_norm,
    checked_output_shape,
    checked_probability,
    checked_seed,
    checked_shape,
    checked_spec,
    contiguous,
)
from .run.prepare import run
from .run.random import dropout_mask as _dropout_mask
from .spec import CHANNEL_NORMS, activation_name, norm_name
from .sublayers import add_norm, gate

__all__ = ["add_norm", "dropout_mask", "gate", "linear_norm_act", "norm_act"]


@on_jagged_values("x")
def linear_norm_act(  # noqa: PLR0913  torch's names, each an argument
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float | None = None,
    num_groups: int | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    momentum: float = 0.1,
    virtual_batch_size: int | None = None,
    process_group: Any = None,
    activation: str | None = None,
    p: float = 0.0,
    channel_dropout: bool = False,
    training: bool = True,
    use_input_stats: bool | None = None,
    seed: int | Tensor | None = None,
    residual: Tensor | None = None,
    shortcut: Tensor | None = None,
    mask: Tensor | None = None,
    **activation_parameters: float,
) -> Tensor:
    """Linear, norm, activation and dropout as one operation.

        y = residual + dropout(activation(norm(x · weightᵀ + bias) + shortcut))

    Args:
        x: (..., K), floating point; or a jagged nested tensor (B, ragged, K), not for group and
            instance norm.
        weight: (N, K), as nn.Linear holds it.
        bias: (N,) or None.
        norm: "layer", "rms" (both over the N features), "batch" (each feature over all else),
            "instance" (each feature of a sample, over its positions), "group" (groups of features
            of a sample, over its positions) or None. The first dimension is the samples, those
            between are positions.
        norm_weight, norm_bias: (N,) or None.
        eps: added to the variance; torch's default where None.
        num_groups: of group norm.
        running_mean, running_var: (N,) or None, of batch or instance norm: updated when `training`
            is true, else used instead of the statistics of x.
        momentum: the weight of new statistics in the running ones.
        virtual_batch_size: batch norm over parts of at most this many samples.
        process_group: batch norm over all processes of a torch.distributed group.
        activation: a name of `fused.activations()`, in any case, or None. A gated one
            halves the features behind the norm: those of residual and result are N / 2.
        p: dropout probability; acts when `training` is true.
        use_input_stats: whether batch or instance norm takes (and learns) the statistics of x, as
            when `training` is true, or the running ones; None: what `training` says. False with
            `training` is a frozen norm behind which dropout acts.
        channel_dropout: whole features of a sample are dropped, over all its positions.
        seed: the dropout seed, an int or an int64 tensor of one element; drawn from torch's
            generator where None.
        residual: of the result's shape or None, added last.
        shortcut: (..., N) or None, added to the norm's result in front of the activation; a second
            operation where a gate follows, or where its dtype is not that of x.
        mask: (...), bool, or None: positions where it is false (padding) take no part in
            statistics and come out as zero.
        **activation_parameters: negative_slope, alpha, beta, threshold, as torch names them.

    Returns:
        (..., N), or (..., N / 2), in the dtype that nn.Sequential of the same layers gives.

    Raises:
        ValueError: shapes or devices that do not match, unknown names, p outside [0, 1], too few
            values for statistics.
        TypeError: dtypes that are not floating point or do not match.
    """
    operation = "linear_norm_act"
    check_keywords(operation, activation_parameters, linear_norm_act)
    norm, activation = norm_name(norm), activation_name(activation)
    check_float("x", operation, x)
    check_float("weight", operation, weight)
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
    check_parameter(operation, "weight", weight, (features, inputs), x)
    check_parameter(operation, "bias", bias, shape, x)
    check_parameter(operation, "norm_weight", norm_weight, shape, x)
    check_parameter(operation, "norm_bias", norm_bias, shape, x)
    cast = autocast_dtype(x.device.type)
    dtype = after_cast(x, cast)
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and after_cast(t, cast) != dtype:
            also = ", or use torch.autocast" if cast is None else ""
            raise TypeError(
                f"{operation}: {name} must have the dtype of x ({x.dtype}), got {t.dtype}; "
                f"convert one of them{also}"
            )
    if float32_under_autocast(x.device.type, dtype, norm):
        dtype = torch.float32
    check_scale_dtype(operation, "norm_weight", norm_weight, dtype)
    check_scale_dtype(operation, "norm_bias", norm_bias, dtype)
    check_norm_parameters(operation, norm, norm_weight, norm_bias)
    out = (*x.shape[:-1], features)
    p = checked_probability(operation, p) * bool(training)
    spec = checked_spec(operation, norm, eps, dtype, activation, p, activation_parameters)
    spec = spec._replace(channel_dropout=channel_dropout)
    result = checked_output_shape(operation, out, -1, spec)
    if residual is not None:
        check_parameter(operation, "residual", residual, result, x)
    check_parameter(operation, "shortcut", shortcut, out, x)
    if mask is not None:
        check_mask(operation, mask, x, -1)
    seed_tensor = checked_seed(operation, seed, x.device)
    norm_weight, norm_bias, bias = map(contiguous, (norm_weight, norm_bias, bias))
    running, parts = (running_mean, running_var, momentum), (virtual_batch_size, process_group)
    given = (norm_weight, norm_bias), num_groups, running, parts, training, use_input_stats
    state = checked_channel_norm(operation, norm, out, -1, x, *given)
    affine, rest = (norm_weight, norm_bias), (residual, mask, seed_tensor)
    return run(spec, x, weight, bias, *affine, *rest, norm=state, shortcut=shortcut)


@on_jagged_values("z")
def norm_act(  # noqa: PLR0913
    z: Tensor,
    *,
    norm: str | None = None,
    normalized_shape: int | Sequence[int] | None = None,
    channel_dim: int = 1,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float | None = None,
    num_groups: int | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    momentum: float = 0.1,
    virtual_batch_size: int | None = None,
    process_group: Any = None,
    activation: str | None = None,
    p: float = 0.0,
    channel_dropout: bool = False,
    training: bool = True,
    use_input_stats: bool | None = None,
    seed: int | Tensor | None = None,
    residual: Tensor | None = None,
    shortcut: Tensor | None = None,
    mask: Tensor | None = None,
    **activation_parameters: float,
) -> Tensor:
    """Norm, activation and dropout as one operation.

        y = residual + dropout(activation(norm(z) + shortcut))

    Args:
        z: (..., *normalized_shape) for layer and rms norm, else (N, C, ...) or, with channel_dim
            -1, (N, ..., C); floating point. Or a jagged nested tensor, not for group and instance
            norm.
        norm: "layer", "rms", "batch", "group", "instance" or None.
        normalized_shape: for layer and rms norm, the trailing dimensions that are normalised
            together; the shape of `norm_weight`, else the last dimension, where None.
        channel_dim: where the channels of the other norms, and of `channel_dropout`, are: 1 as in
            torch, or -1.
        norm_weight, norm_bias: of shape normalized_shape or (C,), or None.
        eps, num_groups, running_mean, running_var, momentum, virtual_batch_size, process_group,
        activation, p, channel_dropout, training, use_input_stats, seed, **activation_parameters:
            as in `linear_norm_act`. The dropout mask is laid along the normalised dimensions, or in
            memory order. A gated activation halves the channels of batch, group and instance norm,
            else the last dimension.
        residual: of the result's shape, or None, added last.
        shortcut: of z's shape, or None, as in `linear_norm_act`: that of a ResNet's block.
        mask: z's shape without the last dimension, as in `linear_norm_act`; for batch, group and
            instance norm with channel_dim -1 alone.

    Returns:
        of z's shape, behind a gate with half the features, in the dtype that nn.Sequential of the
        same layers gives.

    Raises:
        ValueError, TypeError: as `linear_norm_act`.
    """
    operation = "norm_act"
    check_keywords(operation, activation_parameters, norm_act)
    norm, activation = norm_name(norm), activation_name(activation)
    check_float("z", operation, z)
    channelwise = norm in CHANNEL_NORMS
    shape = checked_shape(operation, z, channelwise, channel_dim, normalized_shape, norm_weight)
    check_parameter(operation, "norm_weight", norm_weight, shape, z)
    check_parameter(operation, "norm_bias", norm_bias, shape, z)
    widened = float32_under_autocast(z.device.type, z.dtype, norm)
    dtype = torch.float32 if widened else z.dtype
    check_scale_dtype(operation, "norm_weight", norm_weight, dtype)
    check_scale_dtype(operation, "norm_bias", norm_bias, dtype)
    check_norm_parameters(operation, norm, norm_weight, norm_bias)
    p = checked_probability(operation, p) * bool(training)
    spec = checked_spec(operation, norm, eps, z.dtype, activation, p, activation_parameters)
    spec = spec._replace(channel_dropout=channel_dropout)
    features = channel_dim if channelwise else -1
    result = checked_output_shape(operation, tuple(z.shape), features, spec)
    if residual is not None:
        check_parameter(operation, "residual", residual, result, z)
    check_parameter(operation, "shortcut", shortcut, tuple(z.shape), z)
    if mask is not None:
        check_mask(operation, mask, z, features)
    seed_tensor = checked_seed(operation, seed, z.device)
    norm_weight, norm_bias = contiguous(norm_weight), contiguous(norm_bias)
    running, parts = (running_mean, running_var, momentum), (virtual_batch_size, process_group)
    given = (norm_weight, norm_bias), num_groups, running, parts, training, use_input_stats
    state = checked_channel_norm(operation, norm, tuple(z.shape), channel_dim, z, *given)
    affine, rest = (norm_weight, norm_bias), (residual, mask, seed_tensor)
    where: dict[str, Any] = {"channel_dim": channel_dim, "normalized_dims": len(shape)}
    return run(spec, z, None, None, *affine, *rest, norm=state, shortcut=shortcut, **where)


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
    p = checked_probability(operation, p)
    device = seed.device if isinstance(seed, Tensor) else torch.device("cpu")
    seed_tensor = checked_seed(operation, seed, device)
    if seed_tensor is None:
        raise TypeError(f"{operation}: a seed is needed")
    return _dropout_mask(rows, cols, p, seed_tensor)
