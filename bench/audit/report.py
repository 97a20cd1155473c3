"""What the audit finds, as data, and its JSON file."""

from __future__ import annotations

import json
from dataclasses import asdict, astuple, dataclass, field, fields
from pathlib import Path
from typing import Any

import triton

from .binary import Binary
from .launch import OUTPUTS, PARTIAL, Launch
from .targets import TARGETS


@dataclass(frozen=True)
class Measured:
    """A launch, the one of this number in its case, and the binary that it got.

    `per_thread`: elements of a tile that a thread treats, 0 where unknown. `element_bytes` and
    `exact`: as `Launch` has them. `tile_rows`: BLOCK_M, 0 where the kernel has none. `writes`,
    `masked`, `sums`: whether the launch writes a tensor as large as the problem, has a mask of one
    byte a position, and leaves partial sums.
    """

    kernel: str
    target: str
    case: str
    number: int
    headline: bool
    aligned: bool
    per_thread: float
    element_bytes: int
    tile_rows: int
    writes: bool
    masked: bool
    sums: bool
    exact: bool
    binary: Binary

    @classmethod
    def of(
        cls, launch: Launch, target: str, case: str, number: int, headline: bool, binary: Binary
    ) -> Measured:
        threads = launch.options.get("num_warps", 4) * TARGETS[target].target.warp_size
        return cls(
            kernel=launch.name,
            target=target,
            case=case,
            number=number,
            headline=headline,
            aligned=launch.aligned,
            per_thread=launch.tile / threads,
            element_bytes=launch.element_bytes,
            tile_rows=launch.values.get("BLOCK_M", 0),
            writes=any(name in launch.present for name in OUTPUTS),
            masked="mask_ptr" in launch.present,
            sums=PARTIAL in launch.present,
            exact=launch.exact,
            binary=binary,
        )

    @property
    def key(self) -> tuple[str, str, int, str]:
        return self.kernel, self.case, self.number, self.target

    def __str__(self) -> str:
        return f"{self.kernel} ({self.case}) on {self.target}"

    @property
    def instructions_per_element(self) -> float | None:
        """Of the body, static.

        None where the tile is unknown, matrix units do the work, or the compiler unrolled a loop.
        """
        if self.per_thread == 0 or self.binary.products or self.binary.loops != self.binary.walks:
            return None
        return self.binary.body / self.per_thread


@dataclass(frozen=True)
class Stream:
    """A tensor as large as the problem in one interpreted launch: bytes moved, and its size."""

    call: str
    kernel: str
    argument: str
    moved: int
    size: int

    @property
    def ratio(self) -> float:
        return self.moved / self.size


@dataclass(frozen=True)
class Report:
    """All that was found. `outside`: accesses outside a tensor; `failed`: what did not compile."""

    triton: str = triton.__version__
    binaries: list[Measured] = field(default_factory=list)
    streams: list[Stream] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """One line for each binary and stream, so that differences can be read."""
        tables: dict[str, Any] = {
            "binaries": [_COLUMNS, *map(_row, self.binaries)],
            "streams": [[f.name for f in fields(Stream)], *map(astuple, self.streams)],
            "outside": self.outside,
            "failed": self.failed,
        }
        parts = [f'"triton": {json.dumps(self.triton)}']
        for name, lines in tables.items():
            texts = ",\n".join(json.dumps(line, separators=(",", ":")) for line in lines)
            parts.append(f'"{name}": [\n{texts}\n]')
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{\n" + ",\n".join(parts) + "\n}\n")

    @classmethod
    def read(cls, path: Path) -> Report:
        """What `write` has written.

        Raises:
            ValueError: the file has other columns than this version.
        """
        found = json.loads(path.read_text())
        if found["binaries"][0] != _COLUMNS:
            raise ValueError(f"{path} has other columns; renew it: python -m bench.audit --accept")
        names, *streams = found["streams"]
        return cls(
            found["triton"],
            [_measured(line) for line in found["binaries"][1:]],
            [Stream(**dict(zip(names, line, strict=True))) for line in streams],
            found["outside"],
            found["failed"],
        )


_OWN = [f.name for f in fields(Measured) if f.name != "binary"]
_COLUMNS = _OWN + [f.name for f in fields(Binary)]


def _row(m: Measured) -> list[Any]:
    return [getattr(m, name) for name in _OWN] + list(asdict(m.binary).values())


def _measured(line: list[Any]) -> Measured:
    own, binary = line[: len(_OWN)], line[len(_OWN) :]
    return Measured(*own, binary=Binary(*binary))
