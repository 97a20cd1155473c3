"""CPU inputs so small that only the host's work counts: the chain by torch's own operators.

An autograd node written in Python costs more than torch's whole chain does there (8 × 64 float32,
LayerNorm → ReLU, forward and backward: 53 µs against 44 µs by `python -m bench.costs`; AMD EPYC
9004, November 2026). The operators are
called one after another, without their modules. That is for chains without dropout and for the
activations that torch computes fast, up to these numbers of elements; others are faster by the
kernel at any size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .autograd import Codes
from .backend import request
from .running import ChannelNorm
from .spec import ACTIVATION_CODES, ACTIVATION_NAMES, GATED_CODES

_FAST = (None, "relu", "relu6", "leaky_relu", "sigmoid", "silu", "hardswish")
_FAIR = ("elu", "selu", "gelu_tanh", "mish", "tanh", "softplus")
# By the activation's code; 0 where the kernel always serves, as it does behind a norm for all gates
# but glu, which is one operator in torch.
LIMITS = [0] * (len(ACTIVATION_CODES) + len(GATED_CODES))
for _name in _FAST:
    LIMITS[ACTIVATION_CODES[_name]] = 1 << 14
for _name in _FAIR:
    LIMITS[ACTIVATION_CODES[_name]] = 1 << 11
LIMITS[GATED_CODES["glu"]] = 1 << 13
# Without a norm the kernel saves less: one pass over the output. (Linear → ReLU, forward and
# backward, 256 × 256 float32: 0.77 of eager's speed by the kernel, 0.93 so; level at 512 × 1024.
# Linear → gate by `python -m bench.costs`, 64 × 128: 0.75 for glu, 0.84 to 0.91 for the others;
# level between 32768 and more than 524288 elements. November 2026.)
WITHOUT_NORM = [32 * limit for limit in LIMITS]
_GATED = {"swiglu": 1 << 15, "geglu": 1 << 15, "geglu_tanh": 1 << 14, "reglu": 1 << 16}
for _name, _limit in _GATED.items():
    WITHOUT_NORM[GATED_CODES[_name]] = _limit
_RMS = 2
_INFERENCE_LIMIT = 1 << 12


def is_small(elements: int, z: Tensor, codes: Codes) -> bool:
    """Whether `row` serves an output of so many elements, where a gradient is needed.

    torch's RMSNorm is several operators, and its dropout has another mask. Whoever asks for a
    backend by its name gets it. Not to be asked while compiling: the sizes would become guards, and
    the compiler cannot read the request.
    """
    return (
        elements <= (LIMITS if codes[0] else WITHOUT_NORM)[codes[2]]
        and not codes[5]
        and codes[0] != _RMS
        and z.is_cpu
        and request.get() == "auto"
    )


def is_small_inference(elements: int, z: Tensor, codes: Codes) -> bool:
    """The same where none is: then one operator call is saved, and only where there is no norm."""
    return codes[0] == 0 and elements <= _INFERENCE_LIMIT and is_small(elements, z, codes)


def is_small_channel(elements: int, z: Tensor, norm: ChannelNorm, codes: Codes) -> bool:
    """Whether `normalize_channels` serves an output of so many elements, gradient or not.

    It sees to the running statistics too, by a momentum that is a number.
    """
    return (
        norm.name is not None
        and elements <= LIMITS[codes[2]]
        and norm.virtual_batch_size is None
        and not norm.across
        and (norm.momentum is not None or norm.running_mean is None)
        and z.is_cpu
        and request.get() == "auto"
    )


def normalize_channels(x: Tensor, norm: ChannelNorm, eps: float) -> Tensor:
    """norm(x) with channels in dimension 1."""
    constant = norm.mean is not None
    running = (norm.mean, norm.variance) if constant else (norm.running_mean, norm.running_var)
    parameters = norm.weight, norm.bias
    if norm.name == "group":
        return torch.group_norm(x, norm.groups, *parameters, eps, False)
    normalize = torch.batch_norm if norm.name == "batch" else torch.instance_norm
    return normalize(x, *parameters, *running, not constant, norm.momentum or 0.0, eps, False)


def activate(h: Tensor, residual: Tensor | None, codes: Codes) -> Tensor:
    """residual + activation(h)."""
    y = reference.activate(h, ACTIVATION_NAMES[codes[2]], codes[3], codes[4])
    return y if residual is None else residual + y


def row(
    z: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    codes: Codes,
) -> Tensor:
    """residual + activation(norm(z)) over (rows, cols), as `reference.row` gives it."""
    norm, eps, activation, alpha, beta, _ = codes
    if norm:
        z = torch.layer_norm(z, z.shape[-1:], norm_weight, norm_bias, eps)
    y = reference.activate(z, ACTIVATION_NAMES[activation], alpha, beta)
    return y if residual is None else residual + y
