"""Calls of a graph by their part in a chain, whatever torch calls them.

A graph is Dynamo's: one node for each call that a model makes, with what the compiler knows of its
result in `meta["example_value"]`; parameters and buffers are placeholders. A `Stage` is one part of
a chain in a form that no spelling shows through: `F.relu(x, inplace=True)`, `x.relu()` and
`torch.relu(x)` are the same stage.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..chain.grammar import ACTIVATION, DROPOUT, LINEAR, NORM, RESIDUAL
from ..run.recording import is_plain
from ..spec import ACTIVATIONS, default_eps

_TORCH = str(Path(torch.__file__).parent)
CALLS = ("call_function", "call_method")


@dataclass(eq=False)
class Stage:
    """One part of a chain.

    Attributes:
        kind: LINEAR, NORM, ACTIVATION, DROPOUT or RESIDUAL.
        name: of the norm or activation; of a dropout "elements" or "channels".
        node: its result.
        source: the value that it reads, of a residual either of the two.
        nodes: all that it stands for.
        tensors: its weight, bias and statistics, None where there are none.
        numbers: its scalars: eps, momentum, p, ...
    """

    kind: int
    name: str
    node: fx.Node
    source: fx.Node
    nodes: tuple[fx.Node, ...] = ()
    tensors: dict[str, fx.Node | None] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.nodes = self.nodes or (self.node,)


class Form(NamedTuple):
    """How torch calls a stage: its arguments in their order, the first being what it reads."""

    kind: int
    name: str
    names: tuple[str, ...]
    defaults: dict[str, Any]


def value(node: object) -> Any:
    """What the compiler knows of a node's result: a tensor without data, or None."""
    if not isinstance(node, fx.Node):
        return None
    found = node.meta.get("example_value")
    return found if isinstance(found, Tensor) else None


def place(node: fx.Node) -> str:
    """Where in the source a call is, as file:line: the innermost line that is not torch's."""
    found = "unknown place"
    for line in (node.stack_trace or "").splitlines():
        file, _, rest = line.partition('", line ')
        file = file.partition('"')[2]
        if rest and not file.startswith(_TORCH):
            found = f"{file}:{rest.partition(',')[0]}"
    return found


def arguments(node: fx.Node, names: Iterable[str], defaults: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, however they were passed."""
    return {**defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs}


def spellings(name: str) -> list[Any]:
    """What a node's target may be for the operation of this name: functions, and methods' names."""
    places: tuple[Any, ...] = (F, torch, torch._C._nn)
    both = (name, name + "_")
    found = [getattr(place, n) for place in places for n in both if hasattr(place, n)]
    return found + [n for n in both if hasattr(Tensor, n)]


_NORM_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "layer": ("input", "shape", "weight", "bias", "eps"),
    "rms": ("input", "shape", "weight", "eps"),
    "batch": ("input", "mean", "variance", "weight", "bias", "training", "momentum", "eps"),
    "group": ("input", "groups", "weight", "bias", "eps"),
    "instance": ("input", "mean", "variance", "weight", "bias", "training", "momentum", "eps"),
}
# torch's names → ours.
_RENAMED = {
    **{"normalized_shape": "shape", "num_groups": "groups", "use_input_stats": "training"},
    **{"running_mean": "mean", "running_var": "variance", "train": "training"},
}


def _forms() -> dict[Any, Form]:
    forms: dict[Any, Form] = {}

    def add(
        kind: int, name: str, torch_name: str, names: tuple[str, ...], defaults: dict[str, Any]
    ) -> None:
        forms.update(dict.fromkeys(spellings(torch_name), Form(kind, name, names, defaults)))

    add(LINEAR, "linear", "linear", ("input", "weight", "bias"), {"bias": None})
    absent = dict.fromkeys(("weight", "bias", "mean", "variance"))
    for name, names in _NORM_ARGUMENTS.items():
        eps = None if name == "rms" else 1e-5
        more = {"training": name == "instance", "momentum": 0.1, "eps": eps}
        add(NORM, name, f"{name}_norm", names, absent | more)
    # These two have another order than the functions of torch.nn.functional.
    names = ("input", "weight", "bias", "mean", "variance", "training", "momentum", "eps")
    for function, name in ((torch.batch_norm, "batch"), (torch.instance_norm, "instance")):
        forms[function] = Form(NORM, name, names, {})
    for name, activation in ACTIVATIONS.items():
        parameters = [key for key, _ in activation.parameters]
        names = ("input", *parameters, "inplace")
        add(ACTIVATION, name, name, names, dict(activation.parameters))
    add(ACTIVATION, "gelu", "gelu", ("input", "approximate"), {"approximate": "none"})
    add(ACTIVATION, "glu", "glu", ("input", "dim"), {"dim": -1})
    limits = {"min_val": -1.0, "max_val": 1.0}
    add(ACTIVATION, "relu6", "hardtanh", ("input", "min_val", "max_val", "inplace"), limits)
    p = {"p": 0.5, "training": True}
    add(DROPOUT, "elements", "dropout", ("input", "p", "training", "inplace"), p)
    for n in (1, 2, 3):
        own = p | {"rank": n + 2}
        add(DROPOUT, "channels", f"dropout{n}d", ("input", "p", "training", "inplace"), own)
    for target in (operator.add, operator.iadd, torch.add, "add", "add_"):
        forms[target] = Form(RESIDUAL, "residual", ("input", "other"), {})
    return forms


FORMS = _forms()


def stage_of(node: fx.Node) -> Stage | str | None:
    """The stage that a node is; why it cannot be a part of a chain; or None where it is none."""
    form = FORMS.get(node.target) if node.op in CALLS else None
    if form is None:
        return None
    given = arguments(node, form.names, form.defaults)
    given = {_RENAMED.get(name, name): argument for name, argument in given.items()}
    source = given.pop("input", None)
    if form.kind == RESIDUAL:
        return _residual(node, source, given)
    found, read = value(node), value(source)
    if found is None or read is None:
        return "the compiler knows nothing of its input"
    if not is_plain(found) or not is_plain(read) or found.layout is not torch.strided:
        return f"its input is a {type(read).__name__} ({read.layout})"
    if not found.is_floating_point() or read.dim() < 1:
        return "its input is not floating point" if read.dim() else "its input has no dimension"
    stage = Stage(form.kind, form.name, node, source)
    for name, argument in given.items():
        tensor = name in ("weight", "bias", "mean", "variance")
        (stage.tensors if tensor else stage.numbers)[name] = argument
    return _READERS[form.kind](stage, read) or stage


def _residual(node: fx.Node, source: Any, given: dict[str, Any]) -> Stage | None:
    """An addition of two different tensors of one shape; all others are none of ours."""
    other = given.get("other")
    tensors = [value(node), value(source), value(other)]
    if given.keys() != {"other"} or source is other or any(t is None for t in tensors):
        return None
    if not all(is_plain(t) and t.is_floating_point() and t.dim() for t in tensors):
        return None
    if not all(same(t.shape, tensors[0].shape) for t in tensors[1:]):
        return None
    return Stage(RESIDUAL, "residual", node, source, tensors={"other": other})


def same(a: Iterable[Any], b: Iterable[Any]) -> bool:
    """Whether two shapes or strides are equal as far as is known without a new guard."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    a, b = tuple(a), tuple(b)
    return len(a) == len(b) and all(
        statically_known_true(m == n) for m, n in zip(a, b, strict=True)
    )


def laid_out_alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape have the same strides."""
    # The stride of a dimension of one element means nothing.
    both = [
        (m, n)
        for m, n, size in zip(a.stride(), b.stride(), a.shape, strict=True)
        if not (isinstance(size, int) and size == 1)
    ]
    return same((m for m, _ in both), (n for _, n in both))


def _plain_numbers(stage: Stage, *names: str) -> str:
    """Why the stage's scalars are no constants; ints become floats."""
    for name in names:
        number = stage.numbers[name]
        symbol = number.meta.get("example_value") if isinstance(number, fx.Node) else None
        if isinstance(symbol, torch.SymFloat):
            # A module's float, which dynamic=True leaves open: float() closes it, with a guard.
            number = float(symbol)
        plain = isinstance(number, int | float) and not isinstance(number, bool)
        if not plain or not math.isfinite(number):
            return f"its {name} is not a plain number: {number!r}"
        stage.numbers[name] = float(number)
    return ""


def _parameters_reason(stage: Stage, shape: tuple[Any, ...], read: Tensor) -> str:
    """Why a kernel cannot read the tensors of the stage."""
    for name, node in stage.tensors.items():
        t = value(node)
        if node is None:
            continue
        if t is None or not is_plain(t) or t.device != read.device:
            return f"its {name} is not a plain tensor on {read.device}"
        if not same(t.shape, shape) or not t.is_contiguous():
            return f"its {name} is {tuple(t.shape)}, not contiguous {tuple(shape)}"
    return ""


def _linear(stage: Stage, read: Tensor) -> str:
    weight, bias = value(stage.tensors["weight"]), value(stage.tensors["bias"])
    if weight is None or not is_plain(weight) or weight.dim() != 2:
        return "its weight is not a plain matrix"
    if stage.tensors["bias"] is not None and (bias is None or bias.dim() != 1):
        return "its bias is not a plain vector"
    return ""


def _norm(stage: Stage, read: Tensor) -> str:
    numbers = stage.numbers
    if numbers["eps"] is None:
        numbers["eps"] = default_eps(stage.name, None, read.dtype)
    if stage.name in ("layer", "rms"):
        shape = numbers["shape"]
        shape = tuple(shape) if isinstance(shape, tuple | list | torch.Size) else (shape,)
        if not all(isinstance(n, int) for n in shape):
            return "its shape is not constant"
        numbers["shape"] = shape
        return _plain_numbers(stage, "eps") or _parameters_reason(stage, shape, read)
    if read.dim() < 2:
        return f"its input has {read.dim()} dimensions"
    if stage.name == "group":
        if not isinstance(numbers["groups"], int):
            return "its number of groups is not constant"
    elif not isinstance(numbers["training"], bool):
        return "whether it trains is not constant"
    if stage.name != "group" and (stage.tensors["mean"] is None) != (
        stage.tensors["variance"] is None
    ):
        return "it has one of running_mean and running_var"
    reason = _plain_numbers(stage, "eps", "momentum")
    return reason or _parameters_reason(stage, (read.shape[1],), read)


def _activation(stage: Stage, read: Tensor) -> str:
    numbers = stage.numbers
    if "approximate" in numbers:
        stage.name = {"none": "gelu", "tanh": "gelu_tanh"}.get(numbers.pop("approximate"), "")
        if not stage.name:
            return "its approximate is unknown"
    if "dim" in numbers and numbers.pop("dim") not in (-1, read.dim() - 1):
        return "it halves another dimension than the last"
    if "min_val" in numbers and (numbers.pop("min_val"), numbers.pop("max_val")) != (0, 6):
        return "it is not relu6, but clamps to other values"
    numbers.pop("inplace", None)
    return _plain_numbers(stage, *numbers)


def _dropout(stage: Stage, read: Tensor) -> str:
    training, rank = stage.numbers["training"], stage.numbers.get("rank")
    if not isinstance(training, bool):
        return "whether it trains is not constant"
    if rank is not None and read.dim() != rank:
        return f"it drops channels of {read.dim()} dimensions"
    return _plain_numbers(stage, "p")


_READERS = {LINEAR: _linear, NORM: _norm, ACTIVATION: _activation, DROPOUT: _dropout}
