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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from . import ops as _ops  # noqa: F401  (it defines the operators)
from .extension import LIBRARY, REASON
from .first_kernel import cuda_cpp, gpu_reason
from .launchers import LINEAR, PLACES, TRITON, Launchers

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
# (request, device type, its index, dtype) → backend.
_chosen: dict[tuple[str, str, int, torch.dtype], str] = {}
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


def _index_of(device_type: str, index: int | None) -> int:
    """The GPU that is meant, the current one where none is said; -1 for other devices."""
    if device_type != "cuda":
        return -1
    if index is None or index < 0:
        return torch.cuda.current_device() if torch.cuda.is_available() else 0
    return index


def why_not(backend: str, device_type: str, dtype: torch.dtype, index: int | None = None) -> str:
    """The sentence that says why a backend cannot serve this device and dtype; empty if it can.

    index: of the GPU; None: the current one.
    """
    if backend == "reference":
        return ""
    if device_type != _DEVICE_OF[backend]:
        return f"{backend} serves {_DEVICE_OF[backend]} tensors, not {device_type}"
    if dtype not in _DTYPES[backend]:
        served = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES[backend])
        return f"{backend} serves {served}, not {str(dtype).removeprefix('torch.')}"
    return REASON if backend == "cpp" else gpu_reason(backend, _index_of(device_type, index))


def requested() -> str:
    """The backend that is asked for here, by `use_backend` or `FUSED_BACKEND`."""
    if torch.compiler.is_dynamo_compiling():
        return _request_when_compiled(_open_requests)
    return request.get()


def _reasons(name: str, device_type: str, index: int, dtype: torch.dtype) -> dict[str, str]:
    """Each backend that a request could mean for this device → why not, up to one that can."""
    candidates = [name]
    if name == "auto":
        candidates = [b for b, device in _DEVICE_OF.items() if device == device_type]
    reasons = {}
    for candidate in candidates:
        reasons[candidate] = why_not(candidate, device_type, dtype, index)
        if not reasons[candidate]:
            break
    return reasons


def _choose(name: str, device_type: str, index: int, dtype: torch.dtype) -> str:
    reasons = _reasons(name, device_type, index, dtype)
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


def choose(device_type: str, dtype: torch.dtype, index: int | None = None) -> str:
    """The backend that serves tensors of this device and dtype.

    index: of the GPU, as `Tensor.get_device` has it; None: the current one.
    """
    if torch.compiler.is_dynamo_compiling():
        return _choose_when_compiled(device_type, dtype, index, _open_requests)
    if device_type != "cuda":
        index = -1
    elif index is None:
        index = _index_of(device_type, None)
    key = (request.get(), device_type, index, dtype)
    backend = _chosen.get(key)
    if backend is None:
        backend = _chosen[key] = _choose(*key)
    return backend


# (request, GPU, dtype) → launchers.
_cuda_launchers: dict[tuple[str, int, torch.dtype], Launchers] = {}


def cuda_launchers(dtype: torch.dtype, index: int) -> Launchers:
    """The launchers of the operators for tensors on a GPU, by what is asked for here.

    Raises:
        RuntimeError: no kernel serves it.
    """
    key = (request.get(), index, dtype)
    found = _cuda_launchers.get(key)
    if found is None:
        found = _cuda_launchers[key] = _find_launchers(*key)
    return found


def _find_launchers(name: str, index: int, dtype: torch.dtype) -> Launchers:
    # Whoever calls an operator has chosen it already. Backward may run under another request than
    # forward did, so "reference" is no answer here.
    for asked in (name, "auto"):
        for backend, why in _reasons(asked, "cuda", index, dtype).items():
            if not why and backend in ("triton", "cuda"):
                return TRITON if backend == "triton" else cuda_cpp()
    reasons = _reasons("auto", "cuda", index, dtype)
    why = "; ".join(f"{b}: {reason}" for b, reason in reasons.items())
    raise RuntimeError(f"fused: no kernel serves cuda {str(dtype).removeprefix('torch.')} ({why})")


def _for_cuda(name: str) -> Callable[..., Any]:
    def call(first: torch.Tensor, *args: Any) -> Any:
        return cuda_launchers(first.dtype, first.get_device())[name](first, *args)

    return call


_library = torch.library.Library("fused_lnad", "IMPL")
for _name in PLACES:
    _library.impl(_name, _for_cuda(_name), "CUDA")
for _name, _launcher in LINEAR.items():
    _library.impl(_name, _launcher, "CUDA")

# The compiler takes what these two return for constant, as if marked with
# torch.compiler.assume_constant_result, which would import all of it; the argument is its guard.


def _request_when_compiled(guarded: tuple[str, ...]) -> str:
    return request.get()


def _choose_when_compiled(
    device_type: str, dtype: torch.dtype, index: int | None, guarded: tuple[str, ...]
) -> str:
    return choose(device_type, dtype, index)


_request_when_compiled._dynamo_marked_constant = True  # type: ignore[attr-defined]
_choose_when_compiled._dynamo_marked_constant = True  # type: ignore[attr-defined]


def reason(device_type: str, dtype: torch.dtype, index: int | None = None) -> str:
    """Why no kernel serves this device and dtype, whatever is asked for; empty if one does."""
    index = _index_of(device_type, index)
    if choose(device_type, dtype, index) != "reference":
        return ""
    name = requested()
    if name == "reference":
        return "backend 'reference' is asked for"
    why = "; ".join(_reasons(name, device_type, index, dtype).values())
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


def asked() -> str | None:
    """The backend that is asked for here; backward, in threads of its own, must be told."""
    # The compiler cannot read a request.
    return None if torch.compiler.is_dynamo_compiling() else request.get()


def as_asked(name: str | None, operator: Callable[..., Any], *args: Any) -> Any:
    """Calls an operator in backward under the request that forward had."""
    if name is None or name == request.get():
        return operator(*args)
    before = request.set(name)
    try:
        return operator(*args)
    finally:
        request.reset(before)
