"""python -m bench.latency: how long the first training step of a block waits for Triton.

Compiles, one after another on one CPU core, the kernels that one training step (forward, backward)
of a block launches, in a new process with an empty Triton cache and then in another with the cache
that this one left. Needs no GPU: launches are captured as the audit captures them, for --target.
With a GPU, --device cuda times the first step of a real block instead.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# The norm and the scene of the audit's families that stands for it; None: along rows.
BLOCKS: dict[str, str | None] = {
    "layer": None,
    "rms": None,
    "none": None,
    "batch": "batch last",
    "group": "group held rows",
    "instance": "instance held last",
    "rms, swiglu": None,
}
DOCUMENT = ROOT / "docs" / "audit.md"


def split(name: str) -> tuple[str | None, str | None]:
    """The norm and the gated activation, if there is one."""
    norm, _, gate = name.partition(", ")
    return None if norm == "none" else norm, gate or None


def compile_block(name: str, target: str) -> dict[str, Any]:
    """Compiles a block's kernels by Triton's own cache; the seconds, and the kernels' names."""
    import triton

    from .audit import channel_family, gated_family, row_family
    from .audit.family import without_memory
    from .audit.launch import captured
    from .audit.targets import TARGETS

    scene = BLOCKS[name]
    norm, gate = split(name)
    families: Any = channel_family if scene else gated_family if gate else row_family
    different: dict[str, Any] = {"norm": norm}
    if scene:
        different = {"scene": scene, "dropout": "elements"}
    elif name == "none":
        different |= {"parameters": "none", "wanted": row_family.WANT_BIAS}
    with captured(target) as launches:
        for family in (families.FORWARD, families.BACKWARD):
            family.call(family.ordinary | different, without_memory)
    started = time.perf_counter()
    for launch in launches:
        triton.compile(launch.source(), TARGETS[target].target, launch.options)
    return {
        "seconds": time.perf_counter() - started,
        "kernels": sorted({launch.name.strip("_") for launch in launches}),
    }


def step_block(name: str) -> dict[str, Any]:
    """The first training step of a real block on the GPU."""
    import torch

    import fused

    norm, gate = split(name)
    options: dict[str, Any] = {"num_groups": 32} if norm == "group" else {}
    options |= {"activation": gate or "gelu", "dropout": 0.1, "device": "cuda"}
    block = fused.LinearNormAct(1024, 1024, norm=norm, **options).bfloat16()
    shape = (64, 196, 1024) if name in ("group", "instance") else (4096, 1024)
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    block.linear(x).sum().backward()  # what torch and cuBLAS make ready is not ours
    torch.cuda.synchronize()
    started = time.perf_counter()
    block(x).sum().backward()
    torch.cuda.synchronize()
    return {"seconds": time.perf_counter() - started, "kernels": []}


def in_new_process(name: str, given: argparse.Namespace, cache: str) -> dict[str, Any]:
    """One block in a process of its own, with this folder as Triton's cache."""
    command = [sys.executable, "-m", "bench.latency", "--only", name, "--target", given.target]
    command += ["--device", given.device]
    environment = os.environ | {"TRITON_CACHE_DIR": cache}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr.strip()[-500:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def line(name: str, cold: dict[str, Any], warm: dict[str, Any]) -> str:
    kernels = ", ".join(cold["kernels"])
    return f"| {name} | {cold['seconds']:.2f} | {warm['seconds']:.2f} | {kernels} |"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.latency", description=__doc__)
    parser.add_argument("blocks", nargs="*", help=f"of {'; '.join(BLOCKS)} (default: all)")
    parser.add_argument("--target", default="sm_90", help="the GPU that is compiled for")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", choices=tuple(BLOCKS), help="this block, in this process")
    parser.add_argument("--write", action="store_true", help="put the table into docs/audit.md")
    given = parser.parse_args(arguments)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    if given.only:
        found = (
            step_block(given.only)
            if given.device == "cuda"
            else compile_block(given.only, given.target)
        )
        print(json.dumps(found))
        return 0
    rows = [
        "| norm | empty cache, s | Triton's cache, s | kernels |",
        "|---|---|---|---|",
    ]
    if given.write and given.blocks:
        parser.error("--write is of all blocks")
    unknown = [name for name in given.blocks if name not in BLOCKS]
    if unknown:
        parser.error(f"unknown block {unknown[0]!r}; known: {'; '.join(BLOCKS)}")
    print("\n".join(rows))
    for name in given.blocks or BLOCKS:
        with tempfile.TemporaryDirectory() as cache:
            cold = in_new_process(name, given, cache)
            warm = in_new_process(name, given, cache)
        rows.append(line(name, cold, warm))
        print(rows[-1], flush=True)
    if given.write:
        from .report import fill

        fill(DOCUMENT, "latency", "\n".join(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
