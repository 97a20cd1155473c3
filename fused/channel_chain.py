"""A chain with a norm over samples or positions, or with dropout of whole channels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import guard, small
from .autograd import Codes
from .chain import Chain
from .channel import drop_channels, run_channel, run_linear_channel
from .checks import few_values
from .dispatch import chain as run_chain
from .guard import CHANNEL_DROPOUTS
from .norms import NORM_CLASSES, channel_norm
from .recording import is_compiling, transformed
from .running import ChannelNorm, count_batch

_HALF = (torch.bfloat16, torch.float16)
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
        self.channel_norm = None if self.norm_name not in NORM_CLASSES.values() else self.norm
        self.drops_channels = type(self.dropout) in CHANNEL_DROPOUTS
        self.channel_dim = getattr(self.channel_norm, "channel_dim", 1)
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
        return super().input_reason(x) or self._open_size_reason(x)

    def _open_size_reason(self, x: Tensor) -> str:
        """Why images whose sizes the compiler leaves open run as torch's own operators.

        Inductor (torch 2.13) cannot order the symbolic strides of a view that a convolution saves
        for its backward; our result would be one.
        """
        if not is_compiling() or x.dim() < 4 or not torch.is_grad_enabled():
            return ""
        from torch.fx.experimental.symbolic_shapes import has_static_value

        fixed = all(has_static_value(size) for size in x.shape[2:])
        return "" if fixed else "the compiler leaves the sizes of the images open"

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
        # torch takes float32 parameters, all of them, with a 16-bit input; on GPUs not group norm.
        if dtypes <= {dtype}:
            return ""
        mixed = device.type == "cpu" or self.norm_name != "group"
        if mixed and dtype in _HALF and dtypes == {torch.float32}:
            return ""
        own = " and ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
        return f"it has {own}, its input {str(dtype).removeprefix('torch.')}"

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
        if self._is_unbatched(rank):
            shape = (1, *shape)
        channels = norm.num_channels if self.norm_name == "group" else norm.num_features
        if shape[dim] != channels:
            return f"the norm takes {channels} channels, its input is {shape}"
        state = channel_norm(norm, self.norm_name or "")
        return few_values(state, shape, dim) or self._dropout_reason(rank, dim)

    def gate_dim(self, rank: int) -> int:
        if self.channel_norm is None or self.channel_dim == -1:
            return rank - 1
        return 0 if self._is_unbatched(rank) else 1

    def _is_unbatched(self, rank: int) -> bool:
        """Whether torch's InstanceNorm takes an input of so many dimensions for one sample."""
        return self.norm_name == "instance" and rank == _DIMENSIONS.get(type(self.norm), (0,))[0]

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

    def _shape_for_short_guard(self, x: Tensor) -> Any:
        return x.shape

    # ---- running ----

    def run(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        codes: Codes | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        norm = self.channel_norm
        if norm is None and (self.norm is not None or self.gated):
            return self._run_row_norm(x, residual, codes, mask)
        codes = codes or self._codes(x.dtype)
        state = ChannelNorm() if norm is None else channel_norm(norm, self.norm_name or "")
        dim = self.channel_dim if norm is not None else getattr(self.dropout, "channel_dim", 1)
        options: dict[str, Any] = {
            "channel_dropout": self.drops_channels and bool(codes[5]),
            "residual": residual,
            "mask": mask,
        }
        unbatched = self._is_unbatched(x.dim())
        if unbatched:
            x = x.unsqueeze(0)
            if residual is not None:
                options["residual"] = residual.unsqueeze(0)
        linear: Any = None if self.linear is None else self.linear._parameters
        if self._is_small(x, state, codes, mask):
            z = x if linear is None else F.linear(x, linear["weight"], linear["bias"])
            h = small.normalize_channels(z, state, codes[1])
            if codes[5]:  # a row of the mask is the positions of a channel, or the channels
                rest = (0, 0.0, *codes[2:])
                dims = max(1, x.dim() - 2)
                y = run_chain(h, dims, None, None, options["residual"], None, rest)
            else:
                y = small.activate(h, options["residual"], codes)
        elif linear is None:
            y = run_channel(x, dim, state, codes, **options)
        else:
            weight, bias = linear["weight"], linear["bias"]
            y = run_linear_channel(x, weight, bias, dim, state, codes, **options)
        count_batch(state)
        return y.squeeze(0) if unbatched else y

    def _is_small(self, x: Tensor, norm: ChannelNorm, codes: Codes, mask: Tensor | None) -> bool:
        """Whether torch's norm serves, and the rest after it."""
        if mask is not None or is_compiling() or transformed():
            return False
        rank = x.dim()
        if self.channel_dim == -1 and rank > 2:
            return False
        # The mask must be laid as run_channel lays it: in memory order.
        plain = x.is_contiguous() and (rank == 2 or x.shape[2:].numel() > 1)
        if self.gated and rank != 2:
            return False
        if codes[5] and (self.drops_channels or not plain):
            return False
        elements = x.numel()
        if self.linear is not None:
            elements = elements // max(1, x.shape[-1]) * self.linear.weight.shape[0]
        return small.is_small_channel(elements, x, norm, codes)

    def _run_rows(self, x: Tensor, codes: Codes) -> Tensor:
        return self.run(x, None, codes)

    def _run_row_norm(
        self, x: Tensor, residual: Tensor | None, codes: Codes | None, mask: Tensor | None
    ) -> Tensor:
        """A chain along rows, with dropout of channels behind it as a second operation."""
        codes = codes or self._codes(x.dtype)
        if not codes[5]:
            return super().run(x, residual, codes, mask)
        y = super().run(x, None, (*codes[:5], 0))
        dim = getattr(self.dropout, "channel_dim", 1)
        return drop_channels(y, dim, codes[5], residual, mask)


def is_channel_chain(children: list[nn.Module]) -> bool:
    """Whether these children of a chain need a `ChannelChain`."""
    return any(type(c) in NORM_CLASSES or type(c) in CHANNEL_DROPOUTS for c in children)
