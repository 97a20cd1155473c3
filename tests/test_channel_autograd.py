"""Differentiation, compilation and training with norms over samples or positions."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from sequentials import assert_close, outcome
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import fused
from fused.backends import ops
from fused.functional import norm_act
from fused.spec import Spec

pytestmark = pytest.mark.usefixtures("cpp")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


NORMS = ("batch", "group", "instance")
NETS: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...]]] = {
    "batch": (lambda: [nn.Linear(5, 6), nn.BatchNorm1d(6), nn.GELU()], (7, 5)),
    "group": (lambda: [nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6), nn.SiLU()], (2, 3, 6, 5)),
    "instance": (
        lambda: [nn.Conv2d(3, 6, 3), nn.InstanceNorm2d(6, affine=True), nn.Tanh()],
        (2, 3, 6, 5),
    ),
}


def options_of(norm: str) -> dict[str, int]:
    return {"num_groups": 2} if norm == "group" else {}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("channel_dim", [1, -1])
@pytest.mark.parametrize("norm", NORMS)
def test_first_and_second_derivatives(norm: str, channel_dim: int, masked: bool) -> None:
    if masked and channel_dim == 1:
        pytest.skip("a mask needs channels last")
    shape = (3, 4, 5) if channel_dim == 1 else (3, 5, 4)
    z, residual = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 1, 0]]).bool()

    def run(z: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return norm_act(
            z,
            norm=norm,
            channel_dim=channel_dim,
            norm_weight=weight,
            norm_bias=bias,
            activation="silu",
            p=0.25,
            seed=3,
            residual=residual,
            mask=mask if masked else None,
            **options_of(norm),
        )

    inputs = (z, weight, bias, residual)
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_derivatives_with_running_statistics() -> None:
    z = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    weight, bias, mean = (torch.randn(4, dtype=torch.float64) for _ in range(3))
    weight.requires_grad_(), bias.requires_grad_()
    variance = torch.rand(4, dtype=torch.float64) + 0.5

    def run(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return norm_act(
            z,
            norm="batch",
            norm_weight=weight,
            norm_bias=bias,
            running_mean=mean,
            running_var=variance,
            training=False,
            activation="gelu",
        )

    assert torch.autograd.gradcheck(run, (z, weight, bias))
    assert torch.autograd.gradgradcheck(run, (z, weight, bias))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", NETS)
def test_torch_func(case: str, training: bool) -> None:
    make, shape = NETS[case]
    net = fused.Sequential(*make()).train(training and case != "batch")
    plain = nn.Sequential(*net)
    x = torch.randn(shape)
    given = dict(net.named_parameters())

    def loss(net: nn.Module, given: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(net, given, (x,)).square().sum()

    ours = torch.func.grad(lambda g: loss(net, g))(given)
    theirs = torch.func.grad(lambda g: loss(plain, g))(given)
    for name in given:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-4)
    tangent = torch.randn_like(x)
    y, dy = torch.func.jvp(net, (x,), (tangent,))
    plain_y, plain_dy = torch.func.jvp(plain, (x,), (tangent,))
    torch.testing.assert_close(y, plain_y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dy, plain_dy, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", NETS)
def test_one_graph(case: str, training: bool) -> None:
    make, shape = NETS[case]
    net = fused.Sequential(*make()).train(training)
    twin = copy.deepcopy(net)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for batch in (shape[0], shape[0] + 3, shape[0]):
        x = torch.randn(batch, *shape[1:])
        assert_close(outcome(compiled, x), outcome(twin, x), 1e-5)
    for (name, ours), theirs in zip(net.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


@pytest.mark.parametrize("case", NETS)
def test_inductor(case: str) -> None:
    make, shape = NETS[case]
    net = fused.Sequential(*make(), nn.Dropout(0.5))
    twin = copy.deepcopy(net)
    compiled = torch.compile(net, fullgraph=True)
    x = torch.randn(shape)
    found = outcome(compiled, x)
    outcome(twin, x)  # for its running statistics
    assert 0.2 < float((found[0] == 0).float().mean()) < 0.8
    net.eval(), twin.eval()
    assert_close(outcome(compiled, x), outcome(twin, x), 1e-4)
    memory = x.to(memory_format=torch.channels_last) if x.dim() == 4 else x
    assert_close(outcome(compiled, memory), outcome(twin, memory), 1e-4)


def test_a_block_with_a_mask_compiles() -> None:
    block = fused.LinearNormAct(5, 6, norm="batch", activation="relu", momentum=None)
    twin = copy.deepcopy(block)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    x, mask = torch.randn(3, 4, 5), torch.rand(3, 4) < 0.7
    for _ in range(2):
        torch.testing.assert_close(compiled(x, mask=mask), twin(x, mask=mask))
    torch.testing.assert_close(block.norm.running_var, twin.norm.running_var)


@pytest.mark.parametrize("case", NETS)
def test_export(case: str) -> None:
    make, shape = NETS[case]
    net = fused.Sequential(*make()).eval()
    x = torch.randn(shape)
    program = torch.export.export(net, (x,))
    torch.testing.assert_close(program.module()(x), net(x))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("case", NETS)
def test_checkpointing_repeats_the_mask(case: str, reentrant: bool) -> None:
    make, shape = NETS[case]
    net = fused.Sequential(*make(), nn.Dropout(0.5))
    x = torch.randn(shape)

    def run(x: Tensor) -> Tensor:
        return checkpoint(net, x, use_reentrant=reentrant)

    found = []
    for function in (net, run):
        torch.manual_seed(2)
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        y.square().sum().backward()
        found.append((y.detach(), leaf.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_two_steps_before_the_backward() -> None:
    """The running statistics change in between; backward must not need them."""
    net = fused.Sequential(nn.BatchNorm2d(4), nn.ReLU())
    x = torch.randn(3, 4, 5, 5, requires_grad=True)
    y = net(x)
    (expected,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
    net(torch.randn(3, 4, 5, 5))
    (again,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.equal(again, expected)


def saved_bytes(net: nn.Module, x: Tensor) -> int:
    storages = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        net(x)
    return sum(storages.values())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("norm", ["batch", "group", "instance"])
def test_what_is_kept_is_the_input_and_statistics(norm: str, layout: torch.memory_format) -> None:
    first = {
        "batch": nn.BatchNorm2d(8),
        "group": nn.GroupNorm(2, 8),
        "instance": nn.InstanceNorm2d(8, affine=True),
    }[norm]
    net = fused.Sequential(first, nn.GELU(), nn.Dropout(0.1))
    x = torch.randn(4, 8, 16, 16).to(memory_format=layout).requires_grad_()
    statistics = 2 * 4 * {"batch": 8, "group": 4 * 2, "instance": 4 * 8}[norm]
    parameters = 2 * 4 * 8
    assert saved_bytes(net, x) <= x.numel() * 4 + statistics + parameters + 8


def test_the_linear_bias_needs_no_gradient_where_the_norm_takes_it_out() -> None:
    net = fused.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.GELU())
    net(torch.randn(9, 5)).sum().backward()
    assert torch.equal(net[0].bias.grad, torch.zeros(6))


def operator_inputs(norm: str, last: bool) -> tuple[Tensor, ...]:
    z = torch.randn(3, 5, 8) if last else torch.randn(3, 8, 5)
    return z, torch.randn(8), torch.randn(8), torch.randn_like(z)


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("norm", NORMS)
def test_operators_are_what_they_declare(norm: str, last: bool) -> None:
    epilogue = Spec(
        norm, 1e-5, "gelu", threshold=1000, groups=2 if norm == "group" else 8, channels_last=last
    )
    codes, seed = epilogue.channel, torch.tensor([5])
    z, weight, bias, residual = operator_inputs(norm, last)
    mask = torch.rand(3, 5) < 0.8 if last else None
    check = torch.library.opcheck
    check(ops.channel_statistics, (z, mask, *codes[:3]))
    check(ops.channel_forward, (z, weight, bias, residual, mask, seed, *codes))
    mean, variance, count = ops.channel_statistics(z, mask, *codes[:3])
    given = mean, variance, weight, bias
    check(ops.channel_apply, (z, *given, residual, mask, seed, *codes))
    check(ops.channel_apply_, (z.clone(), *given, residual, mask, seed, *codes))
    some = count if mask is not None else None
    dy, wanted = torch.randn_like(z), 3
    for constant in (False, True):
        known = (mean, variance, None if constant else some, weight, bias, mask, seed)
        check(ops.channel_backward, (dy, z, *known, wanted, constant, *codes))
    if norm == "batch":
        check(ops.channel_sums, (dy, z, *given, mask, seed, *codes))
        sums, _ = ops.channel_sums(dy, z, *given, mask, seed, *codes)
        total = count if mask is not None else torch.tensor([15.0])
        check(
            ops.channel_gradient,
            (dy, z, mean, variance, sums, total, weight, bias, mask, seed, *codes),
        )


@pytest.mark.parametrize("norm", NORMS)
def test_state_goes_through_copies_and_files(norm: str, tmp_path) -> None:
    block = fused.LinearNormAct(5, 6, norm=norm, activation="relu", **options_of(norm))
    x = torch.randn(4, 3, 5)
    block(x)
    block.eval()
    expected = block(x)
    torch.save(block, tmp_path / "block.pt")
    loaded = torch.load(tmp_path / "block.pt", weights_only=False)
    for other in (copy.deepcopy(block), loaded):
        assert torch.equal(other(x), expected)
        assert other.state_dict().keys() == block.state_dict().keys()


def test_two_hundred_steps_follow_eager() -> None:
    """Loss, weights and running statistics stay as near to float64 as those of eager do."""
    torch.manual_seed(0)
    x = torch.randn(512, 12) * torch.linspace(0.5, 3, 12) + 1
    target = (x[:, :3].prod(1) + x[:, 3:6].sum(1).sin()).unsqueeze(1)

    def train(kind: type[nn.Sequential], dtype: torch.dtype) -> dict[str, Tensor]:
        torch.manual_seed(1)
        net = kind(
            *(nn.Linear(12, 32), nn.BatchNorm1d(32), nn.SiLU()),
            # No kink, where an error in the last place decides on which side an element falls.
            *(nn.Linear(32, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Linear(16, 1)),
        ).to(dtype)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
        losses = []
        for step in range(200):
            rows = slice(step * 64 % 512, step * 64 % 512 + 64)
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(net(x[rows].to(dtype)), target[rows].to(dtype))
            loss.backward()
            optimizer.step()
            losses.append(loss.detach().double())
        state = {name: t.double() for name, t in net.state_dict().items()}
        return {"losses": torch.stack(losses), **state}

    oracle = train(nn.Sequential, torch.float64)
    eager = train(nn.Sequential, torch.float32)
    ours = train(fused.Sequential, torch.float32)
    assert oracle["losses"][-1] < 0.5 * oracle["losses"][0]
    for name, expected in oracle.items():
        spread = float((eager[name] - expected).abs().max())
        error = float((ours[name] - expected).abs().max())
        scale = float(expected.abs().max())
        assert error <= 4 * spread + 1e-5 * scale, f"{name}: {error} against {spread}"


@pytest.mark.parametrize("norm", [None, *NORMS])
@pytest.mark.parametrize("memory", ["contiguous", "channels last", "sequence"])
def test_what_comes_out_may_be_written_to(norm: str | None, memory: str) -> None:
    """As in nn.Sequential: torch refuses to write to a view that a function made."""
    dim = -1 if memory == "sequence" else 1
    options = options_of(norm or "") | {"channel_dim": dim}
    dropped = 0.0 if norm else 0.5
    net = fused.NormAct(16, norm=norm, activation="silu", channel_dropout=dropped, **options)
    x = torch.randn((8, 300, 16) if dim == -1 else (8, 16, 20, 15))
    if memory == "channels last":
        x = x.to(memory_format=torch.channels_last)
    gradients = []
    for in_place in (False, True):
        torch.manual_seed(1)
        leaf = x.clone().requires_grad_()
        y = net(leaf)
        y = y.mul_(2).relu_() if in_place else (y * 2).relu()
        y.square().sum().backward()
        gradients.append(leaf.grad)
    assert net.plan()[0].fused_calls == 2
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


@pytest.mark.parametrize("channel_dropout", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("norm", [None, "layer", "rms", *NORMS])
def test_backward_of_an_empty_batch(norm: str, activation: str, channel_dropout: bool) -> None:
    """The gradient of a sum is expanded: all its strides are zero."""
    dropout = {"channel_dropout" if channel_dropout else "dropout": 0.1}
    for shape in ((0, 5, 16), (3, 0, 16)) if norm else ((0, 16), (0, 5, 16)):
        if norm == "instance" and shape[1] == 0:
            continue  # torch raises, too
        x = torch.randn(shape, requires_grad=True)
        net = fused.LinearNormAct(
            16, 32, norm=norm, activation=activation, **dropout, **options_of(norm)
        )
        net(x).sum().backward()
        assert x.grad is not None and x.grad.shape == shape


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, fused.BatchNorm])
def test_a_batch_that_raises_is_not_counted(
    kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    norm, x = kind(64), torch.randn(512, 64)
    modules = [fused.Sequential(norm, nn.ReLU()), *([norm] if kind is fused.BatchNorm else [])]
    with torch.no_grad():
        with monkeypatch.context() as broken:
            broken.setattr(ops, "channel_forward", fail)
            for module in modules:
                with pytest.raises(RuntimeError, match="out of memory"):
                    module(x)
        assert int(norm.num_batches_tracked) == 0
        for module in modules:
            module(x)
        assert int(norm.num_batches_tracked) == len(modules)
