"""A chain with a norm over samples or positions, or with dropout of whole channels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from ..modules.norms import NORM_CLASSES, channel_norm
from ..run.channels import channel
from ..run.checks import few_values
from ..run.prepare import run
from ..run.recording import is_compiling
from ..run.running import ChannelNorm
from ..spec import Spec
from . import guard
from .chain import Chain
from .guard import CHANNEL_DROPOUTS

# The numbers of dimensions that a norm takes, the batch included; None: two or more.
_DIMENSIONS: dict[type, tuple[int, ...]] = {
    nn.BatchNorm1d: (2, 3),
    nn.BatchNorm2d: (4,),
    nn.BatchNorm3d: (5,),
    nn.InstanceNorm1d: (2, 3),
    nn.InstanceNorm2d: (3, 4),
    nn.InstanceNorm3d: (4, 5),
}
_BATCH_ATTRIBUTES = ("training", "eps", "momentum", "track_running_stats", "num_features")
_ATTRIBUTES = {
    "batch": _BATCH_ATTRIBUTES,
    "instance": (*_BATCH_ATTRIBUTES, "affine"),
    "group": ("eps", "num_groups", "num_channels"),
}


@dataclass
class ChannelChain(Chain):
    """A `Chain` whose norm is batch, group or instance norm, or whose dropout is of channels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.along_rows = False
        self.channel_norm = None if self.norm_name not in NORM_CLASSES.values() else self.norm
        self.drops_channels = type(self.dropout) in CHANNEL_DROPOUTS
        self.channel_dim = getattr(self.channel_norm, "channel_dim", 1)
        # Of how many dimensions an input is one sample; torch's InstanceNorm takes such.
        instance = self.norm_name == "instance"
        self.unbatched_rank = _DIMENSIONS.get(type(self.norm), (0,))[0] if instance else 0
        # Memory order does not matter: the layout is found for every input.
        self.alone = None if self.drops_channels else self.alone
        # Reads what may change about the norm; None without one.
        self.norm_values: Callable[[Any], Any] | None = None
        names = _ATTRIBUTES.get(self.norm_name or "")
        if names is not None:
            own = ("channel_dim", "virtual_batch_size", "process_group")
            more = (name for name in own if hasattr(self.channel_norm, name))
            self.norm_values = attrgetter(*names, *more)

    # ---- the guard ----

    def input_reason(self, x: Any) -> str:
        reason = super().input_reason(x)
        return reason or (guard.open_size_reason(x) if is_compiling(x) else "")

    def norm_reason(self, device: torch.device, dtype: torch.dtype) -> str:
        norm = self.channel_norm
        if norm is None:
            return super().norm_reason(device, dtype)
        dtypes = set()
        channels = norm.num_channels if self.norm_name == "group" else norm.num_features
        for name in ("weight", "bias"):
            reason = guard.parameter_reason(norm, name, device)
            t = None if reason else norm._parameters[name]
            if not reason and t is not None and tuple(t.shape) != (channels,):
                reason = f"its {name} is {tuple(t.shape)}, it normalises {channels} channels"
            if reason:
                return reason
            dtypes |= set() if t is None else {t.dtype}
        if self.norm_name != "group":
            reason = self._buffers_reason(device, channels, dtypes)
            if reason:
                return reason
        if norm.eps <= 0:
            return f"its eps is {norm.eps}"
        return guard.dtypes_reason(dtypes, device, dtype, self.norm_name)

    def _buffers_reason(self, device: torch.device, channels: int, dtypes: set[torch.dtype]) -> str:
        """Why the running statistics cannot be read or written; adds their dtypes."""
        norm = self.norm
        found = []
        for name in ("running_mean", "running_var"):
            reason = guard.buffer_reason(norm, name, device)
            if reason:
                return reason
            t = norm._buffers[name]
            found.append(t is not None)
            if t is not None:
                dtypes.add(t.dtype)
                if tuple(t.shape) != (channels,):
                    return f"its {name} is {tuple(t.shape)}, it normalises {channels} channels"
        if found[0] != found[1]:
            return "it has one of running_mean and running_var"
        if self.norm_name == "instance" and not norm.training and norm.track_running_stats:
            return "" if found[0] else "it has no running statistics to use"
        reason = guard.buffer_reason(norm, "num_batches_tracked", device)
        if not reason and norm._buffers["num_batches_tracked"] is None and norm.momentum is None:
            reason = "" if not found[0] else "it has no num_batches_tracked for momentum=None"
        return reason

    def shape_reason(self, shape: tuple[int, ...]) -> str:
        norm, rank = self.channel_norm, len(shape)
        if norm is None:
            reason = super().shape_reason(shape)
            return reason or self._dropout_reason(rank, None)
        kind, dim = type(norm), self.channel_dim
        least = 1 if dim == -1 else 2
        if rank not in _DIMENSIONS.get(kind, (rank,)) or rank < least:
            return f"{kind.__name__} does not take {rank} dimensions"
        if rank == self.unbatched_rank:
            shape = (1, *shape)
        channels = norm.num_channels if self.norm_name == "group" else norm.num_features
        if shape[dim] != channels:
            return f"the norm takes {channels} channels, its input is {shape}"
        state = channel_norm(norm, self.norm_name or "")
        return few_values(state, shape, dim) or self._dropout_reason(rank, dim)

    def gate_dim(self, rank: int) -> int:
        if self.channel_norm is None or self.channel_dim == -1:
            return rank - 1
        return 0 if rank == self.unbatched_rank else 1

    def _dropout_reason(self, rank: int, norm_dim: int | None) -> str:
        """Why the dropout is not of the channels that the norm has."""
        if not self.drops_channels:
            return ""
        kind, dim = type(self.dropout), getattr(self.dropout, "channel_dim", 1)
        takes = CHANNEL_DROPOUTS[kind]
        if rank != (takes or rank) or rank < 2:
            return f"{kind.__name__} takes other inputs than {rank} dimensions"
        if norm_dim is not None and dim != norm_dim and not (dim + norm_dim == 0 and rank == 2):
            return (
                f"{kind.__name__} drops along dimension {dim}, the norm's channels are {norm_dim}"
            )
        return ""

    # ---- the short guard ----

    def _readers(self) -> list[tuple[Callable[[Any], Any], nn.Module]]:
        readers = super()._readers()
        if self.norm_values is not None and self.channel_norm is not None:
            readers.append((self.norm_values, self.channel_norm))
        return readers

    def shape_key(self, x: Tensor) -> Any:
        shape, rank = x.shape, x.dim()
        if (
            self.channel_norm is None
            or self.drops_channels
            or rank < 2
            or rank == self.unbatched_rank
        ):
            return shape
        # What `few_values` and the norm depend on, so that another batch is no other shape.
        channels = shape[self.channel_dim]
        positions = x.numel() // max(1, shape[0] * channels)
        return rank, channels, shape[-1], min(shape[0], 2), min(positions, 2)

    # ---- running ----

    def run(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        shortcut: Tensor | None = None,
        spec: Spec | None = None,
    ) -> Tensor:
        alone = residual is None and mask is None and shortcut is None
        again = spec is not None and alone and not self.gated
        spec = spec or self._spec_for(x)
        linear: Any = {} if self.linear is None else self.linear._parameters
        given: Any = (linear.get("weight"), linear.get("bias"))
        norm, dim = self.channel_norm, self.channel_dim
        if self.drops_channels:
            spec = spec._replace(channel_dropout=spec.threshold > 0)
            dim = dim if norm is not None else getattr(self.dropout, "channel_dim", 1)
        if norm is None:
            affine: Any = {} if self.norm is None else self.norm._parameters
            given = (*given, affine.get("weight"), affine.get("bias"), residual, mask)
            # Without any norm it is a chain over channels, which keeps the memory format.
            state = ChannelNorm() if self.norm is None and not self.gated else None
            dims = 1 if self.norm is None else len(self.norm.normalized_shape)
            where: Any = {"channel_dim": dim, "normalized_dims": dims}
            return run(spec, x, *given, norm=state, shortcut=shortcut, **where)
        state = channel_norm(norm, self.norm_name or "")
        rank = x.dim()
        if rank == self.unbatched_rank:
            residual, shortcut = (
                None if t is None else t.unsqueeze(0) for t in (residual, shortcut)
            )
            where = {"channel_dim": dim, "shortcut": shortcut}
            given = (*given, None, None, residual, mask)
            return run(spec, x.unsqueeze(0), *given, norm=state, **where).squeeze(0)
        if not again:
            given = (*given, None, None, residual, mask)
            return run(spec, x, *given, norm=state, channel_dim=dim, shortcut=shortcut)
        y = channel(spec, x, dim, state, *given, eager=True)
        if state.batches is not None:
            state.batches.add_(1)
        return y


def is_channel_chain(children: list[nn.Module]) -> bool:
    """Whether these children of a chain need a `ChannelChain`."""
    return any(type(c) in NORM_CLASSES or type(c) in CHANNEL_DROPOUTS for c in children)
