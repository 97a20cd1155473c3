"""Where and with what a figure was measured; python -m bench.machine prints it.

FUSED_BENCH_COMMIT in the environment is the commit where there is no checkout to ask, as on a
machine to which the files alone were copied.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from fused.backends import backend
from fused.tools.doctor import cpu_model, version_of

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ("fused", "kernels", "csrc", "setup.py")
FALLBACK_CACHE = 32 << 20


@dataclass(frozen=True)
class Machine:
    """The columns that every row of a run has in common."""

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


def commit_of(root: Path = ROOT) -> str:
    """FUSED_BENCH_COMMIT, or the checkout's; "-dirty" where what is measured differs from it."""
    given = os.environ.get("FUSED_BENCH_COMMIT")
    if given:
        return given

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD") or "unknown"
        return commit + ("-dirty" if git("status", "--porcelain", "--", *MEASURED) else "")
    except OSError:  # no git
        return "unknown"


def gpu_clocks() -> str:
    """The GPU's highest clocks and its power limit, as nvidia-smi has them; "" without it."""
    query = "clocks.max.sm,clocks.max.mem,power.limit"
    index = str(torch.cuda.current_device())
    command = ["nvidia-smi", "-i", index, f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().replace(", ", " / ")


def this_machine(device: str) -> Machine:
    """What this process measures with."""
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_model()
    return Machine(
        device,
        name,
        torch.get_num_threads(),
        (backend.cpu_isa() or "no C++ kernels") if device == "cpu" else "",
        gpu_clocks() if device == "cuda" else "",
        commit_of(),
        datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
        platform.python_version(),
        torch.__version__,
        version_of("triton") or "",
    )


def last_level_cache(device: str) -> int:
    """Bytes of the cache before the device's memory."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    # Not os.sysconf: glibc multiplies the size on some AMD processors.
    for index in (3, 2):
        path = Path(f"/sys/devices/system/cpu/cpu0/cache/index{index}/size")
        if path.exists():
            return int(path.read_text().strip().removesuffix("K")) << 10
    return FALLBACK_CACHE


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.machine", description=__doc__)
    parser.add_argument("--out", type=Path, help="a file for the same")
    given = parser.parse_args(arguments)
    found = this_machine("cuda" if torch.cuda.is_available() else "cpu")
    text = json.dumps(asdict(found), indent=1)
    print(text)
    if given.out:
        given.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
