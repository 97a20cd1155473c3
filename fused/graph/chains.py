"""The chains of a graph: maximal runs of stages, each the only reader of the one before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from ..backends import backend
from ..chain.grammar import (
    ACTIVATION,
    DROPOUT,
    LINEAR,
    NORM,
    RESIDUAL,
    extends,
    is_add_norm,
    is_behind_norm,
    is_chain,
)
from ..chain.guard import dtypes_reason, memory_order
from ..spec import CHANNEL_NORMS, GATED_ACTIVATIONS, ROW_NORMS
from . import gates
from .forms import Stage, laid_out_alike, stage_of, value
from .memory import Memory, target_name

_SOFTMAX = ("softmax", "_softmax", "sparsemax")


@dataclass(eq=False)
class Found:
    """A chain, or a stage by itself.

    Attributes:
        stages: in their order.
        reason: why it stays as it is; empty where it can be one operation.
    """

    stages: list[Stage]
    reason: str = ""

    @property
    def kinds(self) -> list[int]:
        return [stage.kind for stage in self.stages]

    @property
    def nodes(self) -> list[fx.Node]:
        return [node for stage in self.stages for node in stage.nodes]

    @property
    def last(self) -> fx.Node:
        return self.stages[-1].node

    @property
    def source(self) -> fx.Node:
        """What the chain reads first: of a residual alone, either of the two."""
        return self.stages[0].source

    def part(self, kind: int) -> Stage | None:
        """The stage of this kind."""
        return next((stage for stage in self.stages if stage.kind == kind), None)

    @property
    def residual(self) -> fx.Node | None:
        """What is added last, or to what the last norm reads."""
        return self._added(shortcut=False)

    @property
    def shortcut(self) -> fx.Node | None:
        """What is added between norm and activation."""
        return self._added(shortcut=True)

    def _added(self, shortcut: bool) -> fx.Node | None:
        for i, stage in enumerate(self.stages):
            following = self.kinds[i + 1 : i + 2]
            if stage.kind == RESIDUAL and (following == [ACTIVATION]) is shortcut:
                result = self.stages[i - 1].node if i else stage.source
                both = stage.source, stage.tensors["other"]
                return next(node for node in both if node is not result)
        return None

    @property
    def total(self) -> fx.Node | None:
        """The sum that a norm reads; others may read it, too."""
        stage = self.part(RESIDUAL)
        return stage.node if stage is not None and is_add_norm(self.kinds) else None

    @property
    def gate(self) -> fx.Node | None:
        """What gates the source, by its activation; the source itself: the first of its halves."""
        return self.stages[0].tensors.get("gate")

    def reads(self) -> list[Any]:
        """What its call reads from outside."""
        tensors = [node for stage in self.stages for node in stage.tensors.values()]
        inside = {stage.node for stage in self.stages}
        added = self.residual, self.shortcut
        return [n for n in (self.source, *added, *tensors) if n and n not in inside]

    def describe(self) -> str:
        """The chain in names: linear → layer → gelu → dropout → residual."""
        names = ["dropout" if stage.kind == DROPOUT else stage.name for stage in self.stages]
        for i in range(1, len(names) - 1):
            if self.kinds[i : i + 2] == [RESIDUAL, ACTIVATION]:
                names[i] = "shortcut"
        return " → ".join(names)


def find(graph: fx.Graph) -> tuple[list[Found], dict[fx.Node, str]]:
    """Every chain and every stage that is left over, and the calls that are no stage → why not."""
    stages: dict[fx.Node, Stage] = {}
    refused: dict[fx.Node, str] = {}
    memory = Memory(graph)
    for node in graph.nodes:
        stage = stage_of(node)
        if isinstance(stage, Stage):
            reason = memory.in_place_reason(node)
            if not reason:
                stages[node] = stage
            elif stage.kind != RESIDUAL:
                refused[node] = reason
        elif stage is not None:
            refused[node] = stage
    gates.collect(graph, stages)
    owner = {node: stage for stage in stages.values() for node in stage.nodes}
    taken: set[Stage] = set()
    found = []
    for node in graph.nodes:
        stage = stages.get(node)
        if stage is None or stage in taken:
            continue
        chain = Found([stage])
        while (following := _next(chain, owner, taken)) is not None:
            chain.stages.append(following)
        # What a residual adds to may be no chain without it.
        if not is_chain(chain.kinds):
            chain.stages = [stage]
        # An addition ends a chain or has its norm; by itself it is none.
        if chain.kinds == [RESIDUAL]:
            continue
        taken.update(chain.stages)
        chain.reason = _reason(chain) or _order_reason(chain, memory)
        found.append(chain)
    for stage in stages.values():
        if stage not in taken:
            refused[stage.node] = "what it adds to is no chain, or laid out in another way"
    return found, refused


def _order_reason(chain: Found, memory: Memory) -> str:
    """Why the chain's calls cannot run as one, for what stands between them."""
    reads = chain.reads()
    if chain.total is not None:
        # The call stands where the sum is made.
        norm = chain.stages[-1]
        if any(
            memory.position[t] > memory.position[chain.total] for t in norm.tensors.values() if t
        ):
            return "the norm's parameters are made after the sum"
        reads = [*reads, chain.total]
    return memory.move_reason(chain.nodes, reads, (chain.source, chain.gate))


def _next(chain: Found, owner: dict[fx.Node, Stage], taken: set[Stage]) -> Stage | None:
    """The stage that alone reads the chain's last value and may follow it."""
    last = chain.last
    readers = [*dict.fromkeys(owner.get(user) for user in last.users)]
    if chain.kinds[-1] == RESIDUAL:
        # The sum may have other readers: it is a result, too.
        norms = (s for s in readers if s is not None and s.kind == NORM and s.source is last)
        stage = next(
            (s for s in norms if s.name in ROW_NORMS and len(s.numbers["shape"]) == 1), None
        )
        if is_behind_norm(chain.kinds) and len(readers) == 1:
            stage = readers[0]
    else:
        stage = readers[0] if len(readers) == 1 else None
    if stage is None or stage in taken or not extends(chain.kinds, stage.kind):
        return None
    if stage.kind == RESIDUAL:
        both = value(stage.source), value(stage.tensors["other"])
        # The kernels add nothing to a gate of two tensors.
        return stage if chain.gate is None and laid_out_alike(*both) else None
    if stage.source is not last or last in stage.tensors.values():
        return None
    return stage if _goes_with(chain, stage) else None


def _goes_with(chain: Found, stage: Stage) -> bool:
    """Whether the kernels have this stage behind these."""
    norm, activation, dropout = chain.part(NORM), chain.part(ACTIVATION), chain.part(DROPOUT)
    if stage.kind == NORM and chain.kinds[-1] == RESIDUAL:
        x = value(chain.last)
        return (dropout is None or dropout.name == "elements") and x.is_contiguous()
    channels = norm is not None and norm.name in CHANNEL_NORMS
    gated = stage.name in GATED_ACTIVATIONS
    if "gate" in stage.tensors or (gated and chain.kinds[-1] == RESIDUAL):
        return False
    if stage.kind == ACTIVATION and gated:
        return not channels and (norm is None or len(norm.numbers["shape"]) == 1)
    if stage.kind == DROPOUT and stage.name == "channels":
        row_norm = norm is not None and not channels
        return not row_norm and (activation is None or activation.name not in GATED_ACTIVATIONS)
    return True


def _reason(chain: Found) -> str:
    """Why the kernels do not serve the chain's tensors."""
    x = value(chain.source)
    norm = chain.part(NORM)
    # The norm reads what autocast makes of a Linear's input; its own node knows.
    read = x if norm is None else value(norm.source)
    reason = backend.reason(x.device.type, read.dtype)
    if chain.gate is not None and backend.choose(x.device.type, x.dtype) == "cuda":
        reason = "CUDA C++ has no gate of two tensors"
    if reason:
        return reason
    added = chain.residual, chain.shortcut
    if any(node is not None and value(node).device != x.device for node in added):
        return "what is added is on another device"
    if norm is not None:
        dtypes = {value(t).dtype for t in norm.tensors.values() if t is not None}
        # Such a norm is computed in float32 whatever its weight is.
        reason = "" if norm.numbers.get("written") else _dtypes(chain, norm, dtypes, read)
        if reason or (norm.numbers["eps"] <= 0 and norm.name in CHANNEL_NORMS):
            return reason or f"its eps is {norm.numbers['eps']}"
        if norm.numbers.get("written") and not dtypes <= {read.dtype, value(chain.last).dtype}:
            return _dtypes(chain, norm, dtypes, read)
    elif (
        chain.part(LINEAR) is None
        and chain.gate is None
        and not x.is_contiguous()
        and not _channelwise(chain)
    ):
        if chain.stages[0].name in GATED_ACTIVATIONS:
            return "its input is not contiguous, and is halved"
        if memory_order(x) is None:
            return "its input has gaps or overlaps in memory"
    dropout = chain.part(DROPOUT)
    if len(chain.stages) == 1 and dropout is not None and _behind_softmax(dropout):
        return "it drops weights of attention"
    if dropout is not None and not 0 <= dropout.numbers["p"] <= 1:
        return f"its p is {dropout.numbers['p']}"
    return ""


def _dtypes(chain: Found, norm: Stage, dtypes: set[Any], read: Any) -> str:
    return dtypes_reason(dtypes, read.device, read.dtype, norm.name)


def _channelwise(chain: Found) -> bool:
    """Whether the layout is found for every input."""
    dropout = chain.part(DROPOUT)
    return dropout is not None and dropout.name == "channels"


def _behind_softmax(dropout: Stage) -> bool:
    node: Any = dropout.source
    while isinstance(node, fx.Node) and target_name(node) in ("to", "type_as", "float"):
        node = node.args[0]
    return isinstance(node, fx.Node) and target_name(node) in _SOFTMAX
