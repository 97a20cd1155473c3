"""Linear and batch or group norm as one operator, where gemm.py says that there is one."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import gemm, ops
from .autograd import Codes
from .dispatch import needs_gradient
from .linear import LinearChannelFunction
from .random import draw_seed
from .recording import composite
from .running import ChannelNorm, update_running
from .spec import is_gated


def serves_linear_channel(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    channel_dim: int,
    norm: ChannelNorm,
    codes: Codes,
    options: dict[str, Any],
) -> bool:
    """Whether `run_linear_channel` takes these arguments of channel.py's function of that name."""
    residual = options.get("residual")
    if (
        norm.name not in ("batch", "group")
        or norm.mean is not None
        or norm.across
        or norm.virtual_batch_size is not None
        or options.get("mask") is not None
        or options.get("channel_dropout", False)
        # Group norm has one position for each sample; more are not neighbours of one row.
        or not (x.dim() == 2 or (channel_dim == -1 and x.dim() > 2 and norm.name == "batch"))
        or x.numel() == 0
        or is_gated(codes[2])
        or (residual is not None and residual.dtype != x.dtype)
        or torch.is_autocast_enabled(x.device.type)
        or composite(x)
    ):
        return False
    # Frozen weights stay torch's: with them nn.Linear does not keep x.
    if not weight.requires_grad and needs_gradient(x, bias, norm.weight, norm.bias, residual):
        return False
    return gemm.serves_channel(_rows(x), weight, codes[0], norm.groups)


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def run_linear_channel(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: ChannelNorm,
    codes: Codes,
    *,
    residual: Tensor | None = None,
    seed: Tensor | None = None,
    **unused: Any,
) -> Tensor:
    """residual + dropout(activation(norm(x · weightᵀ + bias))), and the running statistics."""
    out = (*x.shape[:-1], weight.shape[0])
    x = _rows(x)
    rows, channels = x.shape[0], weight.shape[0]
    if seed is None and codes[5]:
        seed = draw_seed(x.device)
    if residual is not None:
        residual = residual.reshape(rows, channels).contiguous()
        if residual is x:  # the compiler takes no tensor twice
            residual = residual.view_as(residual)
    groups = norm.groups if norm.name == "group" else channels
    scalars = (codes[0], groups, True, *codes[1:], False)
    inputs = (x, weight, bias, norm.weight, norm.bias, residual, seed)
    learns = norm.running_mean is not None
    if needs_gradient(*inputs):
        found = LinearChannelFunction.apply(*inputs, scalars, learns)
        y, *statistics = found if learns else (found,)
    else:
        y, _, *statistics = ops.linear_channel_forward(*inputs, False, *scalars)
    if learns:
        mean, variance = statistics
        update_running(norm, rows, mean, variance, mean.new_empty(0))
    return y.view(out)
