"""The modules: Sequential (sequential.py), and the explicit blocks made of it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .build import make_activation, make_dropout, make_norm
from .chain import Chain
from .checks import check_mask, check_residual
from .guard import NORM_OF, PLAIN_TENSORS, ReLUSquared
from .jagged import is_jagged, like, residual_values, values_of
from .norms import MASKED_NORMS, BatchNorm, ChannelDropout, GroupNorm, InstanceNorm
from .sequential import Sequential
from .spec import CHANNEL_NORMS

__all__ = [
    "MLP",
    "BatchNorm",
    "ChannelDropout",
    "GroupNorm",
    "InstanceNorm",
    "LinearNormAct",
    "NormAct",
    "ReLUSquared",
    "Sequential",
]


class _Built(Sequential):
    """A Sequential whose constructor takes no children, so that a slice is a plain Sequential."""

    def __getitem__(self, idx: Any) -> Any:
        if isinstance(idx, slice):
            return Sequential(OrderedDict([*self._modules.items()][idx]))
        return super().__getitem__(idx)


class _Block(_Built):
    """A Sequential that is one chain, with a residual input and a mask of positions."""

    channel_dim = -1

    def __init__(self, children: dict[str, nn.Module | None]) -> None:
        super().__init__()
        for name, child in children.items():
            if child is not None:
                self.add_module(name, child)

    def forward(
        self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """The block.

        Args:
            input: a tensor, or a jagged nested tensor (batch, ragged, features).
            residual: of the output's shape, added last.
            mask: bool, the shape of the input without its features: positions where it is false
                (padding) take no part in statistics and come out as zero.

        Raises:
            TypeError: residual is not a floating-point tensor, mask not a boolean one.
            ValueError: one of them has another shape or device than it must; mask with channels in
                dimension 1; a jagged input for group or instance norm.
        """
        operation = type(self).__name__
        if is_jagged(input):
            drops = isinstance(self._modules.get("dropout"), ChannelDropout)
            norm = NORM_OF.get(type(self._modules.get("norm")))
            values = values_of(operation, input, norm, mask, drops)
            return like(input, self(values, residual_values(operation, input, residual)))
        if residual is None and mask is None:
            return super().forward(input)
        if mask is not None:
            check_mask(operation, mask, input, self.channel_dim)
        steps = self._current_steps()
        step = steps[0] if len(steps) == 1 else None
        if isinstance(step, Chain) and (residual is None or type(residual) in PLAIN_TENSORS):
            shape = step.output_shape(input)
            if shape is not None:
                if residual is not None:
                    check_residual(operation, residual, shape, input)
                return step(input, residual, mask)
        y = input
        for child in self.children():
            y = child(y, mask) if mask is not None and type(child) in MASKED_NORMS else child(y)
        if residual is not None:
            check_residual(operation, residual, tuple(y.shape), y)
            y = residual + y
        return y if mask is None else torch.where(mask.unsqueeze(-1), y, 0)


class LinearNormAct(_Block):
    """Linear, norm, activation and dropout as one operation.

        y = residual + dropout(activation(norm(x · weightᵀ + bias)))

    Its children are named linear, norm, act and dropout; they are torch's own, or subclasses with
    the same parameters where torch has none for features in the last dimension.

    Args:
        in_features, out_features: K and N.
        norm: "layer", "rms" (both over the N features), "batch" (each feature over all else),
            "instance" (each feature of a sample, over its positions), "group" (groups of features
            of a sample, over its positions) or None. The first dimension of the input is the
            samples, those between first and last are positions.
        activation: a name of `fused.spec.ACTIVATIONS`, or None.
        dropout: probability; 0 leaves the child out.
        channel_dropout: probability with which a feature of a sample is dropped as a whole.
        bias: whether the Linear has one.
        eps: the norm's; torch's default where None.
        affine: whether the norm has weight (and, but for rms, bias).
        num_groups: of group norm.
        momentum, track_running_stats: of batch and instance norm, as torch has them.
        virtual_batch_size: batch norm by parts of the batch of at most so many samples, as TabNet
            has it (Arik and Pfister, 2021).
        process_group: batch norm over all processes of a torch.distributed group.
        **activation_parameters: negative_slope, alpha, beta, threshold, as torch names them.

    Shape:
        x (..., K), residual (..., N), mask (...) → (..., N).

    Raises:
        ValueError: unknown norm or activation, dropout outside [0, 1], an option of another norm.
        TypeError: a parameter that the activation does not have.
    """

    def __init__(  # noqa: PLR0913  torch's names, each an argument
        self,
        in_features: int,
        out_features: int,
        *,
        norm: str | None = None,
        activation: str | None = None,
        dropout: float = 0.0,
        channel_dropout: float = 0.0,
        bias: bool = True,
        eps: float | None = None,
        affine: bool = True,
        num_groups: int | None = None,
        momentum: float | None = 0.1,
        track_running_stats: bool | None = None,
        virtual_batch_size: int | None = None,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
        **activation_parameters: float,
    ) -> None:
        options = {
            "eps": eps,
            "affine": affine,
            "num_groups": num_groups,
            "momentum": momentum,
            "track_running_stats": track_running_stats,
            "virtual_batch_size": virtual_batch_size,
            "process_group": process_group,
        }
        where = {"device": device, "dtype": dtype}
        super().__init__(
            {
                "linear": nn.Linear(in_features, out_features, bias, **where),
                "norm": make_norm(norm, out_features, -1, options, **where),
                "act": make_activation(activation, activation_parameters),
                "dropout": make_dropout(dropout, channel_dropout, -1),
            }
        )


class NormAct(_Block):
    """Norm, activation and dropout as one operation, after any layer.

        y = residual + dropout(activation(norm(x)))

    Its children are named norm, act and dropout, as in `LinearNormAct`.

    Args:
        num_features: the number of channels; for layer and rms norm the size of the last
            dimension, or the trailing shape that is normalised.
        channel_dim: where the channels of batch, group and instance norm and of channel_dropout
            are: 1 as in torch, or -1 for the last dimension.
        norm, activation, dropout, channel_dropout, eps, affine, num_groups, momentum,
        track_running_stats, virtual_batch_size, process_group, **activation_parameters: as in
            `LinearNormAct`.

    Shape:
        x (..., num_features) for layer and rms norm, else (N, num_features, ...) or, with
        channel_dim -1, (N, ..., num_features); residual of x's shape; mask of x's shape without
        its last dimension, if channels are last → x's shape.

    Raises:
        ValueError, TypeError: as `LinearNormAct`.
    """

    def __init__(  # noqa: PLR0913
        self,
        num_features: int | Sequence[int],
        *,
        norm: str | None = None,
        activation: str | None = None,
        dropout: float = 0.0,
        channel_dropout: float = 0.0,
        eps: float | None = None,
        affine: bool = True,
        channel_dim: int = 1,
        num_groups: int | None = None,
        momentum: float | None = 0.1,
        track_running_stats: bool | None = None,
        virtual_batch_size: int | None = None,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
        **activation_parameters: float,
    ) -> None:
        options = {
            "eps": eps,
            "affine": affine,
            "num_groups": num_groups,
            "momentum": momentum,
            "track_running_stats": track_running_stats,
            "virtual_batch_size": virtual_batch_size,
            "process_group": process_group,
        }
        where = {"device": device, "dtype": dtype}
        super().__init__(
            {
                "norm": make_norm(norm, num_features, channel_dim, options, **where),
                "act": make_activation(activation, activation_parameters),
                "dropout": make_dropout(dropout, channel_dropout, channel_dim),
            }
        )
        # A row norm, and no norm, have their features last whatever is said here.
        self.channel_dim = channel_dim if norm in CHANNEL_NORMS or channel_dropout else -1


class MLP(_Built):
    """Blocks of Linear, norm, activation and dropout, and a Linear at the end.

    Args:
        in_features: K of the first block.
        hidden_features: N of each block.
        out_features: N of the last Linear; None leaves it out.
        norm, activation, dropout, bias, **options: of every block, as in `LinearNormAct`.

    Shape:
        x (..., in_features) → (..., out_features); mask (...), bool, which every block gets, leaves
        out positions (padding).

    Raises:
        ValueError, TypeError: as `LinearNormAct`.

    Example:
        >>> MLP(784, [512, 256], 10, norm="layer", activation="gelu", dropout=0.1)
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: Sequence[int],
        out_features: int | None = None,
        *,
        norm: str | None = "layer",
        activation: str | None = "gelu",
        dropout: float = 0.0,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        layers: list[nn.Module] = []
        previous = in_features
        for features in hidden_features:
            layers.append(
                LinearNormAct(
                    previous,
                    features,
                    norm=norm,
                    activation=activation,
                    dropout=dropout,
                    bias=bias,
                    device=device,
                    dtype=dtype,
                    **options,
                )
            )
            previous = features
        if out_features is not None:
            layers.append(nn.Linear(previous, out_features, bias, device=device, dtype=dtype))
        super().__init__(*layers)

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None and not is_jagged(input):
            return super().forward(input)
        y = input
        for block in self.children():
            y = block(y, mask=mask) if isinstance(block, _Block) else block(y)
        return y if mask is None else torch.where(mask.unsqueeze(-1), y, 0)
