"""What `explain` says of a model's calls."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused
from fused.graph import policy

pytestmark = pytest.mark.usefixtures("fresh_compiler")

C = 32


class Block(nn.Module):
    """A pre-norm block: what a Sequential holds, and what a forward calls."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(C), nn.Dropout(0.1)
        self.inner = nn.Sequential(nn.Linear(C, C), nn.GELU(), nn.Dropout(0.1), nn.Linear(C, C))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.inner(self.norm(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.batch = nn.BatchNorm1d(C)
        self.up, self.gate = nn.Linear(C, C), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        x = F.relu(self.batch(x))
        torch._dynamo.graph_break()
        return self.up(x) * F.silu(self.gate(x))


def by_name(explanation: fused.Explanation) -> dict[str, list[fused.Call]]:
    found: dict[str, list[fused.Call]] = {}
    for call in explanation.calls:
        found.setdefault(call.name, []).append(call)
    return found


def test_every_call_its_chain_its_ways_and_its_place() -> None:
    model = Model()
    before = model.batch.running_mean.clone()
    found = fused.explain(model, torch.randn(64, C))
    assert torch.equal(model.batch.running_mean, before)
    assert model.batch.num_batches_tracked == 0 and model.training
    assert found.graphs == 2
    calls = by_name(found)
    assert {name: len(c) for name, c in calls.items()} == {
        **{"layer": 3, "gelu": 3, "dropout": 6, "residual": 3},
        **{"batch": 1, "relu": 1, "silu": 1, "gate": 1},
    }
    assert calls["gelu"][0].ways == ("fuse_", "fused", "fused_eager")
    assert calls["gelu"][0].chain == "linear → gelu → dropout"
    assert calls["residual"][0].ways == ("fused", "fused_eager")
    assert calls["residual"][2].chain == "linear → dropout → residual"
    # The sum and the norm of the next block.
    chain = "linear → dropout → residual → layer"
    assert calls["residual"][0].chain == calls["layer"][1].chain == chain
    assert calls["layer"][0].ways == () and calls["layer"][0].reason
    assert calls["batch"][0].chain == calls["relu"][0].chain == "batch → relu"
    assert calls["gate"][0].ways == calls["silu"][0].ways == ("fused_eager",)
    _, first = inspect.getsourcelines(Block.forward)
    assert calls["layer"][0].place == f"{__file__}:{first + 1}"
    assert calls["residual"][0].bytes == 3 * 64 * C * 4


def test_random_numbers_are_as_before() -> None:
    model, x = Model(), torch.randn(8, C)
    torch.manual_seed(1)
    wanted = torch.rand(3)
    torch.manual_seed(1)
    fused.explain(model, x)
    assert torch.equal(torch.rand(3), wanted)


def test_shares_and_what_is_printed() -> None:
    found = fused.explain(Model(), torch.randn(64, C))
    text = str(found)
    assert "2 × norm layer" in text and "test_explain.py:" in text
    assert f'{found.share("fused"):.0%} by torch.compile(backend="fused")' in text
    # Passes over one tensor; fuse_ has three GELUs and three dropouts, the pass also the others but
    # the first LayerNorm. Inductor keeps what drops nothing.
    passes = 3 * (2 + 2 + 2 + 2 + 3) + 2 + 2 + 2 + 3
    assert found.share("fuse_") == pytest.approx(12 / passes)
    assert found.share("fused_eager") == pytest.approx((passes - 2) / passes)
    assert 12 / passes < found.share("fused") < (passes - 2) / passes


def test_evaluation() -> None:
    found = fused.explain(Model().eval(), torch.randn(64, C))
    dropped = by_name(found)["dropout"]
    assert {call.reason for call in dropped} == {"it drops nothing"}
    assert {call.bytes for call in dropped} == {0}


def test_inference_leaves_pointwise_chains_to_inductor() -> None:
    with torch.no_grad():
        found = fused.explain(Model().eval(), torch.randn(64, C))
    relu = by_name(found)["relu"][0]
    assert relu.ways == ("fused_eager",) and "Inductor" in relu.reason


@pytest.mark.parametrize("asked", [True, False])
def test_chains_between_convolutions_that_inductor_lays_out(
    asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy, "_LARGE", 0)
    if asked:
        monkeypatch.setenv("TORCHINDUCTOR_LAYOUT_OPTIMIZATION", "1")
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2)
    for count in (3, 4):
        left = asked and count == 3
        found = by_name(fused.explain(nn.Sequential(*layers[:count]), torch.randn(2, 3, 8, 8)))
        ways = ("fused_eager",) if left else ("fused", "fused_eager")
        assert found["batch"][0].ways == ("fuse_", *ways)
        assert ("convolutions" in found["batch"][0].reason) is left


def test_what_was_compiled_before_changes_nothing() -> None:
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2))
    for size in (8, 9, 10):
        torch.compile(nn.Sequential(*layers), backend="eager")(torch.randn(2, 3, size, size))
        found = by_name(fused.explain(layers, torch.randn(2, 3, size, size)))
        assert found["batch"][0].ways == ("fuse_", "fused", "fused_eager")


def test_a_model_without_any() -> None:
    found = fused.explain(nn.Linear(4, 4), torch.randn(2, 4))
    assert found.calls == [] and found.share("fused") == 0.0
    assert "no norm, activation or dropout in 1 graph" in str(found)
    with pytest.raises(TypeError, match=r"must be an nn\.Module"):
        fused.explain(torch.sin)  # type: ignore[arg-type]


def test_keywords_and_subgraphs() -> None:
    class Saved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, *, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False)

    found = fused.explain(Saved(), kwargs={"x": torch.randn(8, C)})
    assert by_name(found)["gelu"][0].chain == "linear → gelu → dropout"


def test_command_line(tmp_path: Path) -> None:
    (tmp_path / "mymodel.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def build():\n"
        "    net = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU())\n"
        "    return net, (torch.randn(4, 8),)\n"
    )
    run = subprocess.run(
        [sys.executable, "-m", "fused", "explain", "mymodel:build"],
        **{"cwd": tmp_path, "capture_output": True, "text": True},
    )
    assert run.returncode == 0, run.stderr
    assert "norm layer" in run.stdout and "one operation by fuse_" in run.stdout
