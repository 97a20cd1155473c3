"""What the GEMM kernels share: which tile is a program's, its product, and parts of it.

    z = x · weightᵀ + bias,   x (rows, inner), weight (cols, inner) as nn.Linear holds it

The product is accumulated in float32 and rounded to z's dtype once, where the library's GEMM rounds
it too; what follows starts from the rounded z. So a kernel with an epilogue gives the same function
of z as the pass behind the library's GEMM, and its backward sees the z that its forward saw.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..parts.tile import add_columns, row_offset
from ..tuning import gemm as gemm_tuning
from ..tuning import rules as tuning

# Row blocks whose programs follow one another, so that they find weight's columns in L2.
ROW_BLOCKS = tl.constexpr(8)


class ProductTile(NamedTuple):
    """What a product is compiled for: one constant of the launch.

    ALIGN_K divides inner and both strides; EVEN_K: BLOCK_K divides inner. ALIGN_N divides cols.
    """

    ALIGN_K: int
    ALIGN_N: int
    EVEN_K: bool
    PRECISION: str
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    STAGES: int


def product_tile(
    x: Tensor, weight: Tensor, tile: gemm_tuning.GemmTile, precision: str, align: int
) -> ProductTile:
    """The constant for x · weightᵀ; align: of the columns, and of what else has as many."""
    inner, strides = x.shape[1], (x.stride(0), weight.stride(0))
    align_k = tuning.alignment(inner, x.element_size(), *strides)
    even = inner % tile.block_k == 0
    return ProductTile(align_k, align, even, precision, *tile[:4])


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
    TILE: tl.constexpr,
):
    """x · weightᵀ of a tile, float32 [BLOCK_M, BLOCK_N]; 0 outside the masks."""
    PRECISION: tl.constexpr = TILE.PRECISION
    ALIGN: tl.constexpr = TILE.ALIGN_K
    k = tl.arange(0, TILE.BLOCK_K)
    end = (inner // ALIGN) * ALIGN
    # The transposed weight, [BLOCK_K, BLOCK_N].
    weight_offset = tl.multiple_of(column.to(tl.int64) * stride_wn, ALIGN)[None, :] + k[:, None]
    x_ptr += row_offset(row, stride_xm, ALIGN) + k[None, :]
    weight_ptr += weight_offset
    z = tl.zeros((row.shape[0], column.shape[0]), tl.float32)
    for k0 in tl.range(0, inner, TILE.BLOCK_K, num_stages=TILE.STAGES):
        x_mask = row_mask[:, None]
        weight_mask = column_mask[None, :]
        if not TILE.EVEN_K:
            x_mask = x_mask & (k0 + k < end)[None, :]
            weight_mask = weight_mask & (k0 + k < end)[:, None]
        x = tl.load(x_ptr, mask=x_mask, other=0.0)
        weight = tl.load(weight_ptr, mask=weight_mask, other=0.0)
        z = tl.dot(x, weight, z, input_precision=PRECISION)
        x_ptr += TILE.BLOCK_K
        weight_ptr += TILE.BLOCK_K
    return z


@triton.jit
def write_product(
    x_ptr,
    weight_ptr,
    bias_ptr,
    z_ptr,
    rows,
    cols,
    inner,
    stride_xm,
    stride_wn,
    WHOLE: tl.constexpr,
    TILE: tl.constexpr,
):
    """z = x · weightᵀ + bias of the tile of this program, to memory; bias may be absent.

    Returns:
        z as it is stored; the tile's first row (int64) and column; the masks of its rows and
        columns, and its columns.
    """
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    ALIGN_N: tl.constexpr = TILE.ALIGN_N
    row0, col0 = tile_of_program(tl.program_id(0), rows, cols, WHOLE, BLOCK_M, BLOCK_N)
    row = row0 + tl.arange(0, BLOCK_M)
    column = col0 + tl.arange(0, BLOCK_N)
    row_mask = row < rows
    column_mask = column < (cols // ALIGN_N) * ALIGN_N
    z = product(
        x_ptr, weight_ptr, row, row_mask, column, column_mask, inner, stride_xm, stride_wn, TILE
    )
    z = add_columns(z, bias_ptr, column, column_mask).to(z_ptr.dtype.element_ty)
    mask = row_mask[:, None] & column_mask[None, :]
    tl.store(z_ptr + row_offset(row, cols, ALIGN_N) + column[None, :], z, mask=mask)
    return z, row0, col0, row_mask, column, column_mask


@triton.jit
def halves(z):
    """The left and the right half of a tile's columns."""
    M: tl.constexpr = z.shape[0]
    N: tl.constexpr = z.shape[1]
    return tl.split(tl.permute(tl.reshape(z, (M, 2, N // 2)), (0, 2, 1)))
