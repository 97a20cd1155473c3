"""Builds the C++ and CUDA C++ kernels; everything else about the package is in pyproject.toml.

fused/_C.abi3.so, for CPUs, uses libtorch's stable ABI and no Python API, so one build serves every
torch ≥ 2.11 and every Python. fused/_cuda.abi3.so, for GPUs, has a plain C interface; it takes nvcc
and a torch for CUDA. Both are optional: where one cannot be built the package is installed without
it, and one sentence says why and what to do.

Read from the environment:
    FUSED_NO_EXT=1          build neither
    FUSED_CUDA              1: build the CUDA C++ kernels even for a torch without CUDA; 0: do not
    TORCH_CUDA_ARCH_LIST    the GPUs to build for, as in "8.0;9.0+PTX" (default: 8.0, 9.0, 10.0+PTX)
    CUDA_HOME               where bin/nvcc is (default: the PATH, then /usr/local/cuda)
    MAX_JOBS                how many files are compiled at a time (default: the number of CPUs)
    CXX                     the compiler (default: g++, then clang++)
    FUSED_SANITIZE          sanitizers, as in -fsanitize= (make sanitize), of the C++ kernels
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
AGAIN = "and run 'pip install --no-build-isolation .' again"

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
KERNELS = (
    {"portable": [], "avx2": AVX2_FLAGS, "avx512": AVX512_FLAGS} if IS_X86 else {"portable": []}
)
SOURCES: dict[str, list[str]] = {
    f"csrc/cpu/{family}_{isa}.cpp": flags
    for family in ("channel", "row", "stages")
    for isa, flags in KERNELS.items()
}
HOST = ("channel", "row", "add_norm", "gate", "arguments", "channel_problem")
HOST += ("channel_backward", "channel_statistics", "channel_sums", "channel_forward")
HOST += ("channel_coefficients", "isa", "cpu/memory")
SOURCES |= {f"csrc/{name}.cpp": [] for name in HOST}

CUDA_SOURCES: dict[str, list[str]] = {
    f"csrc/cuda/{name}.cu": [] for name in ("channel", "row", "gated", "sums", "errors")
}
CUDA_FLAGS = ["-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]
# Ampere, Hopper and Blackwell of data centres; the code of 8.0 also serves 8.6 and 8.9, and the
# PTX whatever is newer.
CUDA_ARCHITECTURES = ("8.0", "9.0", "10.0")


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
    if os.environ.get("FUSED_NO_EXT") == "1":
        return "FUSED_NO_EXT=1 is set; unset it " + AGAIN
    if find_torch() is None:
        also = "" if find_compiler() else " and no C++ compiler was found"
        return f"pip's build environment had no torch{also}; install what lacks {AGAIN}"
    version = metadata.version("torch")
    if tuple(int(part) for part in version.split(".")[:2]) < (2, 11):
        return f"torch {version} is too old; install torch 2.11 or newer {AGAIN}"
    if find_compiler() is None:
        return f"no C++ compiler was found; install g++ or set CXX {AGAIN}"
    return ""


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    names = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((found for name in names if (found := shutil.which(name))), None)


def cuda_of_torch() -> str | None:
    """The CUDA version that the installed torch is for, or None."""
    torch = find_torch()
    text = (torch / "version.py").read_text() if torch else ""
    found = re.search(r"^cuda\b.*= '(.+)'", text, re.MULTILINE)
    return found[1] if found else None


def why_not_cuda() -> str:
    """Why the CUDA C++ kernels cannot be built here and the remedy; empty if it can be tried."""
    if os.environ.get("FUSED_NO_EXT") == "1":
        return "FUSED_NO_EXT=1 is set; unset it " + AGAIN
    if os.environ.get("FUSED_CUDA") == "0":
        return "FUSED_CUDA=0 is set; unset it " + AGAIN
    if os.environ.get("FUSED_CUDA") != "1" and cuda_of_torch() is None:
        return f"the installed torch is not for CUDA; install another or set FUSED_CUDA=1 {AGAIN}"
    if find_nvcc() is None:
        return f"nvcc was not found; install CUDA's compiler or set CUDA_HOME {AGAIN}"
    return ""


def architecture_flags(nvcc: str) -> list[str]:
    """What to compile for, by TORCH_CUDA_ARCH_LIST or by default, as nvcc's flags."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not listed:
        known = run([nvcc, "--list-gpu-arch"]).stdout.split()
        listed = [a for a in CUDA_ARCHITECTURES if f"compute_{a.replace('.', '')}" in known]
        if not listed:
            raise OSError(f"{nvcc} knows none of {', '.join(CUDA_ARCHITECTURES)}")
        listed[-1] += "+PTX"
    flags = []
    for architecture in listed:
        found = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", architecture)
        if not found:
            raise OSError(f"TORCH_CUDA_ARCH_LIST: expected e.g. 9.0+PTX, got {architecture!r}")
        number = found[1] + found[2]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if found[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def say(sentence: str) -> None:
    sys.stderr.write(f"fused-lnad: {sentence}\n")  # one write: several threads say something


def say_without(name: str, reason: str, package: Path) -> None:
    """Says why a library is not built, and leaves it in the package, since pip seldom shows it."""
    package.mkdir(parents=True, exist_ok=True)
    (package / f"{name}.missing").write_text(reason)
    lost = "C++ kernels, so CPU tensors run in plain torch"
    lost = "CUDA C++ kernels, so GPUs need Triton" if name == "_cuda" else lost
    say(f"installing without the {lost}: {reason}.")


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True)


class BuildPy(build_py):
    """Says, in the commands that build something, why a library is not built."""

    def run(self) -> None:
        super().run()
        package = Path(ROOT if self.editable_mode else self.build_lib, "fused")
        for name, reason in WITHOUT.items():
            if reason:
                say_without(name, reason, package)


def is_current(output: Path, made_of: Path) -> bool:
    """Whether an object is newer than everything that it was made of."""
    if not output.exists() or not made_of.exists():
        return False
    listed = shlex.split(made_of.read_text().partition(": ")[2].replace("\\\n", " "))
    made = output.stat().st_mtime
    return all(Path(name).exists() and Path(name).stat().st_mtime <= made for name in listed)


def build_library(
    compiler: list[str],
    flags: list[str],
    sources: dict[str, list[str]],
    link_flags: list[str],
    target: Path,
) -> None:
    """Compiles the sources in parallel, only those that changed, and links one library.

    Each source has the flags that it alone gets.
    """
    # Objects outlive pip's temporary folders, one set for each compiler, torch and flags.
    version = run([*compiler, "--version"]).stdout
    key = repr((version, find_torch() and metadata.version("torch"), flags, sources))
    objects = ROOT / "build" / f"objects-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    objects.mkdir(parents=True, exist_ok=True)

    def compile_one(source: str) -> Path:
        path, output = ROOT / source, objects / Path(source.replace("/", "_")).with_suffix(".o")
        made_of = output.with_suffix(".d")  # the compiler's list of the source and its headers
        if not is_current(output, made_of):
            started, partial = time.monotonic(), output.with_suffix(f".{os.getpid()}")
            say(f"compiling {source}")
            command = [*compiler, *flags, *sources[source], "-MMD", "-MF", str(made_of)]
            command += ["-c", str(path), "-o", str(partial)]
            print(run(command).stderr, file=sys.stderr, end="")
            partial.replace(output)
            say(f"compiled {source} in {time.monotonic() - started:.0f} s")
        return output

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        built = [str(output) for output in pool.map(compile_one, sources)]
    target.parent.mkdir(parents=True, exist_ok=True)
    # Replaced as a whole: a process that has the old library loaded keeps it.
    partial = target.with_suffix(f".{os.getpid()}")
    run([*compiler, *built, *link_flags, "-o", str(partial)])
    partial.replace(target)


class BuildExtension(build_ext):
    """Builds one of the two libraries; goes on without it where that fails."""

    def run(self) -> None:
        self.in_checkout = self.inplace or self.editable_mode  # setuptools' run resets inplace
        for name, reason in WITHOUT.items() if self.in_checkout else ():
            # What an earlier command left there may no longer be why.
            (ROOT / "fused" / f"{name}.missing").unlink(missing_ok=True)
            if reason:
                say_without(name, reason, ROOT / "fused")
        super().run()

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        try:
            (build_cuda_kernels if ext.name == "fused._cuda" else build_cpu_kernels)(target)
        except (subprocess.CalledProcessError, OSError) as error:
            print((getattr(error, "stderr", None) or str(error)).strip(), file=sys.stderr)
            # A library of older sources must not be loaded by newer Python code; that of the
            # checkout is not touched where another is built.
            target.unlink(missing_ok=True)
            if self.in_checkout:
                target = ROOT / self.get_ext_filename(ext.name)
                target.unlink(missing_ok=True)
            wanted = "CUDA 12" if ext.name == "fused._cuda" else "g++ 11"
            reason = f"the compiler failed (why: pip -v); install {wanted} or newer {AGAIN}"
            say_without(ext.name.removeprefix("fused."), reason, target.parent)


def write_schemas() -> str:
    """Writes the source that defines the operators, where it changed; returns its path."""
    schemas = run_path(str(ROOT / "fused/backends/schemas.py"))["SCHEMAS"].values()
    lines = "".join(f'      "{schema}",\n' for schema in schemas)
    text = (
        "// Written by setup.py from fused/backends/schemas.py.\n"
        '#include "schemas.h"\n\n'
        "STABLE_TORCH_LIBRARY_FRAGMENT(fused_lnad, library) {\n"
        f"  fused::define(library, {{\n{lines}  }});\n}}\n"
    )
    path = ROOT / "build/schemas.cpp"
    path.parent.mkdir(exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return str(path.relative_to(ROOT))


def build_cpu_kernels(target: Path) -> None:
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
    sources = SOURCES | {write_schemas(): [f"-I{ROOT / 'csrc'}"]}
    build_library(compiler, flags, sources, link_flags, target)


def build_cuda_kernels(target: Path) -> None:
    nvcc = find_nvcc()
    assert nvcc
    flags = [*CUDA_FLAGS, *architecture_flags(nvcc)]
    if os.environ.get("CXX"):
        flags.append(f"-ccbin={shlex.split(os.environ['CXX'])[0]}")
    # With CUDA's runtime inside, the library loads where only the driver is, or not even that.
    build_library([nvcc], flags, CUDA_SOURCES, ["-shared", "-cudart=static"], target)


WITHOUT = {"_C": why_not(), "_cuda": why_not_cuda()}
# `optional`: setuptools goes on when a library is missing.
extensions = [
    Extension(f"fused.{name}", sources=list(sources), py_limited_api=True, optional=True)
    for name, sources in (("_C", SOURCES), ("_cuda", CUDA_SOURCES))
    if not WITHOUT[name]
]
setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildExtension, "build_py": BuildPy},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if extensions else {},
)
