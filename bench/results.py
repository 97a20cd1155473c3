"""Rows to and from CSV: one file a suite, what is measured again replaced, the rest kept."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from itertools import product
from pathlib import Path
from typing import Any

from .harness import Outcome, Row
from .machine import Machine

# What tells two measurements apart; of two with the same key the later one counts.
KEY = ("suite", "chain", "norm", "activation", "dtype", "M", "K", "N", "p", "mode",
       "shape", "layout", "provider", "device", "machine", "threads", "isa")  # fmt: skip


def _parse(kind: str, text: str) -> object:
    """A column's text as its annotation has it; empty where a number is missing."""
    if text and kind.startswith("int"):
        return int(text)
    return float(text) if text and kind.startswith("float") else text


def read(path: Path, row: type[Any] = Row) -> list[Any]:
    """The rows of a file; none where it is missing.

    Raises:
        ValueError: the file has other columns.
    """
    if not path.exists():
        return []
    kinds = {field.name: str(field.type) for field in fields(row)}
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != list(kinds):
            raise ValueError(f"{path} has other columns than this harness; move it away")
        return [row(**{k: _parse(kinds[k], v) for k, v in line.items()}) for line in reader]


def write(path: Path, rows: Iterable[Any], row: type[Any] = Row) -> None:
    """Replaces a file by these rows, at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(row)])
        writer.writeheader()
        writer.writerows(asdict(r) for r in rows)
    partial.replace(path)


def by_key(rows: Iterable[Any], key: Sequence[str]) -> dict[tuple[object, ...], Any]:
    """The rows by what tells them apart, the later of two that agree."""
    return {tuple(getattr(r, name) for name in key): r for r in rows}


def merge(path: Path, outcome: Outcome, machine: Machine) -> None:
    """Adds a cell's rows to a file, in place of those with the same key.

    What an earlier run measured of a provider that is now refused is removed.
    """
    rows = by_key((*read(path), *outcome.rows), KEY)
    modes = (outcome.cell.mode, *(["backward"] if outcome.cell.needs_gradients else []))
    for provider, mode in product(outcome.refused, modes):
        key = asdict(outcome.cell) | asdict(machine) | {"provider": provider, "mode": mode}
        rows.pop(tuple(key[name] for name in KEY), None)
    write(path, rows.values())
