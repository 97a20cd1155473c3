"""The delay model: embeddings and numbers into blocks of Linear → Norm → Activation → Dropout."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fused.nn import ReLUSquared
from fused.spec import ACTIVATIONS, NORM_CODES

EMBEDDING_WIDTH = 8
_NORM_MODULES: dict[str, Callable[[int], nn.Module]] = {
    "layer": nn.LayerNorm,
    "rms": nn.RMSNorm,
    "batch": nn.BatchNorm1d,
    "group": lambda features: nn.GroupNorm(8, features),
}
# What the library can fuse, among the norms that mean something for a row of features.
NORMS = tuple(name for name in NORM_CODES if name in _NORM_MODULES)


def make_activation(name: str) -> nn.Module:
    """The torch module of an activation of `fused.spec.ACTIVATIONS`."""
    if name == "gelu_tanh":
        return nn.GELU(approximate="tanh")
    return (ACTIVATIONS[name].module or ReLUSquared)()


class DelayModel(nn.Module):
    """The logit of a late arrival, in plain torch modules.

    Args:
        cardinalities: number of codes of each categorical column.
        numeric: number of numeric columns.
        hidden: features of each block.
        norm: a name of `NORMS`, or None.
        activation: a name of `fused.spec.ACTIVATIONS`.
        dropout: probability.

    Shape:
        categorical (M, columns) int64, numeric (M, numeric) → (M,).
    """

    offsets: Tensor

    def __init__(
        self,
        cardinalities: Sequence[int],
        numeric: int,
        hidden: Sequence[int],
        norm: str | None,
        activation: str,
        dropout: float,
    ) -> None:
        super().__init__()
        # One table for all columns; each column's codes begin at its offset.
        starts = torch.tensor([0, *cardinalities[:-1]]).cumsum(0)
        self.register_buffer("offsets", starts, persistent=False)
        self.embedding = nn.Embedding(sum(cardinalities), EMBEDDING_WIDTH)
        nn.init.normal_(self.embedding.weight, std=0.1)

        layers: list[nn.Module] = []
        features = len(cardinalities) * EMBEDDING_WIDTH + numeric
        for width in hidden:
            layers.append(nn.Linear(features, width))
            if norm is not None:
                layers.append(_NORM_MODULES[norm](width))
            layers += [make_activation(activation), nn.Dropout(dropout)]
            features = width
        self.blocks = nn.Sequential(*layers, nn.Linear(features, 1))

    def forward(self, categorical: Tensor, numeric: Tensor) -> Tensor:
        embedded = self.embedding(categorical + self.offsets).flatten(1)
        x = torch.cat([embedded.to(numeric.dtype), numeric], dim=1)
        return self.blocks(x).squeeze(1)
