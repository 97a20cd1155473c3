"""Which backend serves a device and dtype, and the sentence that says why not a faster one.

    triton     CUDA tensors: float32, bfloat16, float16
    cuda       the same and float64, by CUDA C++, where Triton does not serve
    cpp        CPU tensors: float32, bfloat16, float16, float64
    reference  everything else, in plain torch

`FUSED_BACKEND` in the environment asks for one of them in the whole process, `use_backend(...)` in
one thread or task; a backend that cannot serve a tensor gives way to the reference, and `why_not`
says why.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from importlib.util import find_spec

import torch

from . import cuda_library
from . import ops as _ops
from .extension import LIBRARY, REASON
from .launchers import TRITON, Launchers

BACKENDS = ("auto", "triton", "cuda", "cpp", "reference")
_DTYPES = {
    "cpp": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
}
_DEVICE_OF = {"cpp": "cpu", "triton": "cuda", "cuda": "cuda"}


def _checked(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; known: {', '.join(BACKENDS)}")
    return name


_default = _checked(os.environ.get("FUSED_BACKEND") or "auto")
# What the running thread or task asks for.
request: ContextVar[str] = ContextVar("fused_backend", default=_default)
# (request, device type, dtype) → backend.
_chosen: dict[tuple[str, str, torch.dtype], str] = {}
# What is asked for by the `use_backend` blocks that are open anywhere in the process. The compiler
# cannot read a context variable, but it guards on this, and so compiles again where they differ.
_open_blocks: list[str] = []
_open_requests: tuple[str, ...] = ()
_lock = threading.Lock()


def cpu_isa() -> str | None:
    """The instruction set of the C++ kernels: avx512, avx2 or portable; None without them."""
    return LIBRARY.fused_cpu_isa().decode() if LIBRARY else None


def set_cpu_isa(name: str) -> None:
    """Makes the C++ kernels use avx512, avx2 or portable code (for tests and measurements).

    Raises:
        ValueError: the machine or the build does not have it.
    """
    if LIBRARY is None or not LIBRARY.fused_set_cpu_isa(name.encode()):
        raise ValueError(
            f"instruction set {name!r} is not available here; known: avx512, avx2, portable"
        )


def poison_outputs(on: bool) -> None:
    """Makes the C++ kernels fill their outputs with NaN before they write them (for tests)."""
    if LIBRARY is not None:
        LIBRARY.fused_poison_outputs(int(on))


def _first_kernel(launchers: Launchers) -> str:
    """What goes wrong with a first kernel on a real tensor, or the empty string."""
    try:
        z = torch.zeros(1, 16, device="cuda")
        launchers["row_forward"](z, None, None, None, None, None, 1, 1e-5, 0, 0.0, 0.0, 0)
    # Everything: Triton raises its own exceptions, the compiler's, the driver's and torch's.
    except Exception as error:
        text = str(error).strip()
        return text.splitlines()[0] if text else type(error).__name__
    return ""


@lru_cache(maxsize=2)
def _gpu_reason(backend: str) -> str:
    """Why Triton, or the CUDA C++ kernels, cannot be used, or the empty string. Tries them once."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if backend == "triton":
        if find_spec("triton") is None:
            return "triton is not installed; run 'pip install triton'"
        failed, remedy = _first_kernel(TRITON), "check the driver and the C compiler"
    else:
        library, reason = cuda_library.load()
        if library is None:
            return reason
        failed, remedy = _first_kernel(_cuda_cpp()), "build them for this GPU and its driver"
    kind = "Triton" if backend == "triton" else "CUDA C++"
    return f"a first {kind} kernel failed ({failed}); {remedy}" if failed else ""


@lru_cache(maxsize=1)
def _cuda_cpp() -> Launchers:
    """The launchers of the CUDA C++ kernels, imported at the first use."""
    from . import cuda_channel, cuda_channel_backward, cuda_row

    modules = (cuda_row, cuda_channel, cuda_channel_backward)
    return {n: getattr(m, n) for n in _ops.OPERATORS for m in modules if n in m.__dict__}


def why_not(backend: str, device_type: str, dtype: torch.dtype) -> str:
    """The sentence that says why a backend cannot serve this device and dtype; empty if it can."""
    if backend == "reference":
        return ""
    if device_type != _DEVICE_OF[backend]:
        return f"{backend} serves {_DEVICE_OF[backend]} tensors, not {device_type}"
    if dtype not in _DTYPES[backend]:
        served = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES[backend])
        return f"{backend} serves {served}, not {str(dtype).removeprefix('torch.')}"
    return REASON if backend == "cpp" else _gpu_reason(backend)


def requested() -> str:
    """The backend that is asked for here, by `use_backend` or `FUSED_BACKEND`."""
    if torch.compiler.is_dynamo_compiling():
        return _request_when_compiled(_open_requests)
    return request.get()


def _reasons(name: str, device_type: str, dtype: torch.dtype) -> dict[str, str]:
    """Each backend that a request could mean for this device → why not, up to one that can."""
    candidates = [name]
    if name == "auto":
        candidates = [b for b, device in _DEVICE_OF.items() if device == device_type]
    reasons = {}
    for candidate in candidates:
        reasons[candidate] = why_not(candidate, device_type, dtype)
        if not reasons[candidate]:
            break
    return reasons


def _choose(name: str, device_type: str, dtype: torch.dtype) -> str:
    reasons = _reasons(name, device_type, dtype)
    for candidate, reason in reasons.items():
        if not reason:
            return candidate
    # Said once: a machine that could be faster, or a request that cannot be met.
    served = device_type in _DEVICE_OF.values() and dtype.is_floating_point
    if reasons and (name != "auto" or served):
        why = "; ".join(f"{candidate}: {reason}" for candidate, reason in reasons.items())
        warnings.warn(
            f"fused: {device_type} {str(dtype).removeprefix('torch.')} runs in plain torch, "
            f"right but slower ({why})",
            stacklevel=2,
        )
    return "reference"


def choose(device_type: str, dtype: torch.dtype) -> str:
    """The backend that serves tensors of this device type and dtype."""
    if torch.compiler.is_dynamo_compiling():
        return _choose_when_compiled(device_type, dtype, _open_requests)
    key = (request.get(), device_type, dtype)
    backend = _chosen.get(key)
    if backend is None:
        backend = _chosen[key] = _choose(*key)
    return backend


# (request, dtype) → launchers.
_cuda_launchers: dict[tuple[str, torch.dtype], Launchers] = {}


def cuda_launchers(dtype: torch.dtype) -> Launchers:
    """The launchers of the operators for CUDA tensors of this dtype, by what is asked for here.

    Raises:
        RuntimeError: no kernel serves it.
    """
    key = (request.get(), dtype)
    found = _cuda_launchers.get(key)
    if found is None:
        found = _cuda_launchers[key] = _find_launchers(*key)
    return found


def _find_launchers(name: str, dtype: torch.dtype) -> Launchers:
    # Whoever calls an operator has chosen it: backward of what forward did under another request
    # does, and then "reference" is no answer.
    for asked in (name, "auto"):
        for backend, why in _reasons(asked, "cuda", dtype).items():
            if not why and backend in ("triton", "cuda"):
                return TRITON if backend == "triton" else _cuda_cpp()
    why = "; ".join(f"{b}: {reason}" for b, reason in _reasons("auto", "cuda", dtype).items())
    raise RuntimeError(f"fused: no kernel serves cuda {str(dtype).removeprefix('torch.')} ({why})")


_ops.cuda_launchers = cuda_launchers

# The compiler takes what these two return for constant, as if marked with
# torch.compiler.assume_constant_result, which would import all of it; the argument is its guard.


def _request_when_compiled(guarded: tuple[str, ...]) -> str:
    return request.get()


def _choose_when_compiled(device_type: str, dtype: torch.dtype, guarded: tuple[str, ...]) -> str:
    return choose(device_type, dtype)


_request_when_compiled._dynamo_marked_constant = True  # type: ignore[attr-defined]
_choose_when_compiled._dynamo_marked_constant = True  # type: ignore[attr-defined]


def reason(device_type: str, dtype: torch.dtype) -> str:
    """Why no kernel serves this device and dtype, whatever is asked for; empty if one does."""
    if choose(device_type, dtype) != "reference":
        return ""
    name = requested()
    if name == "reference":
        return "backend 'reference' is asked for"
    why = "; ".join(_reasons(name, device_type, dtype).values())
    asked = "" if name == "auto" else f", and backend {name!r} is asked for"
    return f"{why or f'no kernel serves {device_type}'}{asked}"


def _count_blocks(opened: str | None = None, closed: str | None = None) -> None:
    global _open_requests  # noqa: PLW0603
    with _lock:
        if opened is not None:
            _open_blocks.append(opened)
        if closed is not None:
            _open_blocks.remove(closed)
        _open_requests = tuple(sorted(set(_open_blocks)))


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Asks for one backend inside the block, in this thread or task alone.

    Args:
        name: "auto", "triton", "cuda", "cpp" or "reference". What the backend cannot serve runs in
            the reference, with a warning that says why.

    Raises:
        ValueError: unknown name.
    """
    before = request.set(_checked(name))
    _count_blocks(opened=name)
    try:
        yield
    finally:
        _count_blocks(closed=name)
        request.reset(before)
