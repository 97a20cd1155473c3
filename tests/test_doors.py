"""The ways into the graph pass: that each gives what torch gives, and how they go with torch's."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from processes import run_python
from reach import Log, equal_to_eager
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import _recursive_pre_grad_passes
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.utils.checkpoint import checkpoint

import fused
from fused.graph import policy

N = 16


def full(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.full)


@pytest.fixture(autouse=True)
def _fresh(one_thread: None) -> Iterator[None]:
    """Everything is compiled here and now, and no chain is too small for it."""
    torch._dynamo.reset()
    with (
        mock.patch.object(policy, "_LARGE", 0),
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

    layout = {"layout_optimization": False}  # convolutions keep the model's, on CPUs
    for how in ({"mode": "max-autotune-no-cudagraphs"}, {"options": {"max-fusion-size": 8}}, {}):
        assert compiled("fused", **how) == layout | compiled("inductor", **how)
    for said in (True, False):
        assert compiled("fused", options={"layout_optimization": said}) == {
            "layout_optimization": said
        }
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


def test_momentum_none_breaks_the_graph_as_ever(log: Log) -> None:
    model = nn.Sequential(nn.Linear(N, N), nn.BatchNorm1d(N, momentum=None), nn.ReLU()).double()
    equal_to_eager(model, rows())
    assert "batch → relu" not in " ".join(log.fused)
    for backend in ("eager", "fused_eager"):
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.TorchDynamoException):
            torch.compile(model, backend=backend, fullgraph=True)(rows())


def test_dropout_has_a_mask_of_its_own(log: Log) -> None:
    model, x = nn.Sequential(nn.ReLU(), nn.Dropout()), torch.ones(64, N)
    masks = []
    for call in (model, torch.compile(model, backend="fused_eager"), fused.Sequential(*model)):
        torch.manual_seed(0)
        masks.append(call(x) == 0)
    assert log.fused == ["relu → dropout"]
    assert not torch.equal(masks[0], masks[1]) and torch.equal(masks[1], masks[2])


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


@pytest.mark.parametrize("backend", [full("fused"), "fused_eager"])
def test_autocast_inside_the_model_has_eagers_dtypes(backend: str, log: Log) -> None:
    x = torch.randn(32, N, requires_grad=True)
    equal_to_eager(Autocast(), x, backend=backend, tolerance=3e-2)
    assert log.fused == ["linear → batch → gelu", "layer → relu"]


def before_autograd(module: Any, inputs: Any) -> Any:
    """A backend: what Inductor does before autograd, and nothing else of it."""
    return _recursive_pre_grad_passes(module, inputs).forward


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.norm(self.conv(x))))


@pytest.mark.parametrize("backend", [full("fused"), "fused_eager", before_autograd])
def test_images_of_open_sizes_can_be_trained(backend: Any, log: Log) -> None:
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64, requires_grad=True)
    with fused.inductor():
        equal_to_eager(Images().double(), x, backend=backend, dynamic=True)
    reason = "the compiler leaves the sizes of the images open"
    # Inductor cannot, eager torch can.
    assert (log.left.get("batch → relu") == reason) == (backend != "fused_eager")
    assert ("batch → relu" in log.fused) == (backend == "fused_eager")


# ---- into Inductor's own ----


def compiled_again(log: Log) -> list[str]:
    """The chains that are taken where somebody calls torch.compile now."""
    torch._dynamo.reset()
    log.fused.clear()
    x = rows()
    model = block(nn.LayerNorm)
    compiled = torch.compile(copy.deepcopy(model), backend=before_autograd)
    for a, b in zip(step(compiled, x), step(model, x), strict=True):
        torch.testing.assert_close(a, b)
    return log.fused


TAKEN_AGAIN = ["linear → layer → gelu"]


class Named(CustomGraphPass):
    """A pass of somebody else, which Inductor's caches may know."""

    def __init__(self, name: str | None, calls: list[str | None]) -> None:
        self.name, self.calls = name, calls

    def __call__(self, graph: torch.fx.Graph) -> None:
        # It runs first, and sees the model's own calls.
        assert any(node.target is F.layer_norm for node in graph.nodes)
        self.calls.append(self.name)

    def uuid(self) -> str | None:
        return self.name


def setting() -> Any:
    return inductor_config.pre_grad_custom_pass


def test_a_block_and_a_call_put_the_pass_into_inductor(log: Log) -> None:
    with inductor_config.patch(pre_grad_custom_pass=None):
        assert compiled_again(log) == []
        with fused.inductor():
            assert compiled_again(log) == TAKEN_AGAIN
        assert setting() is None and compiled_again(log) == []
        fused.inductor()
        assert compiled_again(log) == TAKEN_AGAIN
        with fused.inductor(), fused.inductor():
            assert compiled_again(log) == TAKEN_AGAIN
        assert compiled_again(log) == TAKEN_AGAIN


def test_what_is_compiled_again_after_the_block_is_inductors(log: Log) -> None:
    model, x = block(nn.LayerNorm), rows()
    compiled = torch.compile(model, backend=before_autograd, dynamic=False)
    with fused.inductor():
        compiled(x)
    compiled(x)
    assert log.fused == TAKEN_AGAIN
    compiled(rows(7))
    assert log.fused == TAKEN_AGAIN


def test_an_exception_ends_the_block() -> None:
    with pytest.raises(KeyError), fused.inductor():
        raise KeyError
    assert setting() is None


@pytest.mark.parametrize("several", [False, True])
def test_a_pass_that_is_set_already_runs_too_and_is_set_again(several: bool, log: Log) -> None:
    calls: list[str | None] = []
    before: Any = Named("first", calls)
    if several:
        before = [before, Named("second", calls)]
    with inductor_config.patch(pre_grad_custom_pass=before):
        with fused.inductor(), fused.inductor():
            assert compiled_again(log) == TAKEN_AGAIN
        assert calls == ["first", "second"][: 1 + several]
        assert setting() is before


def test_the_key_of_caches_changes_with_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    def key() -> Any:
        with fused.inductor():
            return setting().uuid()

    found = [key()]
    assert key() == found[0]
    with fused.use_backend("reference"):
        found.append(key())
    monkeypatch.setenv("FUSED_BACKEND", "reference")
    found.append(key())
    monkeypatch.setenv("FUSED_ANYTHING", "1")
    found.append(key())
    for name in "first", "second":
        with inductor_config.patch(pre_grad_custom_pass=Named(name, [])):
            found.append(key())
    assert len(set(found)) == len(found) and None not in found
    with inductor_config.patch(pre_grad_custom_pass=lambda graph: None):
        assert key() is None


@pytest.fixture
def cached(tmp_path: Path) -> Iterator[Callable[[], dict[str, int]]]:
    """Compiles with caches in an empty folder, and says how often AOTAutograd's was asked."""

    def compiled(backend: str) -> dict[str, int]:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        torch.manual_seed(0)
        model, x = block(nn.LayerNorm), rows()
        found = step(torch.compile(copy.deepcopy(model), backend=backend), x)
        for a, b in zip(found, step(model, x), strict=True):
            torch.testing.assert_close(a, b)
        counted = torch._dynamo.utils.counters["aot_autograd"]
        return {name: n for name in CACHED if (n := counted[f"autograd_cache_{name}"])}

    with (
        inductor_config.patch(fx_graph_cache=True),
        torch._functorch.config.patch(enable_autograd_cache=True),
        mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=str(tmp_path)),
    ):
        yield compiled


CACHED = ("hit", "miss", "bypass")
knows_passes = pytest.mark.skipif(
    not hasattr(inductor_config, "pre_grad_pass_timing"),
    reason="torch 2.11 runs the pass before it looks into its caches, and bypasses AOTAutograd's",
)


@knows_passes
@pytest.mark.parametrize("backend", ["inductor", "fused"])
def test_caches_know_the_pass(
    backend: str, cached: Callable[..., Any], log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiled() -> tuple[dict[str, int], list[str]]:
        log.fused.clear()
        if backend == "fused":
            return cached(backend), [*log.fused]
        with fused.inductor():
            return cached(backend), [*log.fused]

    assert compiled() == ({"miss": 1}, TAKEN_AGAIN)
    assert compiled() == ({"hit": 1}, [])
    monkeypatch.setenv("FUSED_BACKEND", "auto")
    assert compiled() == ({"miss": 1}, TAKEN_AGAIN)
    # A pass without uuid() runs before torch looks into its caches, and ours with it; so does
    # every pass in torch 2.11.
    for how in ({"pre_grad_custom_pass": lambda graph: None}, {"pre_grad_pass_timing": "early"}):
        with inductor_config.patch(how):
            assert compiled() == ({"bypass": 1}, TAKEN_AGAIN)


PROCESS = """
import fused, json, torch
from fused.graph import policy
from torch import nn
policy._LARGE = 0
torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.GELU()).double()
x = torch.randn(6, 16, dtype=torch.float64)
wanted = model(x)
with fused.inductor():
    found = torch.compile(model)(x)
torch.testing.assert_close(found, wanted)
gradients = [torch.autograd.grad(y.square().sum(), [*model.parameters()]) for y in (found, wanted)]
torch.testing.assert_close(*gradients)
print(json.dumps(torch._dynamo.utils.counters["aot_autograd"]))
"""


@knows_passes
@pytest.mark.full
def test_another_process_finds_what_was_compiled(tmp_path: Path) -> None:
    def run(backend: str) -> dict[str, int]:
        done = run_python(PROCESS, TORCHINDUCTOR_CACHE_DIR=str(tmp_path), FUSED_BACKEND=backend)
        assert done.returncode == 0, done.stderr
        counted = json.loads(done.stdout)
        return {name: n for name in CACHED if (n := counted.get(f"autograd_cache_{name}", 0))}

    found = [run(backend) for backend in ("auto", "auto", "reference")]
    assert found == [{"miss": 1}, {"hit": 1}, {"miss": 1}]


def test_importing_fused_imports_no_compiler() -> None:
    done = run_python(
        "import fused, sys\n"
        "assert not {'torch._dynamo', 'torch._inductor.config'} & {*sys.modules}\n"
        "from fused import inductor\n"
        "assert inductor is fused.inductor and 'torch._inductor.config' in sys.modules\n"
        "assert not hasattr(fused, 'nothing')"
    )
    assert done.returncode == 0, done.stderr


def operators(call: Callable[[], Any]) -> set[str]:
    """The operators of this library that a call runs."""
    with torch.profiler.profile() as seen:
        call()
    return {event.key for event in seen.key_averages() if "fused_lnad" in event.key}


@pytest.mark.parametrize("backend", ["fused", "fused_eager"])
def test_a_request_after_compiling(backend: str) -> None:
    model, x = block(nn.LayerNorm), rows(grad=False)
    wanted = model(x)
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        assert operators(lambda: compiled(x))
        with fused.use_backend("reference"):
            torch.testing.assert_close(compiled(x), wanted)
            # What Inductor has compiled stays; without it each call looks.
            assert bool(operators(lambda: compiled(x))) == (backend == "fused")
        torch._dynamo.reset()
        with fused.use_backend("reference"):
            compiled(x)
        assert operators(lambda: compiled(x)) == set()


@knows_passes
def test_the_pass_is_in_inductor_for_the_thread_that_asks(log: Log) -> None:
    found = []
    with fused.inductor():
        thread = Thread(target=lambda: found.append(setting()))
        thread.start()
        thread.join()
    assert found == [None]


@pytest.mark.full
def test_hugging_face_trainer(tmp_path: Path, log: Log) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16}
    p = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(**sizes, **layers, **p)
    model = transformers.BertForSequenceClassification(config)
    samples = [
        {"input_ids": torch.randint(0, 50, (8,)), "labels": torch.tensor(i % 2)} for i in range(8)
    ]

    def loss(compile: bool) -> float:
        how = {"max_steps": 2, "per_device_train_batch_size": 4, "torch_compile": compile}
        quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
        arguments = transformers.TrainingArguments(str(tmp_path), **how, **quiet)
        own = copy.deepcopy(model)
        trained = transformers.Trainer(model=own, args=arguments, train_dataset=samples).train()
        return trained.training_loss

    wanted = loss(False)
    assert log.fused == []
    with fused.inductor():
        found = loss(True)
    assert {"linear → residual → layer", "linear → gelu"} <= {*log.fused}
    assert found == pytest.approx(wanted, rel=1e-5)
