"""The raw operators: schemas and fake kernels.

The C++ implementations register themselves when the extension is loaded (extension.py), those for
CUDA tensors in backend.py. The operators are opaque to torch.compile and know nothing of autograd
(autograd.py does).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec import (
    NORM_NAMES,
    STATISTICS,
    WANT_BIAS,
    WANT_NORM_BIAS,
    WANT_NORM_WEIGHT,
    is_gated,
)
from . import extension as _extension  # noqa: F401  (it defines the operators)
from .launchers import LINEAR_PLACES, PLACES
from .schemas import SCHEMAS

_library = torch.library.Library("fused_lnad", "FRAGMENT")
for _name, _schema in SCHEMAS.items():
    if not hasattr(torch.ops.fused_lnad, _name):  # the extension is not loaded
        _library.define(_schema)


def _statistics_dtype(z: Tensor) -> torch.dtype:
    return torch.float64 if z.dtype == torch.float64 else torch.float32


@torch.library.register_fake("fused_lnad::row_forward")
def _(z, bias, norm_weight, norm_bias, residual, seed, norm, eps, activation, *rest):
    rows, cols = z.shape
    statistics = z.new_empty((STATISTICS[NORM_NAMES[norm]], rows), dtype=_statistics_dtype(z))
    return z.new_empty((rows, cols // 2 if is_gated(activation) else cols)), statistics


def _empty_outputs(x: Tensor, weight: Tensor, save_z: bool) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape if save_z else (0,))


@torch.library.register_fake("fused_lnad::linear_row_forward")
def _(x, weight, bias, norm_weight, norm_bias, residual, seed, save_z, norm, *scalars):
    statistics = x.new_empty((STATISTICS[NORM_NAMES[norm]], x.shape[0]), dtype=torch.float32)
    return *_empty_outputs(x, weight, save_z), statistics


@torch.library.register_fake("fused_lnad::linear_channel_forward")
def _(x, weight, bias, norm_weight, norm_bias, residual, seed, save_z, norm, groups, *scalars):
    mean, variance, _count = _empty_statistics(x, None, norm, groups)
    return *_empty_outputs(x, weight, save_z), mean, variance


@torch.library.register_fake("fused_lnad::row_forward_")
def _(z, *rest):
    return None


def _shortcut_gradient(z: Tensor, shortcut: Tensor | None, norm: int) -> Tensor:
    """Without a norm it is that of z."""
    return z.new_empty(z.shape if shortcut is not None and norm else (0,))


def _row_gradients(
    z: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, wanted: int
) -> tuple[Tensor, ...]:
    def gradient(parameter: Tensor | None, bit: int) -> Tensor:
        if parameter is None or not wanted & bit:
            return z.new_empty((0,), dtype=_statistics_dtype(z))
        return parameter.new_empty((z.shape[1],))

    return (
        z.new_empty(z.shape),
        gradient(norm_weight, WANT_NORM_WEIGHT),
        gradient(norm_bias, WANT_NORM_BIAS),
        gradient(z, WANT_BIAS),
    )


@torch.library.register_fake("fused_lnad::row_backward")
def _(dy, z, bias, weight, shift, statistics, seed, wanted, norm, eps, act, a, b, t, shortcut=None):
    found = _row_gradients(z, weight if norm else None, shift if norm else None, wanted)
    return *found, _shortcut_gradient(z, shortcut, norm)


@torch.library.register_fake("fused_lnad::add_norm_forward")
def _(x, residual, norm_weight, norm_bias, seed, norm, eps, threshold):
    statistics = x.new_empty((STATISTICS[NORM_NAMES[norm]], x.shape[0]), dtype=_statistics_dtype(x))
    return x.new_empty(x.shape), x.new_empty(x.shape), statistics


@torch.library.register_fake("fused_lnad::add_norm_backward")
def _(dy, dh, h, norm_weight, norm_bias, statistics, seed, wanted, norm, eps, threshold):
    dx = h.new_empty(h.shape if threshold else (0,))
    return dx, *_row_gradients(h, norm_weight, norm_bias, wanted)


@torch.library.register_fake("fused_lnad::gate_forward")
def _(value, gate, seed, activation, t):
    return value.new_empty(value.shape)


@torch.library.register_fake("fused_lnad::gate_backward")
def _(dy, value, gate, seed, activation, t, joined):
    rows, cols = value.shape
    if joined:
        return value.new_empty((rows, 2 * cols)), value.new_empty((0, cols))
    return value.new_empty((rows, cols)), value.new_empty((rows, cols))


def _channels(z: Tensor, channels_last: bool) -> int:
    return z.shape[2 if channels_last else 1]


def _empty_statistics(
    z: Tensor, mask: Tensor | None, norm: int, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _statistics_dtype(z)
    samples = 1 if NORM_NAMES[norm] == "batch" else z.shape[0]
    mean, variance = (z.new_empty((samples, groups), dtype=dtype) for _ in range(2))
    return mean, variance, z.new_empty((samples if mask is not None else 0,), dtype=dtype)


@torch.library.register_fake("fused_lnad::channel_statistics")
def _(z, mask, norm, groups, channels_last):
    return _empty_statistics(z, mask, norm, groups)


@torch.library.register_fake("fused_lnad::channel_forward")
def _(z, norm_weight, norm_bias, residual, mask, seed, norm, groups, channels_last, *scalars):
    return z.new_empty(z.shape), *_empty_statistics(z, mask, norm, groups)


@torch.library.register_fake("fused_lnad::channel_apply")
def _(z, *rest):
    return z.new_empty(z.shape)


@torch.library.register_fake("fused_lnad::channel_apply_")
def _(z, *rest):
    return None


@torch.library.register_fake("fused_lnad::channel_backward")
def _(
    dy,
    z,
    mean,
    variance,
    count,
    norm_weight,
    norm_bias,
    mask,
    seed,
    wanted,
    constant,
    norm,
    groups,
    channels_last,
    eps,
    activation,
    alpha,
    beta,
    threshold,
    channel_dropout,
    shortcut=None,
):
    def gradient(parameter: Tensor | None, bit: int) -> Tensor:
        if parameter is None or not wanted & bit:
            return z.new_empty((0,), dtype=_statistics_dtype(z))
        return parameter.new_empty((_channels(z, channels_last),))

    return (
        z.new_empty(z.shape),
        gradient(norm_weight if norm else None, WANT_NORM_WEIGHT),
        gradient(norm_bias if norm else None, WANT_NORM_BIAS),
        gradient(z, WANT_BIAS),
        _shortcut_gradient(z, shortcut, norm),
    )


@torch.library.register_fake("fused_lnad::channel_sums")
def _(dy, z, mean, variance, weight, bias, mask, seed, norm, groups, last, *rest):
    sums = z.new_empty((2, _channels(z, last)), dtype=_statistics_dtype(z))
    return sums, _shortcut_gradient(z, rest[6] if len(rest) > 6 else None, norm)


@torch.library.register_fake("fused_lnad::channel_gradient")
def _(dy, z, *rest):
    return z.new_empty(z.shape)


OPERATORS = tuple(PLACES)
GPU_OPERATORS = tuple(LINEAR_PLACES)  # those without a C++ implementation

# Differentiation is autograd.py's; without this, torch's fallback for operators that have none
# would look through the arguments at every call.
for _name in OPERATORS + GPU_OPERATORS:
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")

row_forward = torch.ops.fused_lnad.row_forward.default
row_forward_ = torch.ops.fused_lnad.row_forward_.default
row_backward = torch.ops.fused_lnad.row_backward.default
gate_forward = torch.ops.fused_lnad.gate_forward.default
gate_backward = torch.ops.fused_lnad.gate_backward.default
add_norm_forward = torch.ops.fused_lnad.add_norm_forward.default
add_norm_backward = torch.ops.fused_lnad.add_norm_backward.default
linear_row_forward = torch.ops.fused_lnad.linear_row_forward.default
linear_channel_forward = torch.ops.fused_lnad.linear_channel_forward.default
channel_statistics = torch.ops.fused_lnad.channel_statistics.default
channel_forward = torch.ops.fused_lnad.channel_forward.default
channel_apply = torch.ops.fused_lnad.channel_apply.default
channel_apply_ = torch.ops.fused_lnad.channel_apply_.default
channel_backward = torch.ops.fused_lnad.channel_backward.default
channel_sums = torch.ops.fused_lnad.channel_sums.default
channel_gradient = torch.ops.fused_lnad.channel_gradient.default
