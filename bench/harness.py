"""Measures one cell: checks each provider, then times all of them in turns, in one run.

In every round each provider runs a block of calls; the next round starts with another provider. A
ratio is the median of the rounds' ratios, so what disturbs a round disturbs both of its sides. All
sides allocate what they return. Inputs that are large for the last-level cache come from a ring
that exceeds it, shared by the providers, so that none finds its input in the cache.

On a GPU everything is timed twice: by calls from Python, whose time is the host's where the kernels
are short, and by replays of CUDA graphs, whose time is the kernels' alone (the modes that end with
"replayed"). fused is then also measured against itself ("fused again"): no smaller difference of
its ratio from 1 means anything.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice
from typing import Any

import torch
from torch import nn

from fused.clock import capture

from .cells import Cell
from .check import CheckError, check
from .check_channel import check_channel
from .machine import Machine, last_level_cache
from .providers import Inputs, Provider, make_chain, make_providers

WARM_UP_CALLS = 3
BLOCK_SECONDS = 2e-3  # a block has as many calls as fit in, at least one
MOST_CALLS = 100
FEWEST_ROUNDS, MOST_ROUNDS = 7, 100
# An input is large when it fills this share of the last-level cache; the ring is this many caches.
LARGE, RING_CACHES = 1 / 4, 2
STEPS = 8  # of a graph at least, so that what is between two replays weighs little
AGAIN = "fused again"


@dataclass(frozen=True)
class Row:
    """One provider of one cell; a line of the CSV. Times are of one call, in microseconds.

    Attributes:
        over_fused: median of the rounds' ratios of this provider's time to fused's, which is
            fused's speed-up over it; p20 and p80 of the same. Empty where fused was refused.
        error: largest relative error in the check; empty for a limit.
        kept_bytes: kept for backward besides x and the parameters; empty where not counted.
        ring: how many inputs were rotated.
    """

    suite: str
    chain: str
    norm: str
    activation: str
    dtype: str
    M: int
    K: int
    N: int
    p: float
    mode: str
    shape: str
    layout: str
    provider: str
    median_us: float
    p20_us: float
    p80_us: float
    over_fused: float | str
    over_fused_p20: float | str
    over_fused_p80: float | str
    error: float | str
    kept_bytes: int | str
    rounds: int
    calls: int
    ring: int
    device: str
    machine: str
    threads: int
    isa: str
    clocks: str
    commit: str
    date: str
    python: str
    torch: str
    triton: str


@dataclass(frozen=True)
class Outcome:
    """The rows of a cell, and which providers were refused and why."""

    cell: Cell
    rows: list[Row]
    refused: dict[str, str]


class Clock:
    """Time marks on the device's own clock, or on the host's."""

    def __init__(self, device: str, host: bool = False) -> None:
        self._events = device == "cuda" and not host
        self._synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None

    def mark(self) -> Any:
        if not self._events:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """Between two marks; on a GPU only after `wait`."""
        return start.elapsed_time(end) / 1e3 if self._events else end - start

    def wait(self) -> None:
        self._synchronize()


def make_ring(cell: Cell, device: str) -> list[Inputs]:
    """The inputs that are rotated; one where they are small for the cache."""
    dtype = getattr(torch, cell.dtype)
    features = cell.K if cell.has_linear else cell.width
    size = cell.M * max(features, cell.N) * dtype.itemsize
    cache = last_level_cache(device)
    count = 1 + math.ceil(RING_CACHES * cache / size) if size >= LARGE * cache else 1

    memory = torch.channels_last if cell.layout else torch.contiguous_format

    def make(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, device=device).to(dtype, memory_format=memory)

    x_sizes = cell.sizes if cell.shape else (cell.M, features)
    return [
        Inputs(make(*x_sizes).requires_grad_(cell.needs_gradients), make(*cell.sizes))
        for _ in range(count)
    ]


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


def kept_bytes(provider: Provider, inputs: Inputs) -> int:
    """Bytes that the forward pass keeps for backward, besides x and the parameters."""
    known = {t.untyped_storage().data_ptr() for t in (inputs.x, *provider.parameters)}
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = provider.forward(inputs)  # alive until all are counted, so no address comes twice
    del y
    return sum(kept.values())


def _spread(values: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return statistics.median(values), fifths[0], fifths[3]


def _rows(
    cell: Cell,
    machine: Machine,
    times: dict[tuple[str, str], list[float]],
    facts: dict[str, dict[str, Any]],
) -> list[Row]:
    rows = []
    for (name, mode), seconds in times.items():
        median, p20, p80 = (round(value * 1e6, 3) for value in _spread(seconds))
        ours = times.get(("fused", mode))
        ratios: tuple[Any, ...] = ("", "", "")
        if ours:
            spread = _spread([theirs / own for theirs, own in zip(seconds, ours, strict=True)])
            ratios = tuple(round(ratio, 4) for ratio in spread)
        key = asdict(replace(cell, mode=mode)) | {"provider": name}
        over: dict[str, Any] = dict(
            zip(("over_fused", "over_fused_p20", "over_fused_p80"), ratios, strict=True)
        )
        more: dict[str, Any] = {
            "median_us": median,
            "p20_us": p20,
            "p80_us": p80,
            "rounds": len(seconds),
        }
        rows.append(Row(**key, **over, **more, **facts[name], **asdict(machine)))
    return rows


def measure(
    cell: Cell,
    machine: Machine,
    seconds: float,
    make: Callable[[Cell, nn.Sequential, Inputs], list[Provider]] = make_providers,
) -> Outcome:
    """Checks and times a cell.

    Args:
        seconds: how long to time; at least FEWEST_ROUNDS rounds are made.
        make: the providers of a cell, from its chain and inputs.
    """
    torch.manual_seed(0)
    chain = make_chain(cell, machine.device)
    ring = make_ring(cell, machine.device)
    providers = make(cell, chain, ring[0])
    facts: dict[str, dict[str, Any]] = {}
    refused: dict[str, str] = {}
    passed = []
    for provider in providers:
        found: dict[str, Any] = {"error": "", "kept_bytes": "", "ring": len(ring)}
        try:
            if provider.checked:
                checked = check if cell.rows_are_apart else check_channel
                found["error"] = float(f"{checked(provider, cell, chain, ring[0]):.3g}")
        except (CheckError, RuntimeError) as error:  # the compiler's errors are RuntimeErrors
            refused[provider.name] = str(error).strip().partition("\n")[0]
            continue
        if provider.backward and provider.name in ("eager", "fused"):
            found["kept_bytes"] = kept_bytes(provider, ring[0])
        passed.append(provider)
        facts[provider.name] = found
    if not any(provider.checked for provider in passed):
        return Outcome(cell, [], refused)
    on_gpu = machine.device == "cuda" and cell.suite != "host"
    if on_gpu and "fused" in facts:
        passed.append(replace(passed[0], name=AGAIN, checked=False))
        facts[AGAIN] = {"error": "", "kept_bytes": "", "ring": len(ring)}
    clock = Clock(machine.device, host=cell.suite == "host")
    rows = []
    with torch.set_grad_enabled(cell.needs_gradients):
        for prepare in (None, replayed) if on_gpu else (None,):
            ready = []
            for provider in passed:
                try:
                    ready.append(prepare(provider, ring) if prepare else provider)
                except RuntimeError as error:  # it cannot be captured
                    refused[f"{provider.name} replayed"] = str(error).strip().partition("\n")[0]
            if not ready:
                continue
            times, calls = time_in_turns(ready, ring, clock, seconds)
            for name, number in calls.items():
                facts[name]["calls"] = number
            rows += _rows(cell, machine, times, facts)
    return Outcome(cell, rows, refused)
