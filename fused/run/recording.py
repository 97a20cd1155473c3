"""Who watches a call: the compiler, an export, a trace or a transform, and what they can record.

A kernel's operators serve eager calls, torch.compile, and torch.export under no_grad; all others
see plain torch operators.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ..backends.backend import choose

functorch_active = torch._C._are_functorch_transforms_active
is_tracing = torch._C._is_tracing
is_exporting = torch.compiler.is_exporting
is_dynamo_compiling = torch.compiler.is_dynamo_compiling
PLAIN_TENSORS = (torch.nn.Parameter, Tensor)
_TRACED_TENSORS = ("FakeTensor", "FunctionalTensor")
_forward_ad = torch.autograd.forward_ad


def is_compiling(x: Tensor) -> bool:
    """Whether torch.compile or torch.export records: sizes may be symbols, and nothing is kept.

    Dynamo says so itself; behind it, x is what the compiler traces with.
    """
    return is_dynamo_compiling() or is_exporting() or type(x) not in PLAIN_TENSORS


def recorded_plain() -> bool:
    """Whether what is recorded now must be plain torch operators.

    torch.jit.trace and ONNX know no others. torch.export records no autograd.Function, only the
    operators inside, which have no gradient: they serve an export under no_grad.
    """
    if is_exporting():
        return torch.is_grad_enabled() or torch.onnx.is_in_onnx_export()
    return not is_dynamo_compiling() and is_tracing()


def is_plain(t: object) -> bool:
    """Whether t is a tensor that a kernel can read, or stands for one where a compiler traces."""
    kind = type(t)
    return kind in PLAIN_TENSORS or kind.__name__ in _TRACED_TENSORS


def transformed() -> bool:
    """Whether torch differentiates forward or transforms: the operator serves neither."""
    return functorch_active() or _forward_ad._current_level >= 0


def composite(x: Tensor, without: str = "") -> bool:
    """Whether the chain runs as plain torch operators rather than as one operator.

    without: what has no CUDA C++ kernel, where that is so.
    """
    if transformed() or recorded_plain() or not is_plain(x):  # DTensor, for one
        return True
    if x.is_cpu:
        return choose("cpu", x.dtype) == "reference"
    chosen = choose(x.device.type, x.dtype, x.get_device())
    if without and chosen == "cuda":
        if not is_dynamo_compiling():
            warnings.warn(
                f"fused: {without} in plain torch, right but slower: CUDA C++ has no kernel for it",
                stacklevel=2,
            )
        return True
    return chosen == "reference"
