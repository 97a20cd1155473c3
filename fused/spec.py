"""The one list of norms and activations, and the `Epilogue` that every layer below passes on.

Vocabulary, here and in every layer: z (rows, cols) is what the epilogue reads (x·weightᵀ, before
the linear bias), y is what it writes, and

    y = residual + dropout(activation(norm(z + bias)))

Norms whose statistics run along a row see z as (rows, cols); those whose statistics run over
samples or positions see it as three dimensions in memory order, (samples, channels, positions) or,
channels last, (samples, positions, channels).

A gated activation halves the features: z has 2N columns and y has N, those of a (the first half,
the value) times an activation of b (the second half, the gate). Its norm is over all 2N.

Adding an activation: one entry here, one pair in kernels/parts/activation.py, one struct in
csrc/activation.h, one line in reference.py. tests/test_architecture.py fails until all exist.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

from torch import nn


@dataclass(frozen=True)
class Activation:
    """One activation: its code in the operators, its torch module, and its parameters.

    `parameters` maps torch's argument names to their defaults, in the order in which the operators
    take them (`alpha` first, `beta` second; absent ones are passed as 0).
    """

    code: int
    module: type[nn.Module] | None
    parameters: tuple[tuple[str, float], ...] = ()


# relu_squared has no torch module; nn.GELU stands for both gelu and gelu_tanh (its `approximate`).
ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(1, nn.ReLU),
    "relu6": Activation(2, nn.ReLU6),
    "leaky_relu": Activation(3, nn.LeakyReLU, (("negative_slope", 0.01),)),
    "elu": Activation(4, nn.ELU, (("alpha", 1.0),)),
    "selu": Activation(5, nn.SELU),
    "gelu": Activation(6, nn.GELU),
    "gelu_tanh": Activation(7, nn.GELU),
    "silu": Activation(8, nn.SiLU),
    "mish": Activation(9, nn.Mish),
    "sigmoid": Activation(10, nn.Sigmoid),
    "tanh": Activation(11, nn.Tanh),
    "hardswish": Activation(12, nn.Hardswish),
    "hardsigmoid": Activation(13, nn.Hardsigmoid),
    "softplus": Activation(14, nn.Softplus, (("beta", 1.0), ("threshold", 20.0))),
    "relu_squared": Activation(15, None),
}
ACTIVATION_CODES: dict[str | None, int] = {None: 0} | {k: a.code for k, a in ACTIVATIONS.items()}


@dataclass(frozen=True)
class GatedActivation:
    """a · gate(b) of the two halves (a, b) of the features, as torch's nn.GLU takes them.

    `gate` is a name of `ACTIVATIONS`; `code` is this one's in the operators.
    """

    code: int
    gate: str


# Dauphin et al., "Language modeling with gated convolutional networks", 2017 (glu); Shazeer, "GLU
# variants improve transformer", 2020 (the others).
GATED_ACTIVATIONS: dict[str, GatedActivation] = {
    "glu": GatedActivation(16, "sigmoid"),
    "swiglu": GatedActivation(17, "silu"),
    "geglu": GatedActivation(18, "gelu"),
    "geglu_tanh": GatedActivation(19, "gelu_tanh"),
    "reglu": GatedActivation(20, "relu"),
}
GATED_CODES: dict[str, int] = {name: a.code for name, a in GATED_ACTIVATIONS.items()}
FIRST_GATED = min(GATED_CODES.values())
_CODES: dict[str | None, int] = dict(ACTIVATION_CODES)
_CODES.update((name, code) for name, code in GATED_CODES.items())
ACTIVATION_NAMES: dict[int, str | None] = {code: name for name, code in _CODES.items()}


def is_gated(activation: int) -> bool:
    """Whether an activation's code is that of a gated one."""
    return activation >= FIRST_GATED


# Norms whose statistics run along a row of the (rows, cols) view, then those whose statistics run
# over samples or positions.
ROW_NORMS = ("layer", "rms")
CHANNEL_NORMS = ("batch", "group", "instance")
NORM_CODES: dict[str | None, int] = {None: 0} | {
    name: code for code, name in enumerate((*ROW_NORMS, *CHANNEL_NORMS), start=1)
}
NORM_NAMES: dict[int, str | None] = {code: name for name, code in NORM_CODES.items()}
# How many statistics of a row are kept for backward.
STATISTICS: dict[str | None, int] = {None: 0, "layer": 2, "rms": 1}
# Which sums over the rows a backward operator makes: `wanted` is a sum of these.
WANT_NORM_WEIGHT, WANT_NORM_BIAS, WANT_BIAS = 1, 2, 4


def activations() -> list[str]:
    """The names of all activations, the gated ones last."""
    return [*ACTIVATIONS, *GATED_ACTIVATIONS]


def norms() -> list[str]:
    """The names of all norms."""
    return [*ROW_NORMS, *CHANNEL_NORMS]


PARAMETER_NAMES = frozenset(key for a in ACTIVATIONS.values() for key, _ in a.parameters)
# As torch's classes are spelled, LeakyReLU for one.
_SPELLINGS = {name.replace("_", ""): name for name in activations()}


def activation_name(given: str | None) -> str | None:
    """The name of an activation that is written in any case, with or without underscores.

    Raises:
        ValueError: unknown activation (the message lists the known ones).
    """
    if given is None or (isinstance(given, str) and given in _CODES):
        return given
    name = _SPELLINGS.get(given.lower().replace("_", "")) if isinstance(given, str) else None
    if name is None:
        raise ValueError(
            f"unknown activation {given!r}; known: {', '.join(activations())}, or None"
        )
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


# A dropout decision compares a 16-bit random number with this many thresholds.
DROPOUT_LEVELS = 1 << 16


def dropout_threshold(p: float) -> int:
    """The 16-bit threshold t of probability p: an element is kept when its number is ≥ t."""
    return round(p * DROPOUT_LEVELS)


def dropout_scale(threshold: int) -> float:
    """The exact inverse of the realised keep probability; 0 where everything is dropped."""
    return DROPOUT_LEVELS / (DROPOUT_LEVELS - threshold) if threshold < DROPOUT_LEVELS else 0.0


@dataclass(frozen=True)
class Epilogue:
    """What happens to z: norm, activation and dropout, with their scalars.

    `alpha` and `beta` are the activation's parameters in the order of `Activation.parameters`.
    `threshold` is dropout's (0: no dropout, 65536: everything is dropped).
    """

    norm: str | None = None
    eps: float = 0.0
    activation: str | None = None
    alpha: float = 0.0
    beta: float = 0.0
    threshold: int = 0

    @property
    def codes(self) -> tuple[int, float, int, float, float, int]:
        """The operators' scalar arguments, in their order."""
        return (
            NORM_CODES[self.norm],
            self.eps,
            _CODES[self.activation],
            self.alpha,
            self.beta,
            self.threshold,
        )


@dataclass(frozen=True)
class ChannelEpilogue(Epilogue):
    """The `Epilogue` of norms over samples or positions, and how channels lie in memory.

    `groups` is the number of statistics of a sample, that is of channels for batch and instance
    norm. `channels_last`: z is (samples, positions, channels), else (samples, channels, positions).
    `channel_dropout`: whole channels of a sample are dropped.
    """

    groups: int = 1
    channels_last: bool = False
    channel_dropout: bool = False

    @property
    def channel_codes(self) -> tuple[int, int, bool, float, int, float, float, int, bool]:
        """The channel operators' scalar arguments, in their order."""
        layout = self.codes[0], self.groups, self.channels_last
        return (*layout, *self.codes[1:], self.channel_dropout)


def is_nan(value: Real | float) -> bool:
    """math.isnan, which does not take the compiler's symbols."""
    return value != value  # noqa: PLR0124


def known_parameters(activation: str | None) -> tuple[tuple[str, float], ...]:
    """The parameters that an activation has, and their defaults; a gated one has none.

    Raises:
        ValueError: unknown activation (the message lists the known ones).
    """
    if activation is None or activation in GATED_ACTIVATIONS:
        return ()
    if activation in ACTIVATIONS:
        return ACTIVATIONS[activation].parameters
    raise ValueError(
        f"unknown activation {activation!r}; known: {', '.join(activations())}, or None"
    )


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


def make_epilogue(
    norm: str | None,
    eps: float,
    activation: str | None,
    p: float,
    parameters: tuple[tuple[str, float], ...] = (),
) -> Epilogue:
    """A checked `Epilogue`; p is the dropout probability (0 in evaluation).

    Raises:
        ValueError: unknown norm or activation, or p outside [0, 1].
        TypeError: a parameter that the activation does not have.
    """
    norm = norm_name(norm)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    alpha, beta = activation_parameters(activation, dict(parameters))
    return Epilogue(norm, float(eps), activation, alpha, beta, dropout_threshold(p))
