"""The CUDA C++ kernels (csrc/cuda): loading their library, launching, what the launchers share.

The library has a plain C interface: a pointer to a structure, the device's index and a stream. It
needs neither libtorch nor CUDA's own libraries, so one build serves every torch. It describes its
structures itself (csrc/cuda/problems.h); fields are known here by name alone.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..spec import WANT_BIAS, WANT_NORM_BIAS, WANT_NORM_WEIGHT
from . import location

LIBRARY = location.find("_cuda")
_REBUILD = (
    "install nvcc and run 'pip install --no-build-isolation --force-reinstall --no-deps fused-lnad'"
    " (or the same with '.' in a checkout)"
)
# By csrc/cpu/codes.h.
STORAGES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_TYPES = {"void": ctypes.c_void_p, "int64_t": ctypes.c_int64, "double": ctypes.c_double}
_WANT = (WANT_NORM_WEIGHT, WANT_NORM_BIAS, WANT_BIAS)


Scalars = TypeVar("Scalars", bound=NamedTuple)


class Kernel(NamedTuple):
    """A launcher, the structure it takes, and its fields with those that a tensor fills, too."""

    launch: Any
    structure: type[ctypes.Structure]
    fields: dict[str, tuple[str | None, str | None]]  # <field>_storage and <field>_stride


def _kernel(library: ctypes.CDLL, line: str) -> tuple[str, Kernel]:
    """The launcher that a line of the library's description names (csrc/cuda/errors.cu)."""
    name, structure, size, declaration = line.split(" ", 3)
    types: dict[str, Any] = {}
    for of_one_type in declaration.replace("const", "").split(";")[:-1]:
        kind, *names = re.findall(r"\w+", of_one_type)
        types |= dict.fromkeys(names, _TYPES[kind])
    made = type(structure, (ctypes.Structure,), {"__slots__": (), "_fields_": list(types.items())})
    if ctypes.sizeof(made) != int(size):
        raise OSError(f"its {structure} has {size} bytes, and its fields {ctypes.sizeof(made)}")
    launcher = getattr(library, f"fused_cuda_{name}")
    launcher.argtypes = [ctypes.POINTER(made), ctypes.c_int, ctypes.c_void_p]
    known = {field: field for field in types}
    fields = {f: (known.get(f"{f}_storage"), known.get(f"{f}_stride")) for f in types}
    return name, Kernel(launcher, made, fields)


class Library:
    """The library at a path, and its kernels by name.

    Raises:
        OSError: it does not load, or does not describe itself.
    """

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        try:
            self.error, describe = library.fused_cuda_error, library.fused_cuda_description
            self.error.restype = describe.restype = ctypes.c_char_p
            lines = describe().decode().splitlines()
            self.kernels = dict(_kernel(library, line) for line in lines)
        except (AttributeError, KeyError) as error:
            raise OSError(f"it is of other sources than the Python code: {error}") from None


@lru_cache(maxsize=1)
def load() -> tuple[Library | None, str]:
    """The library, or None and the reason."""
    if os.environ.get("FUSED_DISABLE_EXT") == "1":
        return None, "FUSED_DISABLE_EXT=1 is set"
    if not LIBRARY.exists():
        why = location.why_missing("_cuda", _REBUILD)
        return None, f"the CUDA C++ kernels were not built; {why}"
    try:
        return Library(LIBRARY), ""
    except OSError as error:
        first = str(error).strip().splitlines()[0]
        return None, f"the library of the CUDA C++ kernels does not load ({first}); {_REBUILD}"


def launch(
    name: str, like: Tensor, tensors: Mapping[str, Tensor | None], numbers: dict[str, Any]
) -> None:
    """Launches a kernel on the device of `like`, in torch's current stream.

    tensors, numbers: fields of the kernel's structure; the others stay null and zero. A tensor also
    fills in <field>_storage, its storage type, and <field>_stride, its first stride, where they
    exist.

    Raises:
        RuntimeError: there is no library, it does not know the kernel or a field, or CUDA refuses.
    """
    library, reason = load()
    if library is None:
        raise RuntimeError(f"fused: {reason}")
    values = dict(numbers)
    try:
        call, structure, fields = library.kernels[name]
        for field, t in tensors.items():
            storage, stride = fields[field]
            if t is None:
                continue
            values[field] = t.data_ptr()
            if storage:
                values[storage] = STORAGES[t.dtype]
            if stride:
                values[stride] = t.stride(0)
        problem = structure(**values)  # has no other attributes than its fields
    except (AttributeError, KeyError) as error:
        raise RuntimeError(_unknown(library, name, {*tensors, *numbers})) from error
    device = like.get_device()  # -1 for the CPU, on which tests emulate the kernels
    stream = torch._C._cuda_getCurrentRawStream(device) if device >= 0 else 0
    refused = call(problem, device, stream)
    if refused:
        said = library.error(refused).decode()
        raise RuntimeError(f"fused: the CUDA C++ kernel {name} cannot be launched: {said}")


def _unknown(library: Library, name: str, given: set[str]) -> str:
    """The sentence for a kernel or a field that a library of other sources does not have."""
    lacks = "no such kernel"
    if name in library.kernels:
        _, structure, fields = library.kernels[name]
        lacks = f"no field {', '.join(sorted(given - fields.keys()))} in its {structure.__name__}"
    return (
        f"fused: the CUDA C++ kernel {name} cannot be launched: the library, of other sources than"
        f" the Python code, has {lacks}; {_REBUILD}"
    )


def compute_dtype(t: Tensor) -> torch.dtype:
    """What a tensor's kernels compute in."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def new_sums(
    z: Tensor,
    size: int,
    wanted: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    zero: Sequence[bool],
) -> list[Tensor | None]:
    """dnorm_weight, dnorm_bias and dbias, (size,) each; None where not wanted or no parameter is.

    zero: whether it is zero, as there is nothing to add up. The others are not filled in yet.
    """
    owners = (norm_weight, norm_bias, z)
    return [
        (owner.new_zeros if zeros else owner.new_empty)((size,))
        if owner is not None and wanted & bit
        else None
        for owner, bit, zeros in zip(owners, _WANT, zero, strict=True)
    ]


def scalars_of(kind: type[Scalars], given: Sequence[Any]) -> Scalars:
    """An operator's scalars; a shortcut, which may follow them, is refused."""
    size = len(kind._fields)
    if any(t is not None for t in given[size:]):
        raise ValueError(
            "fused: the CUDA C++ kernels take no shortcut; add it to the norm's result, and"
            " activate the sum"
        )
    return kind(*given[:size])


def returned(dz: Tensor, sums: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """What the backward operators return: a sum that is not made is empty, in the compute dtype.

    The last is the gradient of a shortcut, of which there is none.
    """
    dtype = compute_dtype(dz)
    found = (dz.new_empty((0,), dtype=dtype) if t is None else t for t in sums)
    return dz, *found, dz.new_empty((0,))


def wanted_of(sums: Sequence[Tensor | None]) -> int:
    """The WANT_ bits (spec.py) of the sums that there are, of norm_weight, norm_bias and bias."""
    return sum(bit for t, bit in zip(sums, _WANT, strict=True) if t is not None)


def add_up(partial: Tensor, outputs: Sequence[Tensor | None]) -> None:
    """outputs[i] = partial[i].sum(1), in order and in double, of the outputs that are not None.

    partial is (planes, outer, chunks, cols), each output (outer, cols), contiguous, of any floating
    dtype; there are at most three.
    """
    planes, outer, chunks, cols = partial.shape
    made = {f"out{i}": t for i, t in enumerate(t for t in outputs if t is not None)}
    assert len(made) == planes
    if made:
        shape = {"planes": planes, "outer": outer, "chunks": chunks, "cols": cols}
        launch("sum", partial, {"partial": partial, **made}, shape)
