"""python -m bench.audit.traffic: the bytes that each call moves, in Triton's interpreter, as JSON.

A process of its own: TRITON_INTERPRET=1 has to be set before triton is imported, and kernels that
are interpreted cannot be compiled. The calls are the families' small ones, about 30 ms a program.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import fused.kernels
import torch
import triton

import fused

from .binary import CACHE
from .launch import PARTIAL, STREAMS
from .report import Stream

ROOT = Path(__file__).resolve().parents[2]


class Traffic(NamedTuple):
    streams: list[Stream]
    outside: list[str]


def interpreted(call: str, run: Callable[[], object]) -> Traffic:
    """Runs launchers in the interpreter; `call` names what is run.

    An access outside every tensor ends the call: the message is in `outside`.
    """
    from .interpreter import launches

    outside = []
    with launches() as log:
        try:
            run()
        except triton.runtime.errors.InterpreterError as error:
            outside.append(f"{call}, {log[-1].kernel}: {error.__cause__ or error}")
    streams = [
        Stream(call, launch.kernel, name, launch.loaded[name] + launch.stored[name], size)
        for launch in log
        for name, size in launch.sizes.items()
        if name in (*STREAMS, PARTIAL)
    ]
    return Traffic(streams, outside)


def _sources() -> str:
    """The hash of all that the figures follow from."""
    folders = [Path(fused.__file__).parent, Path(fused.kernels.__file__).parent]
    digest = hashlib.sha256(f"{triton.__version__} {torch.__version__}".encode())
    for folder in (*folders, Path(__file__).parent):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def measured() -> Traffic:
    """The traffic of every small call, from .cache/audit or from a process that interprets them.

    Raises:
        RuntimeError: the process failed; the message ends with what it printed.
    """
    kept = CACHE / f"traffic-{_sources()}.json"
    if not kept.exists():
        environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "bench.audit.traffic"]
        done = subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-3000:]}")
        CACHE.mkdir(parents=True, exist_ok=True)
        kept.write_text(done.stdout)
    found = json.loads(kept.read_text())
    return Traffic([Stream(**line) for line in found["streams"]], found["outside"])


def main() -> None:
    """Interprets every small call and prints the traffic."""
    from . import interpreter
    from .families import FAMILIES
    from .family import in_memory

    interpreter.install()
    torch.set_num_threads(1)
    streams, outside = [], []
    for family in FAMILIES:
        for name, different in family.small.items():
            case = family.ordinary | different
            found = interpreted(
                f"{family.name}: {name}",
                lambda family=family, case=case: family.call(case, in_memory),
            )
            streams += found.streams
            outside += found.outside
    print(json.dumps({"streams": [asdict(s) for s in streams], "outside": outside}))


if __name__ == "__main__":
    main()
