"""Checks of what a user passed to the functions of functional.py; each raises one sentence."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from inspect import signature
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..spec import CHANNEL_NORMS, PARAMETER_NAMES, Spec, default_eps, is_nan, make_spec
from . import synchronize
from .running import ChannelNorm

_HALF = (torch.bfloat16, torch.float16)


def contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def check_keywords(operation: str, given: Iterable[str], function: Callable[..., Any]) -> None:
    """Names what neither the function nor any activation takes, and what may have been meant.

    Raises:
        TypeError: there is such a keyword.
    """
    if PARAMETER_NAMES.issuperset(given):
        return
    taken = [p.name for p in signature(function).parameters.values() if p.kind != p.VAR_KEYWORD]
    known = [*taken, *sorted(PARAMETER_NAMES)]
    for name in given:
        if name not in known:
            close = get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
            raise TypeError(f"{operation}: unknown argument {name!r}; {hint}")


def check_float(name: str, operation: str, t: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{operation}: {name} must be a tensor, got {type(t).__name__}")
    if not t.is_floating_point():
        raise TypeError(
            f"{operation}: {name} must be floating point, got "
            f"{str(t.dtype).removeprefix('torch.')}; convert it, for example with .float()"
        )


def check_parameter(
    operation: str, name: str, t: Tensor | None, shape: tuple[int, ...], like: Tensor
) -> None:
    if t is None:
        return
    check_float(name, operation, t)
    if tuple(t.shape) != shape:
        raise ValueError(f"{operation}: {name} must be {shape}, got {tuple(t.shape)}")
    if t.device != like.device:
        raise ValueError(
            f"{operation}: all tensors must be on one device; the input is on {like.device}, "
            f"{name} on {t.device}"
        )


def check_scale_dtype(operation: str, name: str, t: Tensor | None, dtype: torch.dtype) -> None:
    wider = dtype in _HALF  # the parameters may be wider than a 16-bit input
    if t is not None and t.dtype != dtype and not (wider and t.dtype == torch.float32):
        also = " or float32" if wider else ""
        raise TypeError(
            f"{operation}: {name} must have the input's dtype ({dtype}){also}, got {t.dtype}"
        )


def checked_output_shape(
    operation: str, shape: tuple[int, ...], dim: int, spec: Spec
) -> tuple[int, ...]:
    """The shape of a chain's result, from that of its norm's input; a gate halves dimension dim."""
    if not spec.gated:
        return shape
    if shape[dim] % 2:
        raise ValueError(
            f"{operation}: activation={spec.activation!r} halves the features; they must"
            f" be an even number, got {shape[dim]}"
        )
    halved = list(shape)
    halved[dim] //= 2
    return tuple(halved)


def checked_seed(operation: str, seed: int | Tensor | None, device: torch.device) -> Tensor | None:
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


def checked_probability(operation: str, p: Any) -> float:
    if not isinstance(p, Real):
        raise TypeError(f"{operation}: p must be a number, got {type(p).__name__}")
    if not 0.0 <= float(p) <= 1.0:
        raise ValueError(f"{operation}: dropout probability has to be between 0 and 1, but got {p}")
    return float(p)


def checked_spec(
    operation: str,
    norm: str | None,
    eps: float | None,
    dtype: torch.dtype,
    activation: str | None,
    p: float,
    parameters: dict[str, float],
) -> Spec:
    if eps is not None and not isinstance(eps, Real):
        raise TypeError(f"{operation}: eps must be a number, got {type(eps).__name__}")
    if eps is not None and is_nan(eps):
        raise ValueError(f"{operation}: eps must be a number, got {eps}")
    eps = default_eps(norm, eps, dtype)
    return make_spec(norm, eps, activation, p, tuple(sorted(parameters.items())))


def after_cast(t: Tensor, cast: torch.dtype | None) -> torch.dtype:
    """The dtype in which autocast passes t to a matrix product; it never casts float64."""
    return t.dtype if cast is None or t.dtype == torch.float64 else cast


def check_norm_parameters(
    operation: str, norm: str | None, norm_weight: Tensor | None, norm_bias: Tensor | None
) -> None:
    if norm is None and (norm_weight is not None or norm_bias is not None):
        raise ValueError(f"{operation}: norm_weight and norm_bias need a norm; norm is None")


def checked_shape(
    operation: str,
    z: Tensor,
    channelwise: bool,
    channel_dim: int,
    normalized_shape: int | Sequence[int] | None,
    norm_weight: Tensor | None,
) -> tuple[int, ...]:
    """The shape of the norm's parameters: the channels, or the trailing dimensions."""
    if channel_dim not in (1, -1) or (channelwise and z.dim() < (2 if channel_dim == 1 else 1)):
        raise ValueError(
            f"{operation}: channel_dim must be 1 or -1, and z must have it, got {channel_dim} for"
            f" {tuple(z.shape)}"
        )
    if channelwise:
        return (z.shape[channel_dim],)
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
    return shape


def checked_channel_norm(
    operation: str,
    norm: str | None,
    shape: tuple[int, ...],
    channel_dim: int,
    like: Tensor,
    affine: tuple[Tensor | None, Tensor | None],
    num_groups: int | None,
    running: tuple[Tensor | None, Tensor | None, float],
    parts: tuple[int | None, Any],
    training: bool,
    use_input_stats: bool | None,
) -> ChannelNorm | None:
    """The norm of an input of this shape, if over samples or positions; `like` has its device.

    Args:
        affine: norm_weight and norm_bias.
        running: running_mean, running_var and momentum.
        parts: virtual_batch_size and process_group.
        training: whether the statistics are those of the input where `use_input_stats` is None.
    """
    norm_weight, norm_bias = affine
    running_mean, running_var, momentum = running
    virtual_batch_size, process_group = parts
    if norm not in CHANNEL_NORMS:
        for name, value in (
            *(("num_groups", num_groups), ("running_mean", running_mean)),
            *(("running_var", running_var), ("virtual_batch_size", virtual_batch_size)),
            *(("process_group", process_group), ("use_input_stats", use_input_stats)),
        ):
            if value is not None:
                raise ValueError(f"{operation}: {name} does not belong to norm={norm!r}")
        return None
    channels = shape[channel_dim]
    for name, t in (
        *(("norm_weight", norm_weight), ("norm_bias", norm_bias)),
        *(("running_mean", running_mean), ("running_var", running_var)),
    ):
        check_parameter(operation, name, t, (channels,), like)
    if (running_mean is None) != (running_var is None):
        raise ValueError(f"{operation}: pass running_mean and running_var, or neither")
    if use_input_stats is False and running_mean is None:
        raise ValueError(f"{operation}: use_input_stats=False needs running_mean and running_var")
    training = training if use_input_stats is None else use_input_stats
    if running_mean is not None and norm == "group":
        raise ValueError(f"{operation}: group norm has no running statistics")
    if norm == "group":
        if not isinstance(num_groups, int) or num_groups < 1 or channels % num_groups:
            raise ValueError(
                f"{operation}: num_groups must divide the {channels} channels, got {num_groups}"
            )
    elif num_groups is not None:
        raise ValueError(f"{operation}: num_groups belongs to norm='group', not to {norm!r}")
    if norm != "batch" and (virtual_batch_size is not None or process_group is not None):
        raise ValueError(
            f"{operation}: virtual_batch_size and process_group belong to norm='batch', not to"
            f" {norm!r}"
        )
    if virtual_batch_size is not None and (virtual_batch_size < 1 or process_group is not None):
        raise ValueError(
            f"{operation}: virtual_batch_size must be at least 1, and without process_group"
        )
    if not isinstance(momentum, Real):
        raise TypeError(f"{operation}: momentum must be a number, got {type(momentum).__name__}")
    found = ChannelNorm(norm, num_groups or 1, momentum=float(momentum))
    found.weight, found.bias = contiguous(norm_weight), contiguous(norm_bias)
    if running_mean is not None and not training:
        found.mean, found.variance = running_mean, running_var
    else:
        found.running_mean, found.running_var = running_mean, running_var
        found.virtual_batch_size = virtual_batch_size
        found.across, found.group = process_group is not None and training, process_group
    reason = few_values(found, shape, channel_dim)
    if reason:
        raise ValueError(f"{operation}: {reason}")
    return found


def few_values(norm: ChannelNorm, shape: tuple[int, ...], channel_dim: int) -> str:
    """What torch says of an input that is too small for statistics; empty where it is not."""
    if norm.mean is not None:
        return ""
    channels = shape[channel_dim]
    samples = shape[0] if len(shape) > 1 else 1
    elements = math.prod(shape) // channels if channels else 0
    if norm.name == "group":
        elements *= channels // norm.groups
    if norm.name == "instance":
        positions = elements // samples if samples else 0
        if positions != 1:
            return ""
        return f"Expected more than 1 spatial element when training, got input size {shape}"
    if elements != 1 or (norm.across and synchronize.is_needed(norm.group)):
        return ""
    return f"Expected more than 1 value per channel when training, got input size {shape}"


def check_mask(operation: str, mask: Any, x: Tensor, channel_dim: int) -> None:
    """Raises unless mask says of each position of x, (..., channels), whether it is there.

    Raises:
        TypeError: it is no boolean tensor.
        ValueError: its shape is not x's without the channels, its device is another, or channels
            are not the last dimension.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{operation}: mask must be a boolean tensor, got {got}")
    if channel_dim != -1:
        raise ValueError(f"{operation}: mask needs channels in the last dimension (channel_dim=-1)")
    if mask.shape != x.shape[:-1]:
        raise ValueError(
            f"{operation}: mask must be {tuple(x.shape[:-1])}, got {tuple(mask.shape)}"
        )
    if mask.device != x.device:
        raise ValueError(f"{operation}: mask is on {mask.device}, the input on {x.device}")
