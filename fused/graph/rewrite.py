"""The pass: chains of a graph become single calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..chain.grammar import DROPOUT
from . import policy
from .call import arguments_of, fused_chain
from .chains import Found, find
from .forms import same, stage_of, value


def rewrite(graph: fx.Graph, rest: str) -> list[Found]:
    """Replaces the chains of a graph by calls of `fused_chain`, in place.

    Args:
        graph: as Dynamo captures it.
        rest: "inductor" or "eager", what runs the rest.

    Returns:
        The chains that were replaced.
    """
    remove_identities(graph)
    done: list[Found] = []
    # The last node of each replaced chain → what stands for it now.
    replaced: dict[fx.Node, fx.Node] = {}
    for chain in find(graph)[0]:
        if chain.reason or policy.reason(chain, rest):
            continue
        arguments = arguments_of(chain)
        if not _gives_the_same(chain, arguments):
            continue
        given = tuple(replaced.get(a, a) if isinstance(a, fx.Node) else a for a in arguments)
        with graph.inserting_after(chain.last):
            call = graph.call_function(fused_chain, given)
        call.meta = dict(chain.last.meta)
        chain.last.replace_all_uses_with(call)
        replaced[chain.last] = call
        for node in reversed(sorted(chain.nodes, key=[*graph.nodes].index)):
            if not node.users:
                graph.erase_node(node)
        done.append(chain)
    return done


def remove_identities(graph: fx.Graph) -> None:
    """Dropout that does not drop is its input."""
    for node in [*graph.nodes]:
        stage = stage_of(node)
        if isinstance(stage, str) or stage is None or stage.kind != DROPOUT:
            continue
        if stage.numbers["p"] == 0 or not stage.numbers["training"]:
            node.replace_all_uses_with(stage.source)
            graph.erase_node(node)


def _gives_the_same(chain: Found, arguments: tuple[Any, ...]) -> bool:
    """Whether the call's result has the shape, dtype and strides that the chain's has."""
    tensors = [value(a) if isinstance(a, fx.Node) else a for a in arguments]
    if arguments[-3] is not None:
        tensors[5:7] = None, None  # nothing is to be learned here
    mode = getattr(tensors[0], "fake_mode", None)
    if mode is None:
        return False
    with mode, torch.no_grad():
        y = fused_chain(*tensors)
    old = value(chain.last)
    return y.dtype == old.dtype and same(y.shape, old.shape) and same(y.stride(), old.stride())
