"""Cases of the row kernels, and the one rule by which a result is judged.

    |result - oracle| ≤ 2 max|eager - oracle| + 4 ulp(oracle)

oracle: reference.py in float64. eager: the same in the dtype of z. The mask is the same in
all three. Where the oracle is NaN or ±inf the result must be so too, except where eager in the same
dtype is not finite either: it ran out of range. Elements where eager alone is not finite are not
judged; an output that would compare nothing at all is a failure, not a pass.

The kernels are called as the dispatcher calls them for CUDA tensors: the functions that ops.py
registers, with the operator's own list of arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fused.backends import launchers
from fused.run import reference
from fused.spec import (
    ACTIVATIONS,
    GATED_ACTIVATIONS,
    WANT_BIAS,
    WANT_NORM_BIAS,
    WANT_NORM_WEIGHT,
    Spec,
    activation_parameters,
    dropout_threshold,
)

GRADIENTS = ("dz", "dnorm_weight", "dnorm_bias", "dbias", "dshortcut")
PARAMETERS = ("dbias", "dnorm_weight", "dnorm_bias")
ALL = WANT_NORM_WEIGHT | WANT_NORM_BIAS | WANT_BIAS


@dataclass(frozen=True)
class Case:
    """One call, forward and backward. `gap` widens row strides, `offset` storage offsets.

    `cols` are those of z; behind a gated activation the result has half of them.
    Without `bias`, dbias may be wanted all the same: the gradient of a bias that z contains.
    """

    rows: int
    cols: int
    dtype: torch.dtype = torch.float32
    norm: str | None = "layer"
    activation: str | None = "gelu"
    p: float = 0.1
    bias: bool = True
    affine: bool = True
    residual: bool = False
    shortcut: bool = False
    parameter_dtype: torch.dtype | None = None
    gap: int = 0
    offset: int = 0
    wanted: int = ALL

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.norm}-{self.activation}-{dtype}-{self.rows}x{self.cols}"

    @property
    def epilogue(self) -> Spec:
        alpha, beta = activation_parameters(self.activation, {})
        eps = 1e-5 if self.norm else 0.0
        threshold = dropout_threshold(self.p)
        return Spec(self.norm, eps, self.activation, alpha, beta, threshold)

    @property
    def result_cols(self) -> int:
        return self.cols // 2 if self.activation in GATED_ACTIVATIONS else self.cols


@dataclass(frozen=True)
class Inputs:
    z: Tensor
    bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    residual: Tensor | None
    dy: Tensor
    seed: Tensor
    shortcut: Tensor | None = None


def make_inputs(case: Case, device: str = "cpu") -> Inputs:
    """Random inputs of a case, the same on every device."""
    generator = torch.Generator().manual_seed(case.rows * 1009 + case.cols)

    def matrix(cols: int, scale: float, mean: float, gap: int = case.gap) -> Tensor:
        width = cols + gap
        flat = torch.randn(case.offset + case.rows * width, generator=generator) * scale + mean
        whole = flat.to(device, case.dtype)[case.offset :]
        return whole.view(case.rows, width)[:, :cols]

    def parameter(wanted: bool, scale: float, mean: float) -> Tensor | None:
        # Rounded to z's dtype first, so that eager, all in that dtype, sees the same numbers.
        values = (torch.randn(case.cols, generator=generator) * scale + mean).to(case.dtype)
        return values.to(device, case.parameter_dtype or case.dtype) if wanted else None

    return Inputs(
        z=matrix(case.cols, 2.0, 0.5),
        bias=parameter(case.bias, 1.0, 0.0),
        norm_weight=parameter(case.affine and case.norm is not None, 0.3, 1.0),
        norm_bias=parameter(case.affine and case.norm is not None, 0.5, 0.0),
        residual=matrix(case.result_cols, 1.0, 0.0) if case.residual else None,
        dy=matrix(case.result_cols, 1.0, 0.0),
        seed=torch.tensor([0x9E3779B97F4A7C15 - 2**64 + case.cols], device=device),
        shortcut=matrix(case.cols, 1.5, 0.0, gap=0) if case.shortcut else None,
    )


def forward_arguments(case: Case, x: Inputs) -> tuple[Any, ...]:
    """The arguments of row_forward and row_forward_, in the order of the schema."""
    seed = x.seed if case.epilogue.threshold else None
    given = (x.z, x.bias, x.norm_weight, x.norm_bias, x.residual, seed, *case.epilogue.row)
    return given if x.shortcut is None else (*given, x.shortcut)


def backward_arguments(case: Case, x: Inputs, statistics: Tensor) -> tuple[Any, ...]:
    """The arguments of row_backward, in the order of the schema."""
    seed = x.seed if case.epilogue.threshold else None
    parameters = (x.bias, x.norm_weight, x.norm_bias)
    given = (x.dy, x.z, *parameters, statistics, seed, case.wanted, *case.epilogue.row)
    return given if x.shortcut is None else (*given, x.shortcut)


def wanted_names(case: Case, x: Inputs) -> list[str]:
    """The gradients that a case asks for; there is always dz, and dshortcut if it is not dz."""
    shortcut = x.shortcut is not None and case.norm is not None
    present = (True, x.norm_weight is not None, x.norm_bias is not None, True, shortcut)
    bits = (WANT_NORM_WEIGHT, WANT_NORM_BIAS, WANT_BIAS)
    asked = (True, *(case.wanted & bit for bit in bits), True)
    return [n for n, p, a in zip(GRADIENTS, present, asked, strict=True) if p and a]


def run(case: Case, x: Inputs) -> dict[str, Tensor]:
    """What the kernels give, by name; gradients that are not wanted are left out."""
    y, statistics = launchers.TRITON["row_forward"](*forward_arguments(case, x))
    gradients = launchers.TRITON["row_backward"](*backward_arguments(case, x, statistics))
    assert y.dtype == x.z.dtype
    wanted = wanted_names(case, x)
    owners = (x.z, x.norm_weight, x.norm_bias, x.z, x.z)
    found = {"y": y}
    for name, gradient, owner in zip(GRADIENTS, gradients, owners, strict=True):
        if name in wanted:
            assert owner is not None
            whole = name in ("dz", "dshortcut")
            assert gradient.shape == (x.z.shape if whole else x.z.shape[1:])
            assert gradient.dtype == owner.dtype
            found[name] = gradient
        else:
            assert gradient.shape == (0,)
            assert gradient.dtype == (x.z.dtype if name == "dshortcut" else torch.float32)
    return found


def expected(case: Case, x: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """What reference.py gives in a dtype."""

    def leaf(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().to(dtype).requires_grad_()

    leaves = {"dz": x.z, "dnorm_weight": x.norm_weight, "dnorm_bias": x.norm_bias, "dbias": x.bias}
    leaves["dshortcut"] = x.shortcut
    if x.bias is None:
        leaves["dbias"] = x.z.new_zeros(x.z.shape[1])
    leaves = {name: leaf(t) for name, t in leaves.items()}
    residual = None if x.residual is None else x.residual.to(dtype)
    spec, parameters = case.epilogue, [leaves[name] for name in PARAMETERS]
    if x.shortcut is None:
        y = reference.row(leaves["dz"], spec, *parameters, residual, x.seed)
    else:
        h = reference.row(leaves["dz"], Spec(spec.norm, spec.eps), *parameters)
        h = h + leaves["dshortcut"]
        y = reference.row(h, spec.without_norm, residual=residual, seed=x.seed)
    wanted = wanted_names(case, x)
    gradients = torch.autograd.grad(y, [leaves[name] for name in wanted], x.dy.to(dtype))
    return {"y": y.detach()} | dict(zip(wanted, gradients, strict=True))


def complaint(
    name: str, result: Tensor, oracle: Tensor, eager: Tensor, dtype: torch.dtype
) -> str | None:
    """What is wrong with a result, or None."""
    assert result.shape == oracle.shape, name
    result, eager = result.double(), eager.double()
    finite = oracle.isfinite() & eager.isfinite()
    if oracle.isfinite().any() and not finite.any():
        return f"{name}: nothing to compare, eager is nowhere finite where the oracle is"
    strange = ~oracle.isfinite() & ~eager.isfinite() & result.isfinite()
    if strange.any():
        return f"{name}: finite at {strange.nonzero()[0].tolist()}, oracle is not"
    error = (result - oracle).abs()
    eager_error = (eager - oracle).abs()[finite]
    limit = 2 * (eager_error.max() if eager_error.numel() else 0.0)
    limit = limit + 4 * torch.finfo(dtype).eps * oracle.abs()
    bad = finite & ~(error <= limit)  # a NaN result is bad
    if not bad.any():
        return None
    at = bad.nonzero()[0].tolist()
    where = tuple(at)
    return (
        f"{name}: {int(bad.sum())} of {bad.numel()} beyond the limit, first at {at}: "
        f"{result[where]:.9g}, oracle {oracle[where]:.9g}, limit {limit[where]:.3g}"
    )


def check(case: Case, x: Inputs | None = None, device: str = "cpu") -> dict[str, Tensor]:
    """Runs a case and judges it; returns the results.

    Raises:
        AssertionError: naming every output that breaks the rule.
    """
    x = make_inputs(case, device) if x is None else x
    result = run(case, x)
    oracle, eager = expected(case, x, torch.float64), expected(case, x, case.dtype)
    found = [complaint(n, result[n], oracle[n], eager[n], case.dtype) for n in result]
    assert not any(found), f"{case}\n" + "\n".join(c for c in found if c)
    return result


def matrix_of_cases(
    activations: Sequence[str | None] = (None, *ACTIVATIONS),
    widths: Sequence[int] = (63, 65, 1, 200),
) -> list[Case]:
    """Every norm x activation x dtype, with the other properties taken in turn."""
    cases = []
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for norm in ("layer", "rms", None):
        for activation in activations:
            for dtype in dtypes:
                i = len(cases)
                case = Case(5, widths[i % len(widths)], dtype, norm, activation)
                case = replace(case, p=(0.1, 0.0, 0.5)[i // 3 % 3], residual=i % 5 < 2)
                case = replace(case, wanted=min(i % 13, ALL))
                case = replace(case, shortcut=i % 4 == 1 and case.result_cols == case.cols)
                cases.append(replace(case, bias=i % 7 < 4, affine=i % 11 < 8))
    return cases


def gated_matrix_of_cases() -> list[Case]:
    """The same for gated activations: halves of 63, 65, 1 and 200 columns."""
    return matrix_of_cases(tuple(GATED_ACTIVATIONS), (126, 130, 2, 400))
