"""The row epilogue of one tile, from memory to memory.

y = residual + dropout(activation(norm(z + bias) + shortcut))
"""

import triton
import triton.language as tl

from ..parts.norm import affine, row_statistics, store_statistics
from ..parts.output import Drop, drop, write_output
from ..parts.tile import (
    Place,
    add_place,
    load_first,
    load_place,
    load_rows,
    row_offset,
    store_place,
)


@triton.jit
def write_rows(
    z_ptr,
    parameters,
    residual_ptr,
    y_ptr,
    statistics_ptr,
    seed_ptr,
    row,  # int64 [BLOCK_M]
    col0,
    rows,
    cols,
    stride_zm,
    stride_rm,
    stride_ym,
    scalars,
    threshold,
    FORM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    total_ptr=None,
    shortcut_ptr=None,
):
    """y, and under a norm the statistics: the tile then holds whole rows, and col0 is 0.

    parameters: bias, norm_weight and norm_bias.
    total_ptr: not None for add & norm, total = residual + dropout(z + bias) and y = norm(total),
    with no activation; total has contiguous rows.
    shortcut_ptr: with contiguous rows, or None.
    """
    ALIGN: tl.constexpr = FORM.ALIGN
    NORM: tl.constexpr = FORM.NORM
    EVEN_N: tl.constexpr = FORM.EVEN_N
    bias_ptr, norm_weight_ptr, norm_bias_ptr = parameters
    column = col0 + tl.arange(0, BLOCK_N)
    row_mask = row < rows
    column_mask = column < (cols // ALIGN) * ALIGN
    mask = row_mask[:, None] & column_mask[None, :]

    z_offset = row_offset(row, stride_zm, ALIGN)
    place = Place(z_ptr, z_offset, column[None, :], mask)
    h = load_rows(place, bias_ptr, column, column_mask)  # [BLOCK_M, BLOCK_N]
    part = Drop(seed_ptr, row, col0, cols, threshold)
    added = Place(residual_ptr, row_offset(row, stride_rm, ALIGN), column[None, :], mask)
    if total_ptr is not None:
        h = drop(h, part, FORM) + load_place(added)
        # The norm reads the sum as it is stored, so that it can be computed again from it.
        h = h.to(total_ptr.dtype.element_ty)
        total = Place(total_ptr, row_offset(row, cols, ALIGN), column[None, :], mask)
        store_place(total, h)
        h = h.to(tl.float32)
    if NORM is not None:
        first = tl.zeros((row.shape[0],), tl.float32)
        if NORM == "layer" and total_ptr is not None:
            first = tl.sum(tl.where(column[None, :] == 0, h, 0.0), 1)
        elif NORM == "layer":
            first = load_first(z_ptr, row, stride_zm, row_mask, bias_ptr)
        eps = tl.cast(scalars[0], tl.float32)
        h, mean, rstd = row_statistics(h, first, column_mask, cols, eps, NORM, EVEN_N)
        store_statistics(statistics_ptr, row, rows, mean, rstd, NORM)
        h, _ = affine(h, rstd, norm_weight_ptr, norm_bias_ptr, column, column_mask)
    out = Place(y_ptr, row_offset(row, stride_ym, ALIGN), column[None, :], mask)
    if total_ptr is not None:
        store_place(out, h)
    else:
        offset = row_offset(row, cols, ALIGN)
        h = add_place(h, Place(shortcut_ptr, offset, column[None, :], mask))
        write_output(h, None, part, added, out, scalars, FORM)
