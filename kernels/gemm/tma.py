"""Linear, activation and dropout without a norm, by tensor descriptors (TMA, sm_90 and newer).

    y = residual + dropout(activation(x · weightᵀ + bias))

No sum along a row is taken, so the accumulators need not be rearranged for one: the epilogue works
on them in registers, on one quarter of the columns after the other. static, sm_90, four warps: 231
registers and no spilled words so, 255 and 34 by halves. Four warps and 98 KB leave room for a
second program on the SM, whose product overlaps this one's epilogue.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..parts.output import Drop, Form, write_output
from ..parts.tile import Place, add_columns
from ..tuning.rules import device_of
from .tile import ProductTile, halves, tile_of_program


@triton.jit(do_not_specialize=("rows", "cols", "inner", "threshold"))
def _gemm_tma_kernel(
    x_desc,
    weight_desc,
    bias_ptr,
    residual_desc,
    z_desc,
    y_desc,
    seed_ptr,
    rows,
    cols,
    inner,
    scalars,
    threshold,
    FORM: tl.constexpr,
    TILE: tl.constexpr,
):
    """One tile a program. The descriptors' blocks are BLOCK_K or BLOCK_N // 4 wide."""
    PRECISION: tl.constexpr = TILE.PRECISION
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    PART: tl.constexpr = BLOCK_N // 4
    row0, col0 = tile_of_program(tl.program_id(0), rows, cols, False, BLOCK_M, BLOCK_N)
    z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in tl.range(0, inner, TILE.BLOCK_K, num_stages=TILE.STAGES):
        x = x_desc.load([row0.to(tl.int32), k0])
        weight = weight_desc.load([col0, k0])
        z = tl.dot(x, weight.T, z, input_precision=PRECISION)
    left, right = halves(z)
    for half in tl.static_range(2):
        z0, z1 = halves(left if half == 0 else right)
        for quarter in tl.static_range(2):
            first = col0 + (2 * half + quarter) * PART
            column = first + tl.arange(0, PART)
            z = add_columns(z0 if quarter == 0 else z1, bias_ptr, column, column < cols)
            z = z.to(y_desc.dtype)
            corner = row0.to(tl.int32)
            if z_desc is not None:
                z_desc.store([corner, first], z)
            row = row0 + tl.arange(0, BLOCK_M)
            write_output(
                *(z.to(tl.float32), None, Drop(seed_ptr, row, first, cols, threshold)),
                Place(residual_desc, corner, first, None),
                *(Place(y_desc, corner, first, None), scalars, FORM),
            )


def can_describe(*tensors: Tensor | None) -> bool:
    """Whether TMA can address these matrices: 16-byte addresses and row strides."""
    return all(
        t is None
        or (
            t.data_ptr() % 16 == 0
            and t.stride(1) == 1
            and (t.stride(0) * t.element_size()) % 16 == 0
            and t.numel() > 0
        )
        for t in tensors
    )


def plain_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    z: Tensor | None,
    y: Tensor,
    scalars: tuple[float, float, float],
    threshold: int,
    form: Form,
    tile: ProductTile,
    num_warps: int,
) -> None:
    """Writes y and, where it is wanted, z; `can_describe` holds for all matrices.

    Args:
        scalars: eps, alpha and beta.
        The others are those of `gemm_row.linear_row_forward`.
    """
    (rows, inner), cols = x.shape, weight.shape[0]

    def described(t: Tensor | None, *block: int) -> TensorDescriptor | None:
        return None if t is None else TensorDescriptor.from_tensor(t, list(block))

    outputs = (tile.BLOCK_M, tile.BLOCK_N // 4)
    programs = triton.cdiv(rows, tile.BLOCK_M) * triton.cdiv(cols, tile.BLOCK_N)
    with device_of(x):
        _gemm_tma_kernel[(programs,)](
            described(x, tile.BLOCK_M, tile.BLOCK_K),
            described(weight, tile.BLOCK_N, tile.BLOCK_K),
            bias,
            described(residual, *outputs),
            described(z, *outputs),
            described(y, *outputs),
            seed,
            rows,
            cols,
            inner,
            scalars,
            threshold,
            FORM=form,
            TILE=tile,
            num_warps=num_warps,
        )
