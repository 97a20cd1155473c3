"""The launches that a launcher would make on a GPU that is not there.

`captured` lets launchers run on tensors of any device as if they lay on a given GPU, and keeps what
they would have launched, so that exactly the configurations of the tuning rules are compiled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any
from unittest import mock

import torch
from fused.kernels.tuning import rules as tuning
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from .targets import TARGETS

_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.bool: "*u1",
}
_HALVES = (torch.bfloat16, torch.float16)
# What a program treats at once, by the names of the kernels' constants.
_TILES = (("UNITS", "RUN"), ("BLOCK_M", "BLOCK_N"), ("BLOCK_G", "BLOCK_E"))
# Tensors of a kernel that are as large as its problem; the sums of programs where there is no
# other.
STREAMS = ("dy_ptr", "z_ptr", "residual_ptr", "y_ptr", "dz_ptr")
STREAMS += ("value_ptr", "gate_ptr", "dvalue_ptr", "dgate_ptr", "shortcut_ptr", "dshortcut_ptr")
PARTIAL = "partial_ptr"
OUTPUTS = ("y_ptr", "dz_ptr", "dvalue_ptr", "dgate_ptr", "dshortcut_ptr")
# Tensors that kernels take as one argument, by the names that the kernels give them.
PACKS = {"incoming": ("dy_ptr", "shortcut_ptr", "dshortcut_ptr")}


def names_in(pack: str, entries: tuple[Any, ...]) -> Iterable[str]:
    """The names of the entries of an argument that is a tuple."""
    own = getattr(entries, "_fields", None) or PACKS.get(pack)
    return own or [f"{pack}[{i}]" for i in range(len(entries))]


@dataclass(frozen=True)
class Launch:
    """A launch that a launcher would have made."""

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]  # num_warps and what else the compiler is told

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @cached_property
    def values(self) -> dict[str, Any]:
        """The arguments and the entries of packs, by their own names where they have one."""
        found = dict(self.arguments)
        for name, value in self.arguments.items():
            if isinstance(value, tuple):
                found |= dict(zip(names_in(name, value), value, strict=True))
        return found

    @property
    def present(self) -> tuple[str, ...]:
        """The names of the tensors."""
        return tuple(k for k, v in self.values.items() if isinstance(v, torch.Tensor))

    @property
    def streams(self) -> list[torch.Tensor]:
        """The tensors as large as the problem."""
        names = [name for name in STREAMS if name in self.present]
        names = names or [name for name in (PARTIAL,) if name in self.present]
        return [self.values[name] for name in names]

    @property
    def element_bytes(self) -> int:
        """What the streams have for each element of the smallest; z before a gate has two."""
        least = min((t.numel() for t in self.streams if t.numel()), default=1)
        return sum(t.element_size() * max(1, t.numel() // least) for t in self.streams)

    @property
    def tile(self) -> int:
        """Elements that a program treats at once; 0 where the kernel does not say."""
        for names in _TILES:
            if all(name in self.values for name in names):
                return prod(self.values[name] for name in names)
        return 0

    @property
    def aligned(self) -> bool:
        """Whether rows and addresses allow 16-byte accesses, by the hint that the kernel gets."""
        hints = [value for name, value in self.values.items() if name.startswith("ALIGN")]
        if not hints or not self.streams:
            return False
        itemsize = self.streams[0].element_size()
        tensors = (self.values[name] for name in self.present)
        return all(hint * itemsize == 16 for hint in hints) and all(
            t.data_ptr() % 16 == 0 for t in tensors
        )

    @property
    def exact(self) -> bool:
        """Whether the kernel asks for float32 products in full: no matrix unit makes them."""
        narrow = any(self.values[name].dtype in _HALVES for name in self.present)
        return self.values.get("PRECISION") == "ieee" and not narrow

    def source(self) -> ASTSource:
        """The source as Triton's own launch would specialise it: types, 16-byte addresses, None."""
        constants: dict[tuple[int, ...], Any] = {}
        attributes: dict[tuple[int, ...], Any] = {}

        def type_of(value: Any, path: tuple[int, ...], constant: bool, free: bool) -> Any:
            if not constant and isinstance(value, tuple):
                # Triton specialises what is in a pack, whatever do_not_specialize says.
                return tuple(type_of(v, (*path, i), False, False) for i, v in enumerate(value))
            if constant or value is None or (type(value) is int and value == 1 and not free):
                constants[path] = value
                return "constexpr"
            if isinstance(value, torch.Tensor):
                if value.data_ptr() % 16 == 0:
                    attributes[path] = [["tt.divisibility", 16]]
                return _POINTERS[value.dtype]
            if isinstance(value, TensorDescriptor):
                dtype = _POINTERS[value.base.dtype].removeprefix("*")
                return f"tensordesc<{dtype}{list(value.block_shape)}>"
            if isinstance(value, float):
                return "fp32"
            if value % 16 == 0 and not free:
                attributes[path] = [["tt.divisibility", 16]]
            return "i32" if abs(value) < 2**31 else "i64"

        signature = {
            p.name: type_of(self.arguments[p.name], (i,), p.is_constexpr, p.do_not_specialize)
            for i, p in enumerate(self.kernel.params)
        }
        return ASTSource(self.kernel, signature, constants, attributes)


# What a launch passes to the compiler besides the kernel's own arguments.
_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")


@contextlib.contextmanager
def captured(arch: str) -> Iterator[list[Launch]]:
    """The launches of every launcher called inside the block, as for a GPU of this architecture."""
    launches: list[Launch] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
        arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
        launches.append(Launch(self, tuple(grid), arguments, options))

    device = TARGETS[arch].device
    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(tuning, "device", lambda z: device),
    ):
        yield launches
