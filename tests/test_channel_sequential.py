"""fused.Sequential with norms over samples or positions gives what nn.Sequential gives."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from sequentials import assert_close, outcome
from torch import Tensor, nn

import fused

Make = Callable[[], list[nn.Module]]


def linear(features: int = 12) -> nn.Linear:
    return nn.Linear(16, features)


# Children, and the shape of the input.
CASES: dict[str, tuple[Make, tuple[int, ...]]] = {
    "linear batch": (lambda: [linear(), nn.BatchNorm1d(12), nn.GELU()], (10, 16)),
    "linear batch on sequences": (lambda: [linear(), nn.BatchNorm1d(6), nn.ReLU()], (10, 6, 16)),
    "linear group": (lambda: [linear(), nn.GroupNorm(3, 12), nn.SiLU()], (10, 16)),
    "linear group on sequences": (lambda: [linear(), nn.GroupNorm(3, 6), nn.SiLU()], (4, 6, 16)),
    "linear instance": (lambda: [linear(), nn.InstanceNorm1d(10), nn.Tanh()], (10, 16)),
    "linear instance affine": (
        lambda: [linear(), nn.InstanceNorm1d(10, affine=True), nn.Tanh()],
        (10, 16),
    ),
    "linear instance on sequences": (
        lambda: [linear(), nn.InstanceNorm1d(6, affine=True), nn.ELU()],
        (3, 6, 16),
    ),
    "batch 1d": (lambda: [nn.BatchNorm1d(7), nn.ReLU()], (9, 7)),
    "batch 1d long": (lambda: [nn.BatchNorm1d(7), nn.ReLU()], (5, 7, 9)),
    "batch 2d": (lambda: [nn.BatchNorm2d(7), nn.Hardswish()], (3, 7, 5, 4)),
    # Without a kink, where the rounding of 16 bits decides on which side an element falls.
    "batch smooth": (lambda: [nn.BatchNorm2d(7), nn.SiLU()], (3, 7, 5, 4)),
    "batch 3d": (lambda: [nn.BatchNorm3d(7), nn.LeakyReLU(0.2)], (2, 7, 3, 5, 4)),
    "batch without affine": (lambda: [nn.BatchNorm2d(7, affine=False), nn.ReLU()], (3, 7, 5, 4)),
    "batch without statistics": (
        lambda: [nn.BatchNorm2d(7, track_running_stats=False), nn.ReLU()],
        (3, 7, 5, 4),
    ),
    "batch cumulative": (lambda: [nn.BatchNorm2d(7, momentum=None), nn.ReLU()], (3, 7, 5, 4)),
    "group 2d": (lambda: [nn.GroupNorm(2, 8), nn.SiLU()], (3, 8, 5, 4)),
    "group of all": (lambda: [nn.GroupNorm(1, 8), nn.SiLU()], (3, 8, 5, 4)),
    "group of one": (lambda: [nn.GroupNorm(8, 8, affine=False), nn.SiLU()], (3, 8, 5)),
    "group 3d": (lambda: [nn.GroupNorm(2, 8), nn.SiLU()], (3, 8, 2, 5, 4)),
    "instance 1d": (lambda: [nn.InstanceNorm1d(8), nn.ReLU()], (3, 8, 11)),
    "instance 1d smooth": (
        lambda: [nn.InstanceNorm1d(8, track_running_stats=True), nn.SiLU()],
        (3, 8, 11),
    ),
    "instance 2d": (lambda: [nn.InstanceNorm2d(8, affine=True), nn.ReLU()], (3, 8, 5, 4)),
    "instance 3d": (lambda: [nn.InstanceNorm3d(8), nn.ReLU()], (2, 8, 3, 2, 4)),
    "instance tracking": (
        lambda: [nn.InstanceNorm2d(8, affine=True, track_running_stats=True), nn.ReLU()],
        (3, 8, 5, 4),
    ),
    "instance one image": (lambda: [nn.InstanceNorm2d(8, affine=True), nn.ReLU()], (8, 5, 4)),
    "instance one volume": (lambda: [nn.InstanceNorm3d(8), nn.ReLU()], (8, 3, 5, 4)),
    "conv": (lambda: [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()], (2, 3, 9, 7)),
    "one position": (lambda: [nn.BatchNorm2d(7), nn.ReLU()], (6, 7, 1, 1)),
}


def twins(make: Make, training: bool, dtype: torch.dtype) -> tuple[nn.Sequential, fused.Sequential]:
    modules = make()
    for module in modules:  # so that a mistaken parameter shows
        for t in module.parameters():
            nn.init.normal_(t, 0.5)
    plain = nn.Sequential(*modules).to(dtype).train(training)
    return plain, fused.Sequential(*copy.deepcopy(modules)).to(dtype).train(training)


def assert_same(plain: nn.Module, net: nn.Module, x: Tensor, within: float = 1e-5) -> None:
    expected, found = outcome(plain, x), outcome(net, x)
    assert_close(found, expected, within)
    assert found[0] is not None and expected[0] is not None
    assert found[0].dtype == expected[0].dtype
    state = plain.state_dict()
    for name, ours in net.state_dict().items():
        torch.testing.assert_close(ours, state[name], rtol=within, atol=within)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("case", CASES)
def test_gives_what_sequential_gives(case: str, training: bool, backend: str) -> None:
    make, shape = CASES[case]
    plain, net = twins(make, training, torch.float32)
    with fused.use_backend(backend):
        for _ in range(3):  # the running statistics go on
            assert_same(plain, net, torch.randn(shape) * 2 + 0.5)
    fused_chains = [entry.fused for entry in net.plan() if len(entry.names) > 1]
    assert fused_chains == [True]


@pytest.mark.parametrize(
    "dtype, within", [(torch.float64, 1e-12), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)]
)
@pytest.mark.parametrize("case", ["batch smooth", "group 2d", "instance 1d smooth", "linear batch"])
def test_other_dtypes(case: str, dtype: torch.dtype, within: float, backend: str) -> None:
    make, shape = CASES[case]
    plain, net = twins(make, True, dtype)
    with fused.use_backend(backend):
        assert_same(plain, net, torch.randn(shape, dtype=dtype), within)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("case", ["batch 2d", "batch 3d", "group 2d", "instance 2d", "conv"])
def test_channels_last_stays_channels_last(case: str, training: bool, backend: str) -> None:
    make, shape = CASES[case]
    plain, net = twins(make, training, torch.float32)
    memory = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    x = torch.randn(shape).to(memory_format=memory)
    with fused.use_backend(backend):
        assert_same(plain, net, x)
        assert net(x).is_contiguous(memory_format=memory)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.transpose(2, 3),
        lambda x: x[:, :, ::2],
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x[:, :1].expand_as(x),
        lambda x: x[1:, :, 1:, 1:],
        lambda x: x.to(memory_format=torch.channels_last)[:, :, 1:],
    ],
    ids=["transposed", "steps", "batch inside", "expanded", "slices", "slices of channels-last"],
)
@pytest.mark.parametrize("case", ["batch 2d", "group 2d", "instance 2d"])
def test_strides(case: str, change: Callable[[Tensor], Tensor], backend: str) -> None:
    plain, net = twins(CASES[case][0], True, torch.float32)
    channels = 7 if case == "batch 2d" else 8
    x = change(torch.randn(3, channels, 6, 6))
    with fused.use_backend(backend):
        assert_same(plain, net, x)
        if case == "batch 2d":
            assert net(x).stride() == plain(x).stride()


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize(
    "change",
    [
        lambda dy: dy.transpose(2, 3).contiguous().transpose(2, 3),
        lambda dy: dy.to(memory_format=torch.channels_last),
        lambda dy: dy.contiguous(),
        lambda dy: dy[:, :, :1, :1].expand_as(dy),
        lambda dy: dy.repeat_interleave(2, 3)[..., ::2],
    ],
    ids=["transposed", "channels-last", "contiguous", "expanded", "steps"],
)
@pytest.mark.parametrize("case", ["batch 2d", "group 2d", "instance 2d"])
def test_strides_of_the_gradient(
    case: str, change: Callable[[Tensor], Tensor], layout: str, backend: str
) -> None:
    plain, net = twins(CASES[case][0], True, torch.float32)
    x = torch.randn(3, 7 if case == "batch 2d" else 8, 6, 6)
    x = x.to(memory_format=torch.channels_last) if layout == "channels-last" else x
    dy = change(torch.randn_like(x))
    found = []
    with fused.use_backend(backend):
        for module in (net, plain):
            own = x.detach().requires_grad_()
            module(own).backward(dy)
            found.append([own.grad, *(t.grad for t in module.parameters())])
    assert_close(*found, 1e-5)


@pytest.mark.parametrize("shape", [(0, 7, 5, 4), (3, 7, 0, 4)], ids=str)
def test_nothing(shape: tuple[int, ...], backend: str) -> None:
    plain, net = twins(CASES["batch 2d"][0], True, torch.float32)
    with fused.use_backend(backend):
        assert_same(plain, net, torch.randn(shape))


@pytest.mark.parametrize(
    "modules, shape",
    [
        ([nn.BatchNorm1d(7), nn.ReLU()], (1, 7)),
        ([nn.BatchNorm2d(7), nn.ReLU()], (1, 7, 1, 1)),
        ([nn.InstanceNorm2d(7), nn.ReLU()], (3, 7, 1, 1)),
        ([nn.GroupNorm(4, 4), nn.ReLU()], (1, 4)),
        ([nn.BatchNorm2d(7), nn.ReLU()], (3, 6, 5, 4)),
        ([nn.BatchNorm2d(7), nn.ReLU()], (3, 7, 5)),
        ([nn.GroupNorm(2, 8), nn.ReLU()], (3, 6, 5)),
        ([nn.InstanceNorm1d(7, affine=True), nn.ReLU()], (3, 6, 5)),
        ([nn.BatchNorm1d(7, eps=0.0), nn.ReLU()], (3, 7)),
    ],
    ids=str,
)
def test_raises_as_torch_does(modules: list[nn.Module], shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    with pytest.raises((ValueError, RuntimeError)) as theirs:
        nn.Sequential(*modules)(x)
    with pytest.raises(theirs.type) as ours:
        fused.Sequential(*modules)(x)
    assert str(ours.value) == str(theirs.value)


def test_one_row_in_evaluation(backend: str) -> None:
    plain, net = twins(CASES["batch 1d"][0], False, torch.float32)
    with fused.use_backend(backend):
        assert_same(plain, net, torch.randn(1, 7))


def test_a_frozen_norm_in_a_training_model(backend: str) -> None:
    plain, net = twins(CASES["linear batch"][0], True, torch.float32)
    with fused.use_backend(backend):
        assert_same(plain, net, torch.randn(10, 16))
        plain[1].eval()
        net[1].eval()
        before = net[1].running_mean.clone()
        assert_same(plain, net, torch.randn(10, 16))
    assert torch.equal(net[1].running_mean, before)


def test_float32_parameters_with_a_16_bit_input(backend: str) -> None:
    plain, net = twins(CASES["batch smooth"][0], True, torch.float32)
    with fused.use_backend(backend):
        assert_same(plain, net, torch.randn(3, 7, 5, 4, dtype=torch.bfloat16), 3e-2)
    assert net.plan()[0].fused_calls or backend == "reference"


@pytest.mark.parametrize(
    "change",
    [
        lambda net: setattr(net[0], "momentum", 0.5),
        lambda net: setattr(net[0], "eps", 0.5),
        lambda net: net[0].eval(),
        lambda net: setattr(net[0], "track_running_stats", False),
        lambda net: setattr(net[0], "running_mean", torch.full((7,), 3.0)),
        lambda net: net[0].reset_running_stats(),
        lambda net: setattr(net[0], "weight", nn.Parameter(torch.full((7,), 2.0))),
        lambda net: net[0].register_forward_hook(lambda m, i, o: o + 1),
        lambda net: net[0].register_buffer("running_var", torch.ones(7).double()),
        lambda net: net[0].register_forward_pre_hook(lambda m, i: (i[0] * 2,)),
    ],
    ids=[
        *("momentum", "eps", "eval", "track", "running_mean", "reset", "weight", "hook"),
        *("dtype of a buffer", "pre-hook"),
    ],
)
@pytest.mark.usefixtures("cpp")
def test_what_is_done_between_two_calls_is_seen(change: Callable[[nn.Module], object]) -> None:
    plain, net = twins(CASES["batch 2d"][0], True, torch.float32)
    x = torch.randn(3, 7, 5, 4)
    for _ in range(2):  # the second by the short guard
        assert_same(plain, net, x)
    change(plain)
    change(net)
    for _ in range(2):
        try:
            expected = plain(x)
        except RuntimeError:
            with pytest.raises(RuntimeError):
                net(x)
        else:
            torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("cpp")
def test_another_shape_after_the_short_guard() -> None:
    plain, net = twins(CASES["batch 1d"][0], True, torch.float32)
    for shape in ((9, 7), (9, 7), (4, 7), (5, 7, 3), (9, 7)):
        assert_same(plain, net, torch.randn(shape))
    assert net.plan()[0].fused_calls == 5


DROPOUTS = [
    (nn.Dropout1d, (6, 8, 9)),
    (nn.Dropout2d, (6, 8, 4, 3)),
    (nn.Dropout3d, (6, 8, 2, 3, 2)),
]


@pytest.mark.parametrize("norm", ["batch", "group", "instance", None])
@pytest.mark.parametrize("kind, shape", DROPOUTS)
def test_dropout_of_channels(
    kind: type[nn.Module], shape: tuple[int, ...], norm: str | None, backend: str
) -> None:
    dims = len(shape) - 2
    first = {
        "batch": getattr(nn, f"BatchNorm{dims}d")(8),
        "group": nn.GroupNorm(2, 8),
        "instance": getattr(nn, f"InstanceNorm{dims}d")(8),
    }.get(norm or "")
    children = [c for c in (first, nn.Sigmoid(), kind(0.5)) if c is not None]
    net = fused.Sequential(*children)
    x = torch.randn(shape)
    with fused.use_backend(backend):
        torch.manual_seed(1)
        y = net(x)
        kept = (y.flatten(2) != 0).any(2)
        assert torch.equal((y.flatten(2) != 0).all(2), kept)  # whole channels
        assert 0 < kept.sum() < kept.numel()
        torch.manual_seed(1)
        seed = torch.randint(0x7FFFFFFFFFFFFFFF, (1,))
        assert torch.equal(kept, fused.functional.dropout_mask(6, 8, 0.5, seed))
        undropped = nn.Sequential(*children[:-1])(x)
        mask = kept.view(6, 8, *[1] * dims)
        torch.testing.assert_close(y, undropped * mask * 2, rtol=1e-5, atol=1e-6)
        net.eval()
        assert_same(nn.Sequential(*children).eval(), net, x)


@pytest.mark.parametrize("residual", [False, True])
def test_dropout_of_channels_behind_a_row_norm(residual: bool, backend: str) -> None:
    block = fused.NormAct(
        8, norm="layer", activation="sigmoid", channel_dropout=0.5, channel_dim=-1
    )
    x = torch.randn(5, 7, 8, requires_grad=True)
    r = torch.randn(5, 7, 8) if residual else None
    with fused.use_backend(backend):
        torch.manual_seed(3)
        y = block(x, r)
        torch.manual_seed(3)
        seed = torch.randint(0x7FFFFFFFFFFFFFFF, (1,))
        keep = fused.functional.dropout_mask(5, 8, 0.5, seed)[:, None]
        expected = torch.sigmoid(block.norm(x)) * keep * 2 + (0 if r is None else r)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
        dy = torch.randn_like(y)
        (ours,) = torch.autograd.grad(y, x, dy)
        (theirs,) = torch.autograd.grad(expected, x, dy)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_dropout_for_other_dimensions_is_torchs() -> None:
    net = fused.Sequential(nn.Sigmoid(), nn.Dropout1d(0.5))
    x = torch.randn(6, 8)  # one sample of 6 channels for torch
    y = net(x)
    assert "Dropout1d" in net.plan()[0].reason
    kept = (y != 0).any(1)
    assert torch.equal((y != 0).all(1), kept)
