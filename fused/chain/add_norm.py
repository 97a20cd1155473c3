"""Add & norm as a module, which runs its children where a kernel would not see what they do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..run.add_norm import add_norm
from ..spec import ROW_NORMS, default_eps, make_spec, norm_name
from . import guard


class AddNorm(nn.Module):
    """Dropout, addition and norm as one operation: where a transformer's sublayers meet.

        h = residual + dropout(x),  y = norm(h)

    A post-norm block (BERT) goes on with y alone; a pre-norm block (GPT, Llama) takes y into the
    next sublayer and h past it. Its children are named norm and dropout.

    Args:
        features: N, the size of the last dimension.
        norm: "layer" or "rms".
        dropout: probability.
        eps: the norm's; torch's default where None.
        affine: whether the norm has weight (and, but for rms, bias).

    Shape:
        x (..., N), residual (..., N) → y (..., N), h (..., N).

    Raises:
        ValueError: another norm, dropout outside [0, 1], shapes that do not fit.

    Example:
        >>> block = AddNorm(512, dropout=0.1)
        >>> y, h = block(torch.randn(8, 50, 512), torch.randn(8, 50, 512))
    """

    def __init__(
        self,
        features: int,
        norm: str = "layer",
        dropout: float = 0.0,
        *,
        eps: float | None = None,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        name = norm_name(norm)
        if name not in ROW_NORMS:
            known = " or ".join(map(repr, ROW_NORMS))
            raise ValueError(f"AddNorm: norm must be {known}, got {norm!r}")
        where = {"elementwise_affine": affine, "device": device, "dtype": dtype}
        self.norm: nn.LayerNorm | nn.RMSNorm
        if name == "layer":
            self.norm = nn.LayerNorm(features, 1e-5 if eps is None else eps, **where)
        else:
            self.norm = nn.RMSNorm(features, eps, **where)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        norm, dropout = self.norm, self.dropout
        if self._reason(x, residual):
            h = residual + dropout(x)
            return norm(h), h
        p = dropout.p if dropout.training else 0.0
        name = guard.NORM_OF[type(norm)]
        spec = make_spec(name, default_eps(name, norm.eps, x.dtype), None, p)
        affine = norm.weight, getattr(norm, "bias", None)
        return add_norm(spec, x, residual, norm_weight=affine[0], norm_bias=affine[1])

    def _reason(self, x: Tensor, residual: Tensor) -> str:
        """What stops the one operation; empty when nothing does."""
        norm, dropout = self.norm, self.dropout
        kind = nn.LayerNorm if isinstance(norm, nn.LayerNorm) else nn.RMSNorm
        reason = "global module hooks are set" if guard.global_hooks() else ""
        reason = (
            reason or guard.module_reason(norm, kind) or guard.module_reason(dropout, nn.Dropout)
        )
        reason = reason or guard.tensor_reason(x) or guard.tensor_reason(residual)
        if reason or x.shape != residual.shape or x.device != residual.device:
            return reason or "x and residual differ"
        if norm.normalized_shape != tuple(x.shape[-1:]):
            return f"the norm takes {norm.normalized_shape}"
        dtype = torch.promote_types(x.dtype, residual.dtype)
        return guard.norm_reason(norm, x.device, dtype)
