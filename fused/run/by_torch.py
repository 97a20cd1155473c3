"""CPU inputs so small that only the host's work counts: the chain by torch's own operators.

An autograd node written in Python costs more than torch's whole chain does there (8 × 64 float32,
LayerNorm → ReLU, forward and backward: 53 µs against 44 µs by `python -m bench.costs`; AMD EPYC
9004, November 2026). The operators are called one after another, without their modules. They
serve chains without dropout and activations that torch computes fast, up to the numbers of elements
below; the kernel is faster for all others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.backend import request
from ..spec import ACTIVATIONS, GATED_ACTIVATIONS, Spec
from . import reference
from .running import ChannelNorm

_FAST = (None, "relu", "relu6", "leaky_relu", "sigmoid", "silu", "hardswish")
_FAIR = ("elu", "selu", "gelu_tanh", "mish", "tanh", "softplus")
# 0 where the kernel always serves, as it does behind a norm for all gates but glu, which is one
# operator in torch.
LIMITS: dict[str | None, int] = dict.fromkeys((*ACTIVATIONS, *GATED_ACTIVATIONS), 0)
LIMITS |= dict.fromkeys(_FAST, 1 << 14) | dict.fromkeys(_FAIR, 1 << 11) | {"glu": 1 << 13}
LARGEST = max(LIMITS.values())
# Without a norm the kernel saves less: one pass over the output. (Linear → ReLU, forward and
# backward, 256 × 256 float32: 0.77 of eager's speed by the kernel, 0.93 so; level at 512 × 1024.
# Linear → gate by `python -m bench.costs`, 64 × 128: 0.75 for glu, 0.84 to 0.91 for the others;
# level between 32768 and more than 524288 elements. November 2026.)
WITHOUT_NORM = {name: 32 * limit for name, limit in LIMITS.items()}
WITHOUT_NORM |= {"swiglu": 1 << 15, "geglu": 1 << 15, "geglu_tanh": 1 << 14, "reglu": 1 << 16}
# Where no gradient is needed one operator call is saved, and only where there is no norm.
_INFERENCE_LIMIT = 1 << 12
_GATE_LIMIT = 1 << 16


def serves_row(spec: Spec, elements: int, x: Tensor, gradient: bool, linear: bool) -> bool:
    """Whether `row` serves a chain without dropout whose norm's input has so many elements.

    torch's RMSNorm is several operators. A backend that is asked for by its name is used. Must not
    be called while compiling: the sizes would become guards, and the compiler cannot read the
    request.
    """
    if spec.norm == "rms":
        return False
    if not gradient and (spec.norm is not None or spec.gated or not linear):
        return False
    limit = (WITHOUT_NORM if spec.norm is None else LIMITS)[spec.activation]
    most = limit if gradient else min(limit, _INFERENCE_LIMIT)
    return elements <= most and x.is_cpu and request.get() == "auto"


def serves_gate(spec: Spec, elements: int, x: Tensor) -> bool:
    """Whether torch's operators gate one tensor by another, of so many elements together.

    Must not be called while compiling, as `serves_row`. (128 × 128 float32: 0.5 of eager's speed
    forward by the kernel, 0.7 with backward; level at 192 to 256.)
    """
    limit = min(WITHOUT_NORM[spec.activation], _GATE_LIMIT)
    return not spec.threshold and elements <= limit and x.is_cpu and request.get() == "auto"


def row(
    z: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    spec: Spec,
    shortcut: Tensor | None = None,
) -> Tensor:
    """`reference.row` without dropout."""
    if spec.norm is not None:
        z = torch.layer_norm(z, z.shape[-1:], norm_weight, norm_bias, spec.eps)
    return activate(z if shortcut is None else z + shortcut, residual, spec)


def serves_channel(
    spec: Spec, elements: int, x: Tensor, channel_dim: int, norm: ChannelNorm
) -> bool:
    """Whether `normalize`, and then `row` or `activate`, runs an output of so many elements, with
    or without gradient. torch updates the running statistics; the momentum must be a number.

    torch mixes few dtypes, and its norms differ in what they make of no elements.
    """
    if (
        not 0 < elements <= LIMITS[spec.activation]
        or norm.name is None
        or norm.virtual_batch_size is not None
        or norm.across
        or (norm.momentum is None and norm.running_mean is not None)
        or not x.is_cpu
        or request.get() != "auto"
        or x.dim() < 2
        or (channel_dim == -1 and x.dim() > 2)
    ):
        return False
    held = (norm.weight, norm.bias, norm.mean, norm.variance, norm.running_mean, norm.running_var)
    if any(t is not None and t.dtype != x.dtype for t in held):
        return False
    if spec.threshold:
        # The mask must be laid as the operator lays it: in memory order.
        plain = x.is_contiguous() and (x.dim() == 2 or x.shape[2:].numel() > 1)
        return plain and not spec.channel_dropout
    return True


def normalize(x: Tensor, norm: ChannelNorm, eps: float) -> Tensor:
    """norm(x) with channels in dimension 1."""
    constant = norm.mean is not None
    running = (norm.mean, norm.variance) if constant else (norm.running_mean, norm.running_var)
    parameters = norm.weight, norm.bias
    if norm.name == "group":
        return torch.group_norm(x, norm.groups, *parameters, eps, False)
    normalize = torch.batch_norm if norm.name == "batch" else torch.instance_norm
    return normalize(x, *parameters, *running, not constant, norm.momentum or 0.0, eps, False)


def activate(h: Tensor, residual: Tensor | None, spec: Spec) -> Tensor:
    """residual + activation(h)."""
    y = reference.activate(h, spec.activation, spec.alpha, spec.beta)
    return y if residual is None else residual + y
