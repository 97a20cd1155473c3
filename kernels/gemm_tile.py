"""What the GEMM kernels share: which tile is a program's, its product, and parts of it.

    z = x · weightᵀ + bias,   x (rows, inner), weight (cols, inner) as nn.Linear holds it

The product is accumulated in float32 and rounded to z's dtype once, where the library's GEMM rounds
it too; what follows starts from the rounded z. So a kernel with an epilogue gives the same function
of z as the pass behind the library's GEMM, and its backward sees the z that its forward saw.
"""

import triton
import triton.language as tl

from .tile import load_columns, row_offset

# Row blocks whose programs follow one another, so that they find weight's columns in L2.
ROW_BLOCKS = tl.constexpr(8)


@triton.jit
def tile_of_program(index, rows, cols, WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N):
    """(first row, int64; first column) of the tile of this index.

    WHOLE: a tile has every column of its rows.
    """
    if WHOLE:
        return index.to(tl.int64) * BLOCK_M, index * 0
    else:
        row_blocks = tl.cdiv(rows, BLOCK_M)
        col_blocks = tl.cdiv(cols, BLOCK_N)
        first = index // (ROW_BLOCKS * col_blocks) * ROW_BLOCKS
        size = tl.minimum(row_blocks - first, ROW_BLOCKS)
        place = index % (ROW_BLOCKS * col_blocks)
        return (first + place % size).to(tl.int64) * BLOCK_M, place // size * BLOCK_N


@triton.jit
def product(
    x_ptr,
    weight_ptr,
    row,  # int64 [BLOCK_M]
    row_mask,
    column,
    column_mask,
    inner,
    stride_xm,
    stride_wn,
    ALIGN: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """x · weightᵀ of a tile, float32 [BLOCK_M, BLOCK_N]; 0 outside the masks.

    ALIGN divides inner and both strides; EVEN_K: BLOCK_K divides inner.
    """
    k = tl.arange(0, BLOCK_K)
    end = (inner // ALIGN) * ALIGN
    # The transposed weight, [BLOCK_K, BLOCK_N].
    weight_offset = tl.multiple_of(column.to(tl.int64) * stride_wn, ALIGN)[None, :] + k[:, None]
    x_ptr += row_offset(row, stride_xm, ALIGN) + k[None, :]
    weight_ptr += weight_offset
    z = tl.zeros((row.shape[0], column.shape[0]), tl.float32)
    for k0 in tl.range(0, inner, BLOCK_K, num_stages=STAGES):
        x_mask = row_mask[:, None]
        weight_mask = column_mask[None, :]
        if not EVEN_K:
            x_mask = x_mask & (k0 + k < end)[None, :]
            weight_mask = weight_mask & (k0 + k < end)[:, None]
        x = tl.load(x_ptr, mask=x_mask, other=0.0)
        weight = tl.load(weight_ptr, mask=weight_mask, other=0.0)
        z = tl.dot(x, weight, z, input_precision=PRECISION)
        x_ptr += BLOCK_K
        weight_ptr += BLOCK_K
    return z


@triton.jit
def add_bias(z, bias_ptr, column, column_mask):
    """z + bias; bias may be absent."""
    if bias_ptr is not None:
        z += load_columns(bias_ptr, column, column_mask)
    return z


@triton.jit
def halves(z):
    """The left and the right half of a tile's columns."""
    M: tl.constexpr = z.shape[0]
    N: tl.constexpr = z.shape[1]
    return tl.split(tl.permute(tl.reshape(z, (M, 2, N // 2)), (0, 2, 1)))
