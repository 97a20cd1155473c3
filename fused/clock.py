"""Which of several calls is the faster, on a GPU: in turns, by the median of their ratios."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

# A call has to be so much faster, in the median of so many turns, to take another's place.
GAIN, TURNS, CALLS = 1.03, 7, 5

Measure = Callable[[list[Callable[[], Any]]], list[list[float]]]


def measure_on_gpu(calls: list[Callable[[], Any]]) -> list[list[float]]:
    """Milliseconds of each call in each turn, by CUDA events."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for turn in range(TURNS):
        for index in (*range(turn % len(calls), len(calls)), *range(turn % len(calls))):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(CALLS):
                calls[index]()
            end.record()
            end.synchronize()
            times[index].append(start.elapsed_time(end) / CALLS)
    return times


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    """How many times faster `theirs` is, by the median of the turns' ratios."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
