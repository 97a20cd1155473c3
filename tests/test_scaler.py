"""FeatureScaler against scikit-learn and written-out formulas, batch by batch, over processes."""

from __future__ import annotations

import copy
import io
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import start_processes
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from fused import FeatureScaler
from fused.extras import scaler

MODES = ("standard", "minmax")
FEATURES = 6


def make_data(rows: int = 500, dtype: torch.dtype = torch.float64) -> Tensor:
    """Features of unlike size, one of them constant and one with missing values."""
    x = torch.randn(rows, FEATURES, dtype=torch.float64)
    x = x * torch.tensor([1.0, 1e-3, 1e4, 5.0, 2.0, 1.0]) + torch.tensor([0.0, 3, 1e5, -7, 0, 1])
    x[:, 4] = 0.1
    x[::7, 3] = torch.nan
    return x.to(dtype)


def formula(x: Tensor, mode: str, feature_range: tuple[float, float] = (0, 1)) -> np.ndarray:
    """What scaling x by its own statistics gives."""
    a = x.double().numpy()
    if mode == "standard":
        deviation = np.nanstd(a, axis=0)
        return (a - np.nanmean(a, axis=0)) / np.where(deviation < 1e-12, 1, deviation)
    low, high = feature_range
    spread = np.nanmax(a, axis=0) - np.nanmin(a, axis=0)
    return (a - np.nanmin(a, axis=0)) / np.where(spread == 0, 1, spread) * (high - low) + low


def sklearn_scaler(mode: str, **options: Any) -> Any:
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    return getattr(preprocessing, {"standard": "StandardScaler", "minmax": "MinMaxScaler"}[mode])(
        **options
    )


def assert_equal(found: Tensor, expected: Any, within: float = 1e-9) -> None:
    torch.testing.assert_close(
        found.double(), torch.as_tensor(expected).double(), rtol=within, atol=within, equal_nan=True
    )


@pytest.mark.parametrize("mode", MODES)
def test_the_formula(mode: str) -> None:
    x = make_data()
    net = FeatureScaler(FEATURES, mode).fit(x)
    assert_equal(net(x), formula(x, mode))
    assert_equal(net.inverse(net(x)), x)
    assert net.count.tolist() == [500, 500, 500, 500 - 72, 500, 500]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("mode", "options"), [("standard", {}), ("minmax", {}), ("minmax", {"feature_range": (-1, 3)})]
)
def test_scikit_learn(mode: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    x, other = make_data(dtype=dtype), make_data(50, dtype)
    theirs = sklearn_scaler(mode, **options).fit(x.numpy())
    net = FeatureScaler(FEATURES, mode, **options).fit(x)
    # In float32 theirs multiplies first and then adds large numbers that cancel.
    within = 1e-9 if dtype == torch.float64 else 1e-4 if mode == "minmax" else 2e-6
    assert_equal(net(other), theirs.transform(other.numpy()), within)
    assert_equal(net(x)[:, 4], theirs.transform(x.numpy())[:, 4], within)
    y = net(other)
    assert_equal(net.inverse(y)[:, 0], theirs.inverse_transform(y.numpy())[:, 0], within)


@pytest.mark.parametrize("mode", MODES)
def test_batches_give_what_one_call_gives(mode: str) -> None:
    x = make_data(1000)
    whole, parts = FeatureScaler(FEATURES, mode), FeatureScaler(FEATURES, mode)
    whole.partial_fit(x)
    for part in x.split([1, 0, 2, 300, 697]):
        parts.partial_fit(part)
    assert torch.equal(parts.count, whole.count)
    assert_equal(parts.center, whole.center, 1e-13)
    assert_equal(parts.scale, whole.scale, 1e-12)
    assert parts.scale[4] == 1.0


def test_a_large_mean_costs_no_digits() -> None:
    """The difference of sums of squares would be wrong in its first digit."""
    x = torch.randn(4000, 1, dtype=torch.float64) + 1e8
    net = FeatureScaler(1)
    for part in x.split(7):
        net.partial_fit(part)
    assert_equal(net.scale, [np.std(x.numpy())], 1e-8)


def test_a_tensor_is_fitted_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = make_data(1000)
    whole = FeatureScaler(FEATURES).fit(x)
    monkeypatch.setattr(scaler, "_CHUNK", 64)
    assert_equal(FeatureScaler(FEATURES).fit(x).scale, whole.scale, 1e-12)
    assert_equal(FeatureScaler(FEATURES).partial_fit(x).scale, whole.scale, 1e-12)


def test_leading_dimensions_and_strides() -> None:
    x = make_data(120)
    folded = x.reshape(2, 3, 20, FEATURES).transpose(0, 2)
    net = FeatureScaler(FEATURES).fit(folded)
    assert_equal(net.scale, FeatureScaler(FEATURES).fit(x).scale, 1e-12)
    assert_equal(net(folded), net(x).reshape(2, 3, 20, FEATURES).transpose(0, 2))
    assert net(x[0]).shape == (FEATURES,)


def test_nearly_constant_features_are_those_of_scikit_learn() -> None:
    base = torch.tensor([1e10, 0.1, 1.0, 1e-20, 0.0], dtype=torch.float64)
    step = torch.tensor([1e-6, 1e-17, 1e-9, 1e-22, 0.0], dtype=torch.float64)
    x = base + step * torch.randn(300, 5, dtype=torch.float64)
    for mode in MODES:
        theirs = sklearn_scaler(mode).fit(x.numpy())
        constant = FeatureScaler(5, mode).fit(x).scale == 1
        assert torch.equal(constant, torch.from_numpy(theirs.scale_ == 1))
        assert constant.any() and not constant.all()


@pytest.mark.parametrize("mode", MODES)
def test_a_feature_that_was_never_seen_is_nan(mode: str) -> None:
    x = make_data()
    x[:, 1] = torch.nan
    net = FeatureScaler(FEATURES, mode).fit(x)
    new = torch.ones(2, FEATURES, dtype=torch.float64)
    y = net(new)
    assert y[:, 1].isnan().all() and y[:, [0, 2, 3, 4, 5]].isfinite().all()
    with warnings.catch_warnings(action="ignore"):
        theirs = sklearn_scaler(mode).fit(x.numpy())
    assert_equal(y, theirs.transform(new.numpy()))
    # It may come later, where scikit-learn goes on with NaN.
    net.partial_fit(make_data())
    assert net(new).isfinite().all()


def test_infinities() -> None:
    x = make_data()
    net = FeatureScaler(FEATURES).fit(x)
    before = copy.deepcopy(net.state_dict())
    bad = make_data(5)
    bad[2, 0] = -torch.inf
    with pytest.raises(ValueError, match="infinite values"):
        net.partial_fit(bad)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert net(bad)[2, 0] == -torch.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("mode", MODES)
def test_dtypes_round_once(mode: str, dtype: torch.dtype) -> None:
    x = torch.randn(200, 3).mul(2).add(1).to(dtype)
    net = FeatureScaler(3, mode).fit(x)
    y = net(x)
    assert y.dtype == dtype
    expected = torch.as_tensor(formula(x, mode))
    assert_equal(y, expected.to(dtype), torch.finfo(dtype).eps)
    assert net.inverse(y).dtype == dtype


def test_conversion_leaves_the_statistics_alone() -> None:
    net = nn.Sequential(FeatureScaler(FEATURES).fit(make_data()), nn.Linear(FEATURES, 2))
    before = copy.deepcopy(net[0].state_dict())
    for convert in (
        net.half,
        net.bfloat16,
        net.float,
        lambda: net.to(torch.float16),
        lambda: net.type(torch.float16),
        lambda: net.to("cpu", torch.bfloat16),
    ):
        convert()
        for name, value in net[0].state_dict().items():
            assert value.dtype == before[name].dtype and torch.equal(value, before[name])
        assert net[0].scale.dtype == torch.float64
    assert net(make_data(dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert net[0].to("meta").mean.is_meta


def test_the_dtype_of_the_output() -> None:
    x = make_data()
    net = FeatureScaler(FEATURES, dtype=torch.float32).fit(x)
    assert net(x).dtype == torch.float32
    assert_equal(net(x), torch.as_tensor(formula(x, "standard")).float())
    assert net.half()(x).dtype == torch.float16


@pytest.mark.parametrize("mode", MODES)
def test_state_dict_deepcopy_and_a_meta_device(mode: str) -> None:
    x = make_data()
    net = FeatureScaler(FEATURES, mode).fit(x)
    expected = net(x)
    assert set(net.state_dict()) == {"count", "mean", "m2", "minimum", "maximum"}
    other = FeatureScaler(FEATURES, mode)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x).nan_to_num(), expected.nan_to_num())
    assert torch.equal(copy.deepcopy(net)(x).nan_to_num(), expected.nan_to_num())
    meta = FeatureScaler(FEATURES, mode, device="meta")
    meta.to_empty(device="cpu").load_state_dict(net.state_dict())
    assert torch.equal(meta(x).nan_to_num(), expected.nan_to_num())
    narrow = {k: v.float() if v.is_floating_point() else v for k, v in net.state_dict().items()}
    other.load_state_dict(narrow, assign=True)
    assert other.mean.dtype == torch.float64
    other.partial_fit(x)  # goes on from what was loaded
    assert other.count[0] == 1000


def test_buffers_that_another_process_wrote() -> None:
    """DistributedDataParallel writes the buffers of rank 0 into those of the others."""
    x = make_data()
    fitted, empty = FeatureScaler(FEATURES).fit(x), FeatureScaler(FEATURES)
    for name, buffer in fitted.named_buffers():
        getattr(empty, name).copy_(buffer)
    assert torch.equal(empty(x).nan_to_num(), fitted(x).nan_to_num())


@pytest.mark.parametrize("mode", MODES)
def test_compile_and_gradients(mode: str) -> None:
    torch._dynamo.reset()
    x = make_data()[:, :3].contiguous()
    with pytest.raises(Exception, match="nothing was fitted"):
        torch.compile(FeatureScaler(3, mode), fullgraph=True, backend="aot_eager")(x)
    net = FeatureScaler(3, mode).fit(x)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    leaf = x.clone().requires_grad_()
    y = compiled(leaf)
    assert torch.equal(y, net(x))
    (dx,) = torch.autograd.grad(y.sum(), leaf)
    assert_equal(dx, (1 / net.scale).expand_as(x))
    net.partial_fit(100 * x)  # the graph reads the buffers
    assert torch.equal(compiled(x), net(x))


@pytest.mark.parametrize("operation", ["forward", "inverse"])
def test_before_fit(operation: str) -> None:
    net = FeatureScaler(3)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="nothing was fitted; call fit or partial_fit"):
            getattr(net, operation)(torch.ones(2, 3))
    net.fit(torch.randn(5, 3))
    net(torch.ones(2, 3))
    net.fit(torch.empty(0, 3))  # fit forgets first
    with pytest.raises(RuntimeError, match="nothing was fitted"):
        net(torch.ones(2, 3))


class Stream(IterableDataset[Tensor]):
    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __iter__(self) -> Any:
        return iter(self.x)


def test_iterables() -> None:
    x, y = make_data(100), torch.zeros(100)
    expected = FeatureScaler(FEATURES).fit(x).scale
    for data in (
        DataLoader(TensorDataset(x, y), batch_size=33),
        DataLoader(Stream(x), batch_size=33),
        [x[:10], x[10:]],
        ([part, None] for part in x.split(9)),
    ):
        assert_equal(FeatureScaler(FEATURES).fit(data).scale, expected, 1e-12)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = list(make_data(90).split(10))

    def shown(stream: io.StringIO, data: Any, progress: bool | None) -> str:
        monkeypatch.setattr(sys, "stderr", stream)
        FeatureScaler(FEATURES).fit(data, progress=progress)
        return stream.getvalue()

    assert shown(io.StringIO(), batches, None) == ""
    assert shown(Terminal(), batches, False) == ""
    lines = shown(io.StringIO(), batches, True).splitlines()
    assert len(lines) == 4 and "\r" not in "".join(lines)
    assert lines[-1].endswith("fit 100%  90 rows")
    text = shown(Terminal(), batches, None)
    assert text.startswith("\r") and text.endswith(f"fit {'━' * 30} 100%  90 rows\n")
    assert shown(io.StringIO(), iter(batches), True).endswith("fit 90 rows\n")
    with pytest.raises(TypeError):
        shown(stream := Terminal(), [*batches[:2], "no tensor"], True)
    assert stream.getvalue().endswith("\n")


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: FeatureScaler(0), ValueError, "at least 1"),
        (lambda: FeatureScaler(2, "robust"), ValueError, "'standard' and 'minmax'"),
        (lambda: FeatureScaler(2, "minmax", feature_range=(1, 1)), ValueError, "low < high"),
        (lambda: FeatureScaler(2).partial_fit(torch.ones(2, 3)), ValueError, r"must be \(..., 2\)"),
        (lambda: FeatureScaler(2).fit(torch.ones(())), ValueError, r"got \(\)"),
        (
            lambda: FeatureScaler(2).fit([[1.0, 2.0]]),
            TypeError,
            "a list of list; use torch.as_tensor",
        ),
        (lambda: FeatureScaler(2)(torch.ones(2, 2).int()), TypeError, "got torch.int32"),
        (lambda: FeatureScaler(2).synchronize(), RuntimeError, "no process group"),
    ],
)
def test_errors(make: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make()


def test_repr() -> None:
    assert repr(FeatureScaler(3)) == "FeatureScaler(3, mode='standard')"
    assert "feature_range=(-1, 1)" in repr(FeatureScaler(3, "minmax", feature_range=(-1, 1)))


def _process(rank: int, folder: str, world: int) -> None:
    """Rank 0 has most of the data, the last rank none, and each saves what it then holds."""
    import torch.distributed as dist

    x: Tensor = torch.load(f"{folder}/x.pt")
    shards = [x[:350], x[350:], x[:0]]
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    for mode in MODES:
        net = FeatureScaler(FEATURES, mode).fit(shards[rank]).synchronize()
        again = ""
        try:
            net.synchronize()
        except RuntimeError as error:
            again = str(error)
        assert "already synchronized" in again
        torch.save({**net.state_dict(), "y": net(x)}, f"{folder}/{mode}{rank}.pt")
    dist.destroy_process_group()


def test_processes(tmp_path: Path) -> None:
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    x, world = make_data(), 3
    torch.save(x, tmp_path / "x.pt")
    start_processes(_process, world, str(tmp_path), world)
    for mode in MODES:
        ours = [torch.load(tmp_path / f"{mode}{rank}.pt") for rank in range(world)]
        for other in ours[1:]:
            assert all(torch.equal(ours[0][k].nan_to_num(), other[k].nan_to_num()) for k in other)
        assert_equal(ours[0]["y"], formula(x, mode))
        assert torch.equal(ours[0]["count"], FeatureScaler(FEATURES).fit(x).count)


def test_fit_of_a_list_says_what_to_pass() -> None:
    for data, got in (([[1.0, 2.0]], "list of list"), ([1.0, 2.0], "list of float")):
        with pytest.raises(TypeError, match=f"FeatureScaler.fit: data .*{got}.*torch.as_tensor"):
            FeatureScaler(2).fit(data)
