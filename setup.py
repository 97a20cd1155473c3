"""Builds the C++ kernels, fused/_C.abi3.so; everything else about the package is in pyproject.toml.

The library uses libtorch's stable ABI and no Python API, so one build serves every torch ≥ 2.11 and
every Python, and fused/backend.py loads it with `torch.ops.load_library`. It is optional: where it
cannot be built the package is installed without it, and one sentence says why and what to do.

Read from the environment:
    FUSED_NO_EXT=1      do not build it
    MAX_JOBS            how many files are compiled at a time (default: the number of CPUs)
    CXX                 the compiler (default: g++, then clang++)
    FUSED_SANITIZE      sanitizers, as in -fsanitize= (make sanitize)
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent

COMMON_FLAGS = [
    "-std=c++20",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",  # the stable ABI of torch 2.11
]
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c"]
AVX512_FLAGS = [
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"),
    "-mprefer-vector-width=512",
    "-Wno-uninitialized",  # false in g++ 12's own avx512fintrin.h (GCC bug 105593)
    "-Wno-maybe-uninitialized",
]
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
# Each source with the flags that it alone gets; the instruction set is chosen at run time. The
# longest to compile come first.
SOURCES: dict[str, list[str]] = {
    "csrc/cpu/row_portable.cpp": [],
    "csrc/cpu/channel_portable.cpp": [],
    "csrc/channel.cpp": [],
    "csrc/row.cpp": [],
    "csrc/channel_backward.cpp": [],
    "csrc/channel_sums.cpp": [],
    "csrc/channel_forward.cpp": [],
    "csrc/channel_statistics.cpp": [],
    "csrc/channel_problem.cpp": [],
    "csrc/channel_coefficients.cpp": [],
    "csrc/arguments.cpp": [],
    "csrc/isa.cpp": [],
    "csrc/cpu/memory.cpp": [],
}
if IS_X86:
    SOURCES = {
        "csrc/cpu/row_avx512.cpp": AVX512_FLAGS,
        "csrc/cpu/row_avx2.cpp": AVX2_FLAGS,
        "csrc/cpu/channel_avx512.cpp": AVX512_FLAGS,
        "csrc/cpu/channel_avx2.cpp": AVX2_FLAGS,
        **SOURCES,
    }


def find_compiler() -> list[str] | None:
    """The compiler's command, or None."""
    if os.environ.get("CXX"):
        command = shlex.split(os.environ["CXX"])
        return command if shutil.which(command[0]) else None
    return next(([name] for name in ("g++", "clang++") if shutil.which(name)), None)


def find_torch() -> Path | None:
    """The folder of the installed torch, found without importing it, or None."""
    spec = find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def why_not() -> str:
    """Why the extension cannot be built here and the remedy; empty if it can be tried."""
    again = "and run 'pip install --no-build-isolation .' again"
    if os.environ.get("FUSED_NO_EXT") == "1":
        return "FUSED_NO_EXT=1 is set; unset it " + again
    if find_torch() is None:
        return "torch is not installed where the package is built; install torch " + again
    version = metadata.version("torch")
    if tuple(int(part) for part in version.split(".")[:2]) < (2, 11):
        return f"torch {version} is too old; install torch 2.11 or newer {again}"
    if find_compiler() is None:
        return f"no C++ compiler was found; install g++ or set CXX {again}"
    return ""


def say(sentence: str) -> None:
    sys.stderr.write(f"fused-lnad: {sentence}\n")  # one write: several threads say something
    sys.stderr.flush()


def say_without(reason: str) -> None:
    say(f"installing without the C++ kernels, so CPU tensors run in plain torch: {reason}.")


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True)


class BuildPy(build_py):
    """Says, in the commands that build something, why the extension is not built."""

    def run(self) -> None:
        super().run()
        if not self.distribution.ext_modules:
            say_without(why_not())


class BuildExtension(build_ext):
    """Compiles the sources in parallel, only those that changed, and links one library."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        try:
            self.build_library(target)
        except (subprocess.CalledProcessError, OSError) as error:
            output = (getattr(error, "stderr", None) or str(error)).strip()
            print(output, file=sys.stderr)
            # A library of older sources must not be loaded by newer Python code; that of the
            # checkout is not touched where another is built.
            target.unlink(missing_ok=True)
            if self.inplace or self.editable_mode:
                (ROOT / self.get_ext_filename(ext.name)).unlink(missing_ok=True)
            say_without(
                "the compiler failed (its messages are above; pip shows them with -v); install"
                " g++ 11 or newer and run 'pip install --no-build-isolation .' again"
            )

    def build_library(self, target: Path) -> None:
        compiler, torch = find_compiler(), find_torch()
        assert compiler and torch
        sanitizers = os.environ.get("FUSED_SANITIZE", "")
        mode = ["-O2"]  # the loops are vectors already; -O3 only makes the build three times longer
        if sanitizers:
            mode = ["-O1", "-g", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
        flags = [*COMMON_FLAGS, *mode, *([] if IS_X86 else ["-DFUSED_PORTABLE_ONLY"])]
        for include in ("include", "include/torch/csrc/api/include"):
            flags += ["-isystem", str(torch / include)]
        link_flags = [*mode, "-shared", f"-L{torch / 'lib'}", "-ltorch_cpu"]
        if sys.platform == "linux" and not sanitizers:
            link_flags += ["-Wl,-z,defs"]  # a missing symbol fails here, not when it is loaded

        # Objects outlive pip's temporary folders, one set for each compiler, torch and flags.
        version = run([*compiler, "--version"]).stdout
        key = repr((version, metadata.version("torch"), flags, SOURCES))
        objects = ROOT / "build" / f"objects-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
        objects.mkdir(parents=True, exist_ok=True)
        csrc = ROOT / "csrc"
        newest_header = max(p.stat().st_mtime for g in ("*.h", "*.inc") for p in csrc.rglob(g))

        def compile_one(source: str) -> Path:
            path, output = ROOT / source, objects / source.replace("/", "_").replace(".cpp", ".o")
            changed = max(newest_header, path.stat().st_mtime)
            if not output.exists() or output.stat().st_mtime < changed:
                started, partial = time.monotonic(), output.with_suffix(f".{os.getpid()}")
                say(f"compiling {source}")
                command = [*compiler, *flags, *SOURCES[source], "-c", str(path), "-o", str(partial)]
                print(run(command).stderr, file=sys.stderr, end="")
                partial.replace(output)
                say(f"compiled {source} in {time.monotonic() - started:.0f} s")
            return output

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            built = [str(output) for output in pool.map(compile_one, SOURCES)]
        target.parent.mkdir(parents=True, exist_ok=True)
        # Replaced as a whole: a process that has the old library loaded keeps it.
        partial = target.with_suffix(f".{os.getpid()}")
        run([*compiler, *built, *link_flags, "-o", str(partial)])
        partial.replace(target)


# `optional`: setuptools goes on when the library is missing.
extension = Extension("fused._C", sources=list(SOURCES), py_limited_api=True, optional=True)
buildable = not why_not()
setup(
    ext_modules=[extension] if buildable else [],
    cmdclass={"build_ext": BuildExtension, "build_py": BuildPy},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if buildable else {},
)
