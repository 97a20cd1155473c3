"""Trains two builds of one model in turns on the same batches.

Short chunks of steps alternate between the builds, so both meet the same noise of the machine, and
a speed-up is a ratio of neighbouring chunks.
"""

from __future__ import annotations

import copy
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn

PARTS = ("data", "forward", "loss", "backward", "optimizer")


@dataclass(frozen=True)
class Recipe:
    """How a model is trained; both builds follow the same one."""

    steps: int
    batch: int
    device: torch.device
    dtype: torch.dtype = torch.float32
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    evaluations: int = 16
    chunk: int = 16  # steps that one build takes before the next one's turn

    def autocast(self) -> AbstractContextManager:
        """Mixed precision, where `dtype` asks for it."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


class Task(Protocol):
    """What a model is trained on, and by what it is judged."""

    rows: int  # training samples

    def batch(self, rows: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """The model's inputs and the target of some training samples."""

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """The mean loss of a batch."""

    def evaluate(self, model: Callable[..., Tensor]) -> dict[str, float]:
        """Name → value of each metric on held-out data; a model in evaluation mode."""


class Clock:
    """Seconds of each part of each step, and of each chunk of steps.

    On a GPU the parts lie between events, so that measuring them does not make the host wait.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[float | torch.cuda.Event] = []
        self._started = 0.0
        self.steps: list[list[float]] = []  # seconds of PARTS, one row a step
        self.chunks: list[float] = []  # seconds
        self.seconds = 0.0  # of all chunks, also those that are not kept

    def start_chunk(self) -> None:
        """Called with nothing pending on the device."""
        self._started = time.perf_counter()

    def mark(self) -> None:
        """Called before the first part of a step and after each part."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def close_chunk(self, keep: bool) -> None:
        """Waits for the device and reads the marks; `keep=False` forgets the chunk."""
        if self._cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._started
        self.seconds += seconds
        stride = len(PARTS) + 1
        if keep:
            self.chunks.append(seconds)
            for first in range(0, len(self._marks), stride):
                marks = self._marks[first : first + stride]
                self.steps.append([_seconds(a, b) for a, b in pairwise(marks)])
        self._marks.clear()


def _seconds(start: Any, end: Any) -> float:
    """Between two times in seconds, or two events."""
    if isinstance(start, torch.cuda.Event):
        return start.elapsed_time(end) / 1e3
    return end - start


class Run:
    """One model in training, with its optimiser, its clock and its curve.

    Attributes:
        curve: one value per evaluation of "step", "epoch", "seconds" (of training, evaluations
            left out), "train_loss" and each metric of the task.
    """

    def __init__(self, model: nn.Module, task: Task, recipe: Recipe) -> None:
        self.model = model
        self.clock = Clock(recipe.device)
        self.curve: defaultdict[str, list[float]] = defaultdict(list)
        self._task = task
        self._recipe = recipe
        self._optimizer = torch.optim.AdamW(
            model.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
        )
        # OneCycleLR ends near zero, which steadies the last evaluation; it needs two steps.
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self._optimizer, recipe.learning_rate, total_steps=max(recipe.steps, 2), pct_start=0.2
        )
        self._losses: list[Tensor] = []

    def train_chunk(self, batches: Sequence[Tensor], keep_times: bool) -> None:
        """Takes one optimiser step for each batch of row numbers."""
        self.model.train()
        clock = self.clock
        clock.start_chunk()
        for rows in batches:
            clock.mark()
            inputs, target = self._task.batch(rows)
            clock.mark()
            with self._recipe.autocast():
                output = self.model(*inputs)
            clock.mark()
            loss = self._task.loss(output.float(), target)
            clock.mark()
            loss.backward()
            clock.mark()
            self._optimizer.step()
            self._schedule.step()
            self._optimizer.zero_grad()
            clock.mark()
            self._losses.append(loss.detach())
        clock.close_chunk(keep_times)

    @torch.no_grad()
    def evaluate(self, step: int) -> None:
        """Appends to the curve: mean training loss since the last call, and the metrics."""
        self.model.eval()
        with self._recipe.autocast():
            metrics = self._task.evaluate(self.model)
        loss = torch.stack(self._losses).mean().item()
        self._losses.clear()
        epoch = step / steps_per_epoch(self._task.rows, self._recipe.batch)
        own = {"step": step, "epoch": epoch, "seconds": self.clock.seconds, "train_loss": loss}
        for name, value in (own | metrics).items():
            self.curve[name].append(value)


def train_in_turns(
    builds: Mapping[str, nn.Module],
    task: Task,
    recipe: Recipe,
    seed: int,
    on_chunk: Callable[[str, Run, float], None],
) -> dict[str, Run]:
    """Trains a copy of every build on the same batches, a chunk of steps each in turn.

    Args:
        builds: name → model; all hold the same parameter values.
        seed: of the order of the batches and of the dropout masks.
        on_chunk: called after each chunk with the build's name, its run and the share done.

    Returns:
        name → finished run.
    """
    total = recipe.steps
    evaluations = max(1, min(total, recipe.evaluations))
    stops = [round(total * (k + 1) / evaluations) for k in range(evaluations)]
    runs = {name: Run(copy.deepcopy(model), task, recipe) for name, model in builds.items()}
    torch.manual_seed(seed)
    batches = _batches(task.rows, recipe, torch.Generator().manual_seed(seed))

    done, order = 0, list(runs)
    for stop in stops:
        while done < stop:
            chunk = [next(batches) for _ in range(min(recipe.chunk, stop - done))]
            # The first chunk warms up (caches; kernels that compile on a GPU), unless it is alone.
            keep_times = done > 0 or len(chunk) == total
            done += len(chunk)
            for name in order:
                runs[name].train_chunk(chunk, keep_times)
                if done == stop and recipe.evaluations:
                    runs[name].evaluate(done)
                on_chunk(name, runs[name], done / total)
            order.reverse()
    return runs


def steps_per_epoch(rows: int, batch: int) -> int:
    """Steps that see each sample once; the remainder of an epoch is left out."""
    return max(1, rows // batch)


def _batches(rows: int, recipe: Recipe, generator: torch.Generator) -> Iterator[Tensor]:
    """Row numbers without end, shuffled anew each epoch."""
    while True:
        shuffled = torch.randperm(rows, generator=generator).to(recipe.device)
        yield from shuffled.split(recipe.batch)[: steps_per_epoch(rows, recipe.batch)]
