"""Which of several calls is the faster, on a GPU: in turns, by the median of their ratios.

Each call is captured in a CUDA graph, and only replays of it are timed: what a call does on the
host, which for small tensors takes longer than its kernels, is not measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

# A call has to be so much faster, in the median of so many turns, to take another's place; and by
# more than a call differs from itself (`noise_floor`).
GAIN, TURNS, CALLS = 1.03, 11, 5
WARM_UP_CALLS = 3

Measure = Callable[[list[Callable[[], Any]]], list[list[float]]]


def capture(call: Callable[[], Any], times: int = 1) -> Callable[[], None]:
    """What replays a CUDA graph of so many calls; the calls are made now, not when it replays."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_CALLS):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            call()
    return graph.replay


def measure_on_gpu(calls: list[Callable[[], Any]]) -> list[list[float]]:
    """Milliseconds of each call in each turn, by CUDA events around replays of `CALLS` calls."""
    times: list[list[float]] = [[] for _ in calls]
    replays = [capture(call, CALLS) for call in calls]
    for replay in replays:
        replay()
    for turn in range(TURNS):
        for index in (*range(turn % len(calls), len(calls)), *range(turn % len(calls))):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            replays[index]()
            end.record()
            end.synchronize()
            times[index].append(start.elapsed_time(end) / CALLS)
    return times


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    """How many times faster `theirs` is, by the median of the turns' ratios."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def noise_floor(one: list[float], again: list[float]) -> float:
    """How many times faster a call seems than itself, measured twice; one turn in five is worse."""
    ratios = [a / b for a, b in zip(one, again, strict=True)]
    fifths = statistics.quantiles(ratios, n=5, method="inclusive")
    return max(1.0, fifths[3], 1 / fifths[0])
