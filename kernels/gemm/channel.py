"""Linear with batch or group norm behind it: the launcher.

    y = residual + dropout(activation(norm(x · weightᵀ + bias)))

Batch norm's statistics are of columns, and come out of the GEMM's tiles (batch.py); group
norm's are of parts of rows, which a tile holds (group.py).
"""

from __future__ import annotations

from torch import Tensor

from ...spec import NORM_NAMES
from ..channel.problem import problem_of
from .batch import batch_forward
from .group import group_forward


def linear_channel_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    save_z: bool,
    norm: int,
    groups: int,
    channels_last: bool,
    eps: float,
    activation: int,
    alpha: float,
    beta: float,
    threshold: int,
    channel_dropout: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y = residual + dropout(activation(norm(x · weightᵀ + bias))), by the statistics of z itself.

    Args:
        x: (rows, inner), last stride 1, any row stride and offset; at least one row and column.
        weight: (cols, inner), likewise, of x's dtype.
        bias, norm_weight, norm_bias: (cols,), contiguous, any floating dtype, or None.
        residual: (rows, cols), contiguous, of x's dtype, or None.
        seed: int64 (1,); may be None where threshold is 0.
        save_z: whether z is needed.
        norm to channel_dropout: as `spec.Spec.channel`, of batch or group norm;
            channels_last is true and channel_dropout false.

    Returns:
        y (rows, cols) in x's dtype; z = x · weightᵀ + bias, likewise, or (0,) where it is not
        needed; mean and variance as `channel.channel_forward` gives them.

    Raises:
        ValueError: groups that no tile holds (`gemm_tuning.group_tile` knows which).
    """
    scalars = (norm, groups, channels_last, eps, activation, alpha, beta, threshold)
    rows, cols = x.shape[0], weight.shape[0]
    batch = NORM_NAMES[norm] == "batch"
    # Samples, positions, channels: batch norm's statistics are of positions.
    shape = (1, rows, cols) if batch else (rows, 1, cols)
    problem = problem_of(shape, x.element_size(), None, *scalars, channel_dropout)
    forward = batch_forward if batch else group_forward
    parameters = (norm_weight, norm_bias)
    return forward(x, weight, bias, parameters, residual, seed, save_z, problem)
