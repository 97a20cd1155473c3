"""python -m bench [norm linear channel shapes host] [--quick]: measure on a CPU.
python -m bench [rows blocks images peers host] --device cuda: measure on a GPU.
python -m bench models [--models a,b] [--providers eager,fused]: whole models by torch.compile.
python -m bench report: tables and pictures from what was measured.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import torch

from . import results
from .cells import CPU_SUITES, Cell
from .gpu_cells import GPU_SUITES, SUITES, is_quick
from .harness import Outcome, measure
from .machine import ROOT, Machine, this_machine
from .providers import make_providers

RESULTS = ROOT / "bench" / "results"
QUICK_RESULTS = ROOT / ".cache" / "bench"
SECONDS_PER_CELL, QUICK_SECONDS_PER_CELL = 3.0, 0.7
# Of a suite: with the compilations, longer than it takes on two quiet cores.
MAX_SECONDS, QUICK_MAX_SECONDS = 5400.0, 55.0


def _chosen(
    parser: argparse.ArgumentParser, what: str, names: list[str], known: Iterable[str]
) -> list[str]:
    unknown = sorted(set(names) - set(known))
    if unknown:
        parser.error(f"unknown {what} {', '.join(unknown)}; known: {', '.join(known)}")
    return names


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    add = parser.add_argument
    add(
        "suites",
        nargs="*",
        metavar="SUITE",
        help=f"{', '.join(SUITES)} (default: all), models or report",
    )
    add("--quick", action="store_true", help="a few cells, four minutes in all, to .cache/bench")
    add("--rest", action="store_true", help="only the cells that --quick leaves out")
    add("--out", type=Path, help="folder of the CSV files (default: bench/results)")
    add("--max-seconds", type=float, help="of each suite; what is left out is said")
    add("--seconds", type=float, help="of timing for each cell, all providers together")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--threads", type=int, help="of torch (default: torch's)")
    add("--only", metavar="REGEX", help="only cells whose printed name matches")
    add("--models", help="of the suite models, with commas between (default: all)")
    add(
        "--providers", help="of the suite models: eager, compile, fused, fused_eager (default: all)"
    )
    add("--max-autotune", action="store_true", help="torch.compile so, at two sizes of linear")
    given = parser.parse_args(arguments)
    given.suites = _chosen(parser, "suite", given.suites, (*SUITES, "models", "report"))
    if "models" in given.suites:
        from .models import KNOWN, MODELS, PARTS, PROVIDERS

        names = given.models.split(",") if given.models else [*MODELS]
        names = [*PARTS] if names == ["parts"] else names
        given.models = _chosen(parser, "model", names, KNOWN)
        names = given.providers.split(",") if given.providers else [*PROVIDERS]
        given.providers = _chosen(parser, "provider", names, PROVIDERS)
    given.suites = given.suites or list(CPU_SUITES if given.device == "cpu" else GPU_SUITES)
    given.out = given.out or (QUICK_RESULTS if given.quick else RESULTS)
    if given.seconds is None:
        given.seconds = QUICK_SECONDS_PER_CELL if given.quick else SECONDS_PER_CELL
    if given.max_seconds is None:
        given.max_seconds = QUICK_MAX_SECONDS if given.quick else MAX_SECONDS
    return given


def describe(outcome: Outcome) -> str:
    """A cell in a line: fused's time by mode, and the other providers' times over it."""
    parts = []
    for mode in dict.fromkeys(row.mode for row in outcome.rows):
        of_mode = {row.provider: row for row in outcome.rows if row.mode == mode}
        ours = of_mode.pop("fused", None)
        others = [f"{name} {row.over_fused:.2f}×" for name, row in of_mode.items() if ours]
        parts.append(f"{mode} {ours.median_us:.1f} µs: {', '.join(others)}" if ours else "")
    return "; ".join(filter(None, parts))


def run_suite(name: str, cells: list[Cell], given: argparse.Namespace, machine: Machine) -> bool:
    """Measures one suite; returns whether no provider was refused."""
    started, fine = time.monotonic(), True
    make = partial(make_providers, max_autotune=given.max_autotune)
    path = given.out / f"{name}.csv"
    print(f"{name}: {len(cells)} cells, at most {given.max_seconds:.0f} s, to {path}", flush=True)
    for index, cell in enumerate(cells):
        elapsed = time.monotonic() - started
        if elapsed > given.max_seconds:
            left = len(cells) - index
            print(f"{name}: stopped by its time limit; {left} cells not measured", flush=True)
            break
        outcome = measure(cell, machine, given.seconds, make)
        results.merge(path, outcome, machine)
        elapsed = time.monotonic() - started
        print(f"{index + 1:4}/{len(cells)} {elapsed:6.0f} s  {cell}  {describe(outcome)}")
        for provider, reason in outcome.refused.items():
            print(f"     REFUSED {provider}: {reason}")
            fine = False
        sys.stdout.flush()
    return fine


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 when a provider was refused, else 0."""
    given = parse_arguments(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        print("bench: torch sees no CUDA device, so nothing was measured")
        return 0
    fine = True
    threads = given.threads or torch.get_num_threads()
    for name in given.suites:
        if name == "report":
            from .report import write_report  # matplotlib

            write_report(given.out, ROOT)
            continue
        if name == "models":
            from .models import run_models

            fine &= run_models(given)
            continue
        cells = list(SUITES[name]())
        if given.quick or given.rest:
            cells = [cell for cell in cells if is_quick(cell) == given.quick]
        if given.only:
            cells = [cell for cell in cells if re.search(given.only, str(cell))]
        # The host's work is one thread's; at these sizes others only wait for each other.
        torch.set_num_threads(1 if name == "host" else threads)
        fine &= run_suite(name, cells, given, this_machine(given.device))
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
