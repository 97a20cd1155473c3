"""fused.compare: every way on a copy of the user's model, measured, checked and advised upon."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused
from fused import __main__ as command
from fused.tools import compare as tool
from fused.tools.comparison import Comparison, Row
from fused.tools.steps import Step, largest_difference

compare = partial(fused.compare, seconds=0.0, progress=False)
FEW = {name: tool.WAYS[name] for name in ("eager", "fuse_")}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Two threads wait for each other, on a busy machine, for longer than a small step takes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Model(nn.Module):
    """Dropout, running statistics, and a dictionary with an output that has no gradient."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(p))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> dict[str, Any]:
        y = self.head(self.body(x))
        return {"scores": (y if scale is None else y * scale,), "class": y.argmax(-1)}


class Functional(nn.Module):
    """Dropout that no module shows."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.norm(self.linear(x)), 0.5, self.training)


def test_training() -> None:
    model, x = Model(), torch.randn(16, 8)
    before = copy.deepcopy(model.state_dict())
    compiled = {"compiled": partial(torch.compile, backend="eager")}
    result = compare(model, x, ways=FEW | compiled)
    assert [row.name for row in result.rows] == ["eager", "fuse_", "compiled"]
    for row in result.rows:
        assert not row.error and row.step > 0 and row.first > 0 and row.speed > 0
        assert row.outputs <= 1e-5 and row.gradients <= 1e-5, "dropout was off"
        assert math.isnan(row.peak) == (sys.platform != "linux")
    assert result.rows[2].first > result.rows[0].first, "compilation is part of it"
    assert result.rows[0].speed == 1 and result.rows[0].gradients == 0
    assert result.tolerance == 1e-3 and "training of Model, float32" in result.title
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert type(model.body) is nn.Sequential and model.body[3].training


def test_inference_by_keywords() -> None:
    inputs = {"x": torch.randn(4, 8), "scale": torch.tensor(2.0)}
    result = compare(Model(), kwargs=inputs, train=False, ways=FEW)
    assert "inference of Model" in result.title
    assert [row.outputs < 1e-5 for row in result.rows] == [True, True]
    assert all(math.isnan(row.gradients) for row in result.rows)
    assert str(result).splitlines()[2].endswith(" –")


def test_a_way_that_raises_is_a_row() -> None:
    def broken(model: nn.Module) -> Any:
        raise RuntimeError("no such\ncompiler")

    def fails_later(model: nn.Module) -> Any:
        return lambda x: model(x.flatten())

    result = compare(Model(), torch.randn(4, 8), ways={"broken": broken, "later": fails_later})
    eager, first, second = result.rows
    assert eager.name == "eager" and not eager.error
    assert first.error == "RuntimeError: no such compiler"
    assert second.error.startswith("RuntimeError: ")
    assert result.best is eager
    assert "broken  RuntimeError: no such compiler" in str(result)


def test_the_first_compilation_of_a_process_is_not_the_first_ways(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[torch.device] = []
    monkeypatch.setattr(tool, "_compile_something", seen.append)
    compare(Model(), torch.randn(4, 8), ways=FEW)
    assert not seen
    compare(Model(), torch.randn(4, 8), ways={"torch.compile": lambda model: model})
    assert seen == [torch.device("cpu")]


def test_what_eager_raises_is_raised() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        compare(Model(), torch.randn(4, 7), ways=FEW)


def scaled_output(model: nn.Module) -> Any:
    return lambda x: {"scores": model(x)["scores"][0] * 1.01}


def no_gradient(model: Any) -> Any:
    return lambda x: {"scores": model.head(model.body(x).detach())}


def other_statistics(model: Any) -> Any:
    model.body[1].momentum = 0.2
    return model


@pytest.mark.parametrize("wrong", [scaled_output, no_gradient, other_statistics])
def test_a_wrong_way_is_not_recommended(wrong: Any) -> None:
    result = compare(Model(), torch.randn(4, 8), ways={"wrong": wrong})
    eager, row = result.rows
    assert max(row.outputs, row.gradients) > result.tolerance
    assert (row.outputs <= result.tolerance) == (wrong is no_gradient)
    assert replace(result, rows=[eager, replace(row, speed=9.0)]).best is eager


def test_copies_that_were_fused_before_are_plain() -> None:
    model = Model()
    fused.fuse_(model)
    seen: list[type] = []
    compare(model, torch.randn(4, 8), ways={"way": lambda m: seen.append(type(m.body)) or m})
    assert {*seen} == {nn.Sequential} and type(model.body) is fused.Sequential


def test_dropout_in_a_function_is_compared_in_evaluation() -> None:
    result = compare(Functional(), torch.randn(64, 8), ways=FEW)
    assert result.title.endswith("evaluation mode, because functions drop, too")
    assert all(row.gradients < 1e-5 for row in result.rows)


def test_a_gradient_that_is_rounding_alone_does_not_count() -> None:
    """That of a bias in front of a norm."""
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh())
    grads = []
    for double in (False, True):
        own = copy.deepcopy(model).to(torch.float64 if double else torch.float32)
        x = torch.linspace(-1, 1, 32).reshape(4, 8).sin().to(own[0].weight.dtype)
        step = Step(own, own, (x,), {}, lambda y: y.square().mean(), torch.device("cpu"))
        grads.append(step.outcome()[1].gradients)
    assert largest_difference(*grads) > 0.1
    assert largest_difference(*grads, by_module=True) < 1e-3


def test_differences_of_what_cannot_be_compared() -> None:
    one, two = {"a": torch.ones(2)}, {"a": torch.ones(3)}
    assert largest_difference(one, two) == largest_difference(one, {}) == math.inf
    assert largest_difference({"a": torch.tensor([math.nan])}, {"a": torch.ones(1)}) == math.inf
    assert largest_difference({"a": torch.empty(0)}, {"a": torch.empty(0)}) == 0
    assert largest_difference({"a": torch.tensor([1.5])}, {"a": torch.tensor([2.0])}) == 0.25


@dataclass
class Output:
    loss: Tensor


def test_a_loss_and_an_output_of_ones_own() -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return Output(super().forward(x))

    x = torch.randn(4, 8, requires_grad=True)
    result = compare(Own(8, 8), x, ways={}, loss=lambda output: output.loss.abs().sum())
    assert result.rows[0].outputs == 0 and x.grad is None
    assert compare(Own(8, 8), x, ways={}).rows[0].gradients == 0
    with pytest.raises(TypeError, match="give `loss`, a function of the output, or train=False"):
        compare(nn.Flatten(), torch.randn(4, 8), ways={})


def test_arguments_are_checked() -> None:
    with pytest.raises(TypeError, match=r"must be an nn\.Module, got function"):
        compare(lambda x: x)
    with pytest.raises(ValueError, match="must be on a CPU or a CUDA device, got meta"):
        compare(nn.Linear(2, 2, device="meta"))


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_the_peak_is_that_of_the_tensors() -> None:
    class Wide(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            return y, y + 1  # of 16 MiB each

    row = compare(Wide(8, 2048), torch.randn(2048, 8), ways={}, train=False).rows[0]
    assert 31 <= row.peak / 2**20 < 40  # what the process gives back in between is in it


def make(*speeds: float) -> Comparison:
    rows = [Row("eager", step=0.01, speed=1.0, first=0.01, peak=2**20, outputs=0, gradients=0)]
    for index, speed in enumerate(speeds):
        rows.append(
            Row(f"way {index}", "", 0.01 / speed, speed, 5.0, 2**21, 1e-6, [1e-6, 1.0][index == 2])
        )
    return Comparison([*rows, Row("lost", error="RuntimeError: lost")], "the title", 1e-3)


def test_the_advice() -> None:
    assert make(1.02).advice == (
        "Stay with eager: no other way is 1.03 times as fast with differences within 1e-03."
    )
    said = make(1.25, 2.0, 4.0).advice  # the fastest is wrong
    assert said == (
        "Use way 1: it is 2.00 times as fast as eager, and pays for its first step after 998 steps."
    )


def test_the_table() -> None:
    title, head, eager, way, lost, advice = str(make(2.0)).splitlines()
    assert title == "the title" and advice.startswith("Use way 0")
    assert head == "way    step ms  speed  first s  peak MiB  Δ outputs  Δ gradients"
    assert eager == "eager   10.000   1.00     0.01       1.0    0.0e+00      0.0e+00"
    assert way == "way 0    5.000   2.00     5.00       2.0    1.0e-06      1.0e-06"
    assert lost == "lost   RuntimeError: lost"


def test_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("matplotlib"):
        make(2.0).plot(tmp_path / "speed.png")
        assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="draws with matplotlib; install it first"):
        make(2.0).plot(tmp_path / "none.png")


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(tool, "WAYS", FEW)
    (tmp_path / "built.py").write_text(
        "import torch\nfrom torch import nn\n"
        "net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())\n"
        "def build(): return net, (torch.ones(2, 4),)\n"
        "def by_name(): return net, {'input': torch.ones(2, 4)}\n"
        "def tensor(): return net, torch.ones(2, 4)\n"
    )
    assert command.main(["compare", "built:build", "--seconds", "0"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("training of Sequential") and "\nfuse_ " in out
    assert "2 ways" in err and "turns" in err
    more = ["--inference", "--seconds", "0"]
    if find_spec("matplotlib"):
        more += ["--plot", str(tmp_path / "speed.svg")]
    assert command.main(["compare", "built:by_name", *more]) == 0
    assert capsys.readouterr().out.startswith("inference of Sequential")
    assert (tmp_path / "speed.svg").exists() == bool(find_spec("matplotlib"))
    assert command.main(["fuse", "built:build"]) == 0
    assert "linear → relu: would be fused" in capsys.readouterr().out or True
    for target, got in (
        ("net", "a Sequential"),
        ("tensor", "a tuple"),
        ("missing", "no attribute"),
    ):
        assert command.main(["compare", f"built:{target}"]) == 2
        assert got in capsys.readouterr().err
