"""Which children of a Sequential form a chain, and whether the chain may run as one operation.

A chain is a maximal run of Linear, norm, activation, dropout in that order, at least two of them.
Its structure is found once per list of children; the guard runs at every call, because anything
may have been done to a child in between: hooks, a replaced forward, another class, a parametrised
or pruned or quantised weight. A chain that the guard stops runs its children one by one, exactly as
nn.Sequential would, and remembers why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

from . import backend
from .autograd import Codes
from .backend import choose
from .dispatch import (
    apply_linear_row,
    apply_row,
    autocast_dtype,
    default_eps,
    is_tracing,
    linear_chain,
    make_codes,
    transformed,
)
from .dispatch import chain as run_chain
from .random import draw_seed
from .spec import ACTIVATIONS

LINEAR, NORM, ACTIVATION, DROPOUT = range(4)
_MINIMUM = 2
_autocast_enabled = torch._C._is_any_autocast_enabled


def _gelu_name(child: nn.GELU) -> str:
    return "gelu_tanh" if child.approximate == "tanh" else "gelu"


class ReLUSquared(nn.Module):
    """relu(x)² (So et al., "Primer", 2021), as a module; torch has none.

    Shape: any to the same.
    """

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x).square()


# The torch module of each activation → its name; GELU decides by its `approximate`.
_ACTIVATION_OF: dict[type, str | Callable[[Any], str]] = {
    **{a.module: name for name, a in ACTIVATIONS.items() if a.module is not None},
    nn.GELU: _gelu_name,
    ReLUSquared: "relu_squared",
}

_KIND_OF: dict[type, int] = {
    nn.Linear: LINEAR,
    nn.LayerNorm: NORM,
    nn.RMSNorm: NORM,
    nn.Dropout: DROPOUT,
} | dict.fromkeys(_ACTIVATION_OF, ACTIVATION)
_NORM_OF: dict[type, str] = {nn.LayerNorm: "layer", nn.RMSNorm: "rms"}
_PLAIN_TENSORS = (nn.Parameter, Tensor)
_NO_PARAMETERS: tuple[tuple[str, float], ...] = ()


def activation_of(child: nn.Module) -> tuple[str, tuple[tuple[str, float], ...]]:
    """The name and parameters of an activation module."""
    found = _ACTIVATION_OF[type(child)]
    name = found if isinstance(found, str) else found(child)
    known = ACTIVATIONS[name].parameters
    if not known:
        return name, _NO_PARAMETERS
    return name, tuple((key, float(getattr(child, key))) for key, _ in known)


def module_reason(child: nn.Module, expected: type) -> str:
    """Why this child must run by itself; empty when nothing was done to it."""
    own = child.__dict__
    if type(child) is not expected:
        return f"its class is now {type(child).__name__}"
    if own["_forward_hooks"] or own["_forward_pre_hooks"]:
        return "it has forward hooks"
    if own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return "it has backward hooks"
    if "forward" in own:
        return "its forward was replaced"
    return ""


def tensor_reason(child: nn.Module, name: str, x: Tensor, optional: bool = True) -> str:
    """Why a parameter of the child cannot be read by a kernel; empty when it can."""
    parameters = child.__dict__["_parameters"]
    if name not in parameters:
        return f"its {name} is not a plain parameter"
    t = parameters[name]
    if t is None:
        return "" if optional else f"it has no {name}"
    if type(t) not in _PLAIN_TENSORS:
        return f"its {name} is a {type(t).__name__}"
    if t.device != x.device:
        return f"its {name} is on {t.device}, the input on {x.device}"
    return ""


def global_hooks() -> bool:
    """Whether hooks that apply to every module are set."""
    return bool(
        _module._global_forward_hooks
        or _module._global_forward_pre_hooks
        or _module._global_backward_hooks
        or _module._global_backward_pre_hooks
    )


@dataclass
class Chain:
    """A run of children that can be one operation.

    `fused_calls` and `unfused_calls` count eager calls; `reason` says why the last unfused one was.
    """

    names: list[str]
    children: list[nn.Module]
    linear: nn.Linear | None = None
    norm: nn.LayerNorm | nn.RMSNorm | None = None
    activation: nn.Module | None = None
    dropout: nn.Dropout | None = None
    types: list[tuple[nn.Module, type]] = field(default_factory=list)
    # What the last input that passed the guard looked like, and the tensors that it met.
    passed: tuple[Any, ...] | None = None
    tensors: list[tuple[dict[str, Any], str, Tensor | None, int]] = field(default_factory=list)
    norm_name: str | None = None
    alone: nn.Module | None = None
    fixed_activation: tuple[str | None, tuple[tuple[str, float], ...]] = (None, _NO_PARAMETERS)
    fused_calls: int = 0
    unfused_calls: int = 0
    reason: str = ""

    def __post_init__(self) -> None:
        for child in self.children:
            kind = _KIND_OF[type(child)]
            setattr(self, ("linear", "norm", "activation", "dropout")[kind], child)
        self.types = [(child, type(child)) for child in self.children]
        if self.norm is not None:
            self.norm_name = _NORM_OF[type(self.norm)]
        # Activation and dropout that does not drop: one torch operator, which nothing can shorten.
        if self.linear is None and self.norm is None:
            self.alone = self.activation
        # Most activations have nothing to read at each call.
        if self.activation is not None and type(self.activation) is not nn.GELU:
            name, parameters = activation_of(self.activation)
            if not parameters:
                self.fixed_activation = (name, parameters)

    def describe(self) -> str:
        """The chain in names: linear → layer → gelu → dropout."""
        parts = []
        for child in self.children:
            kind = _KIND_OF.get(type(child))
            if kind == NORM:
                parts.append(_NORM_OF[type(child)])
            elif kind == ACTIVATION:
                parts.append(activation_of(child)[0])
            else:
                parts.append(type(child).__name__.lower())
        return " → ".join(parts)

    def static_reason(self) -> str:
        """What stops the chain whatever the input is; empty when nothing does."""
        if global_hooks():
            return "global module hooks are set"
        for name, (child, expected) in zip(self.names, self.types, strict=True):
            reason = module_reason(child, expected)
            if reason:
                return f"child {name!r}: {reason}"
        first = self.children[0]
        if first is self.activation and getattr(first, "inplace", False):
            return f"child {self.names[0]!r}: it works in place on the chain's input"
        return ""

    def input_reason(self, x: Any) -> str:
        """What stops the chain for this input; empty when nothing does."""
        if type(x) not in _PLAIN_TENSORS:
            return f"the input is a {type(x).__name__}"
        if not x.is_floating_point():
            return f"the input is {x.dtype}"
        if x.dim() < 1:
            return "the input has no dimension"
        linear, norm = self.linear, self.norm
        dtype, features = x.dtype, tuple(x.shape)
        if linear is not None:
            reason = tensor_reason(linear, "weight", x, False) or tensor_reason(linear, "bias", x)
            if reason:
                return f"Linear: {reason}"
            weight, bias = linear.weight, linear.bias
            if x.shape[-1] != weight.shape[1]:
                return f"Linear takes {weight.shape[1]} features, the input has {x.shape[-1]}"
            cast = autocast_dtype(x.device.type)
            if cast is not None:
                dtype = cast
            elif weight.dtype != dtype or (bias is not None and bias.dtype != dtype):
                return f"Linear has {weight.dtype}, the input {dtype}"
            if bias is not None and not bias.is_contiguous():
                return "Linear: its bias is not contiguous"
            features = (*features[:-1], weight.shape[0])
        if norm is not None:
            shape = norm.normalized_shape
            if features[len(features) - len(shape) :] != shape:
                return f"the norm takes {shape}, its input is {features}"
            for name in ("weight", "bias"):
                if name == "bias" and type(norm) is nn.RMSNorm:
                    continue
                reason = tensor_reason(norm, name, x)
                if reason:
                    return f"{type(norm).__name__}: {reason}"
                t = getattr(norm, name)
                if t is not None and t.dtype not in (dtype, torch.float32):
                    return f"{type(norm).__name__} has {t.dtype}, its input {dtype}"
                if t is not None and not t.is_contiguous():
                    return f"{type(norm).__name__}: its {name} is not contiguous"
        if choose(x.device.type, dtype) == "reference":
            return f"no kernel serves {x.device.type} {dtype}"
        return ""

    def _signature(self, x: Tensor) -> tuple[Any, ...]:
        return x.dtype, x.device, x.shape[-1], backend.generation

    def _remember(self, x: Tensor) -> None:
        """Notes an input that passed, so that its like needs only the short guard."""
        self.tensors = []
        for child in (self.linear, self.norm):
            if child is not None:
                for name, t in child._parameters.items():
                    pointer = 0 if t is None else t.data_ptr()
                    self.tensors.append((child._parameters, name, t, pointer))
        single_row = self.norm is None or len(self.norm.normalized_shape) == 1
        self.passed = self._signature(x) if single_row else None

    def _passes_again(self, x: Any) -> bool:
        """Whether the children are untouched and input and parameters look as they did.

        A parameter that is the same object with the same memory has kept its dtype, device and
        shape; nn.Module.to changes the memory of the same object.
        """
        if global_hooks() or type(x) not in _PLAIN_TENSORS or _autocast_enabled():
            return False
        for child, expected in self.types:
            own = child.__dict__
            if (
                type(child) is not expected
                or own["_forward_hooks"]
                or own["_forward_pre_hooks"]
                or own["_backward_hooks"]
                or own["_backward_pre_hooks"]
                or "forward" in own
            ):
                return False
        if x.dim() == 0 or self._signature(x) != self.passed:
            return False
        for parameters, name, t, pointer in self.tensors:
            if parameters.get(name, self) is not t or (t is not None and t.data_ptr() != pointer):
                return False
        return True

    def __call__(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or transformed() or is_tracing():
            if self.static_reason() or self.input_reason(x):
                return self._one_by_one(x)
            return self.run(x)
        if self.passed is not None and self._passes_again(x):
            self.fused_calls += 1
            return self._run_rows(x) if x.dim() == 2 else self.run(x)
        reason = self.static_reason() or self.input_reason(x)
        if reason:
            self.unfused_calls += 1
            self.reason = reason
            return self._one_by_one(x)
        self.fused_calls += 1
        self._remember(x)
        return self.run(x)

    def _one_by_one(self, x: Tensor) -> Tensor:
        for child in self.children:
            x = child(x)
        return x

    def _codes(self, dtype: torch.dtype) -> Codes:
        """The operators' scalars as the children are now; dtype is that of the norm's input."""
        norm, dropout = self.norm, self.dropout
        eps = 0.0
        if norm is not None:
            eps = norm.eps if norm.eps is not None else default_eps(self.norm_name, None, dtype)
        activation, parameters = self.fixed_activation
        if activation is None and self.activation is not None:
            activation, parameters = activation_of(self.activation)
        p = dropout.p if dropout is not None and dropout.training else 0.0
        return make_codes(self.norm_name, eps, activation, p, parameters)

    def _norm_parameters(self) -> tuple[Tensor | None, Tensor | None]:
        if self.norm is None:
            return None, None
        parameters = self.norm._parameters
        return parameters["weight"], parameters.get("bias")

    def _run_rows(self, x: Tensor) -> Tensor:
        """`run` on (rows, features), where the short guard has passed."""
        codes = self._codes(x.dtype)
        if self.alone is not None and not codes[5]:
            return self.alone(x)
        seed = draw_seed(x.device) if codes[5] else None
        norm_weight, norm_bias = self._norm_parameters()
        if self.linear is None:
            return apply_row(x, None, norm_weight, norm_bias, None, seed, codes)
        parameters = self.linear._parameters
        weight, bias = parameters["weight"], parameters["bias"]
        assert weight is not None
        return apply_linear_row(x, weight, bias, norm_weight, norm_bias, None, seed, codes)

    def run(self, x: Tensor, residual: Tensor | None = None, seed: Tensor | None = None) -> Tensor:
        """The chain as one operation, on an input that the guard has passed."""
        norm_weight, norm_bias = self._norm_parameters()
        dims = 1 if self.norm is None else len(self.norm.normalized_shape)
        if self.linear is None:
            codes = self._codes(x.dtype)
            if self.alone is not None and not codes[5] and residual is None:
                return self.alone(x)
            if x.is_cuda and self.norm_name and torch.is_autocast_enabled("cuda"):
                x = x.float()  # as eager's norm does
            return run_chain(x, dims, norm_weight, norm_bias, residual, seed, codes)
        codes = self._codes(autocast_dtype(x.device.type) or x.dtype)
        parameters = self.linear._parameters
        weight, bias = parameters["weight"], parameters["bias"]
        assert weight is not None
        if dims > 1:
            z = nn.functional.linear(x, weight, bias)
            return run_chain(z, dims, norm_weight, norm_bias, residual, seed, codes)
        return linear_chain(x, weight, bias, norm_weight, norm_bias, residual, seed, codes)


@dataclass
class Single:
    """A child that runs by itself because it is not part of a chain."""

    name: str
    child: nn.Module

    def __call__(self, x: Any) -> Any:
        return self.child(x)


def make_steps(named: Sequence[tuple[str, nn.Module]]) -> list[Chain | Single]:
    """Splits children into maximal chains and single children."""
    steps: list[Chain | Single] = []
    start = 0
    while start < len(named):
        end, last = start, -1
        while end < len(named):
            kind = _KIND_OF.get(type(named[end][1]), -1)
            if kind <= last:
                break
            end, last = end + 1, kind
        if end - start >= _MINIMUM:
            names = [name for name, _ in named[start:end]]
            steps.append(Chain(names, [child for _, child in named[start:end]]))
        else:
            end = start + 1
            steps.append(Single(*named[start]))
        start = end
    return steps


@dataclass(frozen=True)
class Entry:
    """One step of a plan.

    Args:
        names: the children's names.
        chain: what they form ("linear → layer → gelu"), or the class of a single child.
        fused: whether they run as one operation, as far as can be known without an input.
        reason: why not, or why the last unfused call was; empty otherwise.
        fused_calls, unfused_calls: eager calls so far.
    """

    names: tuple[str, ...]
    chain: str
    fused: bool
    reason: str
    fused_calls: int
    unfused_calls: int

    def __str__(self) -> str:
        where = ", ".join(self.names)
        state = "fused" if self.fused else "not fused"
        calls = f"; {self.fused_calls} calls fused, {self.unfused_calls} not"
        counted = calls if self.fused_calls or self.unfused_calls else ""
        reason = f": {self.reason}" if self.reason else ""
        return f"[{where}] {self.chain}: {state}{reason}{counted}"


class Plan(list[Entry]):
    """The steps of a `fused.Sequential`, printable."""

    def __str__(self) -> str:
        return "\n".join(map(str, self))


def make_entry(step: Chain | Single) -> Entry:
    """What one step would do now."""
    if isinstance(step, Single):
        why = "not part of a chain of Linear, norm, activation, dropout"
        return Entry((step.name,), type(step.child).__name__, False, why, 0, 0)
    static = step.static_reason()
    if not static:
        tensors = [t for c in step.children for t in c.parameters(recurse=False)]
        served = [t for t in tensors[:1] if t.device.type != "meta"]
        if served and choose(served[0].device.type, served[0].dtype) == "reference":
            static = f"no kernel serves {served[0].device.type} {served[0].dtype}"
    return Entry(
        tuple(step.names),
        step.describe(),
        not static,
        static or step.reason,
        step.fused_calls,
        step.unfused_calls,
    )
