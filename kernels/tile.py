"""Reading tiles of matrices, and the rows of parameters that go with them, as float32."""

import triton
import triton.language as tl


@triton.jit
def row_offset(row, stride, ALIGN: tl.constexpr):
    """64-bit offsets of the rows, [BLOCK_M, 1], with the divisibility that the host has checked."""
    return tl.multiple_of(row * stride, ALIGN)[:, None]


@triton.jit
def load_columns(ptr, column, column_mask):
    """A (cols,) parameter as float32 [1, BLOCK_N].

    Two-dimensional on purpose: in a one-row tile the load then takes the layout of z's tile, also
    when the parameter is float32 and z is bf16, and nothing has to be rearranged. Callers test for
    absent parameters: a jitted function that returns None does not compile in triton 3.6.
    """
    return tl.load(ptr + column[None, :], mask=column_mask[None, :], other=0.0).to(tl.float32)


@triton.jit
def load_tile(ptr, offset, mask, bias):
    """A float32 tile of z, plus the linear bias where there is one."""
    x = tl.load(ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        x += bias
    return x


@triton.jit
def load_first(ptr, row, stride, row_mask, bias_ptr):
    """The first element of each row of z, plus the linear bias where there is one: [BLOCK_M]."""
    first = tl.load(ptr + row * stride, mask=row_mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        first += tl.load(bias_ptr).to(tl.float32)
    return first
