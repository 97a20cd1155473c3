"""Compiling a launch for an architecture, and the facts of the binary.

Facts are kept in .cache/audit by the hash of what they follow from: the kernel's source with all
that it calls, its specialisation, the target, Triton's version and the reader in assembly.py. What
is there is not compiled again.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import triton

from . import assembly
from .launch import Launch
from .targets import TARGETS

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "audit"
_DOTS = re.compile(r"\btt\.dot\b|warp_group_dot\b|tc_gen5_mma\b")


@dataclass(frozen=True)
class Binary:
    """What the compiler made of a kernel. Widths map bytes (as text) to numbers of instructions.

    `spills`: loads and stores of spilled registers, and bytes of stack. `conversions`:
    rearrangements of data between threads. `products`: matrix products in Triton's code, `matrix`
    the instructions of matrix units by kind. `loops` and `body`: as assembly.py has them; of the
    body, `special` functions and `body_spills`, the accesses of spilled registers. `walks`: as many
    loops as Triton's code has.
    """

    registers: int
    spills: int
    shared: int
    load_widths: dict[str, int]
    store_widths: dict[str, int]
    conversions: int
    products: int
    matrix: dict[str, int]
    instructions: int
    loops: int
    body: int
    special: int
    body_spills: int
    walks: int


@cache
def _reader() -> str:
    source = Path(assembly.__file__).read_bytes() + Path(__file__).read_bytes()
    return hashlib.sha256(source).hexdigest()


def key_of(launch: Launch, arch: str) -> str:
    """The hash of all that the facts follow from."""
    parts = (launch.source().hash(), arch, launch.options, triton.__version__, _reader())
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def kept(key: str) -> Binary | None:
    """The facts under a key, if they are there."""
    file = CACHE / f"{key}.json"
    return Binary(**json.loads(file.read_text())) if file.exists() else None


def compiled(launch: Launch, arch: str) -> Binary:
    """Compiles one launch for an architecture, or finds what is kept of it.

    Raises:
        RuntimeError: the compiler failed; the message ends with the tail of what it printed.
    """
    key = key_of(launch, arch)
    found = kept(key)
    if found is not None:
        return found
    printed = io.StringIO()
    try:
        # On failure triton prints the whole PTX.
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            made = triton.compile(launch.source(), TARGETS[arch].target, launch.options)
    except Exception as error:
        text = f"{launch.name} for {arch}: {error}\n{printed.getvalue()[-500:]}"
        raise RuntimeError(text) from error
    if "cubin" in made.asm:
        facts = assembly.read_cuda(made.asm["cubin"])
    else:
        facts = assembly.read_amd(made.asm["amdgcn"].encode())
    middle = made.asm["ttgir"]
    binary = Binary(
        conversions=middle.count("ttg.convert_layout"),
        products=len(_DOTS.findall(middle)),
        walks=assembly.walks_of(middle),
        shared=made.metadata.shared,
        **facts,
    )
    CACHE.mkdir(parents=True, exist_ok=True)
    partial = CACHE / f"{key}.{hashlib.sha256(repr(binary).encode()).hexdigest()[:8]}"
    partial.write_text(json.dumps(asdict(binary)))
    partial.replace(CACHE / f"{key}.json")
    return binary
