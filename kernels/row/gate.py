"""Gated activations as device functions: a value (a) times an activation of its gate (b).

    y = a · act(b),   a = h[:, :N],   b = h[:, N:],   h = norm(z + bias) over all 2N columns

    gradient, with g = dy mask:   da = g act(b),   db = act'(b) (g a)

A program has a tile of either half, of the same columns, so that y needs no exchange of data.
`cols` is N, `column` counts in [0, N), and `gate_column` is column + N: there z and the parameters,
which have 2N entries, are read a second time.
Source: Dauphin et al., "Language modeling with gated convolutional networks", 2017; Shazeer, "GLU
variants improve transformer", 2020.
"""

import triton
import triton.language as tl

from ..parts.norm import centre
from ..parts.output import Drop, output_gradient
from ..parts.tile import Place, add_columns, load_columns, load_place, row_offset, times_columns


@triton.jit
def load_halves(z_ptr, bias_ptr, z_offset, column, gate_column, column_mask, mask):
    """Float32 tiles of z + bias: of the value and of the gate, [BLOCK_M, BLOCK_N] each."""
    bias_a = load_columns(bias_ptr, column, column_mask) if bias_ptr is not None else None
    bias_b = load_columns(bias_ptr, gate_column, column_mask) if bias_ptr is not None else None
    a = load_place(Place(z_ptr, z_offset, column[None, :], mask))
    b = load_place(Place(z_ptr, z_offset, gate_column[None, :], mask))
    if bias_ptr is not None:
        a, b = a + bias_a, b + bias_b
    return a, b


@triton.jit
def halves_statistics(
    a, b, first, column_mask, cols, eps, NORM: tl.constexpr, EVEN_N: tl.constexpr
):
    """(a - mean, b - mean, mean, rstd): `norm.row_statistics` of a row that two tiles hold."""
    a = centre(a, first, column_mask, NORM, EVEN_N)
    b = centre(b, first, column_mask, NORM, EVEN_N)
    if NORM == "layer":
        shifted_mean = tl.sum(a + b, 1) / (2 * cols)
    else:
        shifted_mean = tl.zeros((a.shape[0],), tl.float32)
    a = centre(a, shifted_mean, column_mask, NORM, EVEN_N)
    b = centre(b, shifted_mean, column_mask, NORM, EVEN_N)
    rstd = tl.rsqrt(tl.sum(a * a + b * b, 1) / (2 * cols) + eps)
    return a, b, first + shifted_mean, rstd


@triton.jit
def affine_halves(a, b, norm_weight_ptr, norm_bias_ptr, column, gate_column, column_mask):
    """`norm.affine` of both halves."""
    a = times_columns(a, norm_weight_ptr, column, column_mask)
    a = add_columns(a, norm_bias_ptr, column, column_mask)
    b = times_columns(b, norm_weight_ptr, gate_column, column_mask)
    return a, add_columns(b, norm_bias_ptr, gate_column, column_mask)


@triton.jit
def halves_gradient(
    dy_ptr,
    a,
    b,
    norm_weight_ptr,
    norm_bias_ptr,
    seed_ptr,
    mean,
    rstd,
    row,  # int64 [BLOCK_M]
    col0,
    column,
    gate_column,
    column_mask,
    mask,
    cols,
    stride_dym,
    scalars,
    threshold,
    FORM: tl.constexpr,
):
    """(da, db, xhat of a, xhat of b), of a and b, tiles of z + bias.

    da and db are the gradients of what the norm gives. Without a norm xhat is a and b themselves.
    In the padding dy is 0, and with it da and db.
    """
    ALIGN: tl.constexpr = FORM.ALIGN
    NORM: tl.constexpr = FORM.NORM
    offset = row_offset(row, stride_dym, ALIGN)
    g = load_place(Place(dy_ptr, offset, column[None, :], mask))
    xhat_a, xhat_b = a, b
    if NORM is not None:
        xhat_a = centre(a, mean, None, NORM, True) * rstd[:, None]
        xhat_b = centre(b, mean, None, NORM, True) * rstd[:, None]
        a, b = affine_halves(
            *(xhat_a, xhat_b, norm_weight_ptr, norm_bias_ptr, column, gate_column, column_mask)
        )
    da, db = output_gradient(g, a, b, Drop(seed_ptr, row, col0, cols, threshold), scalars, FORM)
    return da, db, xhat_a, xhat_b


@triton.jit
def halves_gradient_means(da, db, xhat_a, xhat_b, cols, NORM: tl.constexpr):
    """`norm.row_gradient_means` of a row that two tiles hold, or their share of it: [M], [M]."""
    if NORM == "layer":
        mean_g = tl.sum(da + db, 1) / (2 * cols)
    else:
        mean_g = tl.zeros((da.shape[0],), tl.float32)
    return mean_g, tl.sum(da * xhat_a + db * xhat_b, 1) / (2 * cols)
