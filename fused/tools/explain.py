"""Which calls of a model become one operation with others, by which way, and why not the rest."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from ..chain.chain import Chain
from ..chain.convert import fuse_
from ..chain.grammar import ACTIVATION, DROPOUT, LINEAR, NORM, RESIDUAL
from ..chain.plan import make_steps, printable
from ..graph import policy
from ..graph.chains import Found, find
from ..graph.forms import FORMS, Stage, place, value
from ..graph.gates import is_gate
from ..graph.rewrite import difference, identities, remove_identities

__all__ = ["Call", "Explanation", "explain"]

_KINDS = {NORM: "norm", ACTIVATION: "activation", DROPOUT: "dropout", RESIDUAL: "residual"}
_GATE = "gate"
# Tensors of its size that a call reads and writes by itself.
_PASSES = {"norm": 2, "activation": 2, "dropout": 2, "residual": 3, _GATE: 3}
WAYS = ("fuse_", "fused", "fused_eager")


@dataclass(frozen=True)
class Call:
    """One norm, activation, dropout, residual or gate of a model.

    Attributes:
        kind: "norm", "activation", "dropout", "residual" or "gate".
        name: of the norm or activation, else as kind.
        place: file:line of the call in the model.
        chain: the chain that it is part of, or the call by itself.
        ways: those of "fuse_", "fused" and "fused_eager" that make the chain one operation.
        reason: why the last two do not, where one of them does not.
        bytes: that it reads and writes by itself.
    """

    kind: str
    name: str
    place: str
    chain: str
    ways: tuple[str, ...]
    reason: str
    bytes: int


@dataclass
class Explanation:
    """What `explain` found; print it.

    Attributes:
        calls: in the order of the model.
        graphs: how many graphs the compiler made of one call of the model.
    """

    calls: list[Call] = field(default_factory=list)
    graphs: int = 0

    def share(self, way: str) -> float:
        """The share of the bytes of all calls that are in chains of this way, 0 to 1."""
        total = sum(call.bytes for call in self.calls)
        return sum(c.bytes for c in self.calls if way in c.ways) / total if total else 0.0

    def __str__(self) -> str:
        lines = []
        # Layers that repeat are one line.
        counted = Counter(self.calls)
        names = {c: c.name if c.name == c.kind else f"{c.kind} {c.name}" for c in counted}
        wide = max((len(f"{n} × {names[c]}") for c, n in counted.items()), default=0)
        for call, n in counted.items():
            what = f"{n} × {names[call]}" if n > 1 else names[call]
            how = f"in {call.chain}: " if call.chain != call.name else ""
            how += f"one operation by {', '.join(call.ways)}" if call.ways else "left as it is"
            how += f" ({call.reason})" if call.reason else ""
            lines.append(f"{what:{wide}}  {_short(call.place)}  {how}")
        total = Counter(call.kind for call in self.calls)
        kinds = ", ".join(f"{n} {kind}{'s' * (n > 1)}" for kind, n in total.items())
        lines.append(f"{kinds or 'no norm, activation or dropout'} in {self.graphs} graphs")
        if self.calls:
            shares = [f"{self.share(way):.0%} by {_title(way)}" for way in WAYS]
            lines.append(f"of the bytes that they move, in chains: {', '.join(shares)}")
        return printable("\n".join(lines))


def _title(way: str) -> str:
    return "fuse_" if way == "fuse_" else f'torch.compile(backend="{way}")'


def _short(place: str) -> str:
    relative = os.path.relpath(place)
    if not relative.startswith(".."):
        return relative
    _, packages, inside = place.rpartition("site-packages/")
    return inside if packages else place


def explain(model: nn.Module, *inputs: Any, kwargs: Mapping[str, Any] | None = None) -> Explanation:
    """Finds every norm, activation, dropout, residual and gate that a call of the model makes.

    The model runs once, as it stands (training or evaluation), under torch.compile's capture;
    its buffers and torch's random numbers are as before afterwards.

    Args:
        model: any module.
        inputs: what it takes.
        kwargs: what it takes by keyword.

    Returns:
        An `Explanation`: of each call its chain, the ways that make it one operation, or the reason
        why none does, its place in the source, and the share of bytes that each way reaches.

    Raises:
        TypeError: model is not an nn.Module.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU())
        >>> print(fused.explain(model, torch.randn(4, 8)))  # doctest: +SKIP
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"explain: model must be an nn.Module, got {type(model).__name__}")
    found = Explanation()
    reached = _reached_by_fuse(model)

    def survey(module: fx.GraphModule, given: Any, **options: Any) -> Any:
        from torch._inductor import config

        found.graphs += 1
        with config.patch(policy.inductor_options(given)):
            for part in module.modules():
                if isinstance(part, fx.GraphModule):
                    found.calls += _calls(part.graph, reached)
        return module.forward

    with _as_before(model), torch._dynamo.config.patch(recompile_limit=1 << 10):
        # As a first call: sizes are open only where another was seen before.
        torch.compile(model, backend=survey, dynamic=False)(*inputs, **(kwargs or {}))
    return found


@contextmanager
def _as_before(model: nn.Module) -> Iterator[None]:
    """Gives buffers and random numbers back as they were."""
    held = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng():
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in held:
                    buffer.copy_(before)


def _reached_by_fuse(model: nn.Module) -> set[str]:
    """The paths of all children of chains that fuse_ converts."""
    paths = set()
    for path, module in fuse_(model, dry_run=True).modules.items():
        for step in make_steps(tuple(module._modules.items())):
            if isinstance(step, Chain):
                paths |= {f"{path}.{name}".lstrip(".") for name in step.names}
    return paths


def _path(node: fx.Node) -> str:
    """The path of the module that makes a call, from the one that was compiled."""
    stack = [*node.meta.get("nn_module_stack", {}).values()]
    path = str(stack[-1][0]) if stack else ""
    return path.partition("'].")[2].replace("_modules.", "")


def _calls(graph: fx.Graph, reached: set[str]) -> Iterator[Call]:
    calls = {n: replace(_call(n, "it drops nothing"), bytes=0) for n in identities(graph)}
    order = [*graph.nodes]
    remove_identities(graph)
    chains, refused = find(graph)
    for chain in chains:
        reasons = {rest: _reason(chain, rest) for rest in ("inductor", "eager")}
        ways = tuple(
            way
            for way, rest in (("fused", "inductor"), ("fused_eager", "eager"))
            if not reasons[rest]
        )
        reason = reasons["inductor"] or reasons["eager"]
        for stage in chain.stages:
            own = ("fuse_",) if _path(stage.node) in reached else ()
            name = chain.describe()
            if stage.kind != LINEAR:
                calls[stage.node] = _call(stage.node, reason, stage, name, own + ways)
            if "gate" in stage.tensors:
                inner = (n for n in stage.nodes if n.target in FORMS)
                calls |= {n: _call(n, reason, None, name, ways) for n in (*inner, stage.node)}
    stages = [stage for chain in chains for stage in chain.stages]
    for node in order:
        if node in refused and FORMS[node.target].kind != LINEAR:
            calls[node] = _call(node, refused[node])
        elif node not in calls and not node._erased and is_gate(node, stages):
            calls[node] = _call(node, "its activation is in another chain, or none that gates")
    return (calls[node] for node in order if node in calls)


def _reason(chain: Found, rest: str) -> str:
    reason = chain.reason or policy.reason(chain, rest)
    return reason or difference(chain)


def _call(
    node: fx.Node,
    reason: str,
    stage: Stage | None = None,
    chain: str = "",
    ways: tuple[str, ...] = (),
) -> Call:
    part = stage or FORMS.get(node.target)
    kind = _KINDS[part.kind] if part else _GATE
    name = part.name if part and kind in ("norm", "activation") else kind
    size = 0
    if value(node) is not None:
        n = value(node).numel()
        size = (n if isinstance(n, int) else n.node.hint or 0) * value(node).element_size()
    return Call(kind, name, place(node), chain or name, ways, reason, _PASSES[kind] * size)
