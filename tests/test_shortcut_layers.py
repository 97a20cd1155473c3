"""The shortcut in functions and blocks: what autograd, transforms, compilers and autocast see."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused
from fused.functional import linear_norm_act, norm_act

Call = dict[str, Any]
IMAGES: list[Call] = [
    {"norm": "batch"},
    {"norm": "group", "num_groups": 2},
    {"norm": "instance"},
    {"norm": "batch", "use_input_stats": False},
]
ROWS: list[Call] = [{"norm": "layer"}, {"norm": "rms"}, {"norm": None}]


def inputs(*shape: int, channels: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """z, shortcut, weight and bias."""
    torch.manual_seed(0)
    made = (shape, shape, (channels,), (channels,))
    return [torch.randn(s, dtype=dtype).requires_grad_() for s in made]


def call(
    given: Call, z: Tensor, shortcut: Tensor, weight: Tensor, bias: Tensor, **more: Any
) -> Tensor:
    norm, own = given["norm"], dict(given)
    if norm is not None:
        own["norm_weight"] = weight
    if norm not in (None, "rms"):
        own["norm_bias"] = bias
    if "use_input_stats" in own:
        own["running_mean"], own["running_var"] = torch.zeros(6).double(), torch.ones(6).double()
    return norm_act(z, activation="gelu", shortcut=shortcut, **own, **more)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("given", IMAGES + ROWS, ids=str)
def test_gradients_of_every_order(given: Call, p: float) -> None:
    images = given in IMAGES
    tensors = inputs(3, 6, 4, 5, channels=6) if images else inputs(5, 8, channels=8)

    def function(*tensors: Tensor) -> Tensor:
        return call(given, *tensors, p=p, seed=3)

    used = 3 if given["norm"] == "rms" else 2 if given["norm"] is None else 4
    fixed = tensors[used:]
    own = [tensors[:used]]
    torch.autograd.gradcheck(lambda *t: function(*t, *fixed), *own, fast_mode=True)
    torch.autograd.gradgradcheck(lambda *t: function(*t, *fixed), *own, fast_mode=True)
    with fused.use_backend("reference"):
        expected = function(*tensors)
    torch.testing.assert_close(function(*tensors), expected)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_block_of_a_resnet(memory_format: torch.memory_format) -> None:
    """In both layouts, of a shortcut of another, with running statistics."""
    torch.manual_seed(0)
    eager, ours = (nn.BatchNorm2d(16).double() for _ in range(2))
    for other in (torch.contiguous_format, torch.channels_last):
        z = torch.randn(8, 16, 24, 24).double().to(memory_format=memory_format).requires_grad_()
        shortcut = torch.randn(8, 16, 24, 24).double().to(memory_format=other).requires_grad_()
        normed = eager(z)
        expected = F.relu(normed + shortcut)
        given = {"running_mean": ours.running_mean, "running_var": ours.running_var}
        y = norm_act(z, norm="batch", norm_weight=ours.weight, norm_bias=ours.bias,
                     activation="relu", shortcut=shortcut, **given)  # fmt: skip
        torch.testing.assert_close(y, expected)
        assert y.stride() == normed.stride()
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(getattr(ours, name), getattr(eager, name))
        g = torch.randn_like(y)
        found = torch.autograd.grad(y, (z, shortcut), g)
        torch.testing.assert_close(found, torch.autograd.grad(expected, (z, shortcut), g))


def test_what_is_kept_for_backward() -> None:
    """z, the shortcut, statistics and parameters: no sum, no mask."""
    z, shortcut, weight, bias = inputs(64, 16, 30, 30, channels=16, dtype=torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call({"norm": "batch"}, z, shortcut, weight, bias, p=0.1)
    assert {t.untyped_storage().data_ptr() for t in kept if t.numel() == z.numel()} == {
        z.untyped_storage().data_ptr(),
        shortcut.untyped_storage().data_ptr(),
    }
    assert sum(t.numel() for t in kept if t.numel() != z.numel()) <= 4 * 16 + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_strided_misaligned_and_expanded_tensors(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    wide = torch.randn(70, 2 * 300 + 1).to(dtype)
    z, shortcut = wide[:, 1:301], wide[:, 301:]  # rows apart, at odd addresses
    images = torch.randn(5, 9, 13, 24).to(dtype).movedim(-1, 1)[..., 1:]
    others = torch.randn(24, 5, 12, 9).to(dtype).permute(1, 0, 3, 2)
    for given, x, s in (
        *(({"norm": norm}, z, shortcut) for norm in ("layer", "rms", None)),
        *(({"norm": norm}, images, others) for norm in ("batch", "instance")),
    ):
        # The mask lies in memory order, so what is laid out otherwise is compared without.
        p = 0.2 if x is z else 0.0

        def step(x: Tensor, s: Tensor, given: Call = given, p: float = p) -> tuple[Tensor, ...]:
            x, s = x.detach().requires_grad_(), s.detach().requires_grad_()
            y = norm_act(x, activation="gelu", shortcut=s, p=p, seed=7, **given)
            # The gradient has the strides of one element, of a part, and of another order.
            parts = y[..., :1].expand_as(y).sum(), y[..., ::2].sum(), y.mT.square().sum()
            return y, *torch.autograd.grad(sum(parts), (x, s))

        found = step(x, s)
        if x is z:
            assert all(map(torch.equal, found, step(x.contiguous(), s.contiguous())))
        with fused.use_backend("reference"):
            wanted = step(x.double(), s.double())
        tolerance = 1e-4 if dtype == torch.float32 else 0.05
        for ours, right in zip(found, wanted, strict=True):
            scale = right.abs().max()
            torch.testing.assert_close(ours / scale, right / scale, rtol=0, atol=tolerance,
                                       check_dtype=False)  # fmt: skip


@pytest.mark.parametrize("shape", [(0, 8), (1, 8), (5, 0), (1, 1)])
@pytest.mark.parametrize("norm", ["layer", "rms", None])
def test_no_row_one_row_no_column(norm: str | None, shape: tuple[int, int]) -> None:
    z, shortcut = (torch.randn(shape).double().requires_grad_() for _ in range(2))
    found = []
    for backend in ("cpp", "reference"):
        with fused.use_backend(backend):
            y = norm_act(z, norm=norm, activation="silu", p=0.3, seed=1, shortcut=shortcut)
            found.append([y, *torch.autograd.grad(y.sum(), (z, shortcut))])
    for ours, plain in zip(*found, strict=True):
        assert ours.shape == shape
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("shape", [(0, 6, 4, 4), (1, 6, 3, 5), (2, 6, 0, 4)])
@pytest.mark.parametrize("norm", ["batch", "group", "instance"])
def test_no_image_one_image_no_position(norm: str, shape: tuple[int, ...]) -> None:
    z, shortcut = (torch.randn(shape).double().requires_grad_() for _ in range(2))
    given = {"num_groups": 2} if norm == "group" else {}
    y = norm_act(z, norm=norm, activation="silu", shortcut=shortcut, **given)
    gradients = torch.autograd.grad(y.sum(), (z, shortcut))
    assert y.shape == shape and all(g.shape == shape for g in gradients)
    if y.numel():
        expected = F.silu(norm_act(z, norm=norm, **given) + shortcut)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(gradients, torch.autograd.grad(expected.sum(), (z, shortcut)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    tensors = inputs(8, 6, 20, 20, channels=6)

    def function(*tensors: Tensor) -> Tensor:
        return call({"norm": "batch"}, *tensors, p=0.3)

    found = []
    for how in (False, True):
        torch.manual_seed(1)
        y = checkpoint(function, *tensors, use_reentrant=reentrant) if how else function(*tensors)
        for t in tensors:
            t.grad = None
        y.square().sum().backward()
        found.append([y, *(t.grad for t in tensors)])
    for once, again in zip(*found, strict=True):
        assert torch.equal(once, again)


def test_one_tensor_as_everything() -> None:
    for shape, given in (((9, 16), {"norm": "layer"}), ((8, 6, 20, 20), {"norm": "batch"})):
        x = torch.randn(shape).double().requires_grad_()
        y = norm_act(x, activation="silu", shortcut=x, residual=x, **given)
        normed = norm_act(x, **given)
        expected = x + F.silu(normed + x)
        torch.testing.assert_close(y, expected)
        g = torch.randn_like(y)
        found = torch.autograd.grad(y, x, g), torch.autograd.grad(expected, x, g)
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("given", [IMAGES[0], ROWS[0], ROWS[2]], ids=str)
def test_transforms_forward_mode_and_compile(given: Call) -> None:
    tensors = inputs(3, 6, 4, 5, channels=6) if given in IMAGES else inputs(5, 8, channels=8)

    def function(*tensors: Tensor) -> Tensor:
        return call(given, *tensors, p=0.3, seed=5)

    expected = function(*tensors)
    gradients = torch.autograd.grad(expected.square().sum(), tensors[:2])
    given_by = torch.func.grad(lambda *t: function(*t).square().sum(), (0, 1))(*tensors)
    torch.testing.assert_close(given_by, gradients)
    _, tangent = torch.func.jvp(lambda s: function(tensors[0], s, *tensors[2:]), (tensors[1],),
                                (torch.ones_like(tensors[1]),))  # fmt: skip
    assert tangent.abs().max() > 0
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    y = compiled(*tensors)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), tensors[:2]), gradients)


def test_behind_a_gate_and_of_other_dtypes() -> None:
    """Two operations; eager's dtypes."""
    torch.manual_seed(0)
    x, weight = torch.randn(5, 8).requires_grad_(), torch.randn(12, 8)
    shortcut = torch.randn(5, 12).requires_grad_()
    y = linear_norm_act(x, weight, norm="layer", activation="swiglu", shortcut=shortcut)
    value, gate = (F.layer_norm(x @ weight.t(), (12,)) + shortcut).chunk(2, -1)
    torch.testing.assert_close(y, value * F.silu(gate))
    half = shortcut.detach().bfloat16().requires_grad_()
    for z, s, dtype in (
        (shortcut, half, torch.float32),
        (half, shortcut, torch.float32),
        (half, half.detach().clone(), torch.bfloat16),
    ):
        y = norm_act(z, norm="layer", activation="relu", shortcut=s)
        assert y.dtype == dtype
        torch.testing.assert_close(y, F.relu(F.layer_norm(z, (12,)) + s), rtol=0.02, atol=0.02)
        y.sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        y = linear_norm_act(x, weight, norm="rms", activation="gelu", shortcut=half)
        expected = F.gelu(F.rms_norm(F.linear(x, weight), (12,)) + half)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)


BLOCKS = {
    "layer": lambda: fused.LinearNormAct(8, 16, norm="layer", activation="gelu", dropout=0.2),
    "batch": lambda: fused.LinearNormAct(8, 16, norm="batch", activation="relu"),
    "gated": lambda: fused.LinearNormAct(8, 16, norm="rms", activation="swiglu"),
    "no activation": lambda: fused.LinearNormAct(8, 16, norm="layer", activation=None, dropout=0.2),
    "no norm": lambda: fused.LinearNormAct(8, 16, norm=None, activation="relu"),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name: str) -> None:
    """Whether they run as one operation or child by child."""
    torch.manual_seed(0)
    block = BLOCKS[name]().double()
    x, width = torch.randn(600, 8).double(), block.linear.out_features
    shortcut, residual = torch.randn(600, width).double(), torch.randn(600, 16).double()
    other = copy.deepcopy(block)
    for training in (True, False):
        block.train(training), other.train(training)
        if "dropout" in block._modules and training:
            block.dropout.p = other.dropout.p = 1.0
        y = block(x, residual, shortcut=shortcut)
        h = other.linear(x)
        h = (other.norm(h) if "norm" in other._modules else h) + shortcut
        h = other.act(h) if "act" in other._modules else h
        h = other.dropout(h) if "dropout" in other._modules else h
        torch.testing.assert_close(y, residual + h)
        handle = block.linear.register_forward_hook(lambda *_: None)
        torch.testing.assert_close(block.eval()(x, residual, shortcut=shortcut),
                                   other.eval()(x, residual, shortcut=shortcut))  # fmt: skip
        handle.remove()
    with pytest.raises(ValueError, match="shortcut must be"):
        block(x, shortcut=shortcut[:5])


def test_jagged_padded_and_virtual_batches() -> None:
    torch.manual_seed(0)
    block = fused.LinearNormAct(8, 16, norm="layer", activation="gelu")
    values, shortcuts = torch.randn(7, 8), torch.randn(7, 16)
    offsets = torch.tensor([0, 3, 7])
    x, s = (torch.nested.nested_tensor_from_jagged(t, offsets) for t in (values, shortcuts))
    torch.testing.assert_close(block(x, shortcut=s).values(), block(values, shortcut=shortcuts))
    with pytest.raises(ValueError, match="shortcut must be jagged"):
        block(x, shortcut=shortcuts)
    z, shortcut = torch.randn(2, 3, 16, 6).double().unbind(0)[0], torch.randn(3, 16, 6).double()
    mask = torch.rand(3, 16) < 0.6
    y = norm_act(z, norm="batch", channel_dim=-1, activation="silu", mask=mask, shortcut=shortcut)
    kept = norm_act(z[mask], norm="batch", activation="silu", shortcut=shortcut[mask])
    torch.testing.assert_close(y[mask], kept)
    assert (y[~mask] == 0).all()
    parts = {"norm": "batch", "activation": "silu", "virtual_batch_size": 4}
    for samples in (8, 10):
        z, shortcut = torch.randn(samples, 6).double(), torch.randn(samples, 6).double()
        chunks = zip(z.chunk(-(-samples // 4)), shortcut.chunk(-(-samples // 4)), strict=True)
        expected = [norm_act(a, norm="batch", activation="silu", shortcut=b) for a, b in chunks]
        torch.testing.assert_close(norm_act(z, shortcut=shortcut, **parts), torch.cat(expected))


def test_errors() -> None:
    z = torch.randn(4, 6)
    for wrong, error in (
        (z[:2], ValueError), (z.long(), TypeError), ("z", TypeError), (z.to("meta"), ValueError)
    ):  # fmt: skip
        with pytest.raises(error, match=r"norm_act: .*shortcut"):
            norm_act(z, norm="batch", activation="relu", shortcut=wrong)  # type: ignore[arg-type]
