"""Second stage of sums over the rows: adds up what the programs of a first stage have summed.

The order of the additions follows from the shape alone, so the bits repeat; no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..tuning import rules as tuning
from .tile import row_offset


@triton.jit(do_not_specialize=("programs", "cols"))
def _column_sum_kernel(
    partial_ptr,
    out0_ptr,
    out1_ptr,
    out2_ptr,
    programs,
    cols,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sums partial [planes, programs, cols] over the programs; grid axis 1 is the plane."""
    plane = tl.program_id(1)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = column < (cols // ALIGN) * ALIGN
    partial_ptr += tl.multiple_of(tl.cast(plane, tl.int64) * programs * cols, ALIGN)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in tl.range(0, programs, BLOCK_M):
        program = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_M)
        mask = (program < programs)[:, None] & column_mask[None, :]
        offset = row_offset(program, cols, ALIGN) + column[None, :]
        total += tl.load(partial_ptr + offset, mask=mask, other=0.0)
    sums = tl.sum(total, 0)
    if plane == 0:
        tl.store(out0_ptr + column, sums, mask=column_mask)
    if out1_ptr is not None:
        if plane == 1:
            tl.store(out1_ptr + column, sums, mask=column_mask)
    if out2_ptr is not None:
        if plane == 2:
            tl.store(out2_ptr + column, sums, mask=column_mask)


def sum_columns(partial: Tensor, outputs: list[Tensor]) -> None:
    """outputs[i] = partial[i].sum(0) of float32 (planes, programs, cols), at most three planes."""
    planes, programs, cols = partial.shape
    tile = tuning.column_sum_tile(tuning.device(partial))
    _column_sum_kernel[(triton.cdiv(cols, tile.block_n), planes)](
        partial,
        *(outputs + [None] * (3 - planes)),
        programs,
        cols,
        ALIGN=tuning.alignment(cols, 4),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        num_warps=tile.num_warps,
    )
