"""The doctor's self-test: one operation on one device in one dtype, against plain torch in float64.

Output and gradients are compared under the same seed, so the dropout mask is compared bit for bit.
The limit is that of the tests: twice the error of eager torch in the same dtype, plus a few units
in the last place.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.backend import choose, use_backend
from ..functional import add_norm, dropout_mask, gate, linear_norm_act, norm_act
from ..run import reference
from ..spec import (
    CHANNEL_NORMS,
    GATED_ACTIVATIONS,
    ROW_NORMS,
    Spec,
    default_eps,
    dropout_scale,
    dropout_threshold,
    make_spec,
)

GATE, ADD_NORM = "linear_norm_gate", "add_norm"
SHORTCUT, TWO = "shortcut", "gate"
MODES = ("training", "inference")
# The activation that each norm is tested with.
ACTIVATION_OF: dict[str | None, str] = {
    "layer": "gelu",
    "rms": "silu",
    None: "relu",
    "batch": "relu",
    "group": "silu",
    "instance": "tanh",
}
# Behind a norm over samples or positions a gate is the same operation as without a norm.
GATE_OF: dict[str | None, str] = {"layer": "geglu", "rms": "swiglu", None: "glu"}
# Each operation with the norms that it is tested with.
OPERATIONS: dict[str, tuple[str | None, ...]] = {
    "linear_norm_act": tuple(ACTIVATION_OF),
    "norm_act": tuple(ACTIVATION_OF),
    GATE: tuple(GATE_OF),
    ADD_NORM: ROW_NORMS,
    SHORTCUT: ROW_NORMS + CHANNEL_NORMS,
    TWO: (None,),
}
# No multiple of a vector, of eight mask elements or of a tile.
ROWS, FEATURES_IN, FEATURES = 37, 24, 101
# For norms over samples or positions. linear_norm_act has its channels last, norm_act in dimension
# 1, so that both layouts are tested.
SAMPLES, POSITIONS, GROUPS = 3, 17, 6
P, SEED = 0.25, 20240607
EAGER_FACTOR = 2
# In units in the last place of the largest element. In float64 the oracle is eager itself, so that
# eager's own rounding is not seen.
ULPS = {torch.float32: 4, torch.bfloat16: 4, torch.float16: 4, torch.float64: 64}


def _inputs(operation: str, norm: str | None, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int, mean: float = 0.0, deviation: float = 1.0) -> Tensor:
        t = torch.randn(shape, generator=generator, dtype=torch.float64) * deviation + mean
        return t.to(dtype).to(device)

    rows: tuple[int, ...] = (SAMPLES, POSITIONS) if norm in CHANNEL_NORMS else (ROWS,)
    features = FEATURES + 1 if norm == "group" else FEATURES  # which must be a multiple of GROUPS
    out = features
    if operation == GATE:
        features *= 2
    pair = {ADD_NORM: ("x", "residual"), TWO: ("value", "gate")}.get(operation)
    if pair is not None:
        inputs = {name: make(*rows, features) for name in pair}
    elif operation not in ("norm_act", SHORTCUT):
        inputs = {
            "x": make(*rows, FEATURES_IN),
            "weight": make(features, FEATURES_IN, deviation=FEATURES_IN**-0.5),
            "bias": make(features, deviation=0.1),
            "residual": make(*rows, out),
        }
    else:
        shape = (SAMPLES, features, POSITIONS) if norm in CHANNEL_NORMS else (*rows, features)
        names = ("z", "residual", "shortcut")[: 3 if operation == SHORTCUT else 2]
        inputs = {name: make(*shape) for name in names}
    if norm is not None:
        inputs["norm_weight"] = make(features, mean=1.0, deviation=0.1)
        inputs["norm_bias"] = make(features, deviation=0.1)
    return inputs


def _outcome(run: Callable[..., Tensor], inputs: dict[str, Tensor], mode: str) -> dict[str, Tensor]:
    """The output and, in training, the gradient of every input."""
    if mode == "inference":
        with torch.no_grad():
            return {"output": run(**inputs)}
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    y = run(**leaves)
    dy = torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=y.device).view_as(y)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {"output": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def _add_norm(activation: None, **given: Any) -> Tensor:
    """Both results of add & norm, side by side."""
    return torch.cat(add_norm(**given), -1)


def _gate(norm: None, eps: float, activation: str, **given: Any) -> Tensor:
    """The gate of two tensors, by the name that it has as halves of one."""
    return gate(activation=str(GATED_ACTIVATIONS[activation].gate), **given)


def _plain(spec: Spec, operation: str, **inputs: Tensor) -> Tensor:
    """The same operation in plain torch, in the dtype of its inputs."""
    seed = torch.tensor([SEED], device=next(iter(inputs.values())).device)
    if operation == TWO:
        return reference.gate(**inputs, spec=spec, seed=seed)
    if operation == ADD_NORM:
        add, norm = Spec(threshold=spec.threshold), spec._replace(threshold=0)
        h = reference.row(inputs["x"], add, residual=inputs["residual"], seed=seed)
        affine = inputs["norm_weight"], inputs["norm_bias"]
        return torch.cat([reference.row(h, norm, None, *affine), h], -1)
    z = inputs["z"] if "z" in inputs else F.linear(*(inputs[k] for k in ("x", "weight", "bias")))
    rest = {k: t for k, t in inputs.items() if k not in ("z", "x", "weight", "bias")}
    if spec.norm not in CHANNEL_NORMS:
        return reference.row(z, spec, seed=seed, **rest)
    last = "x" in inputs
    channels = z.shape[2 if last else 1]
    over = spec._replace(
        groups=GROUPS if spec.norm == "group" else channels,
        channels_last=last,
    )
    return reference.channel(z, over, seed=seed, **rest)


def _check_mask(dtype: torch.dtype, device: str) -> None:
    """Dropout alone on ones must give the scale where the mask keeps, and zero elsewhere."""
    ones = torch.ones(ROWS, FEATURES, dtype=dtype, device=device)
    y = norm_act(ones, p=P, seed=SEED)
    keep = dropout_mask(ROWS, FEATURES, P, torch.tensor([SEED], device=device))
    scale = torch.full_like(ones, dropout_scale(dropout_threshold(P)))
    if not torch.equal(y, torch.where(keep, scale, torch.zeros_like(ones))):
        raise ValueError("the dropout mask is not the one of fused.functional.dropout_mask")


def self_test(
    operation: str, norm: str | None, mode: str, dtype: torch.dtype, device: str
) -> float:
    """Runs one operation and compares it with the reference in float64.

    Returns:
        The largest error of the output and of all gradients, as a fraction of its limit.

    Raises:
        ValueError: one of them is beyond its limit, or the dropout mask is wrong.
    """
    inputs = _inputs(operation, norm, dtype, device)
    training = mode == "training"
    activation: str | None = (GATE_OF if operation in (GATE, TWO) else ACTIVATION_OF)[norm]
    if operation == ADD_NORM:
        activation = None
    eps = default_eps(norm, None, dtype)
    calls: dict[str, Callable[..., Tensor]] = {ADD_NORM: _add_norm, TWO: _gate}
    call = calls.get(operation, linear_norm_act if "x" in inputs else norm_act)
    options: dict[str, Any] = {
        "norm": norm,
        "eps": eps,
        "activation": activation,
        "p": P,
        "training": training,
    }
    if norm == "group":
        options["num_groups"] = GROUPS
    # By its name: otherwise torch's own operators would serve such small inputs (by_torch.py).
    with use_backend(choose(device, dtype)):
        got = _outcome(partial(call, seed=SEED, **options), inputs, mode)
    spec = make_spec(norm, eps, activation, P if training else 0.0)
    plain = partial(_plain, spec, operation)
    eager = _outcome(plain, inputs, mode)
    want = _outcome(plain, {name: t.double() for name, t in inputs.items()}, mode)
    if training:
        _check_mask(dtype, device)
    worst = 0.0
    for name, right in want.items():
        largest = float(right.abs().max())
        if name == "bias" and norm in CHANNEL_NORMS:  # its terms cancel; theirs are of this size
            largest = max(largest, float(want["norm_bias"].abs().max()))
        allowed = EAGER_FACTOR * float((eager[name].double() - right).abs().max())
        allowed += ULPS[dtype] * torch.finfo(dtype).eps * largest
        error = float((got[name].double() - right).abs().max())
        if not error <= allowed:  # NaN is beyond it too
            what = "the output" if name == "output" else f"the gradient of {name}"
            raise ValueError(f"{what} is wrong by {error:.2g} where {allowed:.2g} is allowed")
        worst = max(worst, error / allowed)
    return worst
