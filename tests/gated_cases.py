"""Cases of gated activations: z and the parameters have 2N columns, residual, y and dy have N."""

from __future__ import annotations

from typing import Any

import torch
from cases import Inputs, make_inputs

from fused.spec import GATED_ACTIVATIONS, Epilogue, dropout_threshold

GATED = tuple(GATED_ACTIVATIONS)


def make_gated_epilogue(norm: str | None, activation: str, p: float = 0.0) -> Epilogue:
    return Epilogue(norm, 1e-5 if norm else 0.0, activation, threshold=dropout_threshold(p))


def make_gated_inputs(
    rows: int, half: int, dtype: torch.dtype, norm: str | None = "layer", **options: Any
) -> Inputs:
    """`make_inputs` for N = half."""
    inputs = make_inputs(rows, 2 * half, dtype, norm, **options)
    inputs.dy = inputs.dy[:, :half].contiguous()
    if inputs.residual is not None:
        inputs.residual = inputs.residual[:, half:].contiguous()
    return inputs
