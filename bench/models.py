"""python -m bench models: training steps and inference calls of whole models, by torch.compile.

    python -m bench models --models bert,tabm --threads 1 --providers eager,compile,fused
    python -m bench models --models parts      # single norms and short chains, for the policy

A training step is forward, a mean square error and backward to new gradients; an inference call is
forward in evaluation mode. All providers call the same module, whose parameters they share, in
turns (timing.py); on one thread of a CPU times are CPU time. A model is measured with its own
dropout and without, and what a provider gives without dropout is compared with what eager torch
gives before it is timed.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache

from . import results, zoo
from .check import CheckError
from .harness import spread
from .machine import Machine, this_machine
from .providers import Provider
from .timing import Clock, time_in_turns

# The backend of torch.compile; None: eager torch.
PROVIDERS: dict[str, str | None] = {
    **{"eager": None, "compile": "inductor", "fused": "fused", "fused_eager": "fused_eager"}
}
OURS = ("fused", "fused_eager")
# Builders, and the dropout that the model's papers, examples or defaults train with.
MODELS: dict[str, tuple[Callable[[float], zoo.Model], float]] = {
    "mlp-layer": (zoo.mlp, 0.1),
    "mlp-batch": (lambda p: zoo.mlp(p, "batch"), 0.1),
    "pyg-mlp": (zoo.pyg_mlp, 0.5),
    "graphsage": (zoo.graph_sage, 0.5),
    "bert": (zoo.bert, 0.1),
    "vit": (zoo.vit, 0.1),
    "llama": (zoo.llama, 0.0),
    "convnext": (zoo.convnext, 0.0),
    "resnet18": (zoo.resnet, 0.0),
    "mixer": (zoo.mixer, 0.1),
    "tabm": (zoo.tabm, 0.1),
    "transformer": (zoo.transformer, 0.1),
}
# What the pass's policy asks about; `--models parts` is all of them.
PARTS: dict[str, tuple[Callable[[float], zoo.Model], float]] = {
    f"{stages}-{rows}x{features}": (
        partial(zoo.part, stages=stages, rows=rows, features=features),
        0.1 if "dropout" in stages else 0.0,
    )
    for stages, (rows, features) in product(zoo.PARTS, zoo.PART_SIZES)
}
KNOWN = MODELS | PARTS
# The largest difference from eager torch, of each tensor's largest element: an element at ReLU's
# kink that changes its side moves a gradient by about a thousandth.
LIMIT = 1e-2
CANCELLED = 1e-3  # gradients that cancel are compared on this share of the largest one's scale
THREADS = (1, 2)


@dataclass(frozen=True)
class ModelRow:
    """One provider of one model; a line of the CSV.

    Attributes:
        dropout: of every layer that has one; 0 at inference.
        over_fused: median of the rounds' ratios of this provider's time to that of "fused";
            over_fused_eager likewise. Empty where either was refused.
        first_s: seconds of the first call, with compilation and empty caches on disk.
        difference: from eager torch; empty with dropout, whose masks are others.
        refused: why there are no figures.
    """

    model: str
    dropout: float
    mode: str
    provider: str
    median_ms: float | str
    p20_ms: float | str
    p80_ms: float | str
    over_fused: float | str
    over_fused_eager: float | str
    first_s: float | str
    difference: float | str
    rounds: int | str
    refused: str
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


KEY = ("model", "dropout", "mode", "provider", "device", "machine", "threads", "isa")


def make_provider(name: str, model: zoo.Model, training: bool) -> Provider:
    """A step's gradients are those of the parameters, new ones."""
    backend, module = PROVIDERS[name], model.module
    call: Any = torch.compile(module, backend=backend) if backend else module
    parameters = [p for p in module.parameters() if p.requires_grad]

    def forward(_: Any) -> list[Tensor]:
        outputs = model.outputs(call)
        return [model.loss(outputs)] if training else outputs

    def backward(_: Any, losses: list[Tensor]) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(losses[0], parameters, allow_unused=True)

    mode = "training" if training else "inference"
    return Provider(name, forward, mode, backward if training else None)


def values(provider: Provider) -> list[Tensor | None]:
    """What one call gives: loss and gradients, or outputs."""
    outputs = provider.forward(None)
    gradients = provider.backward(None, outputs) if provider.backward else ()
    return [y.detach() for y in outputs] + list(gradients)


def difference(got: Sequence[Tensor | None], want: Sequence[Tensor | None]) -> float:
    """The largest, each tensor's over its largest element.

    Raises:
        CheckError: a tensor is missing, not finite or too far off.
    """
    worst, sizes = 0.0, [0.0 if t is None else float(t.abs().max()) for t in want]
    for ours, theirs, size in zip(got, want, sizes, strict=True):
        if (ours is None) != (theirs is None):
            raise CheckError("gives other gradients than eager torch")
        if ours is not None and theirs is not None:
            scale = max(size, CANCELLED * max(sizes[1:], default=0.0), 1e-30)
            worst = max(worst, float((ours - theirs).abs().max()) / scale)
    if not worst <= LIMIT:
        raise CheckError(f"differs from eager torch by {worst:.2g}")
    return worst


def warm_up_compiler() -> None:
    """What the first compilation of a process imports and probes is no model's."""
    with fresh_cache():
        step = torch.compile(torch.nn.Linear(8, 8))
        step(torch.ones(2, 8)).sum().backward()
    torch.compiler.reset()


def measure_model(
    name: str, p: float, training: bool, chosen: Sequence[str], seconds: float, machine: Machine
) -> list[ModelRow]:
    """Checks and times a model; a provider that fails has a row that says why."""
    torch.manual_seed(0)
    torch.compiler.reset()
    model = KNOWN[name][0](p)
    model.module.train(training)
    found: dict[str, dict[str, Any]] = {}
    passed: list[Provider] = []
    with torch.set_grad_enabled(training):
        reference = make_provider("eager", model, training)
        want = values(reference)
        for way in chosen:
            found[way] = facts = {"refused": "", "first_s": "", "difference": ""}
            with fresh_cache():
                try:
                    provider = make_provider(way, model, training)
                    started = time.perf_counter()
                    got = values(provider)
                    facts["first_s"] = round(time.perf_counter() - started, 2)
                    if not p or not training:
                        facts["difference"] = float(f"{difference(got, want):.2g}")
                    passed.append(provider)
                except (RuntimeError, TypeError, ValueError, AttributeError, CheckError) as error:
                    facts["refused"] = str(error).strip().partition("\n")[0]
        times: dict[tuple[str, str], list[float]] = {}
        if passed:
            inputs: list[Any] = [None]
            clock = Clock(machine.device, own=machine.device == "cpu" and machine.threads == 1)
            times, _ = time_in_turns(passed, inputs, clock, seconds)
    own = {way: rounds for (way, mode), rounds in times.items() if mode != "backward"}
    cell = {"model": name, "dropout": p if training else 0.0}
    cell["mode"] = "training" if training else "inference"
    rows = []
    for way, facts in found.items():
        figures: dict[str, Any] = dict.fromkeys(
            ("median_ms", "p20_ms", "p80_ms", "over_fused", "over_fused_eager", "rounds"), ""
        )
        if way in own:
            median, p20, p80 = (round(s * 1e3, 3) for s in spread(own[way]))
            figures |= {"median_ms": median, "p20_ms": p20, "p80_ms": p80, "rounds": len(own[way])}
            for base in OURS:
                if base in own:
                    ratios = [a / b for a, b in zip(own[way], own[base], strict=True)]
                    figures[f"over_{base}"] = round(spread(ratios)[0], 4)
        rows.append(ModelRow(**cell, provider=way, **figures, **facts, **asdict(machine)))
    return rows


def cases(names: Sequence[str], only: str | None) -> list[tuple[str, float, bool]]:
    """Model, dropout and training: all with their own, all without, all at inference."""
    own = [(name, KNOWN[name][1], True) for name in names]
    others = [(name, 0.0, training) for training in (True, False) for name in names]
    found = dict.fromkeys(own + others)
    return [case for case in found if not only or re.search(only, title(*case))]


def title(name: str, p: float, training: bool) -> str:
    return f"{name} training p={p:g}" if training else f"{name} inference"


def describe(rows: Sequence[ModelRow]) -> str:
    """A case in a line."""
    parts = []
    for r in rows:
        result = f"REFUSED {r.refused}" if r.refused else f"{r.median_ms:.1f} ms"
        parts.append(f"{r.provider} {result} (first {r.first_s or '–'} s)")
    own = title(rows[0].model, rows[0].dropout, rows[0].mode == "training")
    return f"{own}: {', '.join(parts)}"


def run_models(given: argparse.Namespace) -> bool:
    """Measures the chosen models; returns whether no provider was refused."""
    path: Path = given.out / "models.csv"
    fine, started = True, time.monotonic()
    for threads in [given.threads] if given.threads else THREADS:
        torch.set_num_threads(threads)
        warm_up_compiler()
        machine = this_machine(given.device)
        for case in cases(given.models, given.only):
            if time.monotonic() - started > given.max_seconds:
                print(f"models: stopped by its time limit before {title(*case)}", flush=True)
                return fine
            rows = measure_model(*case, given.providers, given.seconds, machine)
            kept = results.by_key((*results.read(path, ModelRow), *rows), KEY)
            results.write(path, kept.values(), ModelRow)
            elapsed = time.monotonic() - started
            print(f"{elapsed:6.0f} s  {threads} threads  {describe(rows)}", flush=True)
            fine &= not any(r.refused for r in rows)
    return fine
