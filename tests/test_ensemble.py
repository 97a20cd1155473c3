"""mc_dropout: mean and spread against formulas and a plain loop; the model is left as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused
from fused import mc_dropout
from fused.extras import ensemble
from fused.modules.norms import ChannelDropout

SEQUENTIALS = (nn.Sequential, fused.Sequential)


def layers(p: float = 0.5) -> list[nn.Module]:
    return [nn.Linear(6, 16), nn.LayerNorm(16), nn.ReLU(), nn.Dropout(p), nn.Linear(16, 3)]


def recorded(module: nn.Module) -> list[Any]:
    """A list that gets the outputs of a module, call by call."""
    seen: list[Any] = []
    module.register_forward_hook(lambda m, a, output: seen.append(output))
    return seen


class Wrapped(nn.Module):
    """No Sequential, so that it cannot be cut."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


@pytest.mark.parametrize("kind", SEQUENTIALS)
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_a_linear_model_has_a_known_spread(kind: Any, p: float) -> None:
    """y = Σ wₖ xₖ mₖ / (1 − p) with mₖ in {0, 1}: variance Σ (wₖ xₖ)² · p / (1 − p)."""
    model, x, samples = kind(nn.Dropout(p), nn.Linear(40, 1)).double(), torch.randn(7, 40), 20_000
    x = x.double()
    mean, deviation = mc_dropout(model, x, samples, seed=1)
    weight, bias = model[1].weight[0].detach(), model[1].bias.detach()
    expected = ((x * weight).square().sum(1, keepdim=True) * p / (1 - p)).sqrt()
    assert mean.shape == deviation.shape == (7, 1) and mean.dtype == torch.float64
    error = (mean - (x @ weight[:, None] + bias)) / (expected / samples**0.5)
    assert float(error.abs().max()) < 4.5
    torch.testing.assert_close(deviation, expected, rtol=0.05, atol=0)


@pytest.mark.parametrize("kind", SEQUENTIALS)
@pytest.mark.parametrize("wrap", [False, True])
def test_a_plain_loop(kind: Any, wrap: bool) -> None:
    """One sample at a time draws what a loop draws after the same seed."""
    net, x = kind(*layers()), torch.randn(5, 6)
    model = Wrapped(net) if wrap else net
    found = mc_dropout(model, x, 9, seed=3, batch_samples=1)
    plain = nn.Sequential(*net).eval()
    plain[3].train()
    with torch.random.fork_rng([]), torch.no_grad():
        torch.manual_seed(3)
        # Wrapped, the chain stays one operation, which draws its masks otherwise than nn.Dropout.
        loop = torch.stack([(net if wrap else plain)(x) for _ in range(9)])
    assert loop.std(0).min() > 0
    torch.testing.assert_close(found.mean, loop.mean(0))
    torch.testing.assert_close(found.standard_deviation, loop.std(0))


@pytest.mark.parametrize(
    ("batch_samples", "chunks"), [(1, [1] * 10), (3, [3, 3, 3, 1]), (10, [10]), (64, [10])]
)
@pytest.mark.parametrize("kind", SEQUENTIALS)
def test_chunks_and_what_runs_once(kind: Any, batch_samples: int, chunks: list[int]) -> None:
    model = kind(*layers())
    prefix, outputs = recorded(model[0]), recorded(model[4])
    found = mc_dropout(model, torch.randn(5, 6), 10, batch_samples=batch_samples)
    assert [len(z) for z in prefix] == [5]
    assert [len(y) for y in outputs] == [5 * chunk for chunk in chunks]
    samples = torch.cat([y.unflatten(0, (-1, 5)) for y in outputs])
    assert len(samples.unique(dim=0)) == 10  # each has its own masks
    torch.testing.assert_close(found.mean, samples.mean(0))
    torch.testing.assert_close(found.standard_deviation, samples.std(0))


def test_the_default_keeps_the_stacked_input_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ensemble, "_STACKED", 5 * 16 * 4 + 1)
    for model, chunks in ((nn.Sequential(*layers()), [4, 4, 2]), (nn.Dropout(0.5), [6, 4])):
        outputs = recorded(model[-1] if isinstance(model, nn.Sequential) else model)
        x = torch.randn(5, 6) if isinstance(model, nn.Sequential) else torch.randn(5, 10)
        mc_dropout(model, x, 10)
        assert [len(y) // 5 for y in outputs] == chunks


def test_the_cut_in_nested_blocks() -> None:
    """Down to the dropout of the second block: what comes before it runs once."""
    mlp = fused.MLP(6, [8, 8], 3, norm="layer", activation="gelu", dropout=0.3)
    mlp[0].dropout.p = 0.0
    model = nn.Sequential(nn.Flatten(), fused.Sequential(nn.Tanh(), mlp), nn.Tanh())
    once = [recorded(m) for m in (model[0], mlp[0].linear, mlp[1].linear)]
    each = [recorded(m) for m in (mlp[1].dropout, mlp[2], model[2])]
    mc_dropout(model, torch.randn(4, 2, 3), 6, batch_samples=2)
    assert [len(seen) for seen in once] == [1] * 3
    assert [len(seen) for seen in each] == [3] * 3
    assert torch.equal(each[2][0], each[1][0].tanh())  # still in order


def test_a_child_that_stands_in_two_places() -> None:
    act = nn.Tanh()
    model = nn.Sequential(act, nn.Linear(6, 6), act, nn.Dropout(0.5), act)
    once, each = recorded(model[1]), recorded(act)
    mean, _ = mc_dropout(model, torch.randn(5, 6), 6, batch_samples=2)
    assert len(once) == 1 and [len(y) for y in each] == [5, 5, 10, 10, 10]
    torch.testing.assert_close(mean, torch.cat(each[2:]).unflatten(0, (6, 5)).mean(0))


def test_hooks_on_a_sequential_are_not_passed_by() -> None:
    inner = nn.Sequential(*layers())
    model = nn.Sequential(nn.Tanh(), inner, nn.Tanh())
    outer, first, hooked = recorded(model[0]), recorded(inner[0]), recorded(inner)
    mc_dropout(model, torch.randn(5, 6), 6, batch_samples=2)
    assert [len(seen) for seen in (outer, first, hooked)] == [1, 3, 3]
    first = recorded(model[1][0])
    recorded(model)
    outer.clear()
    mc_dropout(model, torch.randn(5, 6), 6, batch_samples=2)
    assert len(outer) == 3


def test_what_changes_dimension_0_on_the_way_runs_each_time() -> None:
    model = nn.Sequential(
        nn.Flatten(0, 1), nn.Linear(6, 6), nn.Dropout(0.5), nn.Unflatten(0, (-1, 4))
    )
    x = torch.randn(5, 4, 6)
    mean, deviation = mc_dropout(model, x, 4000, seed=0)
    assert mean.shape == (5, 4, 6)
    with torch.no_grad():
        torch.testing.assert_close(mean, model.eval()(x), rtol=0, atol=0.2)
        torch.testing.assert_close(deviation, model(x).abs(), rtol=0.1, atol=1e-3)


class Own(nn.Dropout):
    pass


@pytest.mark.parametrize(
    ("dropout", "shape"),
    [
        (nn.Dropout(0.5), (4, 6)),
        (nn.Dropout(0.5, inplace=True), (4, 6)),
        (Own(0.5), (4, 6)),
        (nn.Dropout1d(0.5), (4, 6, 5)),
        (nn.Dropout2d(0.5), (4, 6, 5, 5)),
        (nn.Dropout3d(0.5), (4, 6, 2, 2, 2)),
        (nn.AlphaDropout(0.5), (4, 6)),
        (nn.FeatureAlphaDropout(0.5), (4, 6, 5)),
        (ChannelDropout(0.5), (4, 6, 5)),
        (nn.TransformerEncoderLayer(6, 2, 8, 0.5, batch_first=True), (4, 3, 6)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
@pytest.mark.parametrize("before", [[], [nn.Tanh()]])
@pytest.mark.parametrize("batch_samples", [1, 32])
def test_all_dropouts(
    dropout: nn.Module, shape: tuple[int, ...], before: list[nn.Module], batch_samples: int
) -> None:
    x = torch.rand(shape) + 1
    kept = x.clone()
    mean, deviation = mc_dropout(
        nn.Sequential(*before, dropout), x, 60, batch_samples=batch_samples
    )
    assert mean.shape == x.shape and bool((deviation > 0).all())
    assert torch.equal(x, kept)


def test_flags_statistics_and_gradients() -> None:
    class Frozen(nn.Sequential):
        def train(self, mode: bool = True) -> Frozen:
            raise AssertionError("it must not be called")

    model = nn.Sequential(*layers(), nn.BatchNorm1d(3), nn.Dropout(0.0), Frozen(nn.Dropout(0.5)))
    model[2].training = model[3].training = False
    norm = model[5]
    before = {name: m.training for name, m in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    x = torch.randn(5, 6, requires_grad=True)
    modes = recorded(norm)
    norm.register_forward_hook(lambda m, a, y: modes.append((m.training, model[3].training)))
    mean, deviation = mc_dropout(model, x, 8)
    assert modes[1::2] == [(False, True)]
    assert {name: m.training for name, m in model.named_modules()} == before
    assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())
    assert not mean.requires_grad and not deviation.requires_grad

    def fail(*_: Any) -> None:
        raise RuntimeError("from within")

    model[4].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="from within"):
        mc_dropout(model, x, 8, seed=0)
    assert {name: m.training for name, m in model.named_modules()} == before
    assert torch.is_grad_enabled() and torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("wrap", [False, True])
def test_seeds(wrap: bool) -> None:
    model: nn.Module = fused.Sequential(*layers())
    model = Wrapped(model) if wrap else model
    x = torch.randn(5, 6)
    state = torch.get_rng_state()
    first, again, other = (mc_dropout(model, x, 8, seed=seed) for seed in (4, 4, 5))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first.mean, other.mean)
    torch.manual_seed(0)
    first, again = mc_dropout(model, x, 8), mc_dropout(model, x, 8)
    assert not torch.equal(first.mean, again.mean)
    torch.manual_seed(0)
    assert all(map(torch.equal, first, mc_dropout(model, x, 8)))


@pytest.mark.gpu
def test_seeds_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model, x = fused.Sequential(*layers()).cuda(), torch.randn(5, 6, device="cuda")
    states = torch.get_rng_state(), torch.cuda.get_rng_state()
    first, again = (mc_dropout(model, x, 8, seed=4) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(torch.cuda.get_rng_state(), states[1])
    assert first.mean.is_cuda and all(map(torch.equal, first, again))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(dtype: torch.dtype) -> None:
    model, x = fused.Sequential(*layers()).to(dtype), torch.randn(5, 6, dtype=dtype)
    mean, deviation = mc_dropout(model, x, 16)
    assert mean.dtype == deviation.dtype == torch.float32
    assert mc_dropout(model, x[:0], 16).mean.shape == (0, 3)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda x: mc_dropout(nn.Linear(6, 6), x), ValueError, "Linear has no dropout module"),
        (lambda x: mc_dropout(nn.Sequential(*layers(0.0)), x), ValueError, "with p > 0"),
        (lambda x: mc_dropout(nn.Dropout(), x, 1), ValueError, "at least 2, got 1"),
        (lambda x: mc_dropout(nn.Dropout(), x, batch_samples=0), ValueError, "at least 1, got 0"),
        (lambda x: mc_dropout(nn.Dropout(), [x]), TypeError, "got list"),
        (lambda x: mc_dropout(nn.Dropout(), x[0, 0]), TypeError, "one without dimensions"),
        (
            lambda x: mc_dropout(nn.Sequential(nn.Dropout(), nn.Flatten(0)), x, 4),
            ValueError,
            r"must keep dimension 0: it made \(120,\) of 20 rows",
        ),
        (lambda x: mc_dropout(nn.LSTM(6, 6, 2, dropout=0.5), x), ValueError, "LSTM has no dropout"),
        (
            lambda x: mc_dropout(nn.Sequential(nn.Dropout(), nn.LSTM(6, 6)), x),
            TypeError,
            "must return a tensor, got tuple",
        ),
    ],
)
def test_errors(call: Callable[[Tensor], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call(torch.randn(5, 6))
