"""The cases of tests/channel_cases.py, run by the launchers of fused.kernels.channel.

They are called as the dispatcher calls them for CUDA tensors: the functions that ops.py registers,
with the operators' own lists of arguments.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from channel_cases import Inputs, largest_rstd, seed_of, wanted_of
from tolerances import assert_close
from torch import Tensor

from fused import spec
from fused.backends import launchers
from fused.run import reference
from fused.spec import Spec, dropout_scale

NAMES = ("dz", "dnorm_weight", "dnorm_bias", "dbias", "dshortcut")


# In place of the operators, which find the C++ kernels for CPU tensors.
LAUNCHERS = SimpleNamespace(
    **launchers.TRITON,
    WANT_NORM_WEIGHT=spec.WANT_NORM_WEIGHT,
    WANT_NORM_BIAS=spec.WANT_NORM_BIAS,
    WANT_BIAS=spec.WANT_BIAS,
)


def run_with_shortcut(x: Inputs, spec: Spec, shortcut: Tensor) -> dict[str, Tensor]:
    """Forward and backward of act(norm(z) + shortcut) by the launchers, without what is empty."""
    seed, constant = seed_of(x, spec), x.mean is not None
    mean, variance, count = x.mean, x.variance, None
    given = (x.residual, x.mask, seed, *spec.channel, shortcut)
    if constant or spec.norm is None:
        apply = launchers.TRITON["channel_apply"]
        y = apply(x.z, mean, variance, *x.parameters, *given)
    else:
        forward = launchers.TRITON["channel_forward"]
        y, mean, variance, count = forward(x.z, *x.parameters, *given)
    count = None if x.mask is None else count
    given = (x.mask, seed, wanted_of(x, spec), constant, *spec.channel, shortcut)
    backward = launchers.TRITON["channel_backward"]
    gradients = backward(x.dy, x.z, mean, variance, count, *x.parameters, *given)
    found = dict(zip(NAMES, gradients, strict=True))
    return {"y": y} | {name: t for name, t in found.items() if t.shape != (0,)}


def parts_with_shortcut(x: Inputs, spec: Spec, shortcut: Tensor) -> dict[str, Tensor]:
    """The same of batch norm by the operators between which processes exchange statistics."""
    seed, call = seed_of(x, spec), launchers.TRITON
    mean, variance, count = call["channel_statistics"](x.z, x.mask, *spec.channel[:3])
    given = (mean, variance, *x.parameters)
    rest = (x.mask, seed, *spec.channel, shortcut)
    y = call["channel_apply"](x.z, *given, x.residual, *rest)
    sums, dshortcut = call["channel_sums"](x.dy, x.z, *given, *rest)
    if x.mask is None:
        count = mean.new_full((1,), x.z.numel() // spec.groups)
    plain = spec._replace(activation=None, threshold=0).channel
    rest = (sums, count, *x.parameters, x.mask, None, *plain)
    dz = call["channel_gradient"](dshortcut, x.z, mean, variance, *rest)
    return {"y": y, "dz": dz, "dshortcut": dshortcut}


def reference_with_shortcut(
    x: Inputs, spec: Spec, shortcut: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The same by the reference, in two steps and in another dtype."""

    def leaf(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        t = t.to(dtype)
        # Autograd multiplies what padding holds by zero; the operators do not look at it.
        t = t if x.mask is None or t.dim() < 3 else t.masked_fill(~x.mask[:, :, None], 0.0)
        return t.detach().requires_grad_()

    z, s, weight, bias = map(leaf, (x.z, shortcut, *x.parameters))
    constants = [None if t is None else t.to(dtype) for t in (x.mean, x.variance)]
    norm = spec._replace(activation=None, threshold=0)
    h = reference.channel(z, norm, *constants, weight, bias, None, x.mask)
    rest = {"residual": leaf(x.residual), "mask": x.mask, "seed": seed_of(x, spec)}
    y = reference.channel(h + s, spec.without_norm, **rest)
    y.backward(leaf(x.dy))
    of = zip(NAMES[:3], (z, weight, bias), strict=True)
    found = {"y": y.detach()} | {name: t.grad for name, t in of if t is not None}
    if spec.norm is not None:
        found["dshortcut"] = s.grad
    if spec.norm != "group":
        found["dbias"] = z.grad.double().sum((0, 1) if spec.channels_last else (0, 2))
    return found


def check_with_shortcut(x: Inputs, spec: Spec, shortcut: Tensor, what: str) -> dict[str, Tensor]:
    """Holds every result to the rule of tolerances.py, and returns them."""
    dtype = x.z.dtype
    found = run_with_shortcut(x, spec, shortcut)
    oracle, eager = (reference_with_shortcut(x, spec, shortcut, t) for t in (torch.float64, dtype))
    assert found.keys() == oracle.keys()
    terms = float(x.dy.nan_to_num().abs().max()) * max(1, dropout_scale(spec.threshold))
    for name, result in found.items():
        magnitude = 0.0 if name == "y" else terms
        if name in ("dz", "dbias"):
            magnitude *= max(1, largest_rstd(x, spec))
        if name not in ("dz", "dshortcut"):
            # A sum over samples and positions.
            magnitude *= math.sqrt(x.z.numel() / x.z.shape[2 if spec.channels_last else 1])
        assert result.dtype == dtype, name
        assert_close(f"{what} {name}", result, oracle[name], eager[name], dtype, magnitude)
    return found
