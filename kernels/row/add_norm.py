"""Add & norm: h = residual + dropout(x), y = norm(h), by the row kernels.

Rows that one tile holds take one kernel forward, which stores the sum on its way; wider ones take
that of the sum and then that of the norm, which finds h in L2. Backward is the row kernels' own:
the gradient of h from elsewhere joins that of the norm, and its dropped part is stored beside it.
"""

from __future__ import annotations

from torch import Tensor

from ...spec import NORM_NAMES
from ..tuning import rules as tuning
from .backward import row_backward
from .forward import row_forward


def add_norm_forward(
    x: Tensor,
    residual: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    seed: Tensor | None,
    norm: int,
    eps: float,
    threshold: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, h and the statistics of h.

    Args:
        x, residual: (rows, cols), last stride 1, any row stride and offset; one dtype.
        norm_weight, norm_bias: (cols,), contiguous, any floating dtype, or None.
        seed: int64 (1,); may be None where threshold is 0.
        norm, eps, threshold: as `spec.Spec.row` has them.
    """
    rows, cols = x.shape
    affine, no_activation = (norm_weight, norm_bias), (0, 0.0, 0.0)
    tile = tuning.forward_tile(cols, NORM_NAMES[norm], tuning.device(x)) if rows and cols else None
    if tile is None or tile.block_n < cols:
        add = 0, 0.0, *no_activation, threshold
        h, _ = row_forward(x, None, None, None, residual, seed, *add)
        y, statistics = row_forward(
            h, None, norm_weight, norm_bias, None, None, norm, eps, *no_activation, threshold=0
        )
    else:
        h = x.new_empty((rows, cols))
        given = (x, None, *affine, residual, seed, norm, eps, *no_activation, threshold)
        y, statistics = row_forward(*given, total=h)
    return y, h, statistics


def add_norm_backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    statistics: Tensor,
    seed: Tensor | None,
    wanted: int,
    norm: int,
    eps: float,
    threshold: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx (empty where nothing is dropped: it is dresidual), dresidual and the sums over the rows.

    Args:
        dy, dh: the gradients of y and, or None, of h; laid out as x may be.
        wanted: as of `row_backward`; WANT_BIAS sums dx.
    """
    dx = h.new_empty(h.shape if threshold else (0,))
    given = (dy, h, None, norm_weight, norm_bias, statistics, seed, wanted, norm, eps, 0, 0.0, 0.0)
    total = None if dh is None else dh.contiguous()
    dropped = dx if threshold else None
    return dx, *row_backward(*given, threshold, total=total, dropped=dropped)[:4]
