"""The raw operators: schemas and fake kernels.

The C++ implementations register themselves when the extension is loaded (csrc/row.cpp and
csrc/channel.cpp), those for CUDA tensors in backend.py. The operators are opaque to torch.compile
and know nothing of autograd (autograd.py does).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launchers import LINEAR_PLACES, PLACES
from .spec import NORM_NAMES, is_gated

# Which sums over the rows `row_backward` makes.
WANT_NORM_WEIGHT, WANT_NORM_BIAS, WANT_BIAS = 1, 2, 4
# Statistics of a row by the norm's code: none, layer, rms.
STATISTICS_OF = (0, 2, 1)

_library = torch.library.Library("fused_lnad", "DEF")

# statistics is (2, rows) for layer (mean, rstd), (1, rows) for rms (rstd), (0, rows) without norm.
# wanted is a sum of the WANT_ constants; a sum over the rows that is not wanted comes back empty.
# dbias may be wanted without bias: z then contains it already. A gated activation halves the
# columns: z and the parameters have 2N of them, residual, y and dy have N, over which the mask
# lies; row_forward_ does not take one.
_PARAMETERS = "Tensor? bias, Tensor? norm_weight, Tensor? norm_bias"
_SCALARS = "int norm, float eps, int activation, float alpha, float beta, int threshold"
_library.define(
    f"row_forward(Tensor z, {_PARAMETERS}, Tensor? residual, Tensor? seed, {_SCALARS})"
    " -> (Tensor y, Tensor statistics)"
)
_library.define(
    f"row_forward_(Tensor(a!) z, {_PARAMETERS}, Tensor? residual, Tensor? seed, {_SCALARS}) -> ()"
)
_library.define(
    f"row_backward(Tensor dy, Tensor z, {_PARAMETERS}, Tensor statistics, Tensor? seed, int wanted,"
    f" {_SCALARS}) -> (Tensor dz, Tensor dnorm_weight, Tensor dnorm_bias, Tensor dbias)"
)

# The same from a Linear's input on, z = x · weightᵀ + bias, for CUDA tensors alone and where
# gemm.py has a kernel for it. z comes back empty, (0,), unless save_z.
_library.define(
    f"linear_row_forward(Tensor x, Tensor weight, {_PARAMETERS}, Tensor? residual, Tensor? seed,"
    f" bool save_z, {_SCALARS}) -> (Tensor y, Tensor z, Tensor statistics)"
)

# The channel operators take contiguous z: (samples, channels, positions), or with channels_last
# (samples, positions, channels). mean and variance (biased) are (samples, groups) for group and
# instance norm, (1, channels) for batch norm; None without a norm. mask (samples, positions), bool,
# needs channels_last: positions where it is false take no part in statistics, gradients and sums,
# and come out as zero. count is (samples,), for batch norm (1,): the elements behind each
# statistic; empty (as an argument None) where the shape says it, which is without mask.
# channel_dropout lays the mask of dropout over (samples, channels).
_CHANNEL_PARAMETERS = "Tensor? norm_weight, Tensor? norm_bias"
_CHANNEL_SCALARS = (
    "int norm, int groups, bool channels_last, float eps, int activation, float alpha, float beta,"
    " int threshold, bool channel_dropout"
)
_library.define(
    "channel_statistics(Tensor z, Tensor? mask, int norm, int groups, bool channels_last)"
    " -> (Tensor mean, Tensor variance, Tensor count)"
)
_library.define(
    f"channel_forward(Tensor z, {_CHANNEL_PARAMETERS}, Tensor? residual, Tensor? mask,"
    f" Tensor? seed, {_CHANNEL_SCALARS})"
    " -> (Tensor y, Tensor mean, Tensor variance, Tensor count)"
)
_APPLY = (
    f"Tensor? mean, Tensor? variance, {_CHANNEL_PARAMETERS}, Tensor? residual, Tensor? mask,"
    f" Tensor? seed, {_CHANNEL_SCALARS}"
)
_library.define(f"channel_apply(Tensor z, {_APPLY}) -> Tensor y")
_library.define(f"channel_apply_(Tensor(a!) z, {_APPLY}) -> ()")
# constant: mean and variance do not depend on z (evaluation). dbias is the gradient of a bias (one
# per channel) that z contains already, in z's dtype; zero where the norm takes it out again. Group
# norm does not offer it.
_library.define(
    "channel_backward(Tensor dy, Tensor z, Tensor? mean, Tensor? variance, Tensor? count,"
    f" {_CHANNEL_PARAMETERS}, Tensor? mask, Tensor? seed, int wanted, bool constant,"
    f" {_CHANNEL_SCALARS})"
    " -> (Tensor dz, Tensor dnorm_weight, Tensor dnorm_bias, Tensor dbias)"
)
# The two halves of batch norm's backward, between which processes add up sums and count: sums is
# (2, channels), of g and of g · x̂, where g is the gradient of the norm's output.
_library.define(
    f"channel_sums(Tensor dy, Tensor z, Tensor mean, Tensor variance, {_CHANNEL_PARAMETERS},"
    f" Tensor? mask, Tensor? seed, {_CHANNEL_SCALARS}) -> Tensor sums"
)
_library.define(
    "channel_gradient(Tensor dy, Tensor z, Tensor mean, Tensor variance, Tensor sums, Tensor count,"
    f" {_CHANNEL_PARAMETERS}, Tensor? mask, Tensor? seed, {_CHANNEL_SCALARS}) -> Tensor dz"
)
# From a Linear's input on, as linear_row_forward; channels_last alone, without mask.
_library.define(
    f"linear_channel_forward(Tensor x, Tensor weight, {_PARAMETERS}, Tensor? residual,"
    f" Tensor? seed, bool save_z, {_CHANNEL_SCALARS})"
    " -> (Tensor y, Tensor z, Tensor mean, Tensor variance)"
)


def _statistics_dtype(z: Tensor) -> torch.dtype:
    return torch.float64 if z.dtype == torch.float64 else torch.float32


@torch.library.register_fake("fused_lnad::row_forward")
def _(z, bias, norm_weight, norm_bias, residual, seed, norm, eps, activation, alpha, beta, t):
    rows, cols = z.shape
    statistics = z.new_empty((STATISTICS_OF[norm], rows), dtype=_statistics_dtype(z))
    return z.new_empty((rows, cols // 2 if is_gated(activation) else cols)), statistics


def _empty_outputs(x: Tensor, weight: Tensor, save_z: bool) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape if save_z else (0,))


@torch.library.register_fake("fused_lnad::linear_row_forward")
def _(x, weight, bias, norm_weight, norm_bias, residual, seed, save_z, norm, *scalars):
    statistics = x.new_empty((STATISTICS_OF[norm], x.shape[0]), dtype=torch.float32)
    return *_empty_outputs(x, weight, save_z), statistics


@torch.library.register_fake("fused_lnad::linear_channel_forward")
def _(x, weight, bias, norm_weight, norm_bias, residual, seed, save_z, norm, groups, *scalars):
    mean, variance, _count = _empty_statistics(x, None, norm, groups)
    return *_empty_outputs(x, weight, save_z), mean, variance


@torch.library.register_fake("fused_lnad::row_forward_")
def _(z, bias, norm_weight, norm_bias, residual, seed, norm, eps, activation, alpha, beta, t):
    return None


@torch.library.register_fake("fused_lnad::row_backward")
def _(dy, z, bias, norm_weight, norm_bias, statistics, seed, wanted, norm, eps, act, a, b, t):
    def gradient(parameter: Tensor | None, bit: int) -> Tensor:
        if parameter is None or not wanted & bit:
            return z.new_empty((0,), dtype=_statistics_dtype(z))
        return parameter.new_empty((z.shape[1],))

    return (
        z.new_empty(z.shape),
        gradient(norm_weight if norm else None, WANT_NORM_WEIGHT),
        gradient(norm_bias if norm else None, WANT_NORM_BIAS),
        gradient(z, WANT_BIAS),
    )


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
    *scalars,
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
    )


@torch.library.register_fake("fused_lnad::channel_sums")
def _(dy, z, mean, variance, norm_weight, norm_bias, mask, seed, norm, groups, channels_last, *s):
    return z.new_empty((2, _channels(z, channels_last)), dtype=_statistics_dtype(z))


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
linear_row_forward = torch.ops.fused_lnad.linear_row_forward.default
linear_channel_forward = torch.ops.fused_lnad.linear_channel_forward.default
channel_statistics = torch.ops.fused_lnad.channel_statistics.default
channel_forward = torch.ops.fused_lnad.channel_forward.default
channel_apply = torch.ops.fused_lnad.channel_apply.default
channel_apply_ = torch.ops.fused_lnad.channel_apply_.default
channel_backward = torch.ops.fused_lnad.channel_backward.default
channel_sums = torch.ops.fused_lnad.channel_sums.default
channel_gradient = torch.ops.fused_lnad.channel_gradient.default
