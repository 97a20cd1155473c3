"""Who runs a chain along rows: the reference, torch's own operators, or our operator.

It is decided here and nowhere else, for tensors that prepare.py or the short guard has passed: what
autocast does is done, and a residual has the dtype of what it is added to.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import gemm, ops
from ..spec import GATED_ACTIVATIONS, Spec
from . import by_torch, reference
from .autograd import RowFunction
from .layout import contiguous_rows
from .random import draw_seed
from .recording import is_compiling


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether a gradient of one of these tensors is recorded."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def apart(added: Tensor | None, x: Tensor | None) -> Tensor | None:
    """What is added; a view where it is x itself, for the compiler refuses one tensor twice."""
    return x.view_as(x) if added is x and x is not None else added


def row(
    spec: Spec,
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    residual: Tensor | None = None,
    seed: Tensor | None = None,
    plain: bool = False,
    shortcut: Tensor | None = None,
) -> Tensor:
    """residual + dropout(activation(norm(z) + shortcut)) along the last dimension, of any rank.

    Args:
        x: z, or with weight and bias z = x · weightᵀ + bias.
        seed: int64 (1,); drawn where the chain drops and None is given.
        plain: the reference runs it.
    """
    shape = x.shape
    if len(shape) != 2:
        rows = math.prod(shape[:-1])  # not -1, which is ambiguous where there are no features
        x = x.reshape(rows, shape[-1])
        residual = None if residual is None else residual.reshape(rows, residual.shape[-1])
        shortcut = None if shortcut is None else shortcut.reshape(rows, shortcut.shape[-1])
    if seed is None and spec.threshold:
        seed = draw_seed(x.device)
    rest = (norm_weight, norm_bias, residual, seed)
    added = residual, shortcut
    gradient = not plain and needs_gradient(x, weight, bias, norm_weight, norm_bias, *added)
    width = shape[-1] if weight is None else weight.shape[0]
    if plain:
        z = x if weight is None else F.linear(x, weight, bias)
        y = reference.row(z, spec, None, *rest, shortcut)
    elif (
        gemm.enabled
        and weight is not None
        and shortcut is None
        and _is_one_operator(spec, x, weight, gradient)
    ):
        rest = (norm_weight, norm_bias, apart(residual, x), seed)
        if gradient:
            y = RowFunction.apply(x, weight, bias, *rest[:2], None, *rest[2:], spec)
        else:
            y = ops.linear_row_forward(x, weight, bias, *rest, False, *spec.row)[0]
    elif (
        not spec.threshold
        and not is_compiling(x)
        and by_torch.serves_row(spec, x.shape[0] * width, x, gradient, weight is not None)
    ):
        z = x if weight is None else F.linear(x, weight, bias)
        y = by_torch.row(z, norm_weight, norm_bias, residual, spec, shortcut)
    else:
        if weight is None:
            z = contiguous_rows(x)
        elif gradient and bias is not None and bias.requires_grad:
            # The gradient of the bias comes with those of the norm: no other pass over dz.
            z = F.linear(x, weight, bias.detach())
        else:
            z, bias = F.linear(x, weight, bias), None
        if residual is not None:
            residual = contiguous_rows(z.view_as(z) if residual is z else residual)
        if shortcut is not None:
            shortcut = apart(apart(shortcut, z), residual).contiguous()  # type: ignore[union-attr]
        rest = (norm_weight, norm_bias, residual, seed)
        if gradient:
            y = RowFunction.apply(z, None, bias, *rest[:2], shortcut, *rest[2:], spec)
        elif weight is None or spec.activation in GATED_ACTIVATIONS or is_compiling(x):
            y = ops.row_forward(z, None, *rest, *spec.row, shortcut)[0]
        else:
            y = z
            ops.row_forward_(y, None, *rest, *spec.row, shortcut)
    return y if len(shape) == 2 else y.view(*shape[:-1], y.shape[-1])


def _is_one_operator(spec: Spec, x: Tensor, weight: Tensor, gradient: bool) -> bool:
    """Whether a Linear and the chain along its rows are one operator."""
    # Frozen weights stay torch's: with them nn.Linear does not keep x.
    own = weight.requires_grad or not gradient
    return own and not spec.gated and gemm.serves(x, weight, spec.norm)
