"""The progress of one pass over batches: a bar in a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TextIO

_WIDTH = 30  # of the bar, in characters
_INTERVAL = 0.1  # seconds between two drawings of the bar
_LINES = 4  # in a pass without a terminal


class Progress:
    """Shows how many batches and rows are done.

    Args:
        name: what is going on, in a word.
        total: how many batches there will be; 0 where nobody knows.
        stream: where to show it; None is nowhere.
        unit: what `advance` counts.
    """

    def __init__(self, name: str, total: int, stream: TextIO | None, unit: str = "rows") -> None:
        self._name, self._total, self._stream, self._unit = name, total, stream, unit
        self._terminal = stream is not None and stream.isatty()
        self._started = time.perf_counter()
        self._batches = self._rows = self._lines = 0
        self._drawn = float("-inf")

    def advance(self, rows: int) -> None:
        """Counts one batch of so many rows."""
        self._batches += 1
        self._rows += rows
        if self._stream is None:
            return
        if self._terminal:
            now = time.perf_counter()
            if now - self._drawn >= _INTERVAL:
                self._drawn = now
                self._stream.write(f"\r{self._line()}")
                self._stream.flush()
            return
        line = _LINES * self._batches // self._total if self._total else 0
        if line > self._lines:
            self._lines = line
            print(self._line(), file=self._stream, flush=True)

    def _line(self) -> str:
        elapsed = time.perf_counter() - self._started
        done = ""
        if self._total:
            share = min(1.0, self._batches / self._total)
            full = int(_WIDTH * share)
            bar = f"{'━' * full}{'─' * (_WIDTH - full)} " if self._terminal else ""
            done = f"{bar}{share:4.0%}  "
        return f"{elapsed:6.1f} s  {self._name} {done}{self._rows:,} {self._unit}"

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._stream is None:
            return
        if self._terminal:
            self._stream.write(f"\r{self._line()}\n")
            self._stream.flush()
        elif not self._lines:
            print(self._line(), file=self._stream, flush=True)
