"""Loading the C++ kernels, and what else of them Python calls by itself."""

from __future__ import annotations

import ctypes
import os
import re
import warnings

import torch

from ..spec import ACTIVATION_NAMES
from . import location
from .schemas import SCHEMAS

_PATH = location.find("_C")
_REBUILD = (
    "install a C++20 compiler and run 'pip install --no-build-isolation --force-reinstall"
    " --no-deps fused-lnad' (or the same with '.' in a checkout)"
)
_DEFAULT_CACHE_MB = 512  # as in csrc/cpu/memory.cpp


def _older(missing: list[str]) -> str:
    lacks = ", ".join(missing)
    return f"the C++ extension is older than the Python code (no {lacks}); {_REBUILD}"


def _load() -> tuple[ctypes.CDLL | None, str]:
    """Loads the C++ kernels; returns the library, or None and the reason."""
    if os.environ.get("FUSED_DISABLE_EXT") == "1":
        return None, "FUSED_DISABLE_EXT=1 is set"
    if not _PATH.exists():
        return None, f"the C++ extension was not built; {location.why_missing('_C', _REBUILD)}"
    try:
        # An extension that is loaded defines the operators for the whole process, so one with
        # other schemas must not be.
        content = _PATH.read_bytes()
        missing = [n for n, s in SCHEMAS.items() if s.encode() + b"\0" not in content]
        if missing and b"fused_cpu_isa" in content:
            return None, _older(missing)
        torch.ops.load_library(str(_PATH))
        library = ctypes.CDLL(str(_PATH))
        library.fused_cpu_isa.restype = ctypes.c_char_p
        library.fused_set_cpu_isa.argtypes = [ctypes.c_char_p]
        library.fused_empty_cache.restype = None
        known = library.fused_activation_codes()
    except (OSError, RuntimeError, AttributeError) as error:
        first = str(error).strip().splitlines()[0]
        return None, f"the C++ extension does not load ({first}); {_REBUILD}"
    missing = [str(name) for code, name in ACTIVATION_NAMES.items() if code >= known]
    return (None, _older(missing)) if missing else (library, "")


def _check_environment(library: ctypes.CDLL) -> None:
    """Says which variables the C++ kernels do not understand, and what they use instead."""
    megabytes = os.environ.get("FUSED_CPU_CACHE_MB")
    if megabytes is not None and not re.fullmatch("[0-9]{1,8}", megabytes):
        warnings.warn(
            f"fused: FUSED_CPU_CACHE_MB={megabytes!r} is not a number of mebibytes from 0 to"
            f" 99999999; {_DEFAULT_CACHE_MB} is used",
            stacklevel=2,
        )
    isa = os.environ.get("FUSED_CPU_ISA")
    if isa and not library.fused_set_cpu_isa(isa.encode()):
        warnings.warn(
            f"fused: FUSED_CPU_ISA={isa!r} is not served by this machine; known: avx512, avx2,"
            f" portable; {library.fused_cpu_isa().decode()} is used",
            stacklevel=2,
        )


# The library, or None and the sentence that says why.
LIBRARY, REASON = _load()
if LIBRARY is not None:
    _check_environment(LIBRARY)


def empty_cache() -> None:
    """Gives the blocks of freed CPU outputs, which are kept for the next ones, back to the system.

    They are kept up to `FUSED_CPU_CACHE_MB` (default 512); tensors in use are not touched. For
    those on a GPU, torch.cuda.empty_cache() does this.
    """
    if LIBRARY is not None:
        LIBRARY.fused_empty_cache()
