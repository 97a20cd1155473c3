"""The graph pass: what is a chain, what is none, and that nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reach import Log, N, equal_to_eager, llama, rows
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fused

pytestmark = pytest.mark.usefixtures("fresh_compiler")


# ---- what a chain may not do ----


class Shift(nn.Module):
    """A function of parameters as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(N).double()
        self.batch = nn.BatchNorm1d(N).double()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def _grad_mode(m: Any, x: Tensor) -> Tensor:
    h = m.norm(x)
    with torch.no_grad():
        return F.relu(h)


def _autocast(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        h = m.norm(x)
    return F.relu(h)


def _written_between(m: Any, x: Tensor) -> Tensor:
    z = x * 2
    h = F.relu(z)
    total = z.add_(1)
    return F.dropout(h, 1.0) + total


def _written_later(m: Any, x: Tensor) -> Tensor:
    z = x * 2
    h = F.dropout(F.relu(z), 1.0)
    return h + z.add_(1)


def _residual_written_between(m: Any, x: Tensor) -> Tensor:
    z = x * 2
    h = F.relu(m.norm(x))
    z.add_(1)
    return h + z


def _in_place_on_what_is_read_later(m: Any, x: Tensor) -> Tensor:
    h = m.norm(x)
    view = h.view(-1)
    return torch.tanh(F.relu(h, inplace=True)).sum() + view


def _in_place_on_an_input(m: Any, x: Tensor) -> Tensor:
    return torch.tanh(F.relu_(x.detach())), x * 2


def _second_reader(m: Any, x: Tensor) -> Any:
    h = m.norm(x)
    return F.relu(h), h.sum()


def _twice_the_same(m: Any, x: Tensor) -> Tensor:
    h = m.norm(x)
    return h + h


def _interleaved_batch_norms(m: Any, x: Tensor) -> Tensor:
    a, b = m.batch(x), m.batch(x * 3 + 1)
    second = F.relu(b)
    return F.relu(a) + second * 2


def _statistics_read_between(m: Any, x: Tensor) -> Tensor:
    h = m.batch(x)
    seen = m.batch.running_mean * 1
    return F.relu(h) + seen


def _broadcast_residual(m: Any, x: Tensor) -> Tensor:
    return m.norm(x) + x[:1]


@pytest.mark.parametrize(
    ("function", "fused"),
    [
        (_grad_mode, []),
        (_autocast, []),
        (_written_between, []),
        (_written_later, []),
        (_residual_written_between, []),
        (_in_place_on_what_is_read_later, []),
        (_in_place_on_an_input, []),
        (_second_reader, []),
        (_twice_the_same, []),
        (_interleaved_batch_norms, ["batch → relu"]),
        (_statistics_read_between, []),
        (_broadcast_residual, []),
    ],
)
def test_what_must_stay(function: Callable[..., Any], fused: list[str], log: Log) -> None:
    equal_to_eager(Shift(function), rows())
    assert [chain for chain in log.fused if "→" in chain] == fused


def _in_place(m: Any, x: Tensor) -> Tensor:
    return F.dropout(F.relu(m.norm(x), inplace=True), 0.0, inplace=True) * 2


def _add_in_place(m: Any, x: Tensor) -> Tensor:
    h = F.gelu(m.batch(x))
    h += x
    return h.mul_(2)


def _of_another_dtype(m: Any, x: Tensor) -> Tensor:
    return F.relu(m.norm(x)) + x.float()


@pytest.mark.parametrize(
    ("function", "fused"),
    [
        (_in_place, "layer → relu"),
        (_add_in_place, "batch → gelu → residual"),
        (_of_another_dtype, "layer → relu → residual"),
    ],
)
def test_what_is_taken(function: Callable[..., Any], fused: str, log: Log) -> None:
    equal_to_eager(Shift(function), rows())
    assert fused in log.fused


def test_what_is_added_in_place_to_the_stream(log: Log) -> None:

    def model(x: Tensor, w: Tensor) -> Tensor:
        stream = x * 2
        stream += F.gelu(F.linear(stream + 1, w))
        return stream

    equal_to_eager(model, rows(), rows(N, N))
    assert log.fused == ["linear → gelu → residual"]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_images_keep_their_memory_format(memory_format: torch.memory_format, log: Log) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.group = nn.GroupNorm(4, 8)

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(self.conv(x)).relu_()
            return F.silu(self.group(h)) + h

    x = torch.randn(2, 3, 6, 5, dtype=torch.float64).to(memory_format=memory_format)
    equal_to_eager(Block().double(), x)
    assert log.fused == ["batch → relu", "group → silu → residual"]


def test_transposed_activation_and_dropout(log: Log) -> None:
    x = rows(3, 4, N).transpose(0, 1).detach()
    equal_to_eager(lambda x: F.dropout(F.gelu(x), 1.0), x)
    assert log.fused == ["gelu → dropout"]


# ---- dropout ----


class Dropped(nn.Module):
    def __init__(self, p: float = 0.25) -> None:
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(N), nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(F.relu(self.norm(x) + 10))


def test_dropout_is_a_dropout(log: Log) -> None:
    compiled = torch.compile(Dropped(), backend="fused_eager")
    x = torch.randn(4096, N, requires_grad=True)
    torch.manual_seed(1)
    first, second = compiled(x), compiled(x)
    torch.manual_seed(1)
    again = compiled(x)
    assert log.fused == ["relu → dropout"]
    assert torch.equal(first, again) and not torch.equal(first, second)
    dropped = (first == 0).double().mean().item()
    assert abs(dropped - 0.25) < 0.01
    kept = first[first != 0] / F.relu(Dropped().norm(x) + 10)[first != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 4 / 3))
    (g,) = torch.autograd.grad(first.sum(), x)
    assert torch.isfinite(g).all()


def test_evaluation_drops_nothing_and_training_drops_again(log: Log) -> None:
    model = Dropped()
    compiled = torch.compile(model, backend="fused_eager")
    x = torch.randn(64, N)
    assert (compiled(x) == 0).any()
    model.eval()
    assert torch.allclose(compiled(x), model(x))
    model.train()
    assert (compiled(x) == 0).any()


def test_attention_keeps_its_dropout(log: Log) -> None:
    def attention(q: Tensor) -> Tensor:
        return F.dropout(torch.softmax(q @ q.mT, -1), 1.0) @ q

    equal_to_eager(attention, rows(2, 4, N))
    assert log.fused == []
    assert log.left["dropout"] == "it drops weights of attention"


def test_dropout_of_channels(log: Log) -> None:
    equal_to_eager(lambda x: F.dropout2d(F.relu(F.group_norm(x, 2)), 1.0), rows(2, 4, 3, 3))
    assert log.fused == ["group → relu → dropout"]


# ---- shapes, modes and wrappers ----


def chain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(N, N), nn.BatchNorm1d(N), nn.GELU(), nn.Linear(N, N)).double()


@pytest.mark.parametrize("dynamic", [None, True])
def test_another_batch_size_makes_no_more_graphs(dynamic: bool | None, log: Log) -> None:
    model, graphs = chain(), {}
    for backend in ("eager", "fused_eager"):
        torch._dynamo.reset()
        own = copy.deepcopy(model)
        counter = CompileCounterWithBackend(backend)
        compiled = torch.compile(own, backend=counter, dynamic=dynamic)
        reference = copy.deepcopy(model)
        for n in (17, 32, 64, 100):
            x = rows(n, N)
            torch.testing.assert_close(compiled(x), reference(x))
        torch.testing.assert_close(own[1].running_var, reference[1].running_var)
        assert own[1].num_batches_tracked == 4
        graphs[backend] = counter.frame_count
    assert graphs["eager"] == graphs["fused_eager"]
    assert "linear → batch → gelu" in log.fused


def test_a_float_that_the_compiler_left_open_is_guarded(log: Log) -> None:
    model = nn.Sequential(nn.LayerNorm(N), nn.ReLU()).double()
    compiled = torch.compile(model, backend="fused_eager", dynamic=True)
    x = rows()
    torch.testing.assert_close(compiled(x), model(x))
    model[0].eps = 0.5
    torch.testing.assert_close(compiled(x), model(x))
    assert log.fused == ["layer → relu", "layer → relu"]


def test_graph_breaks(log: Log) -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = chain(), chain()

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            torch._dynamo.graph_break()
            return self.second(h)

    equal_to_eager(Broken(), rows())
    assert log.fused == ["linear → batch → gelu"] * 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool, log: Log) -> None:
    from torch.utils.checkpoint import checkpoint

    class Saved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(N, N), nn.LayerNorm(N), nn.GELU()).double()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=reentrant) + x

    equal_to_eager(Saved(), rows())
    assert "linear → layer → gelu" in log.fused


def test_fullgraph_hooks_and_parametrisations(log: Log) -> None:
    model = nn.Sequential(nn.Linear(N, N), nn.LayerNorm(N), nn.GELU()).double()
    nn.utils.parametrizations.weight_norm(model[0])
    model[1].register_forward_hook(lambda module, inputs, y: y * 2)
    equal_to_eager(model, rows(), fullgraph=True)
    assert log.fused == ["linear → layer"]


def test_autocast_around_the_model(log: Log) -> None:
    model = nn.Sequential(nn.Linear(N, N), nn.LayerNorm(N), nn.GELU())
    x = torch.randn(8, N)

    def run(call: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return call(x)

    wanted, found = run(model), run(torch.compile(model, backend="fused_eager"))
    assert wanted.dtype == found.dtype
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
    assert log.fused == ["linear → layer → gelu"]


def test_transformer_encoder_layer(log: Log) -> None:
    layer = nn.TransformerEncoderLayer(N, 2, 32, dropout=0.0, activation="gelu", batch_first=True)
    equal_to_eager(layer.double(), rows(2, 5, N))
    assert log.fused == ["residual → layer", "linear → gelu", "linear → residual → layer"]


class PreNorm(nn.Module):
    """The sum of one sublayer and the norm of the next, across modules."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(norm(N) for _ in range(3))
        self.linears = nn.ModuleList(nn.Linear(N, N) for _ in range(2))
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Any:
        for norm, linear in zip(self.norms, self.linears, strict=False):
            x = x + self.dropout(linear(norm(x)))
        return self.norms[2](x), x.sum(0)


class Llama(nn.Module):
    """Its RMSNorm, which casts what it reads."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        return llama(x, self.weight)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, Llama])
def test_add_and_norm_across_modules(norm: Callable[[int], nn.Module], log: Log) -> None:
    equal_to_eager(PreNorm(norm), rows(2, 5, N, dtype=torch.float32), tolerance=1e-5)
    name = "layer" if norm is nn.LayerNorm else "rms"
    assert [c for c in log.fused if "→" in c] == [f"linear → residual → {name}"] * 2


def _sum_written_before_the_norm(m: Any, x: Tensor) -> Tensor:
    h = x + F.linear(x, m.norm.weight.diag())
    early = h.sin()
    h.mul_(2)
    return m.norm(h) + early


def _weight_made_after_the_sum(m: Any, x: Tensor) -> Tensor:
    h = x + F.linear(x, m.norm.weight.diag())
    return F.layer_norm(h, (N,), m.norm.weight * h.mean())


@pytest.mark.parametrize("function", [_sum_written_before_the_norm, _weight_made_after_the_sum])
def test_what_comes_between_sum_and_norm(function: Callable[..., Any], log: Log) -> None:
    with torch.no_grad():
        equal_to_eager(Shift(function), rows(grad=False))
    assert log.fused == []


def test_a_tensor_of_a_subclass_is_left_alone(log: Log) -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    a = torch.randn(4, N)
    compiled = torch.compile(lambda x: F.relu(F.layer_norm(x, (N,))), backend="fused_eager")
    y = compiled(TwoTensor(a, a.clone()))
    torch.testing.assert_close(y.a, F.relu(F.layer_norm(a, (N,))))
    assert log.fused == []


def test_a_request_for_the_reference_is_kept(log: Log) -> None:

    with fused.use_backend("reference"):
        equal_to_eager(lambda x: F.relu(F.layer_norm(x, (N,))), rows())
    assert log.fused == []
    assert "reference" in log.left["layer → relu"]
