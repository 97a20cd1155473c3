"""fuse_ and unfuse_: in place, nothing lost, everything reported."""

from __future__ import annotations

import copy
import io
import pickle
from abc import ABC
from typing import Any, ClassVar, Generic, TypeVar

import pytest
import torch
from torch import nn

import fused


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Dropout(0.0))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 16), nn.Sequential(nn.LayerNorm(16), nn.ReLU()))
            for _ in range(2)
        )
        self.conv = nn.Sequential(nn.Conv1d(1, 1, 1), nn.BatchNorm1d(1))
        self.shared = self.stem
        self.head = nn.Linear(16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.shared(self.stem(x)[:, :8])
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class Plain(nn.Sequential):
    """Keeps the forward of nn.Sequential."""


class Own(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


def test_everything_survives() -> None:
    model, x = Model(), torch.randn(4, 8)
    optimizer = torch.optim.Adam(model.parameters())
    model(x).sum().backward()
    optimizer.step()
    seen: list[str] = []
    model.stem.register_forward_hook(lambda m, a, o: seen.append("stem"))
    before = {name: id(t) for name, t in model.named_parameters()}
    keys, expected = list(model.state_dict()), model(x)
    states = len(optimizer.state)

    report = fused.fuse_(model)
    assert set(report.modules) == {"stem", "blocks.0.1", "blocks.1.1"}
    assert report.fused == 3
    assert {name: id(t) for name, t in model.named_parameters()} == before
    assert list(model.state_dict()) == keys
    assert len(optimizer.state) == states and all(id(t) in before.values() for t in optimizer.state)
    seen.clear()
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert seen == ["stem", "stem"]
    text = str(report)
    assert "linear → layer → gelu → dropout: fused; 2 calls fused, 0 not" in text
    assert text.endswith("calls of a compiled model are not counted")
    assert str(fused.fuse_(model)) == text  # idempotent
    fused.unfuse_(model)
    assert all(type(m) is not fused.Sequential for m in model.modules())
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("make", [torch.optim.Adam, lambda p: torch.optim.SGD(p, 1e-3, 0.9)])
def test_training_goes_on_as_that_of_the_plain_model(make: Any) -> None:
    """Fused after three steps, with the optimizer that it had; and plain again after six."""
    model = Model().double()
    plain = copy.deepcopy(model)
    optimizers = make(model.parameters()), make(plain.parameters())
    for step in range(9):
        if step == 3:
            fused.fuse_(model)
        if step == 6:
            fused.unfuse_(model)
        x = torch.randn(4, 8, dtype=torch.float64)
        for net, optimizer in zip((model, plain), optimizers, strict=True):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")


def test_a_module_that_was_compiled_before() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model.compile(backend="eager")
    x = torch.randn(2, 4)
    expected = model(x)
    report = fused.fuse_(model)
    torch.testing.assert_close(model(x), expected)
    assert "calls" not in str(report)  # compiled calls are not counted


def test_dry_run_changes_nothing() -> None:
    model = Model()
    report = fused.fuse_(model, dry_run=True)
    assert report.fused == 3 and "would be fused" in str(report)
    assert all(type(m) is not fused.Sequential for m in model.modules())


def test_where_and_subclasses_are_reported() -> None:
    model = nn.Sequential(
        Own(nn.Linear(4, 4), nn.ReLU()),
        nn.Sequential(nn.Linear(4, 4), nn.ReLU()),
        nn.Sequential(nn.Linear(4, 4), nn.Tanh()),
    )
    model[2].forward = nn.Sequential.forward.__get__(model[2])
    x = torch.randn(2, 4)
    expected = model(x)
    report = fused.fuse_(model, where=lambda path, module: path != "1")
    assert report.modules == {}
    text = str(report)
    assert "0: Own is a subclass of nn.Sequential with a forward of its own" in text
    assert "1: left out by `where`" in text and "2: its forward was replaced" in text
    assert torch.equal(model(x), expected)


def test_a_sequential_that_is_iterated_shows_no_calls() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    report = fused.fuse_(model)
    x = torch.randn(2, 4)
    for child in model:
        x = child(x)
    assert "calls" not in str(report)


def test_the_model_itself() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    report = fused.fuse_(model)
    assert type(model) is fused.Sequential and "(the model itself)" in str(report)
    model[1].register_forward_hook(lambda m, a, o: o)
    model(torch.randn(2, 4))
    assert "not fused: child '1': it has forward hooks" in str(report)


def test_what_other_modules_call_is_counted() -> None:
    """fuse_ reads no forward but nn.Sequential's; a report of zeros would not say so."""
    layers = [nn.TransformerEncoderLayer(8, 2, 16) for _ in range(2)]
    layers[1].extra = nn.ModuleList([nn.GELU(), nn.ModuleList([nn.BatchNorm1d(8)])])
    model = nn.Sequential(*layers, nn.LayerNorm(8), fused.NormAct(8, norm="rms", activation="relu"))
    report = fused.fuse_(model, dry_run=True)
    assert report.elsewhere == {"TransformerEncoderLayer": [5, 1, 6]}
    said = (
        "5 norms, 1 activations, 6 dropouts are called in the forward of other modules"
        " (TransformerEncoderLayer), which fuse_ does not change;"
        ' torch.compile(model, backend="fused") reaches them'
    )
    assert str(report).endswith(said)
    assert "other modules" not in str(fused.fuse_(nn.Sequential(nn.Linear(4, 4), nn.ReLU())))


def test_what_a_sequential_with_its_own_forward_calls_is_counted() -> None:
    model = nn.Sequential(Own(nn.Linear(4, 4), nn.LayerNorm(4), nn.GELU()), nn.ReLU())
    assert fused.fuse_(model).elsewhere == {"Own": [1, 1, 0]}


class Named(nn.Sequential):
    """As those of torchvision: a constructor of its own, and more attributes."""

    def __init__(self, width: int, p: float = 0.0) -> None:
        super().__init__(nn.Linear(width, width), nn.LayerNorm(width), nn.ReLU(), nn.Dropout(p))
        self.width = width


class Deeper(Named):
    calls = 0

    def __call__(self, *arguments: Any) -> Any:
        Deeper.calls += 1
        return super().__call__(*arguments)

    def __len__(self) -> int:
        return 1

    def add_module(self, name: str, module: nn.Module | None) -> None:
        super().add_module(name, module)

    def __getattr__(self, name: str) -> Any:
        return 7 if name == "seven" else super().__getattr__(name)


class Slotted(nn.Sequential):
    __slots__ = ("note",)


class Stateful(nn.Sequential):
    """Its own way of being copied; the state is not a copy of the dictionary."""

    def __getstate__(self) -> Any:
        return {"kept": self.__dict__}

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state["kept"])

    def __deepcopy__(self, memo: Any) -> Stateful:
        new = type(self)()
        new.__dict__ = copy.deepcopy(self.__dict__, memo)
        return new


class Registered(nn.Sequential):
    names: ClassVar[list[str]] = []

    def __init_subclass__(cls, *, label: str) -> None:
        cls.names.append(label)


T = TypeVar("T")


class Abstract(nn.Sequential, ABC, Generic[T]):
    pass


LAYERS = [nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU()]
SUBCLASSES: list[Any] = [Plain, Slotted, Stateful, Registered, Abstract]
INSTANCES = [Named(8), Deeper(8), *(kind(*copy.deepcopy(LAYERS)) for kind in SUBCLASSES)]


@pytest.mark.parametrize("plain", INSTANCES, ids=lambda module: type(module).__name__)
def test_a_subclass_that_keeps_the_forward_is_converted(plain: nn.Sequential) -> None:
    kind, x = type(plain), torch.randn(4, 8)
    plain.register_forward_hook(ForwardHook())
    expected, said, keys = plain(x), repr(plain), list(plain.state_dict())
    model = copy.deepcopy(plain)
    report = fused.fuse_(model)
    assert report.fused == 1 and not report.skipped and not report.elsewhere
    assert isinstance(model, kind) and isinstance(model, fused.Sequential)
    made = type(model)
    assert (made.__name__, made.__qualname__) == (kind.__name__, kind.__qualname__)
    assert (made.__module__, made.__doc__) == (kind.__module__, kind.__doc__)
    assert repr(model) == said and list(model.state_dict()) == keys
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert "fused; 1 calls fused" in str(model.plan())
    assert str(fused.fuse_(model)) == str(report) and type(model) is made  # idempotent
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for again in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        assert (
            type(again) is made and again is not model and vars(again).keys() >= vars(plain).keys()
        )
        torch.testing.assert_close(again(x), expected, rtol=1e-5, atol=1e-5)
        assert "fused; 1 calls fused" in str(again.plan())
    fused.unfuse_(model)
    assert type(model) is kind and vars(model).keys() == vars(plain).keys()
    torch.testing.assert_close(model(x), expected)
    assert type(pickle.loads(pickle.dumps(model))) is kind
    assert Registered.names == []


class ForwardHook:
    """Can be pickled."""

    def __call__(self, module: nn.Module, arguments: Any, output: torch.Tensor) -> None:
        pass


def test_a_slot_and_the_attributes_of_a_subclass_survive() -> None:
    model, deeper = Slotted(*copy.deepcopy(LAYERS)), Deeper(8)
    model.note = "kept"
    fused.fuse_(nn.ModuleList([model, deeper]))
    assert isinstance(model, fused.Sequential) and model.note == "kept"
    before = Deeper.calls
    deeper(torch.randn(2, 8))
    assert Deeper.calls == before + 1
    assert (len(deeper), deeper.seven, deeper.width) == (1, 7, 8)
    assert type(type(deeper)(4)) is type(deeper)


def test_a_converted_subclass_compiles() -> None:
    plain, x = Named(8), torch.randn(4, 8)
    model = copy.deepcopy(plain)
    fused.fuse_(model)
    seen: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), plain(x), rtol=1e-5, atol=1e-5)
    assert "autograd_function_apply" in seen and "layer_norm" not in str(seen)


def test_one_class_for_all_modules_of_a_class() -> None:
    model = nn.ModuleList([Named(4), Named(4), Deeper(4)])
    assert len(fused.fuse_(model).modules) == 3
    assert type(model[0]) is type(model[1]) is not type(model[2])
    fused.unfuse_(model)
    assert [type(m) for m in model] == [Named, Named, Deeper]


class Iterated(nn.Sequential):
    def __iter__(self) -> Any:
        return reversed(self._modules.values())


class Reduced(nn.Sequential):
    def __reduce__(self) -> Any:
        return Reduced, (*self._modules.values(),)


class New(nn.Sequential):
    def __new__(cls, *arguments: Any) -> New:
        return super().__new__(cls)


class Meta(type):
    pass


class WithMeta(nn.Sequential, metaclass=Meta):
    pass


class Planned(nn.Sequential):
    def plan(self) -> str:
        return "its own"


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Iterated, "Iterated has an __iter__ of its own"),
        (Reduced, "Reduced has a __reduce__ of its own"),
        (New, "New has a __new__ of its own"),
        (WithMeta, "the class of WithMeta is Meta"),
        (Planned, "it has a `plan` of its own"),
        (torch.ao.nn.intrinsic.LinearReLU, "quantization in torch looks for exactly this class"),
    ],
)
def test_what_cannot_be_converted_safely_is_left_alone(kind: Any, why: str) -> None:
    layers = [nn.Linear(4, 4), nn.ReLU(), nn.Dropout(0.0)]
    model = kind(*(layers[:2] if kind is torch.ao.nn.intrinsic.LinearReLU else layers))
    report = fused.fuse_(model)
    assert type(model) is kind and why in report.skipped[""]
    assert sum(map(sum, report.elsewhere.values())) == len(model) - 1


def test_a_child_named_plan_stays_reachable() -> None:
    model = nn.Sequential()
    model.add_module("plan", nn.Linear(4, 4))
    model.append(nn.ReLU())
    report = fused.fuse_(model)
    assert "it has a `plan` of its own" in str(report) and model.plan is model._modules["plan"]


def test_a_parametrised_subclass_is_left_alone() -> None:
    model = Plain(nn.Linear(4, 4), nn.ReLU())
    model.scale = nn.Parameter(torch.ones(4))
    torch.nn.utils.parametrize.register_parametrization(model, "scale", nn.Identity())
    assert "it is parametrised" in fused.fuse_(model).skipped[""]
    torch.nn.utils.parametrize.remove_parametrizations(model, "scale")
    assert type(model) is Plain
    fused.fuse_(model)
    made = type(model)
    torch.nn.utils.parametrize.register_parametrization(model, "scale", nn.Identity())
    fused.unfuse_(model)
    torch.nn.utils.parametrize.remove_parametrizations(model, "scale")
    assert type(model) is made
