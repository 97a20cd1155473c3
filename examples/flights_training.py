"""Trains two builds of one model in turns on the same batches.

Short chunks of steps alternate between the builds, so both meet the same noise of the machine, and
a speed-up is a ratio of neighbouring chunks.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from flights_data import Table
from torch import Tensor, nn

PARTS = ("data", "forward", "loss", "backward", "optimizer")
CHUNK_STEPS = 16
EVALUATION_BATCH = 8192


@dataclass(frozen=True)
class Recipe:
    """How a model is trained; both builds follow the same one."""

    epochs: int
    batch: int
    device: torch.device
    dtype: torch.dtype = torch.float32
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    evaluations_per_epoch: int = 4

    def autocast(self) -> AbstractContextManager:
        """Mixed precision, where `dtype` asks for it."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


@dataclass
class Curve:
    """What a run is judged by, one entry per evaluation."""

    epoch: list[float] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    valid_loss: list[float] = field(default_factory=list)
    valid_auc: list[float] = field(default_factory=list)


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
    """One model in training, with its optimiser, its clock and its curve."""

    def __init__(self, model: nn.Module, recipe: Recipe, steps: int) -> None:
        self.model = model
        self.clock = Clock(recipe.device)
        self.curve = Curve()
        self._recipe = recipe
        self._optimizer = torch.optim.AdamW(
            model.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
        )
        # OneCycleLR ends near zero, which steadies the last evaluation; it needs two steps.
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self._optimizer, recipe.learning_rate, total_steps=max(steps, 2), pct_start=0.2
        )
        self._losses: list[Tensor] = []

    def train_chunk(self, table: Table, batches: Sequence[Tensor], keep_times: bool) -> None:
        """Takes one optimiser step for each batch of row numbers."""
        self.model.train()
        clock = self.clock
        clock.start_chunk()
        for rows in batches:
            clock.mark()
            categorical, numeric = table.categorical[rows], table.numeric[rows]
            late = table.late[rows]
            clock.mark()
            with self._recipe.autocast():
                logits = self.model(categorical, numeric)
            clock.mark()
            loss = F.binary_cross_entropy_with_logits(logits.float(), late)
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
    def evaluate(self, table: Table, epoch: float) -> None:
        """Appends to the curve: mean training loss since the last call, validation loss and AUC."""
        self.model.eval()
        parts = []
        for first in range(0, len(table), EVALUATION_BATCH):
            rows = slice(first, first + EVALUATION_BATCH)
            with self._recipe.autocast():
                parts.append(self.model(table.categorical[rows], table.numeric[rows]).float())
        logits = torch.cat(parts)
        loss = F.binary_cross_entropy_with_logits(logits, table.late)
        self.curve.epoch.append(epoch)
        self.curve.train_loss.append(torch.stack(self._losses).mean().item())
        self.curve.valid_loss.append(loss.item())
        self.curve.valid_auc.append(area_under_curve(logits, table.late))
        self._losses.clear()


def train_in_turns(
    builds: Mapping[str, nn.Module],
    train: Table,
    valid: Table,
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
    steps_per_epoch = max(1, len(train) // recipe.batch)
    total = steps_per_epoch * recipe.epochs
    evaluations = min(total, recipe.epochs * recipe.evaluations_per_epoch)
    stops = [round(total * (k + 1) / evaluations) for k in range(evaluations)]
    runs = {name: Run(copy.deepcopy(model), recipe, total) for name, model in builds.items()}
    torch.manual_seed(seed)
    batches = _batches(len(train), recipe, torch.Generator().manual_seed(seed))

    done, order = 0, list(runs)
    for stop in stops:
        while done < stop:
            chunk = [next(batches) for _ in range(min(CHUNK_STEPS, stop - done))]
            # The first chunk warms up (caches; kernels that compile on a GPU), unless it is alone.
            keep_times = done > 0 or len(chunk) == total
            done += len(chunk)
            for name in order:
                runs[name].train_chunk(train, chunk, keep_times)
                if done == stop:
                    runs[name].evaluate(valid, done / steps_per_epoch)
                on_chunk(name, runs[name], done / total)
            order.reverse()
    return runs


def _batches(rows: int, recipe: Recipe, generator: torch.Generator) -> Iterator[Tensor]:
    """Row numbers without end, shuffled anew each epoch; the remainder of an epoch is left out."""
    while True:
        shuffled = torch.randperm(rows, generator=generator).to(recipe.device)
        yield from shuffled.split(recipe.batch)[: max(1, rows // recipe.batch)]


def area_under_curve(scores: Tensor, labels: Tensor) -> float:
    """The probability that a positive scores above a negative, ties counted as one half.

    The rank statistic of Mann and Whitney: AUC = (R − P(P + 1)/2) / (P · N), with P positives,
    N negatives and R the sum of the positives' ranks.

    Args:
        scores: (n,).
        labels: (n,), 1 for positives and 0 for negatives.

    Returns:
        The AUC; nan when a class is absent.
    """
    _, place, count = scores.double().unique(return_inverse=True, return_counts=True)
    mean_rank = count.cumsum(0) - (count - 1) / 2  # of each distinct score
    positive = labels > 0.5
    positives = int(positive.sum())
    negatives = len(labels) - positives
    if positives == 0 or negatives == 0:
        return float("nan")
    rank_sum = mean_rank.double()[place[positive]].sum().item()
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)
