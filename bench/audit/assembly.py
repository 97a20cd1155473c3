"""Reading what a compiler made: SASS as cuobjdump prints it, and AMD's assembly.

Both readers give the same facts. `body` are the instructions that a thread executes for the
elements of a tile: those of the innermost loops that touch global memory, or, where there is no
such loop, all of them, so that what is done once a program is counted too. Where several such loops
follow each other (a kernel that walks over its rows twice) their bodies are added up. A count is
static: both sides of a branch are in it, but not NVIDIA's subroutines behind the last EXIT.
`walks_of` counts the same loops in Triton's code: where the compiler has made more of them
(unrolled one, with a loop for what is left) a body is not that of one step.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import triton

_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class _Instruction(NamedTuple):
    opcode: str
    place: int = 0
    target: int | None = None  # of a branch


class _Vocabulary(NamedTuple):
    """What to look for in one instruction set."""

    global_memory: re.Pattern[str]
    special: re.Pattern[str]
    spill: re.Pattern[str]
    matrix: re.Pattern[str]
    issued: re.Pattern[str]  # what takes an issue slot of the threads


_SASS = _Vocabulary(
    re.compile(r"LDG|STG|UTMALDG|UTMASTG|UBLKCP"),
    re.compile(r"MUFU"),
    re.compile(r"LDL|STL"),
    re.compile(r"[A-Z]*(?:HMMA|GMMA|IMMA|QMMA|OMMA)"),
    re.compile(r""),
)
# The scalar unit issues beside the vector units.
_AMD = _Vocabulary(
    re.compile(r"(?:global|buffer|flat)_(?:load|store)"),
    re.compile(r"v_(?:exp|log|rcp|rsq|sqrt|sin|cos)_"),
    re.compile(r"scratch_"),
    re.compile(r"v_mfma"),
    re.compile(r"(?!s_)"),
)


def innermost(
    code: Sequence[_Instruction], loops: Sequence[frozenset[int]], memory: re.Pattern[str]
) -> list[frozenset[int]]:
    """Of loops, given by the indices of their instructions, the innermost that touch memory."""
    walking = [loop for loop in loops if any(memory.match(code[i].opcode) for i in loop)]
    return [loop for loop in walking if not any(inner < loop for inner in walking)]


def _facts(
    code: Sequence[_Instruction], loops: Sequence[frozenset[int]], words: _Vocabulary
) -> dict[str, Any]:
    walks = innermost(code, loops, words.global_memory)
    inside = frozenset[int]().union(*walks) if walks else range(len(code))
    body = [code[i].opcode for i in inside if words.issued.match(code[i].opcode)]
    matrix = [words.matrix.match(at.opcode) for at in code]
    return {
        "instructions": len(code),
        "loops": len(walks),
        "body": len(body),
        "special": sum(bool(words.special.match(opcode)) for opcode in body),
        "body_spills": sum(bool(words.spill.match(opcode)) for opcode in body),
        "matrix": dict(Counter(found[0] for found in matrix if found)),
    }


_MEMORY = re.compile(r"tt\.load|tt\.store|async_copy|buffer_load|buffer_store|descriptor|async_tma")


def walks_of(middle: str) -> int:
    """The innermost loops of Triton's intermediate code that touch global memory."""
    walks = 0
    open_regions = [[False, False, False]]  # is a loop, touches memory, has such a loop inside
    for line in map(str.strip, middle.splitlines()):
        if line.startswith("}") and len(open_regions) > 1:
            is_loop, touches, has_inner = open_regions.pop()
            walks += is_loop and touches and not has_inner
            open_regions[-1][1] |= touches
            open_regions[-1][2] |= (is_loop and touches) or has_inner
        if _MEMORY.search(line):
            open_regions[-1][1] = True
        if line.endswith("{"):
            open_regions.append([bool(re.search(r"scf\.(for|while)\b", line)), False, False])
    return walks


# ---- NVIDIA ----

# "  /*0070*/   @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;"
_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@\S+\s+)?([A-Z][\w.]*)([^;]*);", re.M)


def _parse_sass(text: str) -> list[_Instruction]:
    code = []
    for place, opcode, rest in _LINE.findall(text):
        if opcode == "NOP":
            continue
        target = None
        if opcode.startswith("BRA"):
            found = re.findall(r"0x([0-9a-f]+)", rest)
            target = int(found[-1], 16) if found else None
        code.append(_Instruction(opcode, int(place, 16), target))
    # Behind the last EXIT are subroutines of rare cases, a division's for example, and padding.
    exits = [i for i, at in enumerate(code) if at.opcode.startswith("EXIT")]
    return code[: exits[-1] + 1] if exits else code


def _sass_loops(code: Sequence[_Instruction]) -> list[frozenset[int]]:
    """From the target of each branch backwards to the branch; ptxas keeps loops together."""
    found: dict[int, int] = {}
    for at in code:
        if at.target is not None and at.target < at.place:
            found[at.target] = max(at.place, found.get(at.target, 0))
    return [
        frozenset(i for i, at in enumerate(code) if first <= at.place <= last)
        for first, last in sorted(found.items())
    ]


def _sass_width(opcode: str) -> str:
    if opcode.startswith("UTMA"):
        return "16"  # the copy engine moves whole lines
    for bits in (256, 128, 64):
        if f".{bits}" in opcode:
            return str(bits // 8)
    if re.search(r"\.[US]?16", opcode):
        return "2"
    return "1" if re.search(r"\.[US]8", opcode) else "4"


def read_cuda(cubin: bytes) -> dict[str, Any]:
    """The facts of a binary for NVIDIA's GPUs; 0.4 s, nearly all of it cuobjdump's start."""
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
    if not found:
        raise RuntimeError(f"cuobjdump -res-usage says nothing: {usage.stdout}")
    code = _parse_sass(sass.stdout)
    kinds = Counter(at.opcode.split(".")[0] for at in code)

    def widths(*names: str) -> dict[str, int]:
        return dict(Counter(_sass_width(at.opcode) for at in code if at.opcode.startswith(names)))

    return {
        "registers": int(found[1]),
        "spills": kinds["LDL"] + kinds["STL"] + int(found[2]),
        "load_widths": widths("LDG", "UTMALDG"),
        "store_widths": widths("STG", "UTMASTG"),
        **_facts(code, _sass_loops(code), _SASS),
    }


# ---- AMD ----

_AMD_BYTES = {"dwordx4": "16", "dwordx3": "12", "dwordx2": "8", "dword": "4"}


# ".LBB0_21:  ;   Parent Loop BB0_16 Depth=1", " ; =>  This Inner Loop Header: Depth=2"
_BLOCK = re.compile(r"(?:\.L|; %)(BB\d+_\d+|bb\.\d+):")


def _parse_amd(text: str) -> tuple[list[_Instruction], list[frozenset[int]]]:
    """The instructions, and the loops as LLVM's comments on each block have them.

    Branches backwards are no guide here: LLVM places the blocks of straight code in any order.
    """
    code: list[_Instruction] = []
    members: dict[str, set[int]] = {}
    parents: dict[str, str] = {}
    block, loop = "", None
    for line in text.splitlines():
        if found := _BLOCK.match(line):
            block, loop = found[1], None
        if parent := re.findall(r"Parent Loop (\w+) Depth", line):
            parents[block] = parent[-1]
        if re.search(r"This (?:Inner )?Loop Header", line):
            loop = block
        elif inside := re.search(r"in Loop: Header=(\w+)", line):
            loop = inside[1]
        elif found := re.match(r"\s+([a-z]+_\w+)", line):
            if loop is not None:
                members.setdefault(loop, set()).add(len(code))
            code.append(_Instruction(found[1]))
    # The innermost first, so that a loop has all that is inside when it is added to its parent.
    for header in sorted(parents, key=lambda name: -len(_ancestors(name, parents))):
        members.setdefault(parents[header], set()).update(members.get(header, ()))
    return code, [frozenset(indices) for indices in members.values()]


def _ancestors(header: str, parents: dict[str, str]) -> list[str]:
    found = []
    while header in parents:
        header = parents[header]
        found.append(header)
    return found


def read_amd(assembly: bytes) -> dict[str, Any]:
    """The facts of AMD's assembly; registers and spills are from its own metadata."""
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
        **_facts(*_parse_amd(text), _AMD),
    }
