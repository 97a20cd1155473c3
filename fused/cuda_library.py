"""The CUDA C++ kernels (csrc/cuda): loading their library, the structures that it takes, launching.

The library has a plain C interface: a pointer to a structure, the device's index and a stream. It
needs neither libtorch nor CUDA's own libraries, so one build serves every torch.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from . import location

LIBRARY = location.find("_cuda")
_REBUILD = (
    "install nvcc and run 'pip install --no-build-isolation --force-reinstall --no-deps fused-lnad'"
    " (or the same with '.' in a checkout)"
)
# By csrc/cpu/codes.h.
STORAGES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


class RowProblem(ctypes.Structure):
    """csrc/cuda/row.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("z", "dy", "residual", "bias", "norm_weight")),
        *((name, ctypes.c_void_p) for name in ("norm_bias", "seed", "out", "statistics", "means")),
        ("partial", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "cols", "z_stride", "dy_stride")),
        *((name, ctypes.c_int64) for name in ("residual_stride", "out_stride", "chunks")),
        *((name, ctypes.c_int64) for name in ("storage", "wide", "norm", "activation")),
        *((name, ctypes.c_int64) for name in ("threshold", "wanted")),
        *((name, ctypes.c_double) for name in ("eps", "alpha", "beta")),
    ]


class SumProblem(ctypes.Structure):
    """csrc/cuda/sums.h."""

    _fields_ = [
        ("partial", ctypes.c_void_p),
        ("outs", ctypes.c_void_p * 3),
        *((name, ctypes.c_int64) for name in ("planes", "outer", "chunks", "cols", "wide")),
        ("storages", ctypes.c_int64 * 3),
    ]


class ChannelProblem(ctypes.Structure):
    """csrc/cuda/channel.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("z", "dy", "residual", "mask", "seed")),
        *((name, ctypes.c_void_p) for name in ("coefficients", "out", "partial", "counts")),
        *((name, ctypes.c_int64) for name in ("samples", "channels", "positions", "last")),
        *((name, ctypes.c_int64) for name in ("segments", "chunks", "length", "storage")),
        *((name, ctypes.c_int64) for name in ("activation", "threshold", "channel_dropout")),
        *((name, ctypes.c_int64) for name in ("wanted", "centred")),
        *((name, ctypes.c_double) for name in ("alpha", "beta")),
    ]


class StatisticsProblem(ctypes.Structure):
    """csrc/cuda/channel.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("partial", "counts", "mean", "variance", "count")),
        *((name, ctypes.c_int64) for name in ("segments", "chunks", "channels", "groups", "wide")),
    ]


class CoefficientProblem(ctypes.Structure):
    """csrc/cuda/channel.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("mean", "variance", "norm_weight", "norm_bias")),
        *((name, ctypes.c_void_p) for name in ("sums", "count", "out")),
        *((name, ctypes.c_int64) for name in ("mean_storage", "variance_storage")),
        *((name, ctypes.c_int64) for name in ("weight_storage", "bias_storage")),
        *((name, ctypes.c_int64) for name in ("sums_storage", "count_storage", "segments")),
        *((name, ctypes.c_int64) for name in ("groups", "channels", "elements", "wide")),
        ("eps", ctypes.c_double),
    ]


# In the order of csrc/cuda/errors.cu.
STRUCTURES = (RowProblem, SumProblem, ChannelProblem, StatisticsProblem, CoefficientProblem)
# Launchers of the library and what they take.
LAUNCHERS: dict[str, type[ctypes.Structure]] = {
    "row_forward": RowProblem,
    "row_backward": RowProblem,
    "gated_forward": RowProblem,
    "gated_backward": RowProblem,
    "sum": SumProblem,
    "channel_moments": ChannelProblem,
    "channel_merge": StatisticsProblem,
    "channel_coefficients": CoefficientProblem,
    "channel_forward": ChannelProblem,
    "channel_backward": ChannelProblem,
}


def open_library(path: Path) -> ctypes.CDLL:
    """The library at a path, its functions' types declared.

    Raises:
        OSError: it does not load, or has other structures or functions than this code.
    """
    library = ctypes.CDLL(str(path))
    sizes = (ctypes.c_int64 * len(STRUCTURES))()
    try:
        library.fused_cuda_sizes(sizes)
        library.fused_cuda_error.argtypes = [ctypes.c_int]
        library.fused_cuda_error.restype = ctypes.c_char_p
        for name, structure in LAUNCHERS.items():
            function = getattr(library, f"fused_cuda_{name}")
            function.argtypes = [ctypes.POINTER(structure), ctypes.c_int, ctypes.c_void_p]
            function.restype = ctypes.c_int
    except AttributeError as error:
        raise OSError(f"it is older than the Python code: {error}") from None
    if list(sizes) != [ctypes.sizeof(structure) for structure in STRUCTURES]:
        raise OSError("it is older than the Python code: its structures differ")
    return library


@lru_cache(maxsize=1)
def load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and the reason."""
    if os.environ.get("FUSED_DISABLE_EXT") == "1":
        return None, "FUSED_DISABLE_EXT=1 is set"
    if not LIBRARY.exists():
        why = location.why_missing("_cuda", _REBUILD)
        return None, f"the CUDA C++ kernels were not built; {why}"
    try:
        return open_library(LIBRARY), ""
    except OSError as error:
        first = str(error).strip().splitlines()[0]
        return None, f"the library of the CUDA C++ kernels does not load ({first}); {_REBUILD}"


def launch(name: str, problem: ctypes.Structure, like: Tensor) -> None:
    """Launches on the device of `like`, in torch's current stream.

    Raises:
        RuntimeError: there is no library, or CUDA refuses the launch.
    """
    library, reason = load()
    if library is None:
        raise RuntimeError(f"fused: {reason}")
    device = like.get_device()  # -1 for the CPU, on which tests emulate the kernels
    stream = torch._C._cuda_getCurrentRawStream(device) if device >= 0 else 0
    error = getattr(library, f"fused_cuda_{name}")(ctypes.byref(problem), device, stream)
    if error:
        said = library.fused_cuda_error(error).decode()
        raise RuntimeError(f"fused: the CUDA C++ kernel {name} cannot be launched: {said}")


def pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def storage(t: Tensor | None) -> int:
    return 0 if t is None else STORAGES[t.dtype]


def compute_dtype(t: Tensor) -> torch.dtype:
    """What a tensor's kernels compute in."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def wanted_of(sums: Sequence[Tensor | None]) -> int:
    """The WANT_ bits (spec.py) of the sums that there are, of norm_weight, norm_bias and bias."""
    return sum(1 << i for i, t in enumerate(sums) if t is not None)


def add_up(partial: Tensor, outputs: Sequence[Tensor | None]) -> None:
    """outputs[i] = partial[i].sum(1), in order and in double.

    Args:
        partial: (planes, outer, chunks, cols), float32 or float64; at most three planes.
        outputs: contiguous, (outer, cols) each, of any floating dtype; as many as planes, without
            the None.
    """
    planes, outer, chunks, cols = partial.shape
    made = [t for t in outputs if t is not None]
    assert len(made) == planes
    problem = SumProblem(
        partial=partial.data_ptr(),
        outs=(ctypes.c_void_p * 3)(*(t.data_ptr() for t in made)),
        planes=planes,
        outer=outer,
        chunks=chunks,
        cols=cols,
        wide=partial.dtype == torch.float64,
        storages=(ctypes.c_int64 * 3)(*(STORAGES[t.dtype] for t in made)),
    )
    launch("sum", problem, partial)
