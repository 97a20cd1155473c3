"""The CUDA C++ kernels on CPU tensors: csrc/cuda compiled by g++ against emulation/, and loaded.

The same sources, structures and Python launchers as on a GPU; emulation/cuda_runtime.h runs the
threads of a block as fibers. The library is kept in .cache/cuda-emulation by the sources' hash.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
from functools import cache
from pathlib import Path
from types import SimpleNamespace

from fused import spec
from fused.backends import cuda_channel, cuda_channel_backward, cuda_row, ops
from fused.backends.cuda_library import Library

ROOT = Path(__file__).resolve().parents[2]
SHIM = Path(__file__).parent / "emulation"
FLAGS = ("-std=c++20", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-w", "-I", str(SHIM))


def compiler() -> list[str] | None:
    """The C++ compiler's command, or None."""
    command = shlex.split(os.environ.get("CXX", "g++"))
    return command if shutil.which(command[0]) else None


def build(extra: tuple[str, ...] = ()) -> Path:
    """The emulated library, compiled where there is none of these sources and flags."""
    command = [*(compiler() or []), *FLAGS, *extra]
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    read = [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc/cpu").glob("codes.h")]
    read += [*(ROOT / "csrc/cuda").iterdir(), *SHIM.iterdir()]
    key = hashlib.sha256(repr(command).encode())
    for path in sorted(read):
        key.update(path.read_bytes())
    target = ROOT / ".cache/cuda-emulation" / f"{key.hexdigest()[:16]}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}")
        command += ["-x", "c++", *map(str, sources), "-o", str(partial)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        partial.replace(target)
    return target


@cache
def library() -> Library:
    return Library(build())


# In place of the operators, which find the C++ kernels for CPU tensors.
LAUNCHERS = SimpleNamespace(
    **{
        name: getattr(module, name)
        for module in (cuda_row, cuda_channel, cuda_channel_backward)
        for name in ops.OPERATORS
        if hasattr(module, name)
    },
    WANT_NORM_WEIGHT=spec.WANT_NORM_WEIGHT,
    WANT_NORM_BIAS=spec.WANT_NORM_BIAS,
    WANT_BIAS=spec.WANT_BIAS,
)
