"""Running one case three ways: the operator under test, the oracle in float64, eager."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fused import spec
from fused.backends import ops
from fused.run import reference
from fused.spec import ACTIVATIONS, Spec, dropout_threshold

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NORMS = (None, "layer", "rms")
EVERY_ACTIVATION = (None, *ACTIVATIONS)
OUTPUTS = ("y", "dz", "dbias", "dnorm_weight", "dnorm_bias", "dresidual")


def make_epilogue(norm: str | None, activation: str | None, p: float = 0.0) -> Spec:
    """A `Spec` with torch's defaults for the activation's parameters."""
    values = [v for _, v in ACTIVATIONS[activation].parameters] if activation else []
    alpha, beta = [*values, 0.0, 0.0][:2]
    eps = 1e-5 if norm else 0.0
    return Spec(norm, eps, activation, alpha, beta, dropout_threshold(p))


@dataclass
class Inputs:
    """Tensors of one case; parameters may be None."""

    z: Tensor
    dy: Tensor
    bias: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    residual: Tensor | None = None
    shortcut: Tensor | None = None
    seed: Tensor = field(default_factory=lambda: torch.tensor([0x0123456789ABCDEF]))

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        return self.bias, self.norm_weight, self.norm_bias


def make_inputs(
    rows: int,
    cols: int,
    dtype: torch.dtype,
    norm: str | None = "layer",
    affine: bool = True,
    bias: bool = True,
    residual: bool = True,
    generator: int = 0,
    shortcut: bool = False,
) -> Inputs:
    """Random inputs with every parameter that the case can have."""
    g = torch.Generator().manual_seed(generator)

    def normal(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        return (torch.randn(*shape, generator=g) * scale + mean).to(dtype)

    affine = affine and norm is not None
    return Inputs(
        z=normal(rows, cols, scale=2.0, mean=0.3),
        dy=normal(rows, cols),
        bias=normal(cols) if bias else None,
        norm_weight=normal(cols, scale=0.3, mean=1.0) if affine else None,
        norm_bias=normal(cols) if affine else None,
        residual=normal(rows, cols) if residual else None,
        shortcut=normal(rows, cols) if shortcut else None,
    )


def run_operator(inputs: Inputs, epilogue: Spec) -> dict[str, Tensor]:
    """Forward and backward by the raw operators of the inputs' device."""
    seed = inputs.seed if epilogue.threshold else None
    y, statistics = ops.row_forward(
        inputs.z, *inputs.parameters, inputs.residual, seed, *epilogue.row, inputs.shortcut
    )
    wanted = (
        spec.WANT_NORM_WEIGHT | spec.WANT_NORM_BIAS | (0 if inputs.bias is None else spec.WANT_BIAS)
    )
    rest = (statistics, seed, wanted, *epilogue.row, inputs.shortcut)
    dz, dnorm_weight, dnorm_bias, dbias, dshortcut = ops.row_backward(
        inputs.dy, inputs.z, *inputs.parameters, *rest
    )
    found = {"y": y, "dz": dz}
    if inputs.shortcut is None or epilogue.norm is None:
        assert dshortcut.shape == (0,) and dshortcut.dtype == dz.dtype
    else:
        found["dshortcut"] = dshortcut
    for name, parameter, gradient in (
        ("dbias", inputs.bias, dbias),
        ("dnorm_weight", inputs.norm_weight, dnorm_weight),
        ("dnorm_bias", inputs.norm_bias, dnorm_bias),
    ):
        if parameter is not None:
            found[name] = gradient
    return found


def run_reference(inputs: Inputs, epilogue: Spec, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same by the reference in another dtype; float64 is the oracle."""
    z = inputs.z.detach().to(dtype).requires_grad_()
    parameters = [
        None if t is None else t.detach().to(dtype).requires_grad_() for t in inputs.parameters
    ]
    residual = None if inputs.residual is None else inputs.residual.to(dtype)
    shortcut = None
    if inputs.shortcut is not None:
        shortcut = inputs.shortcut.detach().to(dtype).requires_grad_()
    added = {"residual": residual, "shortcut": shortcut}
    y = reference.row(z, epilogue, *parameters, seed=inputs.seed, **added)
    y.backward(inputs.dy.to(dtype))
    found = {"y": y.detach(), "dz": z.grad}
    if shortcut is not None:
        found["dshortcut"] = shortcut.grad
    for name, t in zip(("dbias", "dnorm_weight", "dnorm_bias"), parameters, strict=True):
        if t is not None:
            found[name] = t.grad
    return found


def magnitudes(inputs: Inputs, oracle: dict[str, Tensor], rstd: float = 1.0) -> dict[str, float]:
    """The size of the terms behind each gradient, where the gradient itself may cancel to zero."""
    scale = float(inputs.dy.abs().max()) * max(1.0, rstd)
    weight = inputs.norm_weight
    if weight is not None:
        scale *= max(1.0, float(weight.abs().max()))
    rows = inputs.z.shape[0] ** 0.5
    found = {name: scale * rows for name in oracle}
    return found | {"y": 0.0, "dz": scale if inputs.z.shape[1] == 1 else 0.0}
