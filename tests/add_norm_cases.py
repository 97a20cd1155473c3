"""Calls of add & norm's operators and of plain torch, and the rule that compares them."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from tolerances import assert_close
from torch import Tensor

from fused.backends import ops
from fused.functional import dropout_mask
from fused.spec import NORM_CODES, WANT_BIAS, WANT_NORM_BIAS, WANT_NORM_WEIGHT, dropout_threshold

SEED, EPS = 11, 1e-5
NAMES = ("y", "h", "dx", "dresidual", "dnorm_weight", "dnorm_bias", "dbias")


def make(rows: int, cols: int, dtype: torch.dtype) -> list[Tensor]:
    """x, residual, norm_weight, norm_bias, dy, dh."""
    generator = torch.Generator().manual_seed(rows)
    shapes = [(rows, cols), (rows, cols), (cols,), (cols,), (rows, cols), (rows, cols)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def by_operators(
    tensors: list[Tensor], norm: str, p: float, forward: Any = None, backward: Any = None
) -> dict[str, Tensor]:
    """The results of an operator pair, that of CPUs where none is given."""
    x, residual, weight, bias, dy, dh = tensors
    t = dropout_threshold(p)
    scalars, seed = (NORM_CODES[norm], EPS, t), torch.tensor([SEED])
    forward, backward = forward or ops.add_norm_forward, backward or ops.add_norm_backward
    y, h, statistics = forward(x, residual, weight, bias, seed, *scalars)
    wanted = WANT_BIAS | WANT_NORM_WEIGHT | WANT_NORM_BIAS
    found = backward(dy, dh, h, weight, bias, statistics, seed, wanted, *scalars)
    dx, dresidual, *sums = found
    return dict(zip(NAMES, (y, h, dx if t else dresidual, dresidual, *sums), strict=True))


def by_torch(tensors: list[Tensor], norm: str, p: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same in plain torch, in this dtype."""
    *leaves, dy, dh = (t.to(dtype).detach() for t in tensors)
    linear_bias = torch.zeros(leaves[0].shape[1], dtype=dtype)
    x, residual, weight, bias, own = (t.requires_grad_() for t in (*leaves, linear_bias))
    z = x + own
    t = dropout_threshold(p)
    keep = dropout_mask(*x.shape, p, SEED).to(dtype)
    h = residual + (z * keep * (65536 / max(1, 65536 - t)) if t else z)
    y = (
        F.layer_norm(h, h.shape[-1:], weight, bias, EPS)
        if norm == "layer"
        else (F.rms_norm(h, h.shape[-1:], weight, EPS) + bias)
    )
    grads = torch.autograd.grad([y, h], [x, residual, weight, bias, own], [dy, dh])
    return dict(zip(NAMES, (y.detach(), h.detach(), *grads), strict=True))


def check(tensors: list[Tensor], norm: str, p: float, *operators: Any) -> dict[str, Tensor]:
    """Holds every result to the rule of tolerances.py, and returns them."""
    dtype = tensors[0].dtype
    found = by_operators(tensors, norm, p, *operators)
    oracle = by_torch(tensors, norm, p, torch.float64)
    eager = by_torch(tensors, norm, p, dtype)
    rows, cols = tensors[0].shape
    terms = float(tensors[4].abs().max()) * 65536 / max(1, 65536 - dropout_threshold(p))
    for name, result in found.items():
        magnitude = 0.0
        if name[0] == "d":
            magnitude = terms * (1.0 if name in ("dx", "dresidual") else math.sqrt(rows))
            magnitude *= 1 / math.sqrt(EPS) if cols == 1 else 1.0
        assert_close(name, result, oracle[name], eager[name], dtype, magnitude)
    return found
