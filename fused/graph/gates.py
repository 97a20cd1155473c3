"""Gates that a model writes out: an activation of one tensor times another, or halves of one."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from ..chain.grammar import ACTIVATION, NORM
from ..run.recording import is_plain
from ..spec import GATES
from .forms import Stage, same, value
from .written import MUL, activation, gelu, is_call, operands, relu_squared, rms_norm, silu

_CHUNK = (torch.chunk, "chunk", torch.split, "split", torch.functional.split)


def _half(node: Any) -> tuple[fx.Node, int] | None:
    """(x, i) where a node is the i-th half of x along its last dimension."""
    whole, part = value(node), None
    if not is_call(node, operator.getitem):
        return None
    source, index = node.args
    if is_call(source, *_CHUNK) and index in (0, 1):
        given = dict(zip(("input", "size", "dim"), source.args, strict=False)) | source.kwargs
        pieces = source.meta.get("example_value")
        x, dim = given["input"], given.get("dim", 0)
        if not isinstance(pieces, tuple | list) or len(pieces) != 2:
            return None
        if value(x) is None or dim not in (-1, value(x).dim() - 1):
            return None
        part = index
    elif isinstance(index, tuple) and isinstance(index[-1], slice) and value(source) is not None:
        x, cut = source, index[-1]
        if index[:-1] not in ((Ellipsis,), (slice(None),) * (value(x).dim() - 1)):
            return None
        n = value(x).shape[-1]
        if not isinstance(n, int) or cut.step is not None:
            return None
        part = {(None, n // 2): 0, (0, n // 2): 0, (n // 2, None): 1, (n // 2, n): 1}.get(
            (cut.start, cut.stop)
        )
    else:
        return None
    n = value(x).shape[-1]
    if part is None or whole is None or not isinstance(n, int) or whole.shape[-1] * 2 != n:
        return None
    return x, part


def gate(node: fx.Node, stages: dict[fx.Node, Stage]) -> Stage | None:
    """a · activation(b) of the halves of one tensor, or of two tensors alike."""
    for a, b in operands(node, *MUL):
        stage = stages.get(b) if isinstance(b, fx.Node) else None
        if stage is None or stage.kind != ACTIVATION or any(stage.numbers.values()):
            continue
        name, first, second = GATES.get(stage.name), _half(a), _half(stage.source)
        if name is None or stage.source is a:
            continue
        found = None
        if first is not None and second is not None and first[0] is second[0]:
            inner = {a, stage.source, *stage.nodes}
            inner |= {h.args[0] for h in (a, stage.source) if is_call(h.args[0], *_CHUNK)}
            found = activation(name, node, first[0], sorted(inner, key=_order(node)))
            if found is not None and first[1] == 1:
                found.tensors["gate"] = first[0]
        return found or _gate_of_two(name, node, a, stage, stages)
    return None


def _gate_of_two(
    name: str, node: fx.Node, a: Any, stage: Stage, stages: dict[fx.Node, Stage]
) -> Stage | None:
    """a · stage, unless the norm in front makes a chain with it, or one is made of the other."""
    tensor, read, norm = value(a), value(stage.source), stages.get(stage.source)
    if tensor is None or not is_plain(tensor) or node.target is operator.imul:
        return None
    if (norm is not None and norm.kind == NORM) or a in stage.source.all_input_nodes:
        return None
    if tensor.dtype != read.dtype or not same(tensor.shape, read.shape):
        return None
    if tensor.device != read.device:
        return None
    found = activation(name, node, a, [*stage.nodes])
    if found is not None:
        found.tensors["gate"] = stage.source
    return found


def is_gate(node: fx.Node, stages: Iterable[Stage]) -> bool:
    """Whether a call multiplies an activation with another tensor of its shape."""
    activations = {stage.node for stage in stages if stage.kind == ACTIVATION}
    return any(
        b in activations and value(a) is not None and same(value(a).shape, value(b).shape)
        for a, b in operands(node, *MUL)
    )


def _order(node: fx.Node) -> Callable[[fx.Node], int]:
    position = {n: i for i, n in enumerate(node.graph.nodes)}
    return position.__getitem__


def collect(graph: fx.Graph, stages: dict[fx.Node, Stage]) -> None:
    """Adds the stages that are written out, and removes those that are parts of them."""
    for node in graph.nodes:
        found = rms_norm(node) or gelu(node) or silu(node)
        found = found or relu_squared(node, stages) or gate(node, stages)
        if found is not None:
            for inner in found.nodes:
                stages.pop(inner, None)
            stages[found.node] = found
