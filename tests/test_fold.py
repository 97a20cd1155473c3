"""fold_: the same outputs without the norm, and a reason for everything that stays."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import fused
from fused import FeatureScaler, fold_
from fused.extras.fold import FoldReport
from fused.modules.norms import BatchNorm

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What is folded into, the norm, and the shape of an input.
PAIRS: dict[str, tuple[Callable[[bool], nn.Module], Callable[..., nn.Module], tuple[int, ...]]] = {
    "linear": (lambda b: nn.Linear(6, 8, b), nn.BatchNorm1d, (5, 6)),
    "conv1d": (lambda b: nn.Conv1d(6, 8, 3, bias=b), nn.BatchNorm1d, (2, 6, 9)),
    "conv2d": (lambda b: nn.Conv2d(6, 8, 3, 2, 1, groups=2, bias=b), nn.BatchNorm2d, (2, 6, 7, 7)),
    "conv3d": (lambda b: nn.Conv3d(6, 8, 2, bias=b), nn.BatchNorm3d, (2, 6, 4, 4, 4)),
    "transposed1d": (lambda b: nn.ConvTranspose1d(6, 8, 3, bias=b), nn.BatchNorm1d, (2, 6, 5)),
    "transposed2d": (
        lambda b: nn.ConvTranspose2d(6, 8, 3, 2, groups=2, bias=b),
        nn.BatchNorm2d,
        (2, 6, 4, 4),
    ),
    "transposed3d": (
        lambda b: nn.ConvTranspose3d(6, 8, 2, bias=b),
        nn.BatchNorm3d,
        (2, 6, 3, 3, 3),
    ),
    "synchronized": (lambda b: nn.Conv2d(6, 8, 3, bias=b), nn.SyncBatchNorm, (2, 6, 7, 7)),
    "sequence": (
        lambda b: nn.Linear(6, 8, b),
        lambda n, **options: BatchNorm(n, channel_dim=-1, **options),
        (2, 5, 6),
    ),
}


def randomise(model: nn.Module) -> nn.Module:
    """Statistics and affine parameters as training leaves them; in eval mode."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.3, 3)
            if module.affine:
                nn.init.uniform_(module.weight, -2, 2)
                nn.init.normal_(module.bias)
    return model.eval()


def fitted(features: int = 6, **options: Any) -> FeatureScaler:
    x = torch.randn(100, features) * torch.arange(1, features + 1) + 2
    return FeatureScaler(features, **options).fit(x)


def assert_folded(
    model: nn.Module, x: Tensor, dtype: torch.dtype, expected: int = 1, magnitude: float = 0.0
) -> FoldReport:
    """Folds, and compares with the model as it was in float64."""
    model = model.to(dtype)
    x = x.to(dtype)
    oracle = copy.deepcopy(model).double()(x.double())
    eager = model(x)
    report = fold_(model)
    assert len(report.folded) == expected, str(report)
    y = model(x)
    assert y.dtype == eager.dtype
    assert_close("folded", y, oracle, eager, dtype, magnitude)
    return report


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", PAIRS)
@torch.no_grad()
def test_norms(name: str, bias: bool, affine: bool, dtype: torch.dtype) -> None:
    make, norm, shape = PAIRS[name]
    model = randomise(nn.Sequential(make(bias), norm(8, affine=affine, eps=1e-3), nn.ReLU()))
    assert_folded(model, torch.randn(shape), dtype)
    assert list(model._modules) == ["0", "2"]
    assert model[0].bias is not None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"mode": "minmax"}, {"mode": "minmax", "feature_range": (-1, 2)}]
)
@torch.no_grad()
def test_scalers(options: dict[str, Any], bias: bool, dtype: torch.dtype) -> None:
    model = nn.Sequential(fitted(**options), nn.Linear(6, 3, bias)).eval()
    assert_folded(model, torch.randn(20, 6) * 3 + 2, dtype)
    assert list(model.state_dict()) == ["1.weight", "1.bias"]


@torch.no_grad()
def test_both_sides_and_two_in_a_row() -> None:
    layers = [fitted(), fitted(mode="minmax"), nn.Linear(6, 8), nn.BatchNorm1d(8)]
    model = randomise(nn.Sequential(*layers, nn.BatchNorm1d(8), nn.ReLU()))
    report = assert_folded(model, torch.randn(20, 6) * 3 + 2, torch.float32, expected=4)
    assert report.folded == dict.fromkeys(["1", "0", "3", "4"], "2")
    assert list(model._modules) == ["2", "5"]


@torch.no_grad()
def test_blocks_nested_in_one_another() -> None:
    """The scaler's Linear is two levels below it; afterwards each block is one fused chain."""
    mlp = fused.MLP(6, [16, 16], 2, norm="batch", activation="relu", dropout=0.1)
    model = randomise(fused.Sequential(fitted(), mlp))
    keys = [key for key in model.state_dict() if "norm" not in key and not key.startswith("0.")]
    report = assert_folded(model, torch.randn(20, 6), torch.float32, expected=3)
    assert report.folded == {
        "0": "1.0.linear",
        "1.0.norm": "1.0.linear",
        "1.1.norm": "1.1.linear",
    }
    assert list(model.state_dict()) == keys
    plan = str(model.plan())
    assert plan.count("linear → relu → dropout:") == 2 and "batch" not in plan


@torch.no_grad()
def test_residual_and_mask_of_a_block_remain() -> None:
    block = randomise(fused.LinearNormAct(6, 8, norm="batch", activation="relu"))
    x, residual = torch.randn(3, 5, 6), torch.randn(3, 5, 8)
    mask = torch.rand(3, 5) < 0.5
    expected = block(x, residual, mask)
    assert len(fold_(block).folded) == 1
    torch.testing.assert_close(block(x, residual, mask), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_sequential_that_runs_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
            self.two = self.one
            self.outer = nn.Sequential(self.one, nn.ReLU(), nn.BatchNorm1d(6))

        def forward(self, x: Tensor) -> Tensor:
            return self.outer(self.two(self.one(x)))

    report = assert_folded(randomise(Twice()), torch.randn(5, 6), torch.float32)
    assert report.folded == {"one.1": "one.0"}
    assert report.skipped == {"outer.2": "the child in front of it, outer.1, is a ReLU"}


@torch.no_grad()
def test_one_norm_behind_two_linears() -> None:
    norm = nn.BatchNorm1d(6)
    model = randomise(nn.Sequential(nn.Linear(6, 6), norm, nn.Linear(6, 6), norm))
    assert_folded(model, torch.randn(5, 6), torch.float32, expected=2)


def test_idempotent_dry_run_and_text() -> None:
    model = randomise(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), BatchNorm(8)))
    x = torch.randn(5, 6)
    before, expected = copy.deepcopy(model.state_dict()), model(x)
    report = fold_(model, dry_run=True)
    stays = "  3: the child in front of it, 2, is a ReLU"
    assert str(report) == f"1 of 2 norms and scalers would be folded\n  1 into 0\n{stays}"
    assert list(model.state_dict()) == list(before) and torch.equal(model(x), expected)
    assert str(fold_(model)) == str(report).replace("would be folded", "folded")
    after = copy.deepcopy(model.state_dict())
    assert str(fold_(model)) == f"0 of 1 norms and scalers folded\n{stays}"
    assert all(torch.equal(t, after[name]) for name, t in model.state_dict().items())
    assert "(the model itself): it is not a child" in str(fold_(nn.BatchNorm1d(3)))
    with pytest.raises(TypeError, match=r"nn\.Module, got Tensor"):
        fold_(x)  # type: ignore[arg-type]


def test_new_parameters() -> None:
    """New objects, with the requires_grad of the old; nobody else's tensors change."""
    model = randomise(nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8)))
    model.requires_grad_(False)
    old = model[0].weight
    before = old.clone()
    fold_(model)
    assert model[0].weight is not old and torch.equal(old, before)
    assert not model[0].weight.requires_grad and not model[0].bias.requires_grad
    model = randomise(nn.Sequential(nn.ConvTranspose2d(6, 8, 3, groups=2), nn.BatchNorm2d(8)))
    model.to(memory_format=torch.channels_last)[0].bias.requires_grad_(False)
    stride = model[0].weight.stride()
    fold_(model)
    assert model[0].weight.requires_grad and not model[0].bias.requires_grad
    assert model[0].weight.stride() == stride and model[0].weight.is_leaf


def linear_norm() -> nn.Sequential:
    return randomise(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)))


def changed(change: Callable[[Any], object], make: Callable[[], Any] = linear_norm) -> nn.Module:
    model = make()
    change(model)
    return model


class Doubled(nn.BatchNorm1d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Backwards(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        for child in reversed(self):
            input = child(input)
        return input


def reused() -> nn.Module:
    linear = nn.Linear(6, 6)
    return nn.Sequential(linear, nn.BatchNorm1d(6), linear).eval()


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6)).eval()
    model[3].weight = model[0].weight
    return model


def wide(change: Callable[[nn.Module], object]) -> nn.Module:
    model = nn.Sequential(fitted(), nn.Linear(6, 6)).eval()
    change(model)
    return model


def shifted(dtype: torch.dtype) -> nn.Module:
    """The center is 100 times the scale: two digits of seven in float32, of two in bfloat16."""
    scaler = FeatureScaler(6).fit(torch.randn(1000, 6) + 100)
    return nn.Sequential(scaler, nn.Linear(6, 6)).to(dtype).eval()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: linear_norm().train(), "1: it is in training mode; call model.eval() first"),
        (lambda: changed(lambda m: m[0].train()), "0, is in training mode"),
        (lambda: changed(lambda m: m[0].register_forward_hook(print)), "0, has hooks"),
        (lambda: changed(lambda m: m[1].register_forward_pre_hook(print)), "1: it has hooks"),
        (lambda: changed(lambda m: m[1].register_full_backward_hook(print)), "1: it has hooks"),
        (lambda: changed(lambda m: setattr(m[0], "forward", m[0].forward)), "0, has a forward"),
        (
            lambda: nn.Sequential(
                nn.Linear(6, 6), nn.BatchNorm1d(6, track_running_stats=False)
            ).eval(),
            "1: it has no running statistics",
        ),
        (lambda: changed(lambda m: prune.random_unstructured(m[0], "weight", 0.5)), "has hooks"),
        (lambda: changed(lambda m: parametrizations.weight_norm(m[0])), "a ParametrizedLinear"),
        (reused, "0, is used more than once"),
        (tied, "0, shares its parameters"),
        (
            lambda: changed(lambda m: m[0].to(torch.float8_e5m2)),
            "parameters on cpu, in float8_e5m2",
        ),
        (lambda: linear_norm().to("meta"), "parameters on meta"),
        (lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(6)).eval(), "6 features, what it f"),
        (lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm2d(6)).eval(), "it is a BatchNorm2d"),
        (lambda: nn.Sequential(nn.Linear(6, 6), Doubled(6)).eval(), "it is a Doubled"),
        (
            lambda: nn.Sequential(nn.Conv1d(6, 6, 1), BatchNorm(6, channel_dim=-1)).eval(),
            "it normalises the last dimension",
        ),
        (
            lambda: nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 6)).eval(),
            "in front of it is miss",
        ),
        (lambda: nn.Sequential(nn.LazyLinear(6), nn.BatchNorm1d(6)).eval(), "0, is a LazyLinear"),
        (lambda: Backwards(nn.Linear(6, 6), nn.BatchNorm1d(6)).eval(), "1: it is not a child"),
        (
            lambda: changed(
                lambda m: m[0].register_forward_hook(print),
                lambda: nn.Sequential(nn.Sequential(nn.Linear(6, 6)), nn.BatchNorm1d(6)).eval(),
            ),
            "0, is a Sequential",
        ),
        (
            lambda: changed(
                lambda m: m[1].running_var.fill_(1e-30),
                lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6, eps=1e-12)).half().eval(),
            ),
            "the result is not finite in float16",
        ),
        (lambda: nn.Sequential(FeatureScaler(6), nn.Linear(6, 6)).eval(), "never seen 6 of its 6"),
        (lambda: nn.Sequential(fitted(), nn.ReLU()).eval(), "behind it, 1, is a ReLU"),
        (lambda: nn.Sequential(nn.ReLU(), fitted()).eval(), "the child behind it is missing"),
        (
            lambda: nn.Sequential(fitted(6), nn.Linear(5, 6)).eval(),
            "6 features, the Linear takes 5",
        ),
        (
            lambda: nn.Sequential(fitted(dtype=torch.float32), nn.Linear(6, 6)).eval(),
            "it converts its input to float32",
        ),
        (lambda: wide(lambda m: m[0].register_forward_hook(print)), "0: it has hooks"),
        (lambda: shifted(torch.bfloat16), "times its scale: half of the digits of bfloat16"),
    ],
)
def test_what_stays(make: Callable[[], nn.Module], text: str) -> None:
    model = make()
    keys = list(model.state_dict())
    report = fold_(model)
    assert report.folded == {} and len(report.skipped) == 1
    assert text in str(report)
    assert list(model.state_dict()) == keys


@torch.no_grad()
def test_a_moderate_center_is_folded() -> None:
    """Its products are 100 times the output, and so is their rounding."""
    x = torch.randn(9, 6) + 100
    assert_folded(shifted(torch.float64), x, torch.float32, magnitude=100.0)


def test_a_compiled_model_sees_the_folding() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(fitted(), nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU())
    model, x = randomise(model), torch.randn(5, 6)
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(x)
    fold_(model)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)
