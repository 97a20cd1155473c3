"""Compiling every case of every family, on all cores, and putting the report together."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

from . import traffic
from .binary import compiled, kept, key_of
from .covering import Case
from .families import FAMILIES
from .family import Family, without_memory
from .launch import Launch, captured
from .report import Measured, Report
from .targets import TARGETS


class Job(NamedTuple):
    """A launch of a case: what a process needs to make it again."""

    family: str
    case: Case
    index: int


# Key, job, launch, and whether it is a headline's.
Planned = tuple[str, Job, Launch, bool]


def launches_of(family: Family, case: Case) -> list[Launch]:
    """The launches of a case for its target."""
    with captured(case["target"]) as found:
        family.call(case, without_memory)
    return found


def planned() -> Iterator[Planned]:
    """(key, job, launch, whether it is a headline's) of every binary, each once."""
    seen: set[str] = set()
    for family in FAMILIES:
        headlines = len(family.headlines) * len(TARGETS)
        for number, case in enumerate(family.cases()):
            for index, launch in enumerate(launches_of(family, case)):
                key = key_of(launch, case["target"])
                if key not in seen:
                    seen.add(key)
                    yield key, Job(family.name, case, index), launch, number < headlines


def _compile(job: Job) -> str | None:
    """In a process of its own: compiles a job into the cache; returns what went wrong."""
    (family,) = [f for f in FAMILIES if f.name == job.family]
    try:
        compiled(launches_of(family, job.case)[job.index], job.case["target"])
    except RuntimeError as error:
        return str(error)
    return None


def _compile_all(jobs: Sequence[Job], processes: int, say: bool) -> list[str | None]:
    """Compiles jobs in processes, started afresh: this one may have threads."""
    started = time.monotonic()
    results: list[str | None] = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        for done, result in enumerate(pool.map(_compile, jobs), start=1):
            results.append(result)
            if say and (done % 50 == 0 or done == len(jobs)):
                elapsed = time.monotonic() - started
                print(f"compiled {done} of {len(jobs)}, {elapsed:.0f} s", file=sys.stderr)
    return results


def sampled(plan: Iterable[Planned]) -> Iterator[Planned]:
    """Of a plan what brings a new kernel, or a family to a new target."""
    seen: set[tuple[str, str]] = set()
    for entry in plan:
        _, job, launch, _ = entry
        met = {("", launch.name), (job.family, job.case["target"])}
        if not met <= seen:
            seen |= met
            yield entry


def audit(processes: int | None = None, say: bool = False, sample: bool = False) -> Report:
    """The whole audit, or of a sample of binaries and without traffic.

    Args:
        processes: that compile what is not in .cache/audit; by default one for each core.
        say: print progress.
    """
    plan = list(sampled(planned()) if sample else planned())
    missing = [job for key, job, _, _ in plan if kept(key) is None]
    failed = []
    if missing:
        count = processes or len(os.sched_getaffinity(0))
        failed = [text for text in _compile_all(missing, min(count, len(missing)), say) if text]
    labels = {f.name: f.label for f in FAMILIES}
    binaries = []
    for key, job, launch, headline in plan:
        binary = kept(key)
        if binary is None and not failed:  # a process that ended without a word
            binary = compiled(launch, job.case["target"])
        if binary is not None:
            where = (job.case["target"], labels[job.family](job.case), job.index)
            binaries.append(Measured.of(launch, *where, headline, binary))
    if sample:
        return Report(binaries=binaries, failed=failed)
    moved = traffic.measured()
    return Report(binaries=binaries, streams=moved.streams, outside=moved.outside, failed=failed)
