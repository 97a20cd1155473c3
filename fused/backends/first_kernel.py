"""Whether Triton, or the CUDA C++ kernels, work on a GPU: tried once on each, with one kernel."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch.utils._python_dispatch import _disable_current_modes

from . import cuda_library
from . import ops as _ops
from .launchers import TRITON, Launchers

_COLS, _EPS = 16, 1e-5
# LayerNorm by the row operator's scalars, and how far its values may be off.
_LAYER_NORM, _ERROR = (1, _EPS, 0, 0.0, 0.0, 0), 1e-4


def _first_kernel(launchers: Launchers, index: int) -> str:
    """What goes wrong with a first kernel on a GPU, or the empty string.

    It is waited for: an asynchronous fault would show only later, elsewhere. A stream that is
    captured cannot be waited for; there the kernel is taken to work.
    """
    try:
        # An exporter's fake tensors have no values to compare.
        with torch.cuda.device(index), _disable_current_modes():
            if torch.cuda.is_current_stream_capturing():
                return ""
            z = torch.arange(float(_COLS), device=f"cuda:{index}").view(1, _COLS)
            y, _ = launchers["row_forward"](z, None, None, None, None, None, *_LAYER_NORM)
            torch.cuda.synchronize(index)
            found = y.view(-1).tolist()
    # Everything: Triton raises its own exceptions, the compiler's, the driver's and torch's.
    except Exception as error:
        text = str(error).strip()
        return text.splitlines()[0] if text else type(error).__name__
    mean, variance = (_COLS - 1) / 2, (_COLS**2 - 1) / 12
    errors = [abs(y - (z - mean) / (variance + _EPS) ** 0.5) for z, y in enumerate(found)]
    if all(error < _ERROR for error in errors):  # NaN is not
        return ""
    return f"its values are wrong by up to {max(errors):.2g}"


@cache
def gpu_reason(backend: str, index: int) -> str:
    """Why Triton, or the CUDA C++ kernels, cannot be used on a GPU, or the empty string.

    Tries them once on each GPU, and touches no other.
    """
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if backend == "triton":
        if find_spec("triton") is None:
            return "triton is not installed; run 'pip install triton'"
        failed, remedy = _first_kernel(TRITON, index), "check the driver and the C compiler"
    else:
        library, reason = cuda_library.load()
        if library is None:
            return reason
        failed, remedy = _first_kernel(cuda_cpp(), index), "build them for this GPU and its driver"
    kind = "Triton" if backend == "triton" else "CUDA C++"
    return f"a first {kind} kernel failed ({failed}); {remedy}" if failed else ""


@cache
def cuda_cpp() -> Launchers:
    """The launchers of the CUDA C++ kernels, imported at the first use."""
    from . import cuda_channel, cuda_channel_backward, cuda_row

    modules = (cuda_row, cuda_channel, cuda_channel_backward)
    return {n: getattr(m, n) for n in _ops.OPERATORS for m in modules if n in m.__dict__}
