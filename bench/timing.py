"""The time of providers, in turns: by calls, and by replays of CUDA graphs."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle, islice
from typing import Any

import torch

from fused.tools.clock import capture

from .providers import Inputs, Provider

WARM_UP_CALLS = 3
BLOCK_SECONDS = 2e-3  # a block has as many calls as fit in, at least one
MOST_CALLS = 100
FEWEST_ROUNDS, MOST_ROUNDS = 7, 100
STEPS = 8  # of a graph at least, so that what is between two replays weighs little


class Clock:
    """Time marks on the device's own clock, or on the host's.

    Args:
        own: on the host, count this process's CPU time: of one thread it is the time on a machine
            that others do not use.
    """

    def __init__(self, device: str, host: bool = False, own: bool = False) -> None:
        self._events = device == "cuda" and not host
        self._now = time.process_time if own else time.perf_counter
        self._synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None

    def mark(self) -> Any:
        if not self._events:
            return self._now()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """Between two marks; on a GPU only after `wait`."""
        return start.elapsed_time(end) / 1e3 if self._events else end - start

    def wait(self) -> None:
        self._synchronize()


def run_block(
    provider: Provider, ring: Iterator[Inputs], calls: int, clock: Clock
) -> dict[str, float]:
    """Seconds of one call by mode, the mean of a block; outputs are freed outside the marks.

    A call before the block is not counted: it meets the caches and the free memory that another
    provider left behind, where a training loop meets its own.
    """
    marks = []
    for index in range(calls + 1):
        if index <= 1:
            clock.wait()
        inputs = next(ring)
        start = clock.mark()
        y = provider.forward(inputs)
        middle = clock.mark()
        gradients = provider.backward(inputs, y) if provider.backward else None
        end = clock.mark() if provider.backward else middle
        marks.append((start, middle, end))
        del y, gradients
    clock.wait()
    del marks[0]
    steps = calls * provider.steps
    times = {provider.mode: sum(clock.seconds(start, end) for start, _, end in marks) / steps}
    if provider.backward:
        times["backward"] = sum(clock.seconds(middle, end) for _, middle, end in marks) / steps
    return times


def time_in_turns(
    providers: list[Provider], ring: list[Inputs], clock: Clock, seconds: float
) -> tuple[dict[tuple[str, str], list[float]], dict[str, int]]:
    """Seconds of one call in every round, by (provider, mode); and the calls in a block."""
    inputs = cycle(ring)
    calls = {}
    for provider in providers:
        run_block(provider, inputs, WARM_UP_CALLS, clock)
        one = run_block(provider, inputs, 1, clock)[provider.mode]
        one *= provider.steps
        calls[provider.name] = min(MOST_CALLS, max(1, round(BLOCK_SECONDS / max(one, 1e-9))))
    times: dict[tuple[str, str], list[float]] = {}
    end, rounds = time.perf_counter() + seconds, 0
    collecting = gc.isenabled()
    gc.disable()
    try:
        while rounds < FEWEST_ROUNDS or (rounds < MOST_ROUNDS and time.perf_counter() < end):
            first = rounds % len(providers)
            for provider in providers[first:] + providers[:first]:
                block = run_block(provider, inputs, calls[provider.name], clock)
                for mode, one in block.items():
                    times.setdefault((provider.name, mode), []).append(one)
            rounds += 1
    finally:
        if collecting:
            gc.enable()
    return times, calls


def replayed(provider: Provider, ring: list[Inputs]) -> Provider:
    """The same as replays of a CUDA graph that walks over the ring, forward and backward."""
    inputs, steps = cycle(ring), len(ring) * math.ceil(STEPS / len(ring))

    def walk() -> None:
        for one in islice(inputs, steps):
            y = provider.forward(one)
            if provider.backward:
                provider.backward(one, y)

    replay = capture(walk)
    mode = f"{provider.mode} replayed"
    return replace(
        provider, forward=lambda _: replay(), backward=None, mode=mode, checked=False, steps=steps
    )
