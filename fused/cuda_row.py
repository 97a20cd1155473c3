"""The row operators for CUDA tensors by the CUDA C++ kernels (schemas: ops.py).

Allocation, and what follows from the shape alone; the arithmetic is in csrc/cuda/row_*.cuh, that of
gated activations in csrc/cuda/gated_*.cuh.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .cuda_library import (
    STORAGES,
    RowProblem,
    add_up,
    compute_dtype,
    launch,
    pointer,
    wanted_of,
)
from .spec import (
    ACTIVATION_NAMES,
    NORM_NAMES,
    STATISTICS,
    WANT_BIAS,
    WANT_NORM_BIAS,
    WANT_NORM_WEIGHT,
    is_gated,
)

# Rows that are summed up by one block at least, and blocks that share the rows at most: what fills
# a large GPU several times over.
_ROWS_OF_CHUNK, _BLOCKS = 64, 1024
_COLS_OF_BLOCK = 256  # about


def chunks_of(rows: int, cols: int, segments: int = 1) -> int:
    """Into how many chunks the rows of a segment are split for sums, by the shape alone."""
    most = max(1, _BLOCKS // (segments * -(-cols // _COLS_OF_BLOCK)))
    return max(1, min(most, -(-rows // _ROWS_OF_CHUNK)))


def features_of(cols: int, activation: int) -> int:
    """The columns of y and dy, given those of z.

    Raises:
        ValueError: a gated activation cannot halve them.
    """
    if not is_gated(activation):
        return cols
    if cols % 2:
        raise ValueError(
            f"fused: {ACTIVATION_NAMES[activation]} halves the columns of z, so their number must"
            f" be even, got {cols}"
        )
    return cols // 2


def _launch(direction: str, problem: RowProblem, like: Tensor) -> None:
    family = "gated" if is_gated(problem.activation) else "row"
    launch(f"{family}_{direction}", problem, like)


def _problem(
    z: Tensor,
    parameters: tuple[Tensor | None, Tensor | None, Tensor | None],
    seed: Tensor | None,
    scalars: tuple[int, float, int, float, float, int],
) -> tuple[RowProblem, tuple[Tensor | None, ...]]:
    """The fields that forward and backward share, and what must live until the launch.

    parameters: bias, norm_weight, norm_bias, in z's dtype or the one it computes in; those of
    another dtype are converted.
    """
    norm, eps, activation, alpha, beta, threshold = scalars
    if norm == 0:
        parameters = (parameters[0], None, None)
    compute = compute_dtype(z)
    kept = tuple(
        t if t is None or t.dtype in (z.dtype, compute) else t.to(compute) for t in parameters
    )
    wide = 0
    for t, bit in zip(kept, (WANT_BIAS, WANT_NORM_WEIGHT, WANT_NORM_BIAS), strict=True):
        wide |= bit if t is not None and t.dtype == compute else 0
    rows, cols = z.shape
    problem = RowProblem(
        z=z.data_ptr(),
        bias=pointer(kept[0]),
        norm_weight=pointer(kept[1]),
        norm_bias=pointer(kept[2]),
        seed=pointer(seed) if threshold else None,
        rows=rows,
        cols=cols,
        z_stride=z.stride(0),
        storage=STORAGES[z.dtype],
        wide=wide,
        norm=norm,
        activation=activation,
        threshold=threshold,
        eps=eps,
        alpha=alpha,
        beta=beta,
    )
    return problem, kept


def row_forward(
    z: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    *scalars: Any,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y = residual + dropout(activation(norm(z + bias))).

    Args:
        z, residual: (rows, cols), last stride 1, any row stride and offset; one dtype. Behind a
            gated activation y and residual have half the columns.
        bias, norm_weight, norm_bias: (cols,), contiguous, any floating dtype, or None.
        seed: int64 (1,); may be None where threshold is 0.
        scalars: norm, eps, activation, alpha, beta, threshold, as `spec.Epilogue.codes`.
        out: where y goes, laid out as z may be; it may be z itself. None: a new tensor.

    Returns:
        y (rows, cols), or half the columns, in z's dtype; statistics of z + bias, float32 (float64
        for float64): (2, rows) mean and rstd for layer norm, (1, rows) rstd for rms norm, (0, rows)
        without.

    Raises:
        ValueError: a gated activation, and an odd number of columns or an `out`.
    """
    rows, cols = z.shape
    if out is not None and is_gated(scalars[2]):
        raise ValueError(
            f"fused: y of {ACTIVATION_NAMES[scalars[2]]} has half the columns of z, so it cannot be"
            " written over z; call row_forward"
        )
    y = z.new_empty((rows, features_of(cols, scalars[2]))) if out is None else out
    statistics = z.new_empty((STATISTICS[NORM_NAMES[scalars[0]]], rows), dtype=compute_dtype(z))
    if rows == 0 or cols == 0:
        return y, statistics.zero_()
    problem, _kept = _problem(z, (bias, norm_weight, norm_bias), seed, scalars)
    if residual is not None:
        problem.residual, problem.residual_stride = residual.data_ptr(), residual.stride(0)
    problem.out, problem.out_stride = y.data_ptr(), y.stride(0)
    problem.statistics = statistics.data_ptr()
    _launch("forward", problem, z)
    return y, statistics


def row_forward_(z: Tensor, *args: Any) -> None:
    """`row_forward` that writes y over z; not with a gated activation."""
    row_forward(z, *args, out=z)


def row_backward(
    dy: Tensor,
    z: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    statistics: Tensor,
    seed: Tensor | None,
    wanted: int,
    *scalars: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `row_forward`, given the gradient dy of its result.

    Args:
        dy, z: (rows, cols), last stride 1, any row stride and offset; one dtype. Behind a gated
            activation dy has half the columns.
        bias, norm_weight, norm_bias, seed, scalars: as in the forward.
        statistics: as the forward returned them.
        wanted: sum of the WANT_ constants of spec.py: the sums over the rows to make.

    Returns:
        dz (rows, cols) in z's dtype; dnorm_weight and dnorm_bias, (cols,) in the dtypes of their
        parameters, and dbias, (cols,) in z's dtype. Those that are not wanted, or whose parameter
        does not exist, are empty, (0,), in the statistics' dtype.
    """
    rows, cols = z.shape
    features = features_of(cols, scalars[2])
    compute = compute_dtype(z)
    dz = z.new_empty((rows, cols))
    if scalars[0] == 0:
        norm_weight = norm_bias = None
    owners = (
        norm_weight if wanted & WANT_NORM_WEIGHT else None,
        norm_bias if wanted & WANT_NORM_BIAS else None,
        z if wanted & WANT_BIAS else None,
    )
    empty = rows == 0 or cols == 0
    gradients = [
        None if owner is None else (owner.new_zeros if empty else owner.new_empty)((cols,))
        for owner in owners
    ]
    if not empty:
        problem, _kept = _problem(z, (bias, norm_weight, norm_bias), seed, scalars)
        made = sum(t is not None for t in gradients)
        partial = z.new_empty((made, 1, chunks_of(rows, features), cols), dtype=compute)
        means = z.new_empty((2 if scalars[0] else 0, rows), dtype=compute)
        problem.dy, problem.dy_stride = dy.data_ptr(), dy.stride(0)
        problem.out, problem.out_stride = dz.data_ptr(), cols
        problem.statistics = statistics.data_ptr()
        problem.means = means.data_ptr() if scalars[0] else None
        problem.partial, problem.chunks = partial.data_ptr(), partial.shape[2]
        problem.wanted = wanted_of(gradients)
        _launch("backward", problem, z)
        if made:
            add_up(partial, gradients)
    dnorm_weight, dnorm_bias, dbias = (
        z.new_empty((0,), dtype=compute) if t is None else t for t in gradients
    )
    return dz, dnorm_weight, dnorm_bias, dbias
