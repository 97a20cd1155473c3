"""The modules: Sequential (sequential.py), and the explicit blocks made of it."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from .chain.add_norm import AddNorm
from .chain.block import Block, Built
from .chain.build import make_activation, make_dropout, make_norm, named_activation
from .chain.guard import ReLUSquared
from .chain.plan import Entry, Plan
from .chain.sequential import Sequential
from .modules.gated import GeGLU, ReGLU, SwiGLU
from .modules.jagged import is_jagged
from .modules.norms import BatchNorm, ChannelDropout, GroupNorm, InstanceNorm
from .run.checks import check_keywords
from .spec import CHANNEL_NORMS, GATED_ACTIVATIONS, norm_name

__all__ = [
    "MLP",
    "AddNorm",
    "BatchNorm",
    "ChannelDropout",
    "Entry",
    "GeGLU",
    "GroupNorm",
    "InstanceNorm",
    "LinearNormAct",
    "NormAct",
    "Plan",
    "ReGLU",
    "ReLUSquared",
    "Sequential",
    "SwiGLU",
]


class LinearNormAct(Block):
    """Linear, norm, activation and dropout as one operation.

        y = residual + dropout(activation(norm(x · weightᵀ + bias) + shortcut))

    Its children are named linear, norm, act and dropout; they are torch's own, or subclasses with
    the same parameters where torch has none for features in the last dimension.

    Args:
        in_features, out_features: K and N.
        norm: "layer", "rms" (both over the N features), "batch" (each feature over all else),
            "instance" (each feature of a sample, over its positions), "group" (groups of features
            of a sample, over its positions) or None. The first dimension of the input is the
            samples, those between first and last are positions.
        activation: a name of `fused.activations()` in any case, a module such as nn.LeakyReLU(0.2),
            whose parameters are taken, or None. With a gated one Linear and norm have 2N features,
            of which the first N are multiplied by the activation of the others.
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
        x (..., K), residual and shortcut (..., N), mask (...) → (..., N).

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
        activation: str | nn.Module | None = None,
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
        check_keywords("LinearNormAct", activation_parameters, LinearNormAct)
        norm = norm_name(norm)
        activation, activation_parameters = named_activation(activation, activation_parameters)
        where = {"device": device, "dtype": dtype}
        features = out_features * (2 if activation in GATED_ACTIVATIONS else 1)
        super().__init__(
            {
                "linear": nn.Linear(in_features, features, bias, **where),
                "norm": make_norm(norm, features, -1, options, **where),
                "act": make_activation(activation, activation_parameters),
                "dropout": make_dropout(dropout, channel_dropout, -1),
            }
        )


class NormAct(Block):
    """Norm, activation and dropout as one operation, after any layer.

        y = residual + dropout(activation(norm(x) + shortcut))

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
        channel_dim -1, (N, ..., num_features); residual of the result's shape; shortcut of x's;
        mask of x's shape without its last dimension, if channels are last → x's shape, behind a
        gated activation with half the features.

    Raises:
        ValueError, TypeError: as `LinearNormAct`.
    """

    def __init__(  # noqa: PLR0913
        self,
        num_features: int | Sequence[int],
        *,
        norm: str | None = None,
        activation: str | nn.Module | None = None,
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
        check_keywords("NormAct", activation_parameters, NormAct)
        norm = norm_name(norm)
        activation, activation_parameters = named_activation(activation, activation_parameters)
        where = {"device": device, "dtype": dtype}
        last = num_features if isinstance(num_features, int) else num_features[-1]
        if activation in GATED_ACTIVATIONS and last % 2:
            raise ValueError(
                f"activation={activation!r} halves the features; they must be an even number, got"
                f" {last}"
            )
        gated_dim = channel_dim if norm in CHANNEL_NORMS else -1
        super().__init__(
            {
                "norm": make_norm(norm, num_features, channel_dim, options, **where),
                "act": make_activation(activation, activation_parameters, gated_dim),
                "dropout": make_dropout(dropout, channel_dropout, channel_dim),
            }
        )
        # A row norm, and no norm, have their features last whatever is said here.
        self.channel_dim = channel_dim if norm in CHANNEL_NORMS or channel_dropout else -1


class MLP(Built):
    """Blocks of Linear, norm, activation and dropout, and a Linear at the end.

    Args:
        in_features: K of the first block.
        hidden_features: N of each block; a number is one block.
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
        hidden_features: int | Sequence[int],
        out_features: int | None = None,
        *,
        norm: str | None = "layer",
        activation: str | nn.Module | None = "gelu",
        dropout: float = 0.0,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        taken = signature(LinearNormAct).parameters
        check_keywords("MLP", [key for key in options if key not in taken], MLP)
        if isinstance(hidden_features, int):
            hidden_features = [hidden_features]
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
            y = block(y, mask=mask) if isinstance(block, Block) else block(y)
        return y if mask is None else torch.where(mask.unsqueeze(-1), y, 0)
