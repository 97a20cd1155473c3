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

from .activation import activate
from .dropout import dropout_multiplier
from .gemm_tile import add_bias, halves, tile_of_program
from .gemm_tuning import GemmTile
from .tuning import Device, device_of


@triton.jit
def write_part(
    z,
    bias_ptr,
    residual_desc,
    z_desc,
    y_desc,
    seed_ptr,
    row0,  # int64
    col0,
    cols,
    alpha,
    beta,
    threshold,
    ACTIVATION: tl.constexpr,
    PTX: tl.constexpr,
    PER_THREAD: tl.constexpr,
):
    """The epilogue of the columns from col0 on; z is their part of the product, float32."""
    BLOCK_M: tl.constexpr = z.shape[0]
    BLOCK_N: tl.constexpr = z.shape[1]
    column = col0 + tl.arange(0, BLOCK_N)
    place = [row0.to(tl.int32), col0]
    z = add_bias(z, bias_ptr, column, column < cols).to(y_desc.dtype)
    if z_desc is not None:
        z_desc.store(place, z)
    h = z.to(tl.float32)
    y = activate(h, tl.cast(alpha, tl.float32), tl.cast(beta, tl.float32), ACTIVATION, PTX)
    if seed_ptr is not None:
        row = row0 + tl.arange(0, BLOCK_M)
        seed = tl.load(seed_ptr)
        y *= dropout_multiplier(seed, row, col0, cols, threshold, PER_THREAD, BLOCK_M, BLOCK_N)
    if residual_desc is not None:
        y += residual_desc.load(place).to(tl.float32)
    y_desc.store(place, y.to(y_desc.dtype))


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
    alpha,
    beta,
    threshold,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
    PER_THREAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One tile a program. The descriptors' blocks are BLOCK_K or BLOCK_N // 4 wide."""
    row0, col0 = tile_of_program(tl.program_id(0), rows, cols, False, BLOCK_M, BLOCK_N)
    z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in tl.range(0, inner, BLOCK_K, num_stages=STAGES):
        x = x_desc.load([row0.to(tl.int32), k0])
        weight = weight_desc.load([col0, k0])
        z = tl.dot(x, weight.T, z, input_precision=PRECISION)
    left, right = halves(z)
    for half in tl.static_range(2):
        z0, z1 = halves(left if half == 0 else right)
        for quarter in tl.static_range(2):
            write_part(
                *(z0 if quarter == 0 else z1, bias_ptr, residual_desc, z_desc, y_desc, seed_ptr),
                *(row0, col0 + (2 * half + quarter) * (BLOCK_N // 4), cols),
                *(alpha, beta, threshold, ACTIVATION, PTX, PER_THREAD),
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
    activation: str | None,
    scalars: tuple[float, float, int],
    precision: str,
    tile: GemmTile,
    device: Device,
) -> None:
    """Writes y and, where it is wanted, z; `can_describe` holds for all matrices.

    Args:
        scalars: alpha, beta and threshold.
        The others are those of `gemm_row.linear_row_forward`.
    """
    (rows, inner), cols = x.shape, weight.shape[0]

    def described(t: Tensor | None, *block: int) -> TensorDescriptor | None:
        return None if t is None else TensorDescriptor.from_tensor(t, list(block))

    outputs = (tile.block_m, tile.block_n // 4)
    programs = triton.cdiv(rows, tile.block_m) * triton.cdiv(cols, tile.block_n)
    with device_of(x):
        _gemm_tma_kernel[(programs,)](
            described(x, tile.block_m, tile.block_k),
            described(weight, tile.block_n, tile.block_k),
            bias,
            described(residual, *outputs),
            described(z, *outputs),
            described(y, *outputs),
            seed,
            rows,
            cols,
            inner,
            *scalars,
            ACTIVATION=activation,
            PRECISION=precision,
            PTX=device.arch > 0,
            PER_THREAD=min(8, 16 // x.element_size()),
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            STAGES=tile.stages,
            num_warps=tile.num_warps,
        )
