"""torch.compile with the graph pass on third-party models: what the models give by themselves."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from models import MODELS, STAGES, WITHOUT_DROPOUT, P
from torch import Tensor, nn
from torch._dynamo.utils import counters

from fused.graph import doors

pytestmark = [
    pytest.mark.usefixtures("bench_harness", "one_thread"),
    pytest.mark.filterwarnings("ignore"),  # the packages' own
]
# Of each tensor's largest element; gradients that cancel have a share of the largest one's.
TOLERANCES = {"float64": 1e-9, "float32": 2e-4}
CANCELLED = 1e-3
# These take RMSNorm's statistics in float32 in every dtype.
ROUNDED, ROUNDED_TOLERANCE = ("t5", "llama"), 2e-6
# A probability that is not zero, so that dropout stays in the graph, and drops nothing.
NEVER = 1e-12
# Those that `make test` also calls in evaluation.
QUICK = ("mlp batch", "sb3 create_mlp", "resnet", "convnext")
# Those that are compiled; each takes Inductor a minute or less.
COMPILED = ("mlp layer", "mlp batch", "bert", "vit", "llama", "t5", "graph sage", "resnet")
MODES = {True: "training", False: "evaluation"}


def cases(ordinary: Callable[[str, str, bool], bool], names: Iterable[str]) -> list[Any]:
    """Model, dtype and training or evaluation; all but the ordinary ones are `full`."""
    return [
        pytest.param(
            name, (dtype, training), id=f"{name}-{dtype}-{mode}",
            marks=[] if ordinary(name, dtype, training) else [pytest.mark.full],
        )
        for name in names for dtype in TOLERANCES for training, mode in MODES.items()
    ]  # fmt: skip


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The chains that the pass takes."""
    found: list[Any] = []
    real = doors.rewrite

    def rewrite(*given: Any) -> list[Any]:
        chains = real(*given)
        found.extend(chains)
        return chains

    monkeypatch.setattr(doors, "rewrite", rewrite)
    return found


def compiled(module: nn.Module, backend: str) -> Callable[..., Any]:
    torch.compiler.reset()
    counters.clear()
    return torch.compile(module, backend=backend, fullgraph=True)


def step(model: Any, module: nn.Module, call: Callable[..., Any]) -> dict[str, Tensor]:
    """Outputs, gradients and buffers after one step of training, or one call in evaluation."""
    module.zero_grad()
    with torch.set_grad_enabled(module.training):
        outputs = model.outputs(call)
        if module.training:
            model.loss(outputs).backward()
    found = {f"output {index}": y.detach() for index, y in enumerate(outputs)}
    found |= {f"buffer {name}": t.clone() for name, t in module.named_buffers()}
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            found[f"gradient {name}"] = parameter.grad
    return found


def largest(tensors: list[Tensor]) -> float:
    return max((float(t.abs().max()) for t in tensors if t.numel()), default=0.0)


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys()
    floor = CANCELLED * largest([t for name, t in want.items() if name.startswith("gradient")])
    for name, t in want.items():
        scale = max(largest([t]), floor if name.startswith("gradient") else 0.0)
        torch.testing.assert_close(
            got[name], t, rtol=0, atol=tolerance * scale, msg=lambda m, name=name: f"{name}: {m}"
        )


def compare(name: str, backend: str, dtype: str, training: bool, taken: list[Any]) -> None:
    model = MODELS[name](NEVER).to(getattr(torch, dtype))
    ours = model.module.train(training)
    theirs = copy.deepcopy(ours)
    call = compiled(ours, backend)
    tolerance = max(TOLERANCES[dtype], ROUNDED_TOLERANCE if name in ROUNDED else 0.0)
    assert_equal(step(model, ours, call), step(model, theirs, theirs), tolerance)
    if training:
        assert sum(len(chain.stages) for chain in taken) >= STAGES[name], [
            chain.describe() for chain in taken
        ]
    step(model, ours, call)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    ("name", "case"),
    cases(lambda *case: case[1:] == ("float64", True)
          or (case[0] in QUICK and case[1:] == ("float32", False)), MODELS),
)  # fmt: skip
def test_gives_what_the_model_gives(name: str, case: tuple[str, bool], taken: list[Any]) -> None:
    compare(name, "fused_eager", *case, taken)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "case"), cases(lambda *case: case == ("mlp layer", "float32", True), COMPILED)
)
def test_gives_what_the_model_gives_before_inductor(
    name: str, case: tuple[str, bool], taken: list[Any]
) -> None:
    # A graph from autograd's cache has been through the pass before.
    with torch._functorch.config.patch(enable_autograd_cache=False):
        compare(name, "fused", *case, taken)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("mlp layer", "tabm") else pytest.mark.full)
        for name in MODELS
        if name not in WITHOUT_DROPOUT
    ],
)
def test_dropout_follows_the_seed(name: str) -> None:
    model = MODELS[name](P)
    call = compiled(model.module, "fused_eager")
    found = []
    for seed in (1, 1, None):
        if seed is not None:
            torch.manual_seed(seed)
        found.append(step(model, model.module, call))
    first, again, another = found
    assert all(bool(t.isfinite().all()) for t in first.values())
    kept = [key for key in first if not key.startswith("buffer")]
    assert all(torch.equal(first[key], again[key]) for key in kept)
    assert not torch.equal(first["output 0"], another["output 0"])
