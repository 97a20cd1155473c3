"""What a graph writes to: which in-place operators are harmless, and what may not move across what.

A value's memory is known: the tensors without data that the compiler computes with share their
storage exactly where the real ones do.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from .forms import CALLS, FORMS, arguments

_IN_PLACE = (operator.iadd, operator.imul, operator.isub, operator.itruediv)
_BARRIERS = {
    *("_set_grad_enabled", "_enter_autocast", "_exit_autocast", "_enter_inference_mode"),
    *("_exit_inference_mode", "set_rng_state", "manual_seed", "_saved_tensors_hooks_disable"),
    "_saved_tensors_hooks_enable",
}


def target_name(node: fx.Node) -> str:
    """The name of what a node calls."""
    target = node.target
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def storages(nodes: Iterable[Any]) -> set[int]:
    """The memory of the nodes' values."""
    values = (node.meta.get("example_value") for node in nodes if isinstance(node, fx.Node))
    return {
        t.untyped_storage()._cdata
        for t in tree_leaves([*values])
        if isinstance(t, Tensor) and t.layout is torch.strided
    }


def _argument(node: fx.Node, name: str) -> Any:
    form = FORMS.get(node.target)
    return arguments(node, form.names, {}).get(name) if form else node.kwargs.get(name)


def written_in_place(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values a call overwrites with its result."""
    if node.op not in CALLS:
        return []
    name = target_name(node)
    found = [node.kwargs.get("out")]
    if (
        node.target in _IN_PLACE
        or name == "setitem"
        or (name.endswith("_") and not name.endswith("__"))
        or _argument(node, "inplace") is True
    ):
        found.append(node.args[0] if node.args else node.kwargs.get("input"))
    return [n for n in found if isinstance(n, fx.Node)]


def statistics_written(node: fx.Node) -> list[fx.Node]:
    """The running statistics that a norm in training updates."""
    if _argument(node, "training") is False or _argument(node, "use_input_stats") is False:
        return []
    names = ("mean", "variance", "running_mean", "running_var")
    return [n for n in (_argument(node, name) for name in names) if isinstance(n, fx.Node)]


def is_barrier(node: fx.Node) -> bool:
    """Whether nothing may move across this node."""
    if node.op == "call_module" or target_name(node) in _BARRIERS:
        return True
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return True
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


class Memory:
    """The memory of a graph's values, and who reads and writes it where."""

    def __init__(self, graph: fx.Graph) -> None:
        self.order = list(graph.nodes)
        self.position = {node: i for i, node in enumerate(self.order)}
        self._sharing: dict[int, list[fx.Node]] = {}
        for node in self.order:
            for storage in storages([node]):
                self._sharing.setdefault(storage, []).append(node)

    def in_place_reason(self, node: fx.Node) -> str:
        """Why an in-place call may not be taken for one that writes a new value; empty if it may.

        Nobody can tell where the memory was made in this graph, and nothing reads it later by an
        older name.
        """
        here = self.position[node]
        for target in written_in_place(node):
            for storage in storages([target]):
                for older in self._sharing[storage]:
                    if older.op in ("placeholder", "get_attr"):
                        return "it writes to an input of the graph"
                    if self.position[older] < here and any(
                        self.position[user] > here for user in older.users
                    ):
                        return "it writes in place to what is read later"
        return ""

    def move_reason(
        self, nodes: Iterable[fx.Node], reads: Iterable[Any], saved: Iterable[Any]
    ) -> str:
        """Why these nodes cannot run together where the last of them stands.

        Args:
            reads: what they read from outside.
            saved: the part of it that is kept for backward.
        """
        inside = set(nodes)
        positions = [self.position[node] for node in inside]
        changed = storages(n for node in inside for n in statistics_written(node))
        read, kept = storages(reads), storages(saved)
        for node in self.order[min(positions) : max(positions)]:
            if node in inside:
                continue
            if is_barrier(node):
                return f"{target_name(node)} stands between its parts"
            writes = storages((*written_in_place(node), *statistics_written(node)))
            if writes & (read | changed) or storages(node.all_input_nodes) & changed:
                return f"{target_name(node)} writes between its parts"
        for node in self.order[max(positions) + 1 :]:
            if storages(written_in_place(node)) & kept:
                return f"{target_name(node)} writes to its input later"
        return ""
