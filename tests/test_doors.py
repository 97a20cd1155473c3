"""The ways into the graph pass: that each gives what torch gives, and how they go with torch's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reach import Log, equal_to_eager
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import config as inductor_config
from torch.utils.checkpoint import checkpoint

N = 16


@pytest.fixture(autouse=True)
def _fresh(one_thread: None) -> Iterator[None]:
    """Everything is compiled here and now."""
    torch._dynamo.reset()
    with (
        inductor_config.patch(fx_graph_cache=False, compile_threads=1),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield


class RMSNorm(nn.Module):
    """Written out, as in Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, N))

    def forward(self, x: Tensor) -> Tensor:
        variance = x.pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + 1e-6))


class Chains(nn.Module):
    """Every kind of chain, called in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(N, n) for n in (N, N, 2 * N))
        self.layer, self.batch, self.rms = nn.LayerNorm(N), nn.BatchNorm1d(N), RMSNorm()
        self.dropout = nn.Dropout(0.0)
        self.conv, self.images = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.group = nn.GroupNorm(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.dropout(F.gelu(self.layer(self.first(x))))
        h = F.relu(self.batch(self.second(h)), inplace=True) + x
        h = F.silu(self.rms(h))
        value, gate = self.third(h).chunk(2, -1)
        h = value * F.silu(gate)
        image = F.relu(self.images(self.conv(h.view(-1, 1, 4, 4))))
        return F.silu(self.group(image)).flatten(1)


TAKEN = [
    "linear → layer → gelu",
    "linear → batch → relu → residual",
    "rms → silu",
    "linear → swiglu",
    "batch → relu",
    "group → silu",
]


def rows(count: int = 6, grad: bool = True) -> Tensor:
    return torch.randn(count, N, dtype=torch.float64).requires_grad_(grad)


def step(model: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """The output, and the gradients of the input and the parameters."""
    parameters = [*model.parameters()] if isinstance(model, nn.Module) else []
    y = model(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *parameters])]


def test_every_kind_of_chain_with_inductor_behind_it(log: Log) -> None:
    model, graphs = Chains().double(), []
    with_options = {"options": {"pre_grad_custom_pass": graphs.append}, "fullgraph": True}
    compiled = equal_to_eager(model, rows(), backend="fused", **with_options)
    assert log.fused == TAKEN and len(graphs) == 1
    reference = compiled._orig_mod
    plain = copy.deepcopy(reference)
    for training in (False, True):
        compiled.train(training)
        plain.train(training)
        x = rows()
        for a, b in zip(step(compiled, x), step(plain, x), strict=True):
            torch.testing.assert_close(a, b)
        for a, b in zip(compiled.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(a, b)
    # Back in training nothing is compiled again.
    assert len(graphs) == 2 and log.fused == 2 * TAKEN


@pytest.fixture
def patches(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What Inductor is told instead of compiling."""
    found: list[dict[str, Any]] = []

    def compile_fx(module: Any, inputs: Any, *, config_patches: Any = None, **_: Any) -> Any:
        found.append(config_patches)
        return module.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    return found


def test_mode_and_options_are_inductors(patches: list[dict[str, Any]]) -> None:
    def compiled(backend: str, **how: Any) -> dict[str, Any]:
        torch._dynamo.reset()
        torch.compile(torch.relu, backend=backend, **how)(torch.ones(3))
        own = dict(patches.pop())
        own.pop("pre_grad_custom_pass", None)
        return own

    for how in ({"mode": "max-autotune-no-cudagraphs"}, {"options": {"max-fusion-size": 8}}, {}):
        assert compiled("fused", **how) == compiled("inductor", **how)
    with pytest.raises(RuntimeError, match="Unexpected optimization option fuse_more"):
        compiled("fused", options={"fuse_more": True})
    with pytest.raises(RuntimeError, match="Unexpected type of attr max_fusion_size"):
        compiled("fused", options={"max_fusion_size": "8"})
    with pytest.raises(RuntimeError, match="Unrecognized mode"):
        compiled("fused", mode="fastest")


def block(norm: type[nn.Module] = nn.BatchNorm1d) -> nn.Sequential:
    return nn.Sequential(nn.Linear(N, N), norm(N), nn.GELU()).double()


@pytest.mark.full
@pytest.mark.parametrize("dynamic", [None, True, False])
def test_another_batch_size_makes_no_more_graphs(dynamic: bool | None, log: Log) -> None:
    graphs = {}
    for backend in ("inductor", "fused"):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend(backend)
        model = block()
        compiled = torch.compile(copy.deepcopy(model), backend=counter, dynamic=dynamic)
        for n in (17, 32, 64):
            x = rows(n)
            for a, b in zip(step(compiled, x), step(model, x), strict=True):
                torch.testing.assert_close(a, b)
        graphs[backend] = counter.frame_count
    assert graphs["fused"] == graphs["inductor"]
    assert "linear → batch → gelu" in log.fused


def test_a_checkpoint_and_a_graph_break(log: Log) -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            # Eager's recomputation would update running statistics a second time.
            self.first, self.second = block(), block(nn.LayerNorm)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            torch._dynamo.graph_break()
            return checkpoint(self.second, h, use_reentrant=False)

    equal_to_eager(Parts(), rows(), backend="fused")
    assert log.fused == ["linear → batch → gelu", "linear → layer → gelu"]


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = block().float(), nn.LayerNorm(N)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            h = self.inner(x) * 2
            with torch.autocast("cpu", enabled=False):
                return F.relu(self.norm(h.float()))


@pytest.mark.parametrize("backend", ["fused", "fused_eager"])
def test_autocast_inside_the_model_has_eagers_dtypes(backend: str, log: Log) -> None:
    x = torch.randn(32, N, requires_grad=True)
    equal_to_eager(Autocast(), x, backend=backend, tolerance=3e-2)
    assert log.fused == ["linear → batch → gelu", "layer → relu"]


@pytest.mark.parametrize("backend", ["fused", "fused_eager"])
def test_images_of_open_sizes_can_be_trained(backend: str, log: Log) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.second = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(F.relu(self.norm(self.conv(x))))

    model = Block().double()
    compiled = torch.compile(copy.deepcopy(model), backend=backend, dynamic=True)
    for size in (6, 9):
        x = torch.randn(2, 3, size, size + 1, dtype=torch.float64, requires_grad=True)
        for a, b in zip(step(compiled, x), step(model, x), strict=True):
            torch.testing.assert_close(a, b)
    reason = "the compiler leaves the sizes of the images open"
    # Inductor cannot, eager torch can.
    assert (log.left.get("batch → relu") == reason) == (backend == "fused")
    assert ("batch → relu" in log.fused) == (backend == "fused_eager")
