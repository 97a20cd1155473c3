"""Norm and dropout modules for channels in any dimension, beside torch's own.

torch's BatchNorm1d, GroupNorm and InstanceNorm1d take channels in dimension 1. After a Linear on
sequences the channels are the last dimension, batch norm also exists over parts of a batch and over
several processes, and padded positions have to be left out. Parameters, buffers and state_dict are
those of torch's classes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ..run.checks import check_mask, few_values
from ..run.prepare import run
from ..run.running import ChannelNorm
from ..spec import CHANNEL_NORMS, NORMS, make_spec

NORM_CLASSES: dict[type, str] = {c: name for name in CHANNEL_NORMS for c in NORMS[name]}


def channel_norm(module: Any, name: str) -> ChannelNorm:
    """The norm as the module's forward would take it now."""
    parameters, buffers = module._parameters, module._buffers
    weight, bias = parameters["weight"], parameters["bias"]
    if name == "group":
        return ChannelNorm(name, module.num_groups, weight, bias)
    norm = ChannelNorm(name, 1, weight, bias, momentum=module.momentum)
    running_mean, running_var = buffers["running_mean"], buffers["running_var"]
    tracks = module.track_running_stats
    if name == "instance":
        norm.momentum = norm.momentum or 0.0
        own = module.training or not tracks
    else:
        norm.virtual_batch_size = getattr(module, "virtual_batch_size", None)
        own = module.training or (running_mean is None and running_var is None)
        kind = type(module)
        if kind is nn.SyncBatchNorm or getattr(module, "process_group", None) is not None:
            # Only what is learned from is shared: not the statistics of an evaluation.
            norm.across, norm.group = module.training, module.process_group
    if not own:
        norm.mean, norm.variance = running_mean, running_var
    elif name == "instance" or (module.training and tracks):
        norm.running_mean, norm.running_var = running_mean, running_var
        if name == "batch":
            norm.batches = buffers["num_batches_tracked"]
    return norm


def _forward(module: Any, name: str, x: Tensor, mask: Tensor | None) -> Tensor:
    """The module's own forward: the norm by itself."""
    operation, dim = type(module).__name__, module.channel_dim
    channels = module.num_channels if name == "group" else module.num_features
    least = 1 if dim == -1 else 2
    if x.dim() < least or x.shape[dim] != channels:
        where = f"(..., {channels})" if dim == -1 else f"(N, {channels}, ...)"
        raise ValueError(f"{operation}: the input must be {where}, got {tuple(x.shape)}")
    if mask is not None:
        check_mask(operation, mask, x, dim)
    norm = channel_norm(module, name)
    reason = few_values(norm, tuple(x.shape), dim)
    if reason:
        raise ValueError(reason)
    return run(make_spec(name, module.eps), x, norm=norm, channel_dim=dim, mask=mask)


class BatchNorm(_BatchNorm):
    """Batch norm (Ioffe and Szegedy, 2015) of channels in dimension 1 or in the last.

    Args:
        num_features: the number of channels.
        eps, momentum, affine, track_running_stats: as of `torch.nn.BatchNorm1d`.
        channel_dim: 1, or -1 for the last dimension.
        virtual_batch_size: statistics are those of parts of the batch, of at most this many samples
            and as torch.chunk makes them (ghost batches: Hoffer et al., 2017); None: of all of it.
        process_group: the processes whose batches count as one (torch.distributed.group.WORLD: all
            of them); None: this one alone.

    Shape:
        x (N, C, ...) or (..., C) to the same; mask (...), bool, with channels last: positions where
        it is false take no part and come out as zero.

    Raises:
        ValueError: another number of channels; one value per channel in training.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        channel_dim: int = 1,
        virtual_batch_size: int | None = None,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        self.channel_dim = _checked_dim(channel_dim)
        if virtual_batch_size is not None and virtual_batch_size < 1:
            raise ValueError(f"virtual_batch_size must be at least 1, got {virtual_batch_size}")
        if virtual_batch_size is not None and process_group is not None:
            raise ValueError(
                "virtual_batch_size makes statistics of parts of a batch and process_group of"
                " several batches; pass one of them"
            )
        self.virtual_batch_size = virtual_batch_size
        self.process_group = process_group

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        return _forward(self, "batch", input, mask)

    def extra_repr(self) -> str:
        more = f", channel_dim={self.channel_dim}"
        if self.virtual_batch_size is not None:
            more += f", virtual_batch_size={self.virtual_batch_size}"
        return super().extra_repr() + more


class GroupNorm(nn.GroupNorm):
    """Group norm (Wu and He, 2018) of channels in dimension 1 or in the last.

    Args:
        num_groups, num_channels, eps, affine: as of `torch.nn.GroupNorm`.
        channel_dim: 1, or -1 for the last dimension.

    Shape:
        x (N, C, ...) or (N, ..., C) to the same; mask as in `BatchNorm`.

    Raises:
        ValueError: num_channels is not a multiple of num_groups; another number of channels.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        channel_dim: int = 1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        self.channel_dim = _checked_dim(channel_dim)

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        return _forward(self, "group", input, mask)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, channel_dim={self.channel_dim}"


class InstanceNorm(_InstanceNorm):
    """Instance norm (Ulyanov et al., 2016) of channels in dimension 1 or in the last.

    Args:
        num_features, eps, momentum, affine, track_running_stats: as of `torch.nn.InstanceNorm1d`.
        channel_dim: 1, or -1 for the last dimension.

    Shape:
        x (N, C, ...) or (N, ..., C) to the same, with a batch dimension; mask as in `BatchNorm`.

    Raises:
        ValueError: another number of channels; one position per sample.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        *,
        channel_dim: int = 1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        self.channel_dim = _checked_dim(channel_dim)

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        return _forward(self, "instance", input, mask)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, channel_dim={self.channel_dim}"


class ChannelDropout(nn.Module):
    """Dropout of whole channels of a sample (Tompson et al., 2015), in dimension 1 or the last.

    Args:
        p: the probability that a channel is dropped.
        channel_dim: 1, or -1 for the last dimension.

    Shape:
        x (N, C, ...) or (N, ..., C) to the same.

    Raises:
        ValueError: p outside [0, 1].
    """

    def __init__(self, p: float = 0.5, channel_dim: int = 1) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
        self.p = p
        self.channel_dim = _checked_dim(channel_dim)

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and self.p):
            return input
        spec = make_spec(p=self.p)._replace(channel_dropout=True)
        return run(spec, input, channel_dim=self.channel_dim)

    def extra_repr(self) -> str:
        return f"p={self.p}, channel_dim={self.channel_dim}"


# Those whose forward takes a mask.
MASKED_NORMS: dict[type, str] = {
    BatchNorm: "batch",
    GroupNorm: "group",
    InstanceNorm: "instance",
}
NORM_CLASSES |= MASKED_NORMS


def _checked_dim(channel_dim: int) -> int:
    if channel_dim not in (1, -1):
        raise ValueError(f"channel_dim must be 1 or -1, got {channel_dim}")
    return channel_dim
