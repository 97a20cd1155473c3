"""What was measured on this machine's GPU: tiles in place of those of the rules, and Linears for
which one kernel with what follows them is faster than the library's GEMM and a pass.

`python -m fused tune` writes the table; it is read once, when the first rule is asked. A key is the
kernel and what its rule depends on, never the batch.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

VERSION = 1
# GPU's name → key → rows of a tile, and its warps.
Tiles = dict[str, dict[str, list[int]]]
# GPU's name → key → how many times faster one kernel is.
Gains = dict[str, dict[str, float]]
Rule = TypeVar("Rule", bound=Callable[..., Any])


class Table(NamedTuple):
    """The content of a file; `linear` has those Linears alone whose kernel is clearly faster."""

    tiles: Tiles
    linear: Gains


class Asked(NamedTuple):
    """What a rule was asked for: its key, its tile (rows, warps), and the elements of such a row.

    A row is what of a tile lies along the contiguous dimension, or all of a group's channels and
    positions.
    """

    key: str
    tile: tuple[int, int]
    width: int


def table_path() -> Path | None:
    """`FUSED_TUNING`, or ~/.cache/fused/tuning.json; None where the variable is empty or 0.

    Also None for a user without a home.
    """
    given = os.environ.get("FUSED_TUNING")
    if given is not None:
        return None if given in ("", "0") else Path(given)
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        cache_folder = Path(root) if root else Path.home() / ".cache"
    except RuntimeError:
        return None
    return cache_folder / "fused" / "tuning.json"


def read(path: Path) -> Table:
    """The content of a file.

    Raises:
        ValueError: it is not such a table.
    """
    found = json.loads(path.read_text())
    if not isinstance(found, dict) or found.get("version") != VERSION:
        raise ValueError(f"it is not of version {VERSION}")
    table = Table(found.get("tiles", {}), found.get("linear", {}))
    for of_gpu in table.tiles.values():
        for key, tile in of_gpu.items():
            if len(tile) != 2 or any(n < 1 or n & (n - 1) for n in tile):
                raise ValueError(f"{key!r} has {tile}, not two powers of two")
    for gains in table.linear.values():
        for key, gain in gains.items():
            if not isinstance(gain, float | int) or gain < 1:
                raise ValueError(f"{key!r} has {gain!r}, not a gain of at least 1")
    return table


def write(path: Path, tiles: Tiles, linear: Gains | None = None) -> None:
    """Writes a table, as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    content = {"version": VERSION, "tiles": tiles, "linear": linear or {}}
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


# What a rule was asked for and answered, while `asked` is open; tiles that `instead` asks for.
_asked: list[Asked] | None = None
_instead: dict[str, tuple[int, int]] = {}
_caches: list[Any] = []


def cached(rule: Rule) -> Rule:
    """functools.lru_cache that `forget` clears."""
    found = lru_cache(maxsize=4096)(rule)
    _caches.append(found)
    return found  # type: ignore[return-value]


@cache
def _table() -> Table:
    """Empty where there is no file; said once where that was asked for, or the file is broken."""
    path = table_path()
    try:
        if path is None or (not path.exists() and "FUSED_TUNING" not in os.environ):
            return Table({}, {})
        return read(path)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        given = " of FUSED_TUNING" if "FUSED_TUNING" in os.environ else ""
        warnings.warn(
            f"fused: the tuning table {path}{given} is not used ({error}); run"
            " 'python -m fused tune' again or remove it",
            stacklevel=2,
        )
        return Table({}, {})


def key_of(kernel: str, *parts: object) -> str:
    """The key of a tile, or of a Linear."""
    return " ".join(map(str, (kernel, *parts)))


def choose(gpu: str, key: str, rule: tuple[int, int], width: int) -> tuple[int, int]:
    """Rows of a tile and its warps: those that were measured on this GPU, else the rule's.

    width: as in `Asked`.
    """
    if _asked is not None:
        _asked.append(Asked(key, rule, width))
    if key in _instead:
        return _instead[key]
    found = _table().tiles.get(gpu, {}).get(key) if gpu else None
    return (found[0], found[1]) if found else rule


def any_linear() -> bool:
    """Whether a Linear was measured on any GPU for which one kernel is faster."""
    return any(_table().linear.values())


def linear_is_faster(gpu: str, key: str) -> bool:
    """Whether one kernel was measured to be faster for a Linear on this GPU."""
    return key in _table().linear.get(gpu, {})


def forget() -> None:
    """Reads the table again, and asks the rules again."""
    _table.cache_clear()
    for rule in _caches:
        rule.cache_clear()


@contextmanager
def asked() -> Iterator[list[Asked]]:
    """What the rules are asked inside the block, and what they answer without a table."""
    global _asked  # noqa: PLW0603
    _asked = []
    forget()
    try:
        yield _asked
    finally:
        _asked = None


@contextmanager
def instead(tiles: dict[str, tuple[int, int]]) -> Iterator[None]:
    """Other tiles inside the block, by key."""
    _instead.update(tiles)
    for rule in _caches:
        rule.cache_clear()
    try:
        yield
    finally:
        _instead.clear()
        for rule in _caches:
            rule.cache_clear()
