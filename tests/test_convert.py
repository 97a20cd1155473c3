"""fuse_ and unfuse_: in place, nothing lost, everything reported."""

from __future__ import annotations

import copy
from typing import Any

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
        " (TransformerEncoderLayer), which fuse_ does not change; use fused.LinearNormAct"
    )
    assert said in str(report)
    assert "other modules" not in str(fused.fuse_(nn.Sequential(nn.Linear(4, 4), nn.ReLU())))


def test_a_subclass_that_keeps_the_forward_is_told_what_to_do() -> None:
    report = fused.fuse_(nn.ModuleList([Plain(nn.Linear(4, 4), nn.ReLU())]))
    assert "0: Plain is a subclass of nn.Sequential; derive it from fused.Sequential" in str(report)
