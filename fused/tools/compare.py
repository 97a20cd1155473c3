"""Which way runs a model the fastest on this machine: measured in turns, on the model itself."""

from __future__ import annotations

import copy
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..chain.convert import fuse_, unfuse_
from ..extras.progress import Progress
from .clock import median_ratio
from .comparison import Comparison, Row
from .steps import (
    Outcome,
    Step,
    floating_tensors,
    largest_difference,
    mean_square,
    switch_dropout_off,
)

__all__ = ["WAYS", "compare"]

Way = Callable[[nn.Module], Callable[..., Any]]
Change = Callable[[nn.Module], Any]


def _fuse(model: nn.Module) -> nn.Module:
    fuse_(model)
    return model


EAGER = "eager"
# What takes a copy of the model and gives what is called in its place.
WAYS: dict[str, Way] = {
    EAGER: lambda model: model,
    "fuse_": _fuse,
    "torch.compile": torch.compile,
    'torch.compile(backend="fused")': partial(torch.compile, backend="fused"),
    'torch.compile(backend="fused_eager")': partial(torch.compile, backend="fused_eager"),
}
# What a way may raise without ending the others; the compiler's errors are RuntimeErrors.
_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError),
    *(RuntimeError, TypeError, ValueError),
)
_FEWEST, _MOST = 5, 200  # rounds
_TURN_SECONDS = 2e-3  # a turn has as many steps as fit in, at least one
_RECOMPILE_LIMIT = 64  # every copy, with dropout and without, compiles the same code
# Of outputs and gradients, relative; by the coarsest dtype of the parameters and outputs.
_TOLERANCES = {torch.float64: 1e-7, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def _nothing(model: nn.Module) -> None:
    """Changes nothing."""


# What may make a step repeatable, the least first, and what the title says of it.
_SILENT: list[tuple[Change, str]] = [
    (_nothing, ""),
    (switch_dropout_off, ""),
    (nn.Module.eval, "; differences in evaluation mode, because functions drop, too"),
]


def compare(
    model: nn.Module,
    *inputs: Any,
    train: bool = True,
    kwargs: Mapping[str, Any] | None = None,
    loss: Callable[[Any], Tensor] | None = None,
    ways: Mapping[str, Way] | None = None,
    seconds: float = 20.0,
    tolerance: float | None = None,
    progress: bool = True,
) -> Comparison:
    """Measures eager, `fuse_` and `torch.compile` with each backend on a model, in turns.

    Each way runs on its own copy of the model, so memory must hold as many copies. A training step
    is forward, loss and backward; an inference step is forward, in evaluation mode and without
    gradients. Outputs, buffers and gradients are compared with eager's with dropout switched off.
    At the end `torch._dynamo.reset()` forgets what was compiled, which includes your own functions.

    Args:
        model: on a CPU or a CUDA device; it is left as it is.
        inputs: what the model takes.
        train: measure training; False measures inference.
        kwargs: what the model takes by keyword.
        loss: takes the output, gives a scalar; None: the sum of the mean squares of all
            floating-point tensors in the output.
        ways: name → what takes a copy of the model and gives what is called in its place; None:
            all. Eager is always measured.
        seconds: for the rounds, without compilation; at least five rounds are measured.
        tolerance: the largest relative difference with which a way is recommended; None: 1e-3 in
            float32, 1e-7 in float64, 2e-2 in float16, 1e-1 in bfloat16.
        progress: show it on stderr.

    Returns:
        A `Comparison`; print it. A way that raises has a row with its error.

    Raises:
        TypeError: model is not an nn.Module; in training, no output needs gradients.
        ValueError: the model is on another device.

    Example:
        >>> result = fused.compare(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), torch.randn(4, 8))
        >>> print(result.advice)  # doctest: +SKIP
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"compare: model must be an nn.Module, got {type(model).__name__}")
    keywords = dict(kwargs or {})
    tensors = [*model.parameters(), *floating_tensors((inputs, keywords))]
    device = tensors[0].device if tensors else torch.device("cpu")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"compare: the model must be on a CPU or a CUDA device, got {device}")
    chosen = {EAGER: WAYS[EAGER]} | dict(WAYS if ways is None else ways)
    stream = sys.stderr if progress else None
    rule = (loss or mean_square) if train else None

    def make(change: Change) -> Step:
        own = unfuse_(copy.deepcopy(model)).train(train)
        change(own)
        return Step(own, own, inputs, keywords, rule, device)

    with torch._dynamo.config.patch(recompile_limit=_RECOMPILE_LIMIT):
        try:
            eager, change, note = _reference(make)
            if any(name.startswith("torch.compile") for name in chosen):
                _compile_something(device)
            rows, steps = [], []
            with Progress("compile", len(chosen), stream, "ways") as bar:
                for name, way in chosen.items():
                    row, step = _prepare(name, way, make, change, eager)
                    rows.append(row)
                    if step is not None:
                        steps.append(step)
                    bar.advance(1)
            times = _in_turns(steps, seconds, stream)
        finally:
            torch._dynamo.reset()
    measured = iter(times)
    for index, row in enumerate(rows):
        if not row.error:
            own = next(measured)
            speed = median_ratio(times[0], own)
            rows[index] = replace(row, step=statistics.median(own), speed=speed)
    floats = [*floating_tensors([[*model.parameters()], eager.values])]
    dtype = max((t.dtype for t in floats), key=lambda d: torch.finfo(d).eps, default=torch.float32)
    title = f"{'training' if train else 'inference'} of {type(model).__name__}, {_short(dtype)}, "
    where = f"{torch.get_num_threads()} CPU threads"
    title += torch.cuda.get_device_name(device) if device.type == "cuda" else where
    title += f", {len(times[0])} rounds; torch {torch.__version__}, fused {__version__}{note}"
    allowed = _TOLERANCES.get(dtype, 1e-1) if tolerance is None else tolerance
    return Comparison(rows, title, allowed)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _sentence(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:157] + '…' if len(text) > 158 else text}"


def _reference(make: Callable[[Change], Step]) -> tuple[Outcome, Change, str]:
    """Eager's outcome with what makes it repeatable, that change, and what to say of it."""
    for change, note in _SILENT:  # noqa: B007 - the last one stands where none is enough
        first, again = (make(change).outcome(seed)[1] for seed in (0, 1))
        if largest_difference(again.values, first.values) == 0:
            break
    return first, change, note


def _prepare(
    name: str,
    way: Way,
    make: Callable[[Change], Step],
    change: Change,
    eager: Outcome,
) -> tuple[Row, Step | None]:
    """A way's first steps: all but the time of a step, and the step that is to be timed."""
    from torch._inductor.utils import fresh_cache  # slow to import

    with fresh_cache():
        try:
            step = make(_nothing)
            start = time.perf_counter()
            step.call = way(step.model)
            made = time.perf_counter() - start
            first, outcome = step.outcome()
            step.run()
            peak = step.peak()
            if change is not _nothing:
                silent = make(change)
                silent.call = way(silent.model)
                _, outcome = silent.outcome()
        except _ERRORS as error:
            if name == EAGER:
                raise
            return Row(name, error=_sentence(error)), None
    outputs = largest_difference(outcome.values, eager.values)
    gradients = math.nan
    if step.loss is not None:
        gradients = largest_difference(outcome.gradients, eager.gradients, by_module=True)
    return Row(name, first=made + first, peak=peak, outputs=outputs, gradients=gradients), step


def _compile_something(device: torch.device) -> None:
    """What only the first compilation of a process pays shall not count for the first way."""
    from torch._inductor.utils import fresh_cache

    with fresh_cache():
        x = torch.ones(64, device=device, requires_grad=True)
        torch.compile(torch.sin)(x).sum().backward()


def _in_turns(steps: list[Step], seconds: float, stream: Any) -> list[list[float]]:
    """Seconds of a step of each way in each round; every round starts with another way."""
    single = [step.run()[0] for step in steps]
    counts = [max(1, round(_TURN_SECONDS / max(one, 1e-9))) for one in single]
    taken = sum(one * count for one, count in zip(single, counts, strict=True))
    rounds = min(_MOST, max(_FEWEST, int(seconds / max(taken, 1e-9))))
    times: list[list[float]] = [[] for _ in steps]
    end = time.perf_counter() + seconds
    collecting = gc.isenabled()
    gc.disable()
    try:
        with Progress("measure", rounds * len(steps), stream, "turns") as bar:
            for turn in range(rounds):
                if turn >= _FEWEST and time.perf_counter() > end:
                    break
                for shift in range(len(steps)):
                    at = (turn + shift) % len(steps)
                    total = sum(steps[at].run()[0] for _ in range(counts[at]))
                    times[at].append(total / counts[at])
                    bar.advance(1)
    finally:
        if collecting:
            gc.enable()
    return times
