"""A chain with checked arguments on its way to a kernel: what is decided once, before who runs it.

Autocast's casts, a residual of another dtype, the family (statistics along rows, or over samples
and positions), what is a second operation (a gate or dropout of channels that the kernels do not
have behind a norm), and the padding that a mask names. rows.py and channels.py take it from there.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.backend import choose
from ..spec import Spec
from .autocast import autocast_dtype, cast_by_autocast, float32_under_autocast
from .channels import channel
from .recording import composite, is_compiling
from .rows import row
from .running import ChannelNorm, count_batch

Parameters = tuple[Tensor | None, Tensor | None]  # weight and bias


def run(  # noqa: PLR0913  the chain's tensors, and where its dimensions are
    spec: Spec,
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    seed: Tensor | None = None,
    *,
    norm: ChannelNorm | None = None,
    channel_dim: int = -1,
    normalized_dims: int = 1,
    shortcut: Tensor | None = None,
) -> Tensor:
    """residual + dropout(activation(norm(z) + shortcut)), with eager's dtypes under autocast.

    Args:
        x: z, of any rank ≥ 1, or with weight (N, K) and bias (N,) z = x · weightᵀ + bias.
        norm_weight, norm_bias: of a norm along rows.
        residual: of the result's shape, or None.
        mask: bool, z's shape without its last dimension, or None: False positions take no part in
            statistics and come out as zero.
        seed: int64 (1,); drawn where the chain drops and None is given.
        norm: the state of a norm over samples or positions; None: the norm is along rows.
        channel_dim: 1 or -1, where the channels of `norm` and of channel dropout are.
        normalized_dims: how many trailing dimensions are a row.
        shortcut: of z's shape, or None.

    Returns:
        of z's shape; a gated activation halves the channels of `norm`, else the last dimension.
    """
    cast = autocast_dtype(x.device.type)
    if cast is not None and weight is not None:
        x, weight = cast_by_autocast(x, cast), cast_by_autocast(weight, cast)
        bias = None if bias is None else cast_by_autocast(bias, cast)
    if float32_under_autocast(x.device.type, x.dtype, spec.norm, spec.activation):
        x = (x if weight is None else F.linear(x, weight, bias)).float()
        weight = bias = None
    if shortcut is not None:
        if spec.activation is None and not spec.threshold and residual is None:
            shortcut, residual = None, shortcut
        elif not _takes_shortcut(spec, x, shortcut):
            # Two operations; the second sees the sum.
            affine: Any = {"norm_weight": norm_weight, "norm_bias": norm_bias, "mask": mask}
            where: Any = {"channel_dim": channel_dim, "normalized_dims": normalized_dims}
            h = run(spec.norm_alone, x, weight, bias, norm=norm, **affine, **where) + shortcut
            norm = None if norm is None else ChannelNorm()
            rest: Any = {"residual": residual, "mask": mask, "seed": seed, "norm": norm}
            return run(spec.without_norm, h, **rest, **where)
    added = None
    if residual is not None and residual.dtype != x.dtype:
        residual, added = None, residual
    if norm is None and spec.channel_dropout and spec.norm is None and not spec.gated:
        norm = ChannelNorm()  # there is only dropout of channels
    linear, affine, plain = (weight, bias), (norm_weight, norm_bias), composite(x)
    if norm is None:
        of_rows = (residual, seed, channel_dim, plain, normalized_dims, shortcut)
        y = _along_rows(spec, x, linear, affine, *of_rows)
    else:
        of_channels = (residual, mask, seed, channel_dim, plain, shortcut)
        y = _over_channels(spec, x, linear, norm, *of_channels)
        count_batch(norm)
    if added is not None:
        y = added + y
    # Padding must come out as zero; the channels' kernels have done that already.
    if mask is not None and (added is not None or norm is None or spec.gated):
        y = torch.where(mask.unsqueeze(-1), y, 0)
    return y


def _takes_shortcut(spec: Spec, x: Tensor, shortcut: Tensor) -> bool:
    """Whether a kernel adds it; CUDA C++ has none for it."""
    triton = not x.is_cuda or choose("cuda", x.dtype, x.get_device()) == "triton"
    return shortcut.dtype == x.dtype and not spec.gated and (triton or composite(x))


def _along_rows(
    spec: Spec,
    x: Tensor,
    linear: Parameters,
    affine: Parameters,
    residual: Tensor | None,
    seed: Tensor | None,
    channel_dim: int,
    plain: bool,
    normalized_dims: int,
    shortcut: Tensor | None = None,
) -> Tensor:
    """The chain of a norm along rows, or of none."""
    if spec.channel_dropout and spec.threshold:
        rest = spec._replace(threshold=0), x, linear, affine, None, None
        y = _along_rows(*rest, channel_dim, plain, normalized_dims, shortcut)
        return _drop_channels(spec, y, channel_dim, residual, seed, plain)
    if normalized_dims == 1:
        return row(spec, x, *linear, *affine, residual, seed, plain, shortcut)
    weight, bias = linear
    z = x if weight is None else F.linear(x, weight, bias)
    if spec.gated:
        norm = Spec(spec.norm, spec.eps), z, (None, None), affine, None, None
        z = _along_rows(*norm, channel_dim, plain, normalized_dims)
        return row(spec.without_norm, z, residual=residual, seed=seed, plain=plain)
    split = z.dim() - normalized_dims
    view = math.prod(z.shape[:split]), math.prod(z.shape[split:])
    scale, shift = (None if t is None else t.reshape(view[1]) for t in affine)
    residual = None if residual is None else residual.reshape(view)
    shortcut = None if shortcut is None else shortcut.reshape(view)
    y = row(spec, z.reshape(view), None, None, scale, shift, residual, seed, plain, shortcut)
    return y.view(z.shape)


def _over_channels(
    spec: Spec,
    x: Tensor,
    linear: Parameters,
    norm: ChannelNorm,
    residual: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    channel_dim: int,
    plain: bool,
    shortcut: Tensor | None = None,
) -> Tensor:
    """The chain of a norm over samples or positions, or of dropout of channels."""
    ways: Any = {"plain": plain, "eager": not plain and not is_compiling(x)}
    given = (channel_dim, norm, *linear)
    if not spec.gated:
        return channel(spec, x, *given, residual, mask, seed, **ways, shortcut=shortcut)
    h = channel(Spec(spec.norm, spec.eps), x, *given, mask=mask, **ways)
    spec = spec.without_norm
    if not (spec.channel_dropout and spec.threshold):
        return gate(spec, h, channel_dim, residual, seed)
    y = gate(spec._replace(threshold=0), h, channel_dim)
    return _drop_channels(spec, y, channel_dim, residual, seed, plain)


def _drop_channels(
    spec: Spec,
    y: Tensor,
    channel_dim: int,
    residual: Tensor | None,
    seed: Tensor | None,
    plain: bool,
) -> Tensor:
    """Dropout of channels as an operation of its own, and what is added after it."""
    spec = Spec(threshold=spec.threshold, channel_dropout=True)
    eager = not plain and not is_compiling(y)
    given = (channel_dim, ChannelNorm(), None, None, residual, None, seed)
    return channel(spec, y, *given, plain=plain, eager=eager, fresh=True)


def gate(
    spec: Spec,
    h: Tensor,
    dim: int,
    residual: Tensor | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """residual + dropout(activation(h)), gated along dimension `dim`, which is halved.

    The mask of dropout lies in memory order: along the last dimension where that is the gated one,
    or where it is so in memory (channels-last), else along all dimensions from `dim` on.
    """
    plain = composite(h)
    if dim in (-1, h.dim() - 1):
        return row(spec, h, residual=residual, seed=seed, plain=plain)
    last = h.movedim(dim, -1)
    if last.is_contiguous() and not h.is_contiguous():
        residual = None if residual is None else residual.movedim(dim, -1)
        return row(spec, last, residual=residual, seed=seed, plain=plain).movedim(-1, dim)
    shape = list(h.shape)
    shape[dim] //= 2
    residual = None if residual is None else residual.flatten(dim)
    return row(spec, h.flatten(dim), residual=residual, seed=seed, plain=plain).view(shape)
