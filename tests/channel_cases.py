"""Running one case of the channel norms three ways: operators under test, float64 oracle, eager."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from tolerances import assert_close
from torch import Tensor

from fused import spec
from fused.backends import ops
from fused.run import reference
from fused.spec import ACTIVATIONS, Spec, dropout_scale, dropout_threshold

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NORMS = (None, "batch", "group", "instance")
EVERY_ACTIVATION = (None, *ACTIVATIONS)
LAYOUTS = (False, True)  # channels_last


def make_epilogue(
    norm: str | None,
    activation: str | None,
    p: float = 0.0,
    channels: int = 1,
    groups: int = 1,
    channels_last: bool = False,
    channel_dropout: bool = False,
) -> Spec:
    """A `Spec` with torch's defaults; `groups` counts for group norm alone."""
    values = [v for _, v in ACTIVATIONS[activation].parameters] if activation else []
    alpha, beta = [*values, 0.0, 0.0][:2]
    return Spec(
        norm,
        1e-5 if norm else 0.0,
        activation,
        alpha,
        beta,
        dropout_threshold(p),
        groups=groups if norm == "group" else channels,
        channels_last=channels_last,
        channel_dropout=channel_dropout,
    )


@dataclass
class Inputs:
    """Tensors of one case; parameters may be None. With mean and variance they are constants."""

    z: Tensor
    dy: Tensor
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    residual: Tensor | None = None
    shortcut: Tensor | None = None
    mask: Tensor | None = None
    mean: Tensor | None = None
    variance: Tensor | None = None
    seed: Tensor = field(default_factory=lambda: torch.tensor([0x0123456789ABCDEF]))

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        return self.norm_weight, self.norm_bias


def make_inputs(
    samples: int,
    channels: int,
    positions: int,
    dtype: torch.dtype,
    norm: str | None = "batch",
    channels_last: bool = False,
    affine: bool = True,
    residual: bool = True,
    masked: bool = False,
    constant: bool = False,
    generator: int = 0,
    device: str = "cpu",
    shortcut: bool = False,
) -> Inputs:
    """Random inputs with every parameter that the case can have.

    `masked`: some positions of each sample are padding, where z, dy and what is added are NaN, and
    the last of several samples is nothing else. `constant`: with the statistics of evaluation.
    """
    g = torch.Generator().manual_seed(generator)

    def normal(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        return torch.randn(*shape, generator=g) * scale + mean

    shape = (samples, positions, channels) if channels_last else (samples, channels, positions)
    affine = affine and norm is not None
    inputs = Inputs(
        z=normal(*shape, scale=2.0, mean=0.3),
        dy=normal(*shape),
        norm_weight=normal(channels, scale=0.3, mean=1.0) if affine else None,
        norm_bias=normal(channels) if affine else None,
        residual=normal(*shape) if residual else None,
        shortcut=normal(*shape) if shortcut else None,
    )
    for name in ("z", "dy", "norm_weight", "norm_bias", "residual", "shortcut"):
        t = getattr(inputs, name)
        setattr(inputs, name, None if t is None else t.to(device, dtype))
    if masked:
        inputs.mask = torch.rand(samples, positions, generator=g) < 0.7
        if samples > 1:
            inputs.mask[-1] = False
        inputs.mask = inputs.mask.to(device)
        for t in (inputs.z, inputs.dy, inputs.residual, inputs.shortcut):
            if t is not None:
                t[~inputs.mask] = math.nan
    if constant and norm is not None:
        # In z's dtype, as module.to(dtype) leaves them; eager takes no other for all layouts.
        inputs.mean = normal(1, channels).to(device, dtype)
        inputs.variance = normal(1, channels).square().add(0.5).to(device, dtype)
    inputs.seed = inputs.seed.to(device)
    return inputs


def seed_of(inputs: Inputs, epilogue: Spec) -> Tensor | None:
    return inputs.seed if epilogue.threshold else None


def wanted_of(inputs: Inputs, epilogue: Spec) -> int:
    """Every sum that the norm offers; without a norm its parameters have none."""
    bias = 0 if epilogue.norm == "group" else spec.WANT_BIAS
    return spec.WANT_NORM_WEIGHT | spec.WANT_NORM_BIAS | bias


def named(inputs: Inputs, y: Tensor, gradients: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """y and the gradients by name, without those that are not made."""
    names = ("dz", "dnorm_weight", "dnorm_bias", "dbias", "dshortcut")
    found = dict(zip(names, gradients, strict=True))
    if not found["dshortcut"].numel() and inputs.z.numel():
        del found["dshortcut"]
    if inputs.norm_weight is None:
        del found["dnorm_weight"]
    if inputs.norm_bias is None:
        del found["dnorm_bias"]
    return {"y": y} | found


def run_operator(inputs: Inputs, epilogue: Spec) -> dict[str, Tensor]:
    """Forward and backward by the raw operators of the inputs' device.

    y, dz, dnorm_weight and dnorm_bias where there are parameters, dbias except for group norm.
    """
    seed, codes = seed_of(inputs, epilogue), (*epilogue.channel, inputs.shortcut)
    constant, given = inputs.mean is not None, (inputs.residual, inputs.mask, seed, *codes)
    if constant:
        mean, variance, count = inputs.mean, inputs.variance, None
        y = ops.channel_apply(inputs.z, mean, variance, *inputs.parameters, *given)
    elif epilogue.norm is None:
        mean = variance = count = None
        y = ops.channel_apply(inputs.z, None, None, None, None, *given)
    else:
        y, mean, variance, count = ops.channel_forward(inputs.z, *inputs.parameters, *given)
        count = count if inputs.mask is not None else None
    gradients = ops.channel_backward(
        inputs.dy,
        inputs.z,
        mean,
        variance,
        count,
        *inputs.parameters,
        inputs.mask,
        seed,
        wanted_of(inputs, epilogue),
        constant,
        *codes,
    )
    found = named(inputs, y, gradients)
    if epilogue.norm == "group":
        del found["dbias"]
    return found


def run_in_parts(inputs: Inputs, epilogue: Spec) -> dict[str, Tensor]:
    """The same for batch norm, by the operators between which processes exchange statistics."""
    seed, codes = seed_of(inputs, epilogue), epilogue.channel
    mean, variance, count = ops.channel_statistics(
        inputs.z, inputs.mask, codes[0], epilogue.groups, epilogue.channels_last
    )
    added = inputs.shortcut
    given = (inputs.z, mean, variance, *inputs.parameters)
    y = ops.channel_apply(*given, inputs.residual, inputs.mask, seed, *codes, added)
    sums, dshortcut = ops.channel_sums(inputs.dy, *given, inputs.mask, seed, *codes, added)
    dy = inputs.dy
    if added is not None:
        dy, codes = dshortcut, epilogue.norm_alone.channel
    if inputs.mask is None:
        count = mean.new_full((1,), inputs.z.numel() // max(1, epilogue.groups))
    dz = ops.channel_gradient(
        dy,
        inputs.z,
        mean,
        variance,
        sums,
        count,
        *inputs.parameters,
        inputs.mask,
        seed,
        *codes,
    )
    found = {"y": y, "dz": dz}
    if added is not None:
        found["dshortcut"] = dshortcut
    for name, parameter, gradient in (
        ("dnorm_weight", inputs.norm_weight, sums[1]),
        ("dnorm_bias", inputs.norm_bias, sums[0]),
    ):
        if parameter is not None:
            found[name] = gradient.to(parameter.dtype)
    return found


def run_reference(inputs: Inputs, epilogue: Spec, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same by the reference in another dtype; float64 is the oracle."""

    def prepared(t: Tensor | None) -> Tensor | None:
        # Autograd multiplies what padding holds by zero; the operators do not look at it.
        if t is None or inputs.mask is None:
            return None if t is None else t.detach().to(dtype)
        return t.detach().to(dtype).masked_fill(~inputs.mask[:, :, None], 0.0)

    z = prepared(inputs.z)
    assert z is not None
    z.requires_grad_()
    parameters = [
        None if t is None else t.detach().to(dtype).requires_grad_() for t in inputs.parameters
    ]
    constants = [None if t is None else t.to(dtype) for t in (inputs.mean, inputs.variance)]
    residual, shortcut = prepared(inputs.residual), prepared(inputs.shortcut)
    if shortcut is not None:
        shortcut.requires_grad_()
    given = list(parameters)
    if epilogue.norm == "group" and given[0] is None and given[1] is not None:
        given[0] = torch.ones_like(given[1])  # torch cannot differentiate a bias alone
    rest = (residual, inputs.mask, seed_of(inputs, epilogue), shortcut)
    y = reference.channel(z, epilogue, *constants, *given, *rest)
    y.backward(prepared(inputs.dy))
    found = {"y": y.detach(), "dz": z.grad}
    if shortcut is not None:
        found["dshortcut"] = shortcut.grad
    for name, t in zip(("dnorm_weight", "dnorm_bias"), parameters, strict=True):
        if t is not None:
            found[name] = t.grad
    if epilogue.norm != "group":
        found["dbias"] = z.grad.double().sum((0, 1) if epilogue.channels_last else (0, 2))
    return found


def check(inputs: Inputs, epilogue: Spec, what: str = "") -> None:
    """Raises unless the operators are as near to the oracle as tolerances.py asks for."""
    dtype = inputs.z.dtype
    found = run_operator(inputs, epilogue)
    oracle = run_reference(inputs, epilogue, torch.float64)
    eager = run_reference(inputs, epilogue, dtype)
    samples, rows, cols = inputs.z.shape
    positions = rows if epilogue.channels_last else cols
    terms = float(inputs.dy.nan_to_num().abs().max()) * max(1, dropout_scale(epilogue.threshold))
    rstd = largest_rstd(inputs, epilogue)
    for name, result in found.items():
        # Sums of terms of both signs: their size is that of the terms, not of what is left.
        summed = name not in ("dz", "dshortcut")
        magnitude = terms * (math.sqrt(samples * positions) if summed else 1)
        if name in ("dz", "dbias"):
            magnitude *= max(1, rstd)
        if name == "y":
            magnitude = 0.0
        if dtype == torch.float64:  # the oracle is eager itself, and no better
            largest = float(oracle[name].abs().max()) if oracle[name].numel() else 0.0
            magnitude = 4 * max(magnitude, rstd, largest)
        assert result.dtype == dtype, name
        assert_close(f"{what} {name}", result, oracle[name], eager[name], dtype, magnitude)


def largest_rstd(inputs: Inputs, epilogue: Spec) -> float:
    """The largest 1/deviation by which the gradients are multiplied; 1 without a norm."""
    variance = inputs.variance
    if epilogue.norm is None:
        return 1.0
    if variance is None:
        _, variance, count = reference.channel_statistics(inputs.z.double(), epilogue, inputs.mask)
        variance = variance[count > 0]
    return float((variance.double() + epilogue.eps).rsqrt().max()) if variance.numel() else 1.0
