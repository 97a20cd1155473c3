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

import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from .cells import Cell
from .check import CheckError, check
from .check_channel import check_channel
from .check_shapes import check_shapes
from .machine import Machine, last_level_cache
from .providers import Inputs, Provider, make_chain, make_providers
from .timing import Clock, replayed, time_in_turns

# An input is large when it fills this share of the last-level cache; the ring is this many caches.
LARGE, RING_CACHES = 1 / 4, 2
AGAIN = "fused again"


@dataclass(frozen=True)
class Row:
    """One provider of one cell; a line of the CSV. Times are of one call, in microseconds.

    Attributes:
        over_fused: median of the rounds' ratios of this provider's time to fused's, which is
            fused's speed-up over it; p20 and p80 of the same. Empty where fused was refused.
        error: largest relative error in the check; empty for a limit.
        kept_bytes: kept for backward besides the inputs and parameters; empty where not
            counted.
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

    def leaf(*sizes: int) -> torch.Tensor:
        return make(*sizes).requires_grad_(cell.needs_gradients)

    return [
        Inputs(
            leaf(*x_sizes),
            make(*cell.sizes),
            tuple(leaf(*cell.sizes) for _ in range(cell.takes_two)),
            tuple(make(*cell.sizes) for _ in range(cell.sums)),
        )
        for _ in range(count)
    ]


def kept_bytes(provider: Provider, inputs: Inputs) -> int:
    """Bytes that the forward pass keeps for backward, besides the inputs and parameters."""
    given = (inputs.x, *inputs.more, *provider.parameters)
    known = {t.untyped_storage().data_ptr() for t in given}
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


def spread(values: list[float]) -> tuple[float, float, float]:
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
        median, p20, p80 = (round(value * 1e6, 3) for value in spread(seconds))
        ours = times.get(("fused", mode))
        ratios: tuple[Any, ...] = ("", "", "")
        if ours:
            found = spread([theirs / own for theirs, own in zip(seconds, ours, strict=True)])
            ratios = tuple(round(ratio, 4) for ratio in found)
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
    make: Callable[[Cell, Any, Inputs], list[Provider]] = make_providers,
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
                checked: Any = check if cell.rows_are_apart else check_channel
                checked = check_shapes if cell.takes_two else checked
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
