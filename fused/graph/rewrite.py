"""The pass: chains of a graph become single calls."""

from __future__ import annotations

import logging
import operator
from contextlib import ExitStack
from itertools import takewhile
from typing import Any

import torch
from torch import fx

from ..chain.grammar import DROPOUT
from . import policy
from .call import call_of, fused_chain
from .chains import Found, find
from .forms import Stage, laid_out_alike, place, same, stage_of, value
from .memory import target_name
from .written import is_cast

# Says of each chain, at level INFO, whether it became one operation, and why not.
LOG = logging.getLogger("fused.graph")


def rewrite(graph: fx.Graph, rest: str) -> list[Found]:
    """Replaces the chains of a graph by calls of the functions of call.py, in place.

    Args:
        graph: as Dynamo captures it.
        rest: "inductor" or "eager", what runs the rest.

    Returns:
        The chains that were replaced.
    """
    remove_identities(graph)
    done: list[Found] = []
    # The results of each replaced chain → what stands for them now.
    replaced: dict[fx.Node, fx.Node] = {}
    for chain in find(graph)[0]:
        reason = chain.reason or policy.reason(chain, rest) or difference(chain)
        LOG.info("%s: %s (%s)", chain.describe(), reason or "one operation", place(chain.last))
        if reason:
            continue
        function, arguments = call_of(chain)
        given = tuple(replaced.get(a, a) if isinstance(a, fx.Node) else a for a in arguments)
        with graph.inserting_after(chain.total or chain.last):
            call = graph.call_function(function, given)
        results = {chain.last: call}
        if chain.total is not None:
            both = {chain.last: 0, chain.total: 1}
            results = {node: _item(graph, call, index) for node, index in both.items()}
        for old, new in results.items():
            new.meta = dict(old.meta)
            old.replace_all_uses_with(new)
            replaced[old] = new
        _erase(graph, chain.nodes)
        done.append(chain)
    return done


def _item(graph: fx.Graph, call: fx.Node, index: int) -> fx.Node:
    with graph.inserting_after(call):
        return graph.call_function(operator.getitem, (call, index))


def identities(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Each dropout that does not drop → its input."""
    found = {}
    for node in graph.nodes:
        stage = stage_of(node)
        if not isinstance(stage, Stage) or stage.kind != DROPOUT:
            continue
        if stage.numbers["p"] == 0 or not stage.numbers["training"]:
            found[node] = stage.source
    return found


def remove_identities(graph: fx.Graph) -> None:
    """Dropout that does not drop becomes its input."""
    for node in identities(graph):
        node.replace_all_uses_with(node.all_input_nodes[0])
        graph.erase_node(node)


def _erase(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    """Removes a chain's nodes, and the casts that only they read."""
    waiting = [*nodes]
    while waiting:
        node = waiting.pop()
        if node.users or node._erased:
            continue
        waiting += [n for n in node.all_input_nodes if n in nodes or is_cast(n)]
        graph.erase_node(node)


def _autocast(node: fx.Node) -> list[torch.autocast]:
    """The regions of autocast that a node stands in, the outermost first."""
    regions: list[fx.Node] = []
    for earlier in takewhile(lambda other: other is not node, node.graph.nodes):
        if target_name(earlier) == "_enter_autocast":
            regions.append(earlier)
        elif target_name(earlier) == "_exit_autocast":
            regions.remove(earlier.args[0])
    arguments: list[Any] = [region.args for region in regions]
    return [torch.autocast(*given) for given in arguments]


def difference(chain: Found) -> str:
    """In what the call's result would not be like the chain's; empty where it would."""
    function, arguments = call_of(chain)
    tensors = [value(a) if isinstance(a, fx.Node) else a for a in arguments]
    if function is fused_chain and arguments[-3] is not None:
        tensors[5:7] = None, None  # nothing is to be learned here
    mode = getattr(tensors[0], "fake_mode", None)
    if mode is None:
        return "the compiler does not know its input"
    with ExitStack() as around:
        for context in (mode, torch.no_grad(), *_autocast(chain.last)):
            around.enter_context(context)
        made = function(*tensors)
    both = (chain.last, chain.total)
    results = {chain.last: made} if chain.total is None else dict(zip(both, made, strict=True))
    for node, new in results.items():
        old = value(node)
        if new.dtype != old.dtype or not same(new.shape, old.shape):
            return f"the result would be {new.dtype} {tuple(new.shape)}"
        if not laid_out_alike(new, old):
            return "the result would be laid out in another way"
    return ""
