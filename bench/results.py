"""Rows to and from CSV: one file a suite, what is measured again replaced, the rest kept."""

from __future__ import annotations

import csv
from dataclasses import asdict, fields
from itertools import product
from pathlib import Path

from .harness import Outcome, Row
from .machine import Machine

COLUMNS = [field.name for field in fields(Row)]
# What tells two measurements apart; of two with the same key the later one counts.
KEY = ("suite", "chain", "norm", "activation", "dtype", "M", "K", "N", "p", "mode",
       "shape", "layout", "provider", "device", "machine", "threads", "isa")  # fmt: skip
_INTEGERS = {"M", "K", "N", "rounds", "calls", "ring", "threads", "kept_bytes"}
_NUMBERS = {"p", "median_us", "p20_us", "p80_us", "error",
            "over_fused", "over_fused_p20", "over_fused_p80"}  # fmt: skip


def _parse(name: str, text: str) -> object:
    if text and name in _INTEGERS:
        return int(text)
    return float(text) if text and name in _NUMBERS else text


def read(path: Path) -> list[Row]:
    """The rows of a file; none where it is missing.

    Raises:
        ValueError: the file has other columns.
    """
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != COLUMNS:
            raise ValueError(f"{path} has other columns than this harness; move it away")
        return [Row(**{k: _parse(k, v) for k, v in line.items()}) for line in reader]  # type: ignore[arg-type]


def merge(path: Path, outcome: Outcome, machine: Machine) -> None:
    """Adds a cell's rows to a file, in place of those with the same key.

    What an earlier run measured of a provider that is now refused is removed.
    """
    rows = {tuple(getattr(row, name) for name in KEY): row for row in (*read(path), *outcome.rows)}
    modes = (outcome.cell.mode, *(["backward"] if outcome.cell.needs_gradients else []))
    for provider, mode in product(outcome.refused, modes):
        key = asdict(outcome.cell) | asdict(machine) | {"provider": provider, "mode": mode}
        rows.pop(tuple(key[name] for name in KEY), None)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows.values())
    partial.replace(path)
