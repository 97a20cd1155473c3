"""Progress bars in a terminal, plain lines anywhere else."""

from __future__ import annotations

import importlib.util
import sys
import time
from types import TracebackType

LINES_PER_TASK = 4


class Progress:
    """One bar per task, with a text beside it; `update` may be called as often as one likes.

    Without a terminal, or without the package rich, a task prints a line each quarter of its way.
    """

    def __init__(self, tasks: list[str]) -> None:
        self._started = time.perf_counter()
        self._width = max(map(len, tasks))
        self._printed = dict.fromkeys(tasks, 0)
        self._bars = None
        if sys.stdout.isatty() and importlib.util.find_spec("rich"):
            from rich.progress import (
                BarColumn,
                ProgressColumn,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )
            from rich.progress import Progress as Bars

            text = TextColumn("{task.fields[text]}")
            columns: list[str | ProgressColumn] = [
                "{task.description}",
                BarColumn(30),
                "{task.percentage:>3.0f}%",
                text,
            ]
            self._bars = Bars(*columns, TimeElapsedColumn(), TimeRemainingColumn())
            self._ids = {task: self._bars.add_task(task, total=1.0, text="") for task in tasks}

    def update(self, task: str, share: float, text: str) -> None:
        """Sets a task's share done (0 … 1) and the text beside it."""
        if self._bars is not None:
            self._bars.update(self._ids[task], completed=share, text=text)
            return
        line = int(share * LINES_PER_TASK)
        if line > self._printed[task]:
            self._printed[task] = line
            elapsed = time.perf_counter() - self._started
            print(f"{elapsed:6.1f} s  {task:<{self._width}} {share:4.0%}  {text}", flush=True)

    def say(self, line: str) -> None:
        """Prints a line above the bars."""
        if self._bars is not None:
            self._bars.console.print(line)
        else:
            print(line, flush=True)

    def __enter__(self) -> Progress:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bars is not None:
            self._bars.stop()
