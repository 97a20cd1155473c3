"""The row operators for CUDA tensors by the CUDA C++ kernels; schemas.py says what they return.

z, dy, residual and y have one dtype, last stride 1, any row stride and any offset; the parameters
are contiguous and have any floating dtype; the seed may be None where threshold is 0. The
arithmetic is in csrc/cuda/row_*.cuh, that of gated activations in csrc/cuda/gated_*.cuh.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ..spec import ACTIVATION_NAMES, NORM_NAMES, STATISTICS, is_gated
from .cuda_library import add_up, compute_dtype, launch, new_sums, returned, scalars_of, wanted_of

# Rows that are summed up by one block at least, and blocks that share the rows at most: what fills
# a large GPU several times over.
_ROWS_OF_CHUNK, _BLOCKS = 64, 1024
_COLS_OF_BLOCK = 256  # about


class Scalars(NamedTuple):
    """The operators' scalars, in the order of `Spec.row`."""

    norm: int
    eps: float
    activation: int
    alpha: float
    beta: float
    threshold: int


def chunks_of(rows: int, cols: int, segments: int = 1) -> int:
    """Into how many chunks the rows of a segment are split for sums, by the shape alone."""
    most = max(1, _BLOCKS // (segments * -(-cols // _COLS_OF_BLOCK)))
    return max(1, min(most, -(-rows // _ROWS_OF_CHUNK)))


def features_of(cols: int, activation: int) -> int:
    """The columns of y and dy, given those of z; a gated activation refuses an odd number."""
    if not is_gated(activation):
        return cols
    if cols % 2:
        raise ValueError(
            f"fused: {ACTIVATION_NAMES[activation]} halves the columns of z, so their number must"
            f" be even, got {cols}"
        )
    return cols // 2


def _launch(
    direction: str,
    scalars: Scalars,
    z: Tensor,
    parameters: tuple[Tensor | None, Tensor | None, Tensor | None],
    tensors: dict[str, Tensor | None],
    chunks: int = 0,
    wanted: int = 0,
) -> None:
    """Forward or backward of any activation; parameters: bias, norm_weight and norm_bias."""
    compute, (rows, cols) = compute_dtype(z), z.shape
    served = (z.dtype, compute)
    tensors["z"] = z
    # Without a norm the other two may be of another size.
    for name, t in zip(("bias", "norm_weight", "norm_bias"), parameters, strict=True):
        if t is not None and (scalars.norm or name == "bias"):
            tensors[name] = t if t.dtype in served else t.to(compute)
    family = "gated" if is_gated(scalars.activation) else "row"
    numbers = scalars._asdict() | {"rows": rows, "cols": cols, "chunks": chunks, "wanted": wanted}
    launch(f"{family}_{direction}", z, tensors, numbers)


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
    """y = residual + dropout(activation(norm(z + bias))), and the statistics of z + bias.

    out: where y goes; it may be z itself, but not with a gated activation. None: a new tensor.
    """
    (rows, cols), given = z.shape, scalars_of(Scalars, scalars)
    if out is not None and is_gated(given.activation):
        raise ValueError(
            f"fused: y of {ACTIVATION_NAMES[given.activation]} has half the columns of z, so it"
            " cannot be written over z; call row_forward"
        )
    y = z.new_empty((rows, features_of(cols, given.activation))) if out is None else out
    statistics = z.new_empty((STATISTICS[NORM_NAMES[given.norm]], rows), dtype=compute_dtype(z))
    if z.numel() == 0:
        return y, statistics.zero_()
    tensors = {"seed": seed, "residual": residual, "out": y, "statistics": statistics}
    _launch("forward", given, z, (bias, norm_weight, norm_bias), tensors)
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
) -> tuple[Tensor, ...]:
    """dz, dnorm_weight, dnorm_bias, dbias and nothing, given the gradient dy of y."""
    (rows, cols), given, compute = z.shape, scalars_of(Scalars, scalars), compute_dtype(z)
    features, dz = features_of(cols, given.activation), z.new_empty((rows, cols))
    if not given.norm:
        norm_weight = norm_bias = None
    empty = z.numel() == 0
    sums = new_sums(z, cols, wanted, norm_weight, norm_bias, [empty] * 3)
    if not empty:
        chunks, made = chunks_of(rows, features), sum(t is not None for t in sums)
        partial = z.new_empty((made, 1, chunks, cols), dtype=compute)
        means = z.new_empty((2 if given.norm else 0, rows), dtype=compute)
        tensors = {"dy": dy, "statistics": statistics, "seed": seed}
        tensors |= {"out": dz, "means": means, "partial": partial}
        parameters = (bias, norm_weight, norm_bias)
        _launch("backward", given, z, parameters, tensors, chunks, wanted_of(sums))
        add_up(partial, sums)
    return returned(dz, sums)
