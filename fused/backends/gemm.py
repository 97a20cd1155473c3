"""Whether a Linear on a GPU runs as one kernel with what follows it.

The alternative is the library's GEMM and one pass over its result. `FUSED_GEMM` in the environment
says which it is, for the whole process:

    library   always the library's GEMM
    auto      one kernel where a rule of kernels/tuning/gemm.py has it faster, or where
              `python -m fused tune linear` has measured so on this GPU (the default)
    fused     one kernel wherever there is one

Where no kernel serves a case the library's GEMM does, whatever is asked for. The batch decides
nothing, so that a change of it compiles nothing.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ..kernels.tuning import gemm as gemm_tuning
from ..kernels.tuning import tuned
from ..kernels.tuning.gemm import Kind
from .backend import choose

MODES = ("auto", "library", "fused")


def checked_mode(name: str) -> str:
    """name itself.

    Raises:
        ValueError: unknown mode.
    """
    if name not in MODES:
        raise ValueError(f"FUSED_GEMM must be one of {', '.join(MODES)}; got {name!r}")
    return name


mode = checked_mode(os.environ.get("FUSED_GEMM") or "auto")
# What callers ask first, because it costs nothing.
enabled = mode == "fused" or (mode == "auto" and gemm_tuning.has_rules())


def serves(x: Tensor, weight: Tensor, norm: str | None, groups: int = 1) -> bool:
    """Whether a Linear and a chain with this norm run as one operator of ops.py.

    Args:
        x: (rows, inner).
        weight: (cols, inner).
        groups: of group norm.
    """
    return has_kernel(x, weight, norm, groups) and _is_chosen(x, weight, norm)


def has_kernel(x: Tensor, weight: Tensor, norm: str | None, groups: int = 1) -> bool:
    """Whether a kernel exists for this Linear, faster or not."""
    if not _is_readable(x, weight):
        return False
    kind, device = Kind(norm, x.dtype, _precision(x.dtype)), _device(x.get_device())
    cols = weight.shape[0]
    if norm == "batch":
        return True
    if norm == "group":
        return gemm_tuning.group_tile(cols // groups, kind, *device) is not None
    return gemm_tuning.row_tile(cols, kind, *device) is not None


def _is_chosen(x: Tensor, weight: Tensor, norm: str | None) -> bool:
    """Whether a kernel is to be used where there is one."""
    if mode == "fused":
        return True
    cols, inner = weight.shape
    return _is_faster(cols, inner, norm, x.dtype, _precision(x.dtype), x.get_device())


def _is_readable(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels can read x and weight, and write x's dtype, 16 bytes at a time."""
    if not _is_on_gpu(x) or x.dtype not in gemm_tuning.DTYPES or weight.shape[1] == 0:
        return False
    align = 16 // x.element_size()
    lengths = (*weight.shape, x.stride(0), weight.stride(0))
    return x.stride(1) == 1 and weight.stride(1) == 1 and not any(n % align for n in lengths)


def _is_on_gpu(x: Tensor) -> bool:
    """Whether x is where these kernels run: on a GPU that Triton serves, as asked for here."""
    return x.is_cuda and choose("cuda", x.dtype, x.get_device()) == "triton"


# The compiler takes what these return for constant, as in backend.py. It guards on TF32 itself.


def _precision(dtype: torch.dtype) -> str:
    return gemm_tuning.precision(dtype)


def _device(index: int) -> tuple[int, int]:
    """(architecture, threads of a warp) of a GPU, as kernels/tuning/rules.py has them."""
    from ..kernels.tuning import rules as tuning

    device = tuning.gpu(index)
    return device.arch, device.warp_size


def _name(index: int) -> str:
    from ..kernels.tuning import rules as tuning

    return tuning.gpu(index).name


def _is_faster(
    cols: int, inner: int, norm: str | None, dtype: torch.dtype, precision: str, index: int
) -> bool:
    name = _name(index) if tuned.any_linear() else ""
    kind = Kind(norm, dtype, precision)
    return gemm_tuning.is_faster(cols, inner, kind, _device(index)[0], name)


_precision._dynamo_marked_constant = True  # type: ignore[attr-defined]
_device._dynamo_marked_constant = True  # type: ignore[attr-defined]
_is_faster._dynamo_marked_constant = True  # type: ignore[attr-defined]
