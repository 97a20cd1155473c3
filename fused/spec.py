"""The one list of norms and activations, and the `Spec` that every layer below passes on.

Vocabulary, here and in every layer: z (rows, cols) is what the chain reads (x·weightᵀ, before the
linear bias), y is what it writes, and

    y = residual + dropout(activation(norm(z + bias) + shortcut))

Norms whose statistics run along a row see z as (rows, cols); those whose statistics run over
samples or positions see it as three dimensions in memory order, (samples, channels, positions) or,
channels last, (samples, positions, channels).

A gated activation halves the features: z has 2N columns and y has N, those of a (the first half,
the value) times an activation of b (the second half, the gate). Its norm is over all 2N.

Adding an activation: one entry here, one pair in kernels/parts/activation.py, one struct in
csrc/activation.h. tests/test_architecture.py fails until all exist.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from numbers import Real
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Parameters = tuple[tuple[str, float], ...]


def _relu_squared(h: Tensor) -> Tensor:
    return F.relu(h).square()


def _hardsigmoid(h: Tensor) -> Tensor:
    # F.hardsigmoid has 1/6 in float32 even in its float64 gradient.
    return F.relu6(h + 3) / 6


class Activation(NamedTuple):
    """One activation: its code in the operators, its torch function and module, its parameters.

    `function` takes the tensor and then the parameters, in the order of `parameters`, which maps
    torch's argument names to their defaults. The operators take them as `alpha` (the first) and
    `beta` (the second); absent ones are passed as 0. `gate` names the activation of the second half
    of a gated one, which halves the last dimension.
    """

    code: int
    function: Callable[..., Tensor]
    module: type[nn.Module] | None
    parameters: Parameters = ()
    gate: str | None = None


# relu_squared has no torch module; nn.GELU stands for both gelu and gelu_tanh (its `approximate`).
ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(1, F.relu, nn.ReLU),
    "relu6": Activation(2, F.relu6, nn.ReLU6),
    "leaky_relu": Activation(3, F.leaky_relu, nn.LeakyReLU, (("negative_slope", 0.01),)),
    "elu": Activation(4, F.elu, nn.ELU, (("alpha", 1.0),)),
    "selu": Activation(5, F.selu, nn.SELU),
    "gelu": Activation(6, F.gelu, nn.GELU),
    "gelu_tanh": Activation(7, partial(F.gelu, approximate="tanh"), nn.GELU),
    "silu": Activation(8, F.silu, nn.SiLU),
    "mish": Activation(9, F.mish, nn.Mish),
    "sigmoid": Activation(10, torch.sigmoid, nn.Sigmoid),
    "tanh": Activation(11, torch.tanh, nn.Tanh),
    "hardswish": Activation(12, F.hardswish, nn.Hardswish),
    "hardsigmoid": Activation(13, _hardsigmoid, nn.Hardsigmoid),
    "softplus": Activation(14, F.softplus, nn.Softplus, (("beta", 1.0), ("threshold", 20.0))),
    "relu_squared": Activation(15, _relu_squared, None),
}


def _gated_by(gate: str) -> Callable[[Tensor], Tensor]:
    def function(h: Tensor) -> Tensor:
        value, half = h.chunk(2, -1)
        return value * ACTIVATIONS[gate].function(half)

    return function


# a · gate(b) of the two halves (a, b) of the features, as nn.GLU takes them. Dauphin et al.,
# "Language modeling with gated convolutional networks", 2017 (glu);
# Shazeer, "GLU variants improve transformer", 2020 (the others).
GATED_ACTIVATIONS: dict[str, Activation] = {
    "glu": Activation(16, F.glu, nn.GLU, gate="sigmoid"),
    "swiglu": Activation(17, _gated_by("silu"), None, gate="silu"),
    "geglu": Activation(18, _gated_by("gelu"), None, gate="gelu"),
    "geglu_tanh": Activation(19, _gated_by("gelu_tanh"), None, gate="gelu_tanh"),
    "reglu": Activation(20, _gated_by("relu"), None, gate="relu"),
}
GATES: dict[str | None, str] = {a.gate: name for name, a in GATED_ACTIVATIONS.items()}
_ALL: dict[str, Activation] = ACTIVATIONS | GATED_ACTIVATIONS
ACTIVATION_CODES: dict[str | None, int] = {None: 0} | {k: a.code for k, a in ACTIVATIONS.items()}
GATED_CODES: dict[str, int] = {name: a.code for name, a in GATED_ACTIVATIONS.items()}
FIRST_GATED = min(GATED_CODES.values())
_CODES: dict[str | None, int] = {None: 0} | {name: a.code for name, a in _ALL.items()}
ACTIVATION_NAMES: dict[int, str | None] = {code: name for name, code in _CODES.items()}


def is_gated(activation: int) -> bool:
    """Whether an activation's code is that of a gated one."""
    return activation >= FIRST_GATED


# Norms whose statistics run along a row of the (rows, cols) view, then those whose statistics run
# over samples or positions; and torch's modules of each. Their codes in the operators are 1, 2, ...
NORMS: dict[str, tuple[type[nn.Module], ...]] = {
    "layer": (nn.LayerNorm,),
    "rms": (nn.RMSNorm,),
    "batch": (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    "group": (nn.GroupNorm,),
    "instance": (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
}
ROW_NORMS, CHANNEL_NORMS = ("layer", "rms"), ("batch", "group", "instance")
NORM_CODES: dict[str | None, int] = {None: 0} | {name: i for i, name in enumerate(NORMS, start=1)}
NORM_NAMES: dict[int, str | None] = {code: name for name, code in NORM_CODES.items()}
STATISTICS: dict[str | None, int] = {None: 0, "layer": 2, "rms": 1}  # of a row, for backward
# Which sums over the rows a backward operator makes: `wanted` is a sum of these.
WANT_NORM_WEIGHT, WANT_NORM_BIAS, WANT_BIAS = 1, 2, 4


def activations() -> list[str]:
    """The names of all activations, the gated ones last."""
    return [*_ALL]


def norms() -> list[str]:
    """The names of all norms."""
    return [*NORMS]


PARAMETER_NAMES = frozenset(key for a in ACTIVATIONS.values() for key, _ in a.parameters)
_SPELLINGS = {name.replace("_", ""): name for name in activations()}  # torch's: LeakyReLU


def activation_name(given: str | None) -> str | None:
    """The name of an activation that is written in any case, with or without underscores.

    Raises:
        ValueError: unknown activation (the message lists the known ones).
    """
    if given is None or (isinstance(given, str) and given in _ALL):
        return given
    name = _SPELLINGS.get(given.lower().replace("_", "")) if isinstance(given, str) else None
    if name is None:
        raise ValueError(f"unknown activation {given!r}; known: {', '.join(_ALL)}, or None")
    return name


def norm_name(given: str | None) -> str | None:
    """The name of a norm that is written in any case.

    Raises:
        ValueError: unknown norm (the message lists the known ones).
    """
    name = given.lower() if isinstance(given, str) else given
    if name is not None and name not in norms():
        raise ValueError(f"unknown norm {given!r}; known: {', '.join(map(repr, norms()))}, or None")
    return name


DROPOUT_LEVELS = 1 << 16  # thresholds that a 16-bit random number is compared with


def dropout_threshold(p: float) -> int:
    """The 16-bit threshold t of probability p: an element is kept when its number is ≥ t."""
    return round(p * DROPOUT_LEVELS)


def dropout_scale(threshold: int) -> float:
    """The exact inverse of the realised keep probability; 0 where everything is dropped."""
    return DROPOUT_LEVELS / (DROPOUT_LEVELS - threshold) if threshold < DROPOUT_LEVELS else 0.0


class Spec(NamedTuple):
    """What a chain does to z: norm, activation and dropout, by name, with their scalars.

    Attributes:
        norm: a name of `NORMS`, or None.
        eps: added to the variance.
        activation: a name of `ACTIVATIONS` or `GATED_ACTIVATIONS`, or None.
        alpha, beta: the activation's parameters, in the order of `Activation.parameters`.
        threshold: dropout's (0: no dropout, 65536: everything is dropped).
        channel_dropout: whole channels of a sample are dropped.
        groups: the statistics of a sample; for batch and instance norm as many as channels.
        channels_last: z is (samples, positions, channels), else (samples, channels, positions).
    """

    norm: str | None = None
    eps: float = 0.0
    activation: str | None = None
    alpha: float = 0.0
    beta: float = 0.0
    threshold: int = 0
    channel_dropout: bool = False
    groups: int = 1
    channels_last: bool = False

    @property
    def gated(self) -> bool:
        """Whether the activation halves the features."""
        return self.activation in GATED_ACTIVATIONS

    @property
    def without_norm(self) -> Spec:
        """What follows the norm."""
        return self._replace(norm=None, eps=0.0)

    @property
    def norm_alone(self) -> Spec:
        """What is in front of a shortcut."""
        return Spec(self.norm, self.eps, groups=self.groups, channels_last=self.channels_last)

    @property
    def row(self) -> tuple[int, float, int, float, float, int]:
        """The row operators' scalar arguments, in their order."""
        codes = NORM_CODES[self.norm], self.eps, _CODES[self.activation]
        return *codes, self.alpha, self.beta, self.threshold

    @property
    def channel(self) -> tuple[int, int, bool, float, int, float, float, int, bool]:
        """The channel operators' scalar arguments, in their order."""
        layout = NORM_CODES[self.norm], self.groups, self.channels_last
        rest = self.eps, _CODES[self.activation], self.alpha, self.beta, self.threshold
        return *layout, *rest, self.channel_dropout


def is_nan(value: Real | float) -> bool:
    """math.isnan, which does not take the compiler's symbols."""
    return value != value  # noqa: PLR0124


def known_parameters(activation: str | None) -> Parameters:
    """The parameters that an activation has, and their defaults; raises as `activation_name`."""
    name = activation_name(activation)
    return () if name is None else _ALL[name].parameters


def activation_parameters(activation: str | None, given: dict[str, float]) -> tuple[float, float]:
    """The two operator parameters of an activation, from torch's argument names.

    Raises:
        ValueError: unknown activation.
        TypeError: a parameter that this activation does not have, or that is not a number.
    """
    known = known_parameters(activation)
    for name, value in given.items():
        if name not in dict(known):
            takes = ", ".join(k for k, _ in known) or "no parameters"
            raise TypeError(f"activation {activation!r} takes {takes}; got {name!r}")
        if not isinstance(value, Real) or is_nan(value):
            raise TypeError(f"activation {activation!r}: {name} must be a number, got {value!r}")
    values = [float(given.get(name, default)) for name, default in known] + [0.0, 0.0]
    return values[0], values[1]


def default_eps(norm: str | None, eps: float | None, dtype: torch.dtype) -> float:
    """torch's default: 1e-5 for layer; for rms the epsilon of the dtype that it computes in."""
    if eps is not None:
        return eps
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    return float(torch.finfo(compute).eps) if norm == "rms" else 1e-5


def make_spec(
    norm: str | None = None,
    eps: float = 0.0,
    activation: str | None = None,
    p: float = 0.0,
    parameters: Parameters = (),
) -> Spec:
    """A checked `Spec`; p is the dropout probability (0 in evaluation).

    Raises:
        ValueError: unknown norm or activation, or p outside [0, 1].
        TypeError: a parameter that the activation does not have.
    """
    # The compiler warns of caches, and a symbol belongs to one graph.
    symbolic = isinstance(eps, torch.SymFloat) or isinstance(p, torch.SymFloat)
    if symbolic or torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting():
        return _make_spec(norm, eps, activation, p, parameters)
    return _cached_spec(norm, eps, activation, p, parameters)


def _make_spec(
    norm: str | None, eps: float, activation: str | None, p: float, parameters: Parameters
) -> Spec:
    norm, activation = norm_name(norm), activation_name(activation)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    alpha, beta = activation_parameters(activation, dict(parameters))
    return Spec(norm, float(eps), activation, alpha, beta, dropout_threshold(p))


_cached_spec = lru_cache(maxsize=4096)(_make_spec)
