"""Reading and writing tiles of matrices, and the rows of parameters that go with them."""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Place(NamedTuple):
    """Where a tile lies: a pointer, offsets of its rows [M, 1] and columns [1, N], and a mask.

    With column None, row holds the offsets [M, N] themselves. With mask None, ptr is a tensor
    descriptor, and row and column are those of the tile's corner.
    """

    ptr: Any
    row: Any
    column: Any
    mask: Any


@triton.jit
def load_place(place):
    """The tile of a `Place` as float32, 0 where it is masked."""
    if place.mask is None:
        return place.ptr.load([place.row, place.column]).to(tl.float32)
    else:
        offset = place.row if place.column is None else place.row + place.column
        return tl.load(place.ptr + offset, mask=place.mask, other=0.0).to(tl.float32)


@triton.jit
def store_place(place, x):
    """Writes x, rounded to the dtype of what is there, to a `Place`."""
    if place.mask is None:
        place.ptr.store([place.row, place.column], x.to(place.ptr.dtype))
    else:
        ptr = place.ptr + place.row
        tl.store(ptr if place.column is None else ptr + place.column, x, mask=place.mask)


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
def add_columns(x, ptr, column, column_mask):
    """x plus a (cols,) parameter, which may be absent."""
    if ptr is not None:
        x += load_columns(ptr, column, column_mask)
    return x


@triton.jit
def load_rows(place, bias_ptr, column, column_mask):
    """The tile of a `Place` plus the bias of its columns, where there is one."""
    bias = load_columns(bias_ptr, column, column_mask) if bias_ptr is not None else None
    x = load_place(place)
    if bias_ptr is not None:
        x += bias
    return x


@triton.jit
def times_columns(x, ptr, column, column_mask):
    """x times a (cols,) parameter, which may be absent."""
    if ptr is not None:
        x *= load_columns(ptr, column, column_mask)
    return x


@triton.jit
def load_first(ptr, row, stride, row_mask, bias_ptr):
    """The first element of each row of z, plus the linear bias where there is one: [BLOCK_M]."""
    first = tl.load(ptr + row * stride, mask=row_mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        first += tl.load(bias_ptr).to(tl.float32)
    return first


@triton.jit
def add_place(x, place):
    """x plus the tile of a `Place`, which may be absent."""
    if place.ptr is not None:
        x += load_place(place)
    return x
