"""A small language model as anybody would write it: nothing in it knows of fused."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORMS: dict[str, Callable[[int], nn.Module]] = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(features, 3 * features, bias=False)
        self.out = nn.Linear(features, features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        samples, length, features = x.shape
        qkv = self.qkv(x).view(samples, length, 3, self.heads, features // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind()
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(samples, length, features))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(features, hidden, bias=False)
        self.up = nn.Linear(features, hidden, bias=False)
        self.down = nn.Linear(hidden, features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and in front of dropout and a residual."""

    def __init__(self, features: int, heads: int, dropout: float, norm: str) -> None:
        super().__init__()
        self.attention_norm = NORMS[norm](features)
        self.attention = Attention(features, heads)
        self.feed_forward_norm = NORMS[norm](features)
        # Three matrices of 8/3 · features have the parameters of two of 4 · features.
        self.feed_forward = FeedForward(features, 32 * round(features / 12))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class Transformer(nn.Module):
    """The logits of the next character.

    Shape:
        (samples, length) int64 → (samples, length, characters).
    """

    def __init__(
        self,
        characters: int,
        context: int,
        features: int,
        heads: int,
        layers: int,
        dropout: float,
        norm: str,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, features)
        self.position = nn.Parameter(torch.randn(context, features))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(features, heads, dropout, norm) for _ in range(layers))
        self.norm = NORMS[norm](features)
        self.head = nn.Linear(features, characters, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        x = self.dropout(self.embedding(text) + self.position[: text.shape[1]])
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
