"""Layer and RMS norm along the rows of a tile: statistics, application, gradient.

    layer: xhat = (x - mean) rstd,  rstd = 1/sqrt(mean((x - mean)²) + eps)
    rms:   xhat = x rstd,           rstd = 1/sqrt(mean(x²) + eps)
    h = xhat weight + bias

    gradient, with g = dh weight:   layer: dx = (g - mean(g) - xhat mean(g xhat)) rstd
                                    rms:   dx = (g           - xhat mean(g xhat)) rstd

The variance is taken in a second pass over the tile, or merged block by block (Chan, Golub,
LeVeque, "Algorithms for computing the sample variance", 1983), never as E[x²] - E[x]².
Formula of the gradient: Ba, Kiros, Hinton, "Layer normalization", 2016, differentiated.
"""

import triton
import triton.language as tl

from .tile import Place, load_columns, load_first, load_rows, row_offset


@triton.jit
def centre(x, mean, column_mask, NORM: tl.constexpr, EVEN_N: tl.constexpr):
    """x - mean for layer norm with zeros in the padding columns, x for rms norm."""
    if NORM != "layer":
        return x
    elif EVEN_N:
        return x - mean[:, None]
    else:
        return tl.where(column_mask[None, :], x - mean[:, None], 0.0)


@triton.jit
def row_statistics(x, first, column_mask, cols, eps, NORM: tl.constexpr, EVEN_N: tl.constexpr):
    """(x - mean, mean, rstd) of the rows of a tile that holds them whole: [M, N], [M], [M].

    `first` [M] is the first element of each row. Subtracted before the sum, it keeps the error of
    the mean relative to the spread of the row and not to its size: a constant row has variance 0
    exactly, where rstd = 1/sqrt(eps) would make an error of one ulp visible. Padding columns of x
    must be 0. The mean of rms norm is 0.
    """
    x = centre(x, first, column_mask, NORM, EVEN_N)
    if NORM == "layer":
        shifted_mean = tl.sum(x, 1) / cols
    else:
        shifted_mean = tl.zeros((x.shape[0],), tl.float32)
    x = centre(x, shifted_mean, column_mask, NORM, EVEN_N)
    return x, first + shifted_mean, tl.rsqrt(tl.sum(x * x, 1) / cols + eps)


@triton.jit
def merge_statistics(x, first, column_mask, seen, new, mean, m2, NORM: tl.constexpr):
    """Mean of x - first and sum of squared deviations of `seen` columns, after `new` more in x."""
    if NORM == "layer":
        x = centre(x, first, column_mask, NORM, False)
        block_mean = tl.sum(x, 1) / new
        x = centre(x, block_mean, column_mask, NORM, False)
        delta = block_mean - mean
        share = new / (seen + new)
        m2 += tl.sum(x * x, 1) + delta * delta * (seen * share)
        mean += delta * share
    else:
        m2 += tl.sum(x * x, 1)
    return mean, m2


@triton.jit
def store_statistics(ptr, row, rows, mean, rstd, NORM: tl.constexpr):
    """Writes statistics of rows: ptr is [2, rows] (mean, rstd) for layer, [1, rows] for rms."""
    mask = row < rows
    if NORM == "layer":
        tl.store(ptr + row, mean, mask=mask)
        ptr += rows
    tl.store(ptr + row, rstd, mask=mask)


@triton.jit
def load_statistics(ptr, row, rows, NORM: tl.constexpr):
    """(mean, rstd) as `store_statistics` wrote them: [M], [M]. The mean of rms norm is 0."""
    mask = row < rows
    mean = tl.zeros((row.shape[0],), tl.float32)
    if NORM == "layer":
        mean = tl.load(ptr + row, mask=mask, other=0.0)
        ptr += rows
    return mean, tl.load(ptr + row, mask=mask, other=0.0)


@triton.jit
def affine(x, rstd, norm_weight_ptr, norm_bias_ptr, column, column_mask):
    """(xhat · norm_weight + norm_bias, xhat) of these columns; either parameter may be absent."""
    norm_weight = (
        load_columns(norm_weight_ptr, column, column_mask) if norm_weight_ptr is not None else None
    )
    norm_bias = (
        load_columns(norm_bias_ptr, column, column_mask) if norm_bias_ptr is not None else None
    )
    xhat = x * rstd[:, None]
    h = xhat
    if norm_weight_ptr is not None:
        h = h * norm_weight
    if norm_bias_ptr is not None:
        h = h + norm_bias
    return h, xhat


@triton.jit
def row_gradient_means(g, xhat, cols, NORM: tl.constexpr):
    """(mean of g, mean of g xhat) along the rows: [M], [M]. The first is 0 for rms norm."""
    if NORM == "layer":
        mean_g = tl.sum(g, 1) / cols
    else:
        mean_g = tl.zeros((g.shape[0],), tl.float32)
    return mean_g, tl.sum(g * xhat, 1) / cols


@triton.jit
def row_gradient(g, xhat, rstd, mean_g, mean_gx, NORM: tl.constexpr):
    """The gradient with respect to the norm's input: [M, N]."""
    dx = g - xhat * mean_gx[:, None]
    if NORM == "layer":
        dx = dx - mean_g[:, None]
    return dx * rstd[:, None]


@triton.jit
def walk_statistics(
    z_ptr,
    bias_ptr,
    row,  # int64 [BLOCK_M]
    rows,
    cols,
    stride_zm,
    FORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(first, mean - first, m2) of z + bias along rows wider than a tile, block by block: [M] each.

    `first` as in `row_statistics`, mean and m2 as in `merge_statistics`.
    """
    ALIGN: tl.constexpr = FORM.ALIGN
    NORM: tl.constexpr = FORM.NORM
    z_offset = row_offset(row, stride_zm, ALIGN)
    end = (cols // ALIGN) * ALIGN
    first = tl.zeros((BLOCK_M,), tl.float32)
    if NORM == "layer":
        first = load_first(z_ptr, row, stride_zm, row < rows, bias_ptr)
    mean = tl.zeros((BLOCK_M,), tl.float32)  # of z + bias - first
    m2 = tl.zeros((BLOCK_M,), tl.float32)
    for col0 in tl.range(0, cols, BLOCK_N):
        column = col0 + tl.arange(0, BLOCK_N)
        column_mask = column < end
        place = Place(z_ptr, z_offset, column[None, :], column_mask[None, :])
        x = load_rows(place, bias_ptr, column, column_mask)
        seen = tl.cast(col0, tl.float32)
        new = tl.cast(tl.minimum(cols - col0, BLOCK_N), tl.float32)
        mean, m2 = merge_statistics(x, first, column_mask, seen, new, mean, m2, NORM)
    return first, mean, m2
