"""Compiles kernels for GPUs that are not there, and reads what the compiler made of them.

`captured` runs a launcher on CPU tensors as if they lay on a given GPU and keeps the launches it
would have made, so that exactly the configurations of kernels/tuning.py are compiled. `audit` reads
registers, spills, access widths and instruction counts from the binary (SASS by the cuobjdump that
triton bundles; for AMD the assembly's own metadata) and layout conversions from the intermediate
code. Disassembly takes 0.4 s a binary, so results are kept in .cache/triton-audit by their hash.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from fused.kernels import tuning
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CACHE = Path(__file__).resolve().parents[2] / ".cache" / "triton-audit"
_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
# What an H100 has; only the grid depends on it.
_PROCESSORS = 132


@dataclass(frozen=True)
class Launch:
    """A launch that a launcher would have made."""

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int


@dataclass(frozen=True)
class Binary:
    """What the compiler made of a kernel. Widths map bytes (as text) to numbers of instructions."""

    registers: int
    spills: int
    load_widths: dict[str, int]
    store_widths: dict[str, int]
    conversions: int
    shared: int
    instructions: int


@contextlib.contextmanager
def captured(arch: str) -> Iterator[list[Launch]]:
    """The launches of every launcher called inside the block, as for a GPU of this architecture."""
    launches: list[Launch] = []
    target = TARGETS[arch]

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        num_warps = kwargs.pop("num_warps")
        arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
        launches.append(Launch(self, tuple(grid), arguments, num_warps))

    arch_number = target.arch if target.backend == "cuda" else 0
    device = tuning.Device(_PROCESSORS, target.warp_size, arch_number)
    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(tuning, "device", lambda z: device),
    ):
        yield launches


def _specialize(launch: Launch) -> ASTSource:
    """The source as Triton's own launch would specialise it (types, 16-byte addresses, None)."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        free = parameter.do_not_specialize
        one = type(value) is int and value == 1 and not free
        if parameter.is_constexpr or value is None or one:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = _POINTERS[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, TensorDescriptor):
            dtype = _POINTERS[value.base.dtype].removeprefix("*")
            signature[parameter.name] = f"tensordesc<{dtype}{list(value.block_shape)}>"
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not free:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def audit(launch: Launch, arch: str) -> Binary:
    """Compiles one launch for an architecture and reads the result.

    Raises:
        RuntimeError: the compiler failed; the message ends with the tail of what it printed.
    """
    source = _specialize(launch)
    printed = io.StringIO()
    try:
        # On failure triton prints the whole PTX.
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            options = {"num_warps": launch.num_warps}
            compiled = triton.compile(source, TARGETS[arch], options)
    except Exception as error:
        text = f"{launch.kernel.__name__} for {arch}: {error}\n{printed.getvalue()[-500:]}"
        raise RuntimeError(text) from error
    code = compiled.asm["cubin"] if "cubin" in compiled.asm else compiled.asm["amdgcn"].encode()
    conversions = compiled.asm["ttgir"].count("ttg.convert_layout")
    kept = CACHE / f"{hashlib.sha256(code).hexdigest()}-{conversions}.json"
    if kept.exists():
        return Binary(**json.loads(kept.read_text()))
    read = _read_cuda if "cubin" in compiled.asm else _read_amd
    binary = Binary(**read(code), conversions=conversions, shared=compiled.metadata.shared)
    CACHE.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(asdict(binary)))
    return binary


def _read_cuda(cubin: bytes) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run(
                [_CUOBJDUMP, flag, file.name], capture_output=True, text=True, check=True
            )
            for flag in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr)
    assert found, usage.stdout
    # "  /*0070*/   @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;"
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?([A-Z][\w.]*)", sass.stdout, re.M)
    opcodes = [opcode for opcode in opcodes if opcode != "NOP"]
    kinds = Counter(opcode.split(".")[0] for opcode in opcodes)
    return {
        "registers": int(found[1]),
        "spills": kinds["LDL"] + kinds["STL"] + int(found[2]),
        "load_widths": dict(Counter(_sass_width(o) for o in opcodes if o.startswith("LDG"))),
        "store_widths": dict(Counter(_sass_width(o) for o in opcodes if o.startswith("STG"))),
        "instructions": len(opcodes),
    }


def _sass_width(opcode: str) -> str:
    for bits in (256, 128, 64):
        if f".{bits}" in opcode:
            return str(bits // 8)
    if re.search(r"\.[US]?16", opcode):
        return "2"
    return "1" if re.search(r"\.[US]8", opcode) else "4"


_AMD_BYTES = {"dwordx4": "16", "dwordx3": "12", "dwordx2": "8", "dword": "4"}


def _read_amd(assembly: bytes) -> dict[str, Any]:
    text = assembly.decode()

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:?\s+(\d+)", text)
        return int(found[1]) if found else 0

    def widths(kind: str) -> dict[str, int]:
        names = re.findall(rf"^\s+(?:global|buffer)_{kind}_(\w+)", text, re.M)
        return dict(
            Counter(_AMD_BYTES.get(n, "2" if re.search("short|16", n) else "1") for n in names)
        )

    return {
        "registers": number("vgpr_count"),
        "spills": number("vgpr_spill_count") + number("private_segment_fixed_size"),
        "load_widths": widths("load"),
        "store_widths": widths("store"),
        "instructions": len(re.findall(r"^\s+[a-z]+_\w+", text, re.M)),
    }
