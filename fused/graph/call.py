"""What a rewritten graph calls, and its arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from ..chain.grammar import ACTIVATION, DROPOUT, LINEAR, NORM
from ..chain.guard import memory_order
from ..run.add_norm import add_norm
from ..run.gate import gate as run_gate
from ..run.prepare import run
from ..run.running import ChannelNorm
from ..spec import CHANNEL_NORMS, Spec, known_parameters, make_spec
from .chains import Found
from .forms import value


def fused_chain(  # noqa: PLR0913  a graph takes no tuples of nodes as one
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    residual: Tensor | None,
    shortcut: Tensor | None,
    gate: Tensor | None,
    spec: Spec,
    momentum: float | None,
    dims: int,
    order: tuple[int, ...] | None,
) -> Tensor:
    """residual + dropout(activation(norm(x · weightᵀ + bias) + shortcut)).

    Channels are dimension 1.

    Args:
        mean, variance: running statistics.
        gate: of a gate of two tensors, x · activation(gate); x itself where gate and value are its
            halves in this order.
        momentum: the weight of new statistics in them; None: they are what is normalised with.
        dims: how many trailing dimensions a norm along rows normalises.
        order: of x's dimensions in memory, where there is neither Linear nor norm and x is not
            contiguous; else None.
    """
    if gate is not None:
        return run_gate(spec, x, None if gate is x else gate)
    if order is not None:
        residual = None if residual is None else residual.permute(order)
        y = run(spec, x.permute(order), residual=residual)
        return y.permute([order.index(d) for d in range(x.dim())])
    if spec.norm not in CHANNEL_NORMS:
        where: Any = {"channel_dim": 1, "normalized_dims": dims, "shortcut": shortcut}
        return run(spec, x, weight, bias, norm_weight, norm_bias, residual, **where)
    norm = ChannelNorm(spec.norm, spec.groups, norm_weight, norm_bias, momentum=momentum)
    if momentum is not None:
        norm.running_mean, norm.running_var = mean, variance
    else:
        norm.mean, norm.variance = mean, variance
    added: Any = {"residual": residual, "shortcut": shortcut}
    return run(spec, x, weight, bias, norm=norm, channel_dim=1, **added)


def fused_add_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor,
    spec: Spec,
) -> tuple[Tensor, Tensor]:
    """(norm(h), h) with h = residual + dropout(x · weightᵀ + bias)."""
    return add_norm(spec, x, residual, weight, bias, norm_weight, norm_bias)


def spec_of(chain: Found) -> Spec:
    """The chain as the kernels take it."""
    norm, activation = chain.part(NORM), chain.part(ACTIVATION)
    dropout = chain.part(DROPOUT)
    name = None if activation is None else activation.name
    numbers = {} if activation is None else activation.numbers
    spec = make_spec(
        None if norm is None else norm.name,
        0.0 if norm is None else norm.numbers["eps"],
        name,
        0.0 if dropout is None else dropout.numbers["p"],
        tuple((key, numbers[key]) for key, _ in known_parameters(name) if key in numbers),
    )
    channels = dropout is not None and dropout.name == "channels"
    groups = 1 if norm is None else norm.numbers.get("groups", 1)
    return spec._replace(channel_dropout=channels and spec.threshold > 0, groups=groups)


def call_of(chain: Found) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """What stands for the chain in a graph: a function and its arguments, nodes and constants."""
    linear, norm = chain.part(LINEAR), chain.part(NORM)
    weights: dict[str, fx.Node | None] = {} if linear is None else linear.tensors
    tensors: dict[str, fx.Node | None] = {} if norm is None else norm.tensors
    numbers: dict[str, Any] = {} if norm is None else norm.numbers
    x, spec = value(chain.source), spec_of(chain)
    order = None
    if linear is None and norm is None and not spec.gated and not spec.channel_dropout:
        found = None if x.is_contiguous() else memory_order(x)
        order = found if found != tuple(range(x.dim())) else None
    parameters = *map(weights.get, ("weight", "bias")), *map(tensors.get, ("weight", "bias"))
    if chain.total is not None:
        return fused_add_norm, (chain.source, *parameters, chain.residual, spec)
    own = numbers.get("training", True) or tensors.get("mean") is None
    return fused_chain, (
        chain.source,
        *parameters,
        *map(tensors.get, ("mean", "variance")),
        chain.residual,
        chain.shortcut,
        chain.gate,
        spec,
        numbers.get("momentum", 0.0) if own else None,
        len(numbers.get("shape", (0,))),
        order,
    )
