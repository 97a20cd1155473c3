"""Stages that a model writes out in several calls: RMSNorm and activations; gates.py has gates.

Each is found from the one call that only it has (rsqrt, tanh, erf, a product) and is a single
`Stage`, whose inner calls nothing else reads.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from ..chain.grammar import ACTIVATION, NORM
from .forms import Stage, same, value

_ADD = (operator.add, operator.iadd, torch.add, "add")
MUL = (operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "multiply")
_CASTS = ("to", "float", "type_as", "type", "half", "bfloat16", "double")
_POW = (operator.pow, torch.pow, "pow", "__pow__")
_MEAN = (torch.mean, "mean")
_ROOT = (torch.rsqrt, "rsqrt")
_TANH = (torch.tanh, "tanh")
_ERF = (torch.erf, "erf", torch.special.erf)


def is_call(node: Any, *targets: Any) -> bool:
    return isinstance(node, fx.Node) and node.op.startswith("call_") and node.target in targets


def is_cast(node: fx.Node) -> bool:
    """Whether a call changes the dtype alone."""
    return is_call(node, *_CASTS)


def operands(node: Any, *targets: Any) -> Iterator[tuple[Any, Any]]:
    """The two operands of a commutative call, in both orders."""
    if is_call(node, *targets) and len(node.args) == 2 and not node.kwargs:
        a, b = node.args
        yield a, b
        yield b, a


def _near(number: Any, wanted: float) -> bool:
    plain = isinstance(number, int | float) and not isinstance(number, bool)
    return plain and math.isclose(number, wanted, rel_tol=1e-6)


def _scaled(node: Any, factor: float) -> Any:
    """What is multiplied by a number, or divided by its inverse."""
    for x, number in operands(node, *MUL):
        if _near(number, factor):
            return x
    if is_call(node, operator.truediv, torch.div, "div") and _near(node.args[1], 1 / factor):
        return node.args[0]
    return None


def _square(node: Any) -> Any:
    """What is squared."""
    if is_call(node, *_POW) and _near(node.args[1], 2):
        return node.args[0]
    if is_call(node, torch.square, "square"):
        return node.args[0]
    if is_call(node, *MUL) and len(node.args) == 2 and node.args[0] is node.args[1]:
        return node.args[0]
    return None


def _cast_of(node: Any) -> Any:
    """The value before casts of its dtype."""
    while is_cast(node) and node.args and value(node) is not None:
        node = node.args[0]
    return node


def _private(nodes: list[fx.Node]) -> bool:
    """Whether nothing but these nodes reads any of them, the last apart."""
    return all(user in nodes for node in nodes[:-1] for user in node.users)


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def rms_norm(root: fx.Node) -> Stage | None:
    """x · rsqrt(mean(x²) + eps), with its weight and its casts where they are next to it.

    Llama casts before the weight, T5 where the weight is narrow, Gemma after 1 + weight.
    """
    if not is_call(root, *_ROOT):
        return None
    for mean, eps in operands(root.args[0], *_ADD):
        if not is_call(mean, *_MEAN) or not isinstance(eps, float) or eps <= 0:
            continue
        given = dict(zip(("input", "dim", "keepdim"), mean.args, strict=False)) | mean.kwargs
        source = _square(given.get("input"))
        x = _cast_of(source)
        dims = given.get("dim")
        dims = tuple(dims) if isinstance(dims, list | tuple) else (dims,)
        product = _only_reader(root)
        if (
            product is None
            or value(x) is None
            or value(product) is None
            or given.get("keepdim") is not True
        ):
            continue
        if dims not in ((-1,), (value(x).dim() - 1,)):
            continue
        if not any(b is root and _cast_of(a) is x for a, b in operands(product, *MUL)):
            continue
        inner = [given["input"], mean, root.args[0], root]
        return _with_weight(x, product, [*_own_casts(source, [*inner, product]), *inner], eps)
    return None


def _own_casts(node: fx.Node, readers: list[fx.Node]) -> list[fx.Node]:
    """The casts that end in a value, as far as only these nodes read them."""
    casts: list[fx.Node] = []
    while is_cast(node) and all(user in [*casts, *readers] for user in node.users):
        casts.insert(0, node)
        node = node.all_input_nodes[0]
    return casts


def _with_weight(x: fx.Node, product: fx.Node, inner: list[fx.Node], eps: float) -> Stage | None:
    """The norm up to the last call behind it whose dtype is that of x."""
    nodes, weight, best = [*inner, product], None, None
    if not isinstance(value(x).shape[-1], int):
        return None
    node: fx.Node | None = product
    while node is not None:
        if value(node).dtype == value(x).dtype and _private([*nodes]):
            best = Stage(
                NORM,
                "rms",
                node,
                x,
                tuple(nodes),
                {"weight": weight},
                {"eps": eps, "shape": (value(x).shape[-1],), "written": True},
            )
        reader = _only_reader(node)
        if reader is None or value(reader) is None:
            break
        if not is_cast(reader) or reader.args[0] is not node:
            vectors = [b for a, b in operands(reader, *MUL) if a is node]
            if weight is not None or not vectors or value(vectors[0]) is None:
                break
            weight = vectors[0]
            if not same(value(weight).shape, value(x).shape[-1:]):
                break
        node = reader
        nodes.append(node)
    return best


def activation(name: str, node: fx.Node, x: Any, inner: list[fx.Node]) -> Stage | None:
    nodes = [*inner, node]
    if value(x) is None or value(node) is None or not _private(nodes):
        return None
    if value(x).dtype != value(node).dtype or not value(x).is_floating_point():
        return None
    return Stage(ACTIVATION, name, node, x, tuple(nodes))


def _half_of_one_plus(inner: fx.Node, x: Any) -> tuple[fx.Node, list[fx.Node]] | None:
    """The call that ends ½ · x · (1 + inner), however it is bracketed, and the calls between."""
    plus = _only_reader(inner)
    if plus is None or not any(b is inner and _near(a, 1) for a, b in operands(plus, *_ADD)):
        return None
    node, nodes, half, times = plus, [plus], False, False
    while not (half and times):
        reader = _only_reader(node)
        if reader is None:
            return None
        other = next((b for a, b in operands(reader, *MUL) if a is node), None)
        if not half and _near(other, 0.5):
            half = True
        elif not times and other is x:
            times = True
        elif not half and not times and other is not None and _scaled(other, 0.5) is x:
            half = times = True
            nodes.insert(0, other)
        else:
            return None
        node = reader
        nodes.append(node)
    return node, nodes[:-1]


def gelu(node: fx.Node) -> Stage | None:
    """½ · x · (1 + erf(x / √2)), or with tanh(√(2/π) · (x + 0.044715 · x³)), as GPT-2 has it."""
    if is_call(node, *_ERF):
        x, name, inner = (
            _scaled(node.args[0], math.sqrt(0.5)),
            "gelu",
            [*node.all_input_nodes, node],
        )
    elif is_call(node, *_TANH):
        total = _scaled(node.args[0], math.sqrt(2 / math.pi))
        x, name, inner = None, "gelu_tanh", [*node.all_input_nodes, node]
        for a, b in operands(total, *_ADD):
            cube = _scaled(b, 0.044715)
            if is_call(cube, *_POW) and _near(cube.args[1], 3) and cube.args[0] is a:
                x, inner = a, [cube, b, total, *inner]
    else:
        return None
    ended = None if x is None else _half_of_one_plus(node, x)
    return ended and activation(name, ended[0], x, [*inner, *ended[1]])


def silu(node: fx.Node) -> Stage | None:
    """x · sigmoid(x)."""
    for x, gate in operands(node, *MUL):
        if is_call(gate, torch.sigmoid, "sigmoid", torch.special.expit) and gate.args[0] is x:
            return activation("silu", node, x, [gate])
    return None


def relu_squared(node: fx.Node, stages: dict[fx.Node, Stage]) -> Stage | None:
    """relu(x)²."""
    inner = _square(node)
    stage = stages.get(inner) if isinstance(inner, fx.Node) else None
    if stage is None or stage.name != "relu":
        return None
    return activation("relu_squared", node, stage.source, list(stage.nodes))
