"""The raw operators: schemas, fake kernels, and the Triton implementations.

The C++ implementations register themselves when the extension is loaded (csrc/ops.cpp). The
operators are opaque to torch.compile and know nothing of autograd (autograd.py does).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Which sums over the rows `row_backward` makes.
WANT_NORM_WEIGHT, WANT_NORM_BIAS, WANT_BIAS = 1, 2, 4
# Statistics of a row by the norm's code: none, layer, rms.
STATISTICS_OF = (0, 2, 1)

_library = torch.library.Library("fused_lnad", "DEF")

# statistics is (2, rows) for layer (mean, rstd), (1, rows) for rms (rstd), (0, rows) without norm.
# wanted is a sum of the WANT_ constants; a sum over the rows that is not wanted comes back empty.
# dbias may be wanted without bias: z then contains it already.
_PARAMETERS = "Tensor? bias, Tensor? norm_weight, Tensor? norm_bias"
_SCALARS = "int norm, float eps, int activation, float alpha, float beta, int threshold"
_library.define(
    f"row_forward(Tensor z, {_PARAMETERS}, Tensor? residual, Tensor? seed, {_SCALARS})"
    " -> (Tensor y, Tensor statistics)"
)
_library.define(
    f"row_forward_(Tensor(a!) z, {_PARAMETERS}, Tensor? residual, Tensor? seed, {_SCALARS}) -> ()"
)
_library.define(
    f"row_backward(Tensor dy, Tensor z, {_PARAMETERS}, Tensor statistics, Tensor? seed, int wanted,"
    f" {_SCALARS}) -> (Tensor dz, Tensor dnorm_weight, Tensor dnorm_bias, Tensor dbias)"
)

_OptionalTensor = Tensor | None


def _statistics_dtype(z: Tensor) -> torch.dtype:
    return torch.float64 if z.dtype == torch.float64 else torch.float32


@torch.library.register_fake("fused_lnad::row_forward")
def _(z, bias, norm_weight, norm_bias, residual, seed, norm, eps, activation, alpha, beta, t):
    planes = STATISTICS_OF[norm]
    return z.new_empty(z.shape), z.new_empty((planes, z.shape[0]), dtype=_statistics_dtype(z))


@torch.library.register_fake("fused_lnad::row_forward_")
def _(z, bias, norm_weight, norm_bias, residual, seed, norm, eps, activation, alpha, beta, t):
    return None


@torch.library.register_fake("fused_lnad::row_backward")
def _(dy, z, bias, norm_weight, norm_bias, statistics, seed, wanted, norm, eps, act, a, b, t):
    def gradient(parameter: Tensor | None, bit: int) -> Tensor:
        if parameter is None or not wanted & bit:
            return z.new_empty((0,), dtype=_statistics_dtype(z))
        return parameter.new_empty((z.shape[1],))

    return (
        z.new_empty(z.shape),
        gradient(norm_weight if norm else None, WANT_NORM_WEIGHT),
        gradient(norm_bias if norm else None, WANT_NORM_BIAS),
        gradient(z, WANT_BIAS),
    )


# ---- CUDA tensors: Triton; kernels/ is imported at the first call, not at import ----


def _triton_row_forward(z: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    from .kernels.row import row_forward

    return row_forward(z, *args)


def _triton_row_forward_(z: Tensor, *args: Any) -> None:
    from .kernels.row import row_forward

    row_forward(z, *args, out=z)


def _triton_row_backward(dy: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from .kernels.row_backward import row_backward

    return row_backward(dy, *args)


_library.impl("row_forward", _triton_row_forward, "CUDA")
_library.impl("row_forward_", _triton_row_forward_, "CUDA")
_library.impl("row_backward", _triton_row_backward, "CUDA")

# Differentiation is autograd.py's; without this, torch's fallback for operators that have none
# would look through the arguments at every call.
for _name in ("row_forward", "row_forward_", "row_backward"):
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")

row_forward = torch.ops.fused_lnad.row_forward.default
row_forward_ = torch.ops.fused_lnad.row_forward_.default
row_backward = torch.ops.fused_lnad.row_backward.default
