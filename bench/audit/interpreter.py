"""A faithful Triton interpreter: right bf16 arithmetic, checked addresses, counted bytes.

Triton's own interpreter (3.6, 3.7.1) truncates float32 to bf16, multiplies the bit patterns of bf16
matrices, has no inline assembly and lets a wild address through. `install()` mends this by patching
its builder; TRITON_INTERPRET=1 must have been set before triton was first imported.

    install()
    with launches() as log:
        row_forward(...)
    log[0].loaded["z_ptr"]      # bytes

Every address of every load and store must lie on an element of an argument of the launch: for a
matrix with a row stride, the gap behind a row counts as outside. Not modelled: warps, layouts,
races.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

if os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("interpreter.py needs TRITON_INTERPRET=1 before triton is imported")

import triton.language as tl
from triton.runtime import interpreter as triton_interpreter

from .launch import names_in

_Builder = triton_interpreter.InterpreterBuilder
_Handle = triton_interpreter.TensorHandle


@dataclass(frozen=True)
class _Argument:
    name: str
    start: int
    itemsize: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def end(self) -> int:
        last = sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        return self.start + (last + 1) * self.itemsize

    def holds(self, address: int) -> bool:
        """Whether an address is that of an element; the halves of a matrix lie in each other."""
        element = (address - self.start) // self.itemsize
        inside = self.start <= address < self.end
        halved = len(self.shape) == 2 and self.strides[0] >= 2 * self.shape[1]
        return inside and not (halved and element % self.strides[0] >= self.shape[1])

    def check(self, kind: str, address: np.ndarray, itemsize: int) -> None:
        """Raises unless every address is that of an element."""
        offset = address - self.start
        last = int(offset.max())
        if last + itemsize > self.end - self.start or itemsize != self.itemsize:
            raise IndexError(f"{kind} {last + itemsize} bytes into {self.name} {self.shape}")
        if (offset % itemsize).any():
            raise IndexError(f"{kind} between the elements of {self.name}")
        if len(self.shape) == 2 and self.strides[1] == 1 and self.strides[0] > self.shape[1]:
            column = int((offset // itemsize % self.strides[0]).max())
            if column >= self.shape[1]:
                raise IndexError(f"{kind} of column {column} of {self.name} {self.shape}")


@dataclass
class Launch:
    """What one kernel launch moved, and how large its tensors are: bytes by argument name."""

    kernel: str
    grid: tuple[int, ...]
    sizes: dict[str, int] = field(default_factory=dict)
    loaded: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    stored: dict[str, int] = field(default_factory=lambda: defaultdict(int))


class _State:
    """The launch that is running, its arguments, and the log that was asked for."""

    arguments: tuple[_Argument, ...] = ()
    launch = Launch("none", ())
    log: list[Launch] | None = None
    installed = False


@contextmanager
def launches() -> Iterator[list[Launch]]:
    """The launches made inside the block, in order."""
    _State.log = log = []
    try:
        yield log
    finally:
        _State.log = None


def _record(kind: str, pointers: np.ndarray, mask: np.ndarray, itemsize: int) -> None:
    address = pointers[np.broadcast_to(mask, pointers.shape)].astype(np.int64).ravel()
    if address.size == 0:
        return
    low = int(address.min())
    for argument in _State.arguments:
        if argument.holds(low):
            argument.check(kind, address, itemsize)
            launch = _State.launch
            moved = launch.loaded if kind == "load" else launch.stored
            moved[argument.name] += address.size * itemsize
            return
    raise IndexError(f"{kind} outside every argument")


def _bf16_to_float(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _float_to_bf16(x: np.ndarray) -> np.ndarray:
    """Round to nearest, ties to even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
    return np.where(np.isnan(x), np.uint32(0x7FC0), rounded).astype(np.uint16)


def _patch_bf16() -> None:
    cast, dot = _Builder.cast_impl, _Builder.create_dot

    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.bfloat16 and target != tl.bfloat16:
            numpy_type = triton_interpreter._get_np_dtype(dst_type)
            return _Handle(_bf16_to_float(src.data).astype(numpy_type), target)
        if target == tl.bfloat16 and source != tl.bfloat16:
            return _Handle(_float_to_bf16(src.data.astype(np.float32)), target)
        return cast(self, src, dst_type)

    def create_dot(self, a, b, d, *rest):
        if a.dtype.scalar != tl.bfloat16:
            return dot(self, a, b, d, *rest)
        product = np.matmul(_bf16_to_float(a.data), _bf16_to_float(b.data), dtype=np.float32)
        return _Handle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)

    _Builder.cast_impl, _Builder.create_dot = cast_impl, create_dot


def _patch_memory() -> None:
    load, store = _Builder.create_masked_load, _Builder.create_masked_store

    def create_masked_load(self, ptrs, mask, *rest, **options):
        element = triton_interpreter._get_np_dtype(ptrs.get_element_ty())
        _record("load", ptrs.data, mask.data, np.dtype(element).itemsize)
        return load(self, ptrs, mask, *rest, **options)

    def create_masked_store(self, ptrs, value, mask, *rest, **options):
        _record("store", ptrs.data, mask.data, value.data.dtype.itemsize)
        return store(self, ptrs, value, mask, *rest, **options)

    _Builder.create_masked_load = create_masked_load
    _Builder.create_masked_store = create_masked_store


def _patch_launch() -> None:
    executor = triton_interpreter.GridExecutor
    to_host = executor._init_args_hst

    def _init_args_hst(self, args, kwargs):
        host, host_kwargs = to_host(self, args, kwargs)
        _State.launch = Launch(self.fn.__name__, tuple(self.grid))
        if _State.log is not None:
            _State.log.append(_State.launch)
        found = []

        def note(name: str, given: object) -> None:
            if isinstance(given, tuple):
                for entry_name, entry in zip(names_in(name, given), given, strict=True):
                    note(entry_name, entry)
            value = getattr(given, "base", given)  # of a tensor descriptor
            if hasattr(value, "data_ptr") and value.numel():
                _State.launch.sizes[name] = value.numel() * value.element_size()
                place = (value.data_ptr(), value.element_size())
                shape = (tuple(value.shape), tuple(value.stride()))
                found.append(_Argument(name, *place, *shape))

        # zip stops at the arguments that are given by position
        for name, given in [*zip(self.arg_names, host, strict=False), *host_kwargs.items()]:
            note(name, given)
        _State.arguments = tuple(found)
        return host, host_kwargs

    executor._init_args_hst = _init_args_hst


def _patch_scalars() -> None:
    """Loop bounds: 3.6 calls int() on one-element arrays, which NumPy 2.4 refuses; 3.7 squeezes."""
    patch_tensor = triton_interpreter._patch_lang_tensor

    def _patch_lang_tensor(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    triton_interpreter._patch_lang_tensor = _patch_lang_tensor


# The few PTX instructions that the kernels write by hand, at float32's accuracy.
_PTX = {
    "ex2.approx.ftz.f32": np.exp2,
    "rcp.approx.ftz.f32": lambda x: np.float32(1) / x,
}


class _Results:
    """What the builder's inline assembly returns in the compiler: results by index."""

    def __init__(self, handle: _Handle):
        self.handle = handle

    def get_result(self, index: int) -> _Handle:
        return self.handle


def _patch_inline_asm() -> None:
    def create_inline_asm(self, asm, constraints, args, types, is_pure, pack):
        with np.errstate(all="ignore"):
            value = _PTX[asm.split()[0]](*(a.data for a in args)).astype(np.float32)
        return _Results(_Handle(value, tl.float32))

    _Builder.create_inline_asm = create_inline_asm


def install() -> None:
    """Patches Triton's interpreter, once per process."""
    if not _State.installed:
        _patch_bf16()
        _patch_memory()
        _patch_launch()
        _patch_inline_asm()
        _patch_scalars()
        _State.installed = True
