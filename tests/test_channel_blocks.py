"""Blocks with norms over samples or positions: features last, padding, jagged tensors, parts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import fused
from fused.functional import linear_norm_act, norm_act

CHANNEL = ("batch", "group", "instance")
LENGTHS = (5, 1, 7, 3)


@pytest.fixture(params=["cpp", "reference"], autouse=True)
def backend(request: pytest.FixtureRequest):
    if request.param == "cpp" and fused.backends.backend.cpu_isa() is None:
        pytest.skip("the C++ extension is not built")
    with fused.use_backend(request.param):
        yield request.param


def block_of(norm: str | None, **options: object) -> fused.LinearNormAct:
    if norm == "group":
        options["num_groups"] = 4
    block = fused.LinearNormAct(6, 12, norm=norm, activation="gelu", **options)
    for t in block.parameters():
        nn.init.normal_(t, 0.3)
    return block


def torch_norm(block: nn.Module) -> nn.Module:
    """torch's own norm, channels in dimension 1, with the same parameters."""
    norm = block.norm
    if isinstance(norm, fused.nn.GroupNorm):
        return nn.GroupNorm(norm.num_groups, norm.num_channels, norm.eps)
    kind = nn.BatchNorm1d if isinstance(norm, fused.nn.BatchNorm) else nn.InstanceNorm1d
    return kind(norm.num_features, affine=True, track_running_stats=norm.track_running_stats)


def gradients(y: Tensor, x: Tensor, net: nn.Module) -> list[Tensor]:
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return list(torch.autograd.grad(y, [x, *net.parameters()], dy))


@pytest.mark.parametrize("shape", [(9, 6), (4, 5, 6), (2, 3, 4, 6)], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", CHANNEL)
def test_features_are_the_last_dimension(norm: str, training: bool, shape: tuple[int, ...]) -> None:
    if norm == "instance" and len(shape) == 2:
        pytest.skip("one position")
    options = {} if norm == "group" else {"track_running_stats": True}
    block = block_of(norm, **options).train(training)
    theirs = torch_norm(block).train(training)
    theirs.load_state_dict(block.norm.state_dict())
    x = torch.randn(shape, requires_grad=True)
    for _ in range(2):
        y = block(x)
        z = block.linear(x)
        flat = z.reshape(shape[0], -1, 12) if len(shape) > 2 else z[:, None]
        h = theirs(flat.transpose(1, 2)).transpose(1, 2).reshape(z.shape)
        expected = nn.functional.gelu(h)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    for name, t in theirs.state_dict().items():
        torch.testing.assert_close(block.norm.state_dict()[name], t, rtol=1e-5, atol=1e-6)
    for ours, other in zip(
        gradients(y, x, block.linear), gradients(expected, x, block.linear), strict=True
    ):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4)


def padded(lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor]:
    """Sequences whose padding holds NaN, and where they are."""
    x = torch.randn(len(lengths), max(lengths), 6)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    x[~mask] = math.nan
    return x, mask


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", [*CHANNEL, "layer", "rms", None])
def test_padding_takes_no_part(norm: str | None, training: bool) -> None:
    block = block_of(norm).train(training)
    # torch raises for the statistics of one position.
    x, mask = padded((5, 2, 7, 3) if norm == "instance" else LENGTHS)
    twin = block_of(norm).train(training)
    twin.load_state_dict(block.state_dict())
    y = block(x, mask=mask)
    assert torch.equal(y[~mask], torch.zeros_like(y[~mask]))
    kept = mask.sum(1).tolist()
    parts = [x.detach()[i, :length].requires_grad_() for i, length in enumerate(kept)]
    if norm in ("group", "instance"):
        expected = torch.cat([twin(part[None])[0] for part in parts])
    else:
        expected = twin(torch.cat(parts))
    torch.testing.assert_close(y[mask], expected, rtol=1e-5, atol=1e-5)
    for name, t in twin.state_dict().items():
        torch.testing.assert_close(block.state_dict()[name], t, rtol=1e-5, atol=1e-6)
    dy = torch.randn_like(expected)
    leaves = [*block.parameters()]
    # What padding holds is NaN, and Linear's own gradient of the weight would read it.
    x_clean = torch.where(mask[:, :, None], x.detach(), 0).requires_grad_()
    full = torch.zeros_like(y).masked_scatter(mask[:, :, None].expand_as(y), dy)
    ours = torch.autograd.grad(block(x_clean, mask=mask), [x_clean, *leaves], full)
    theirs = torch.autograd.grad(expected, [*parts, *twin.parameters()], dy)
    torch.testing.assert_close(ours[0][mask], torch.cat(theirs[: len(parts)]), rtol=1e-4, atol=1e-4)
    assert not ours[0][~mask].any()
    for a, b in zip(ours[1:], theirs[len(parts) :], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_padding_with_residual_and_dropout(norm: str) -> None:
    block = block_of(norm, dropout=0.5)
    x, mask = padded()
    residual = torch.randn(*mask.shape, 12, requires_grad=True)
    y = block(x, residual, mask)
    assert torch.equal(y[~mask], torch.zeros_like(y[~mask]))
    assert y[mask].isfinite().all()
    y[mask].sum().backward()
    assert torch.equal(residual.grad, mask[:, :, None].expand_as(residual).float())


def test_nothing_but_padding_leaves_the_running_statistics() -> None:
    block = block_of("batch")
    before = block.norm.running_mean.clone(), block.norm.running_var.clone()
    y = block(torch.full((2, 3, 6), math.nan), mask=torch.zeros(2, 3, dtype=torch.bool))
    assert torch.equal(y, torch.zeros_like(y))
    assert torch.equal(block.norm.running_mean, before[0])
    assert torch.equal(block.norm.running_var, before[1])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", ["layer", "rms", "batch", None])
def test_jagged(norm: str | None, training: bool) -> None:
    block = block_of(norm).train(training)
    pieces = [torch.randn(length, 6) for length in LENGTHS]
    x = torch.nested.nested_tensor(pieces, layout=torch.jagged, requires_grad=True)
    y = block(x)
    torch.testing.assert_close(y.values(), block(torch.cat(pieces)))
    assert torch.equal(y.offsets(), x.offsets())
    y.values().sum().backward()
    assert x.grad is not None and block.linear.weight.grad is not None
    r = torch.nested.nested_tensor_from_jagged(torch.randn(sum(LENGTHS), 12), x.offsets())
    torch.manual_seed(0)
    with_residual = block(x, r).values()
    torch.testing.assert_close(with_residual - r.values(), block(x).values(), atol=1e-5, rtol=1e-4)
    of_function = linear_norm_act(
        x, block.linear.weight, block.linear.bias, norm=norm, activation="gelu"
    )
    assert of_function.is_nested
    assert of_function.shape == y.shape


@pytest.mark.parametrize("norm", ["group", "instance"])
def test_jagged_needs_padding(norm: str) -> None:
    x = torch.nested.nested_tensor([torch.randn(n, 6) for n in LENGTHS], layout=torch.jagged)
    with pytest.raises(ValueError, match="pad the input"):
        block_of(norm)(x)


@pytest.mark.parametrize("batch", [24, 23, 5, 9])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False])
def test_virtual_batches(batch: int, momentum: float | None, training: bool) -> None:
    block = fused.LinearNormAct(
        6, 12, norm="batch", activation="relu", virtual_batch_size=8, momentum=momentum
    ).train(training)
    theirs = nn.BatchNorm1d(12, momentum=momentum).train(training)
    x = torch.randn(batch, 6, requires_grad=True)
    for _ in range(2):
        y = block(x)
        parts = math.ceil(batch / 8)
        z = block.linear(x)
        expected = torch.cat([theirs(part) for part in z.chunk(parts)]).relu()
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(block.norm.running_mean, theirs.running_mean)
    torch.testing.assert_close(block.norm.running_var, theirs.running_var)
    for ours, other in zip(
        gradients(y, x, block.linear), gradients(expected, x, block.linear), strict=True
    ):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4)


def test_a_virtual_batch_of_one_row_raises() -> None:
    block = fused.LinearNormAct(6, 12, norm="batch", virtual_batch_size=2)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        block(torch.randn(3, 6))


def test_norm_act_has_torchs_channels() -> None:
    block = fused.NormAct(8, norm="group", num_groups=2, activation="silu", dropout=0.1).eval()
    assert type(block.norm) is nn.GroupNorm
    x = torch.randn(3, 8, 5, 4)
    torch.testing.assert_close(block(x), nn.functional.silu(block.norm(x)))
    r = torch.randn_like(x)
    torch.testing.assert_close(block(x, r), r + nn.functional.silu(block.norm(x)))
    batch = fused.NormAct(8, norm="batch", activation="relu")
    for shape in ((3, 8), (3, 8, 5), (3, 8, 5, 4), (2, 8, 2, 2, 2)):
        assert batch(torch.randn(shape)).shape == shape
    with pytest.raises(ValueError, match="channels in the last dimension"):
        batch(x, mask=torch.ones(3, 8, 5, dtype=torch.bool))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"norm": "group"}, "needs num_groups"),
        ({"norm": "layer", "momentum": 0.3}, "momentum does not belong to norm='layer'"),
        ({"norm": "group", "num_groups": 5}, "divisible"),
        ({"norm": "instance", "virtual_batch_size": 5}, "virtual_batch_size does not belong"),
        ({"norm": "batch", "virtual_batch_size": 0}, "at least 1"),
        ({"norm": "batch", "dropout": 0.1, "channel_dropout": 0.1}, "pass one of them"),
        ({"norm": "batch", "channel_dropout": 1.5}, "between 0 and 1"),
        ({"norm": "btach"}, "unknown norm"),
    ],
)
def test_what_does_not_go_together(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fused.LinearNormAct(6, 12, **options)


@pytest.mark.parametrize(
    "mask, error",
    [
        (torch.ones(4, 7), TypeError),
        (torch.ones(4, 6, dtype=torch.bool), ValueError),
        (torch.ones(4, dtype=torch.bool), ValueError),
        ([True], TypeError),
    ],
    ids=str,
)
def test_masks_that_do_not_fit(mask: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="mask must be"):
        block_of("batch")(torch.randn(4, 7, 6), mask=mask)


@pytest.mark.parametrize("norm", CHANNEL)
def test_functions_equal_modules(norm: str) -> None:
    block = block_of(norm)
    x = torch.randn(3, 5, 6)
    options = {"num_groups": 4} if norm == "group" else {}
    if norm == "batch":
        options = {"running_mean": torch.zeros(12), "running_var": torch.ones(12)}
    n = block.norm
    y = linear_norm_act(
        x,
        *(block.linear.weight, block.linear.bias),
        norm=norm,
        norm_weight=n.weight,
        norm_bias=n.bias,
        activation="gelu",
        **options,
    )
    torch.testing.assert_close(y, block(x))
    if norm == "batch":
        torch.testing.assert_close(options["running_mean"], n.running_mean)
        torch.testing.assert_close(options["running_var"], n.running_var)
    z = block.linear(x)
    again = norm_act(
        z,
        norm=norm,
        channel_dim=-1,
        norm_weight=n.weight,
        norm_bias=n.bias,
        activation="gelu",
        **({"num_groups": 4} if norm == "group" else {}),
    )
    torch.testing.assert_close(again, y)
    first = norm_act(
        z.transpose(1, 2),
        norm=norm,
        norm_weight=n.weight,
        norm_bias=n.bias,
        activation="gelu",
        **({"num_groups": 4} if norm == "group" else {}),
    )
    torch.testing.assert_close(first.transpose(1, 2), y, rtol=1e-5, atol=1e-5)


def test_a_whole_mlp_with_a_mask() -> None:
    mlp = fused.MLP(6, [8, 8], 3, norm="batch", activation="relu")
    x, mask = padded()
    y = mlp(x, mask=mask)
    assert y[mask].isfinite().all()
    assert not y[~mask].any()
    torch.testing.assert_close(mlp(x[mask]), y[mask], rtol=1e-5, atol=1e-5)
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0)
    jagged = mlp(torch.nested.nested_tensor_from_jagged(x[mask], offsets))
    torch.testing.assert_close(jagged.values(), y[mask], rtol=1e-5, atol=1e-5)


def test_convert_sync_batchnorm_is_refused_where_features_are_last() -> None:
    """torch would put a norm of dimension 1 there."""
    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    parts = {"norm": "batch", "activation": "relu"}
    for block in (
        fused.LinearNormAct(4, 8, **parts),
        fused.MLP(4, [8], 2, **parts),
        fused.NormAct(8, **parts, virtual_batch_size=4),
    ):
        with pytest.raises(TypeError, match=r"process_group=torch\.distributed\.group\.WORLD"):
            convert(block)
    assert type(convert(fused.NormAct(8, **parts))[0]) is nn.SyncBatchNorm
