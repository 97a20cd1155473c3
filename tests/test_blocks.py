"""LinearNormAct, NormAct and MLP: plain torch inside, a residual on top, slices, refusals."""

from __future__ import annotations

import re

import pytest
import torch
from sequentials import assert_same
from torch import nn

import fused
from fused import functional as F


def test_blocks_have_named_children_and_equal_plain_torch() -> None:
    block = fused.LinearNormAct(16, 32, norm="layer", activation="leaky_relu", negative_slope=0.3)
    assert [name for name, _ in block.named_children()] == ["linear", "norm", "act"]
    assert_same(nn.Sequential(*block), block)
    after = fused.NormAct(16, norm="rms", activation="relu_squared", dropout=0.2, affine=False)
    assert [name for name, _ in after.named_children()] == ["norm", "act", "dropout"]
    after.eval()
    assert_same(nn.Sequential(*after), after)
    mlp = fused.MLP(16, [32, 8], 3, norm="layer", activation="gelu", dropout=0.1).eval()
    plain = nn.Sequential(*[nn.Sequential(*child) if list(child.children()) else child
                            for child in mlp])  # fmt: skip
    assert_same(plain, mlp)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_residual_is_added_last(dtype: torch.dtype) -> None:
    block = fused.LinearNormAct(16, 16, norm="layer", activation="relu", dtype=dtype)
    x = torch.randn(2, 5, 16, dtype=dtype, requires_grad=True)
    y = block(x, x)
    torch.testing.assert_close(y, x + block(x), rtol=2e-2, atol=2e-2)
    y.float().sum().backward()
    assert x.grad is not None and block.plan()[0].fused_calls == 2
    block.norm.register_forward_hook(lambda m, a, o: o)
    torch.testing.assert_close(block(x, x), y, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("shared", [False, True], ids=["another tensor", "the input"])
@pytest.mark.parametrize("norm", [None, "layer", "rms"])
def test_residual_equals_nn_sequential_plus_residual(norm: str | None, shared: bool) -> None:
    """Added after the activation: relu would cut a residual that were added before it."""
    block = fused.LinearNormAct(16, 16, norm=norm, activation="relu")
    plain = nn.Sequential(*block)
    x, residual = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    dy = torch.randn(2, 5, 16)
    results = []
    for net in (block, lambda x, residual: plain(x) + residual):
        leaves = [x.clone().requires_grad_()]
        leaves += leaves if shared else [residual.clone().requires_grad_()]
        y = net(*leaves)
        wanted = [*leaves[: 1 if shared else 2], *plain.parameters()]
        results.append([y.detach(), *torch.autograd.grad(y, wanted, dy)])
    assert block.plan()[0].fused_calls == 1 and (results[0][0] < 0).any()
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "make, error, text",
    [
        (lambda: fused.LinearNormAct(4, 4, norm="layr"), ValueError, "'layer', 'rms'"),
        (lambda: fused.LinearNormAct(4, 4, activation="gelo"), ValueError, "gelu_tanh"),
        (lambda: fused.NormAct(4, activation="relu", alpha=1), TypeError, "no parameters"),
        (
            lambda: fused.NormAct(4, slope=1),
            TypeError,
            "NormAct: unknown argument 'slope'; known: ",
        ),
        (lambda: fused.LinearNormAct(4, 4, nrom="layer"), TypeError, "'nrom'; did you mean 'norm'"),
        (lambda: fused.MLP(4, [4], nrom="rms"), TypeError, "MLP: unknown argument 'nrom'"),
        (lambda: fused.NormAct(4, activation=nn.Softmax(-1)), ValueError, "relu6"),
        (lambda: fused.NormAct(4, activation=nn.Linear(4, 4)), ValueError, "relu6"),
        (lambda: fused.NormAct(4, activation=nn.ELU(), alpha=1), TypeError, "its own parameters"),
        (lambda: fused.NormAct(4, activation=nn.GELU), ValueError, "unknown activation"),
        (lambda: fused.MLP(4, [4], dropout=1.5), ValueError, "between 0 and 1"),
    ],
)
def test_wrong_arguments(make: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    "module",
    [
        nn.GELU(),
        nn.GELU(approximate="tanh"),
        nn.LeakyReLU(0.2),
        nn.Softplus(2.0, 5.0),
        fused.ReLUSquared(),
        fused.SwiGLU(),
        fused.GeGLU(approximate="tanh"),
    ],
    ids=str,
)
def test_activations_as_modules(module: nn.Module) -> None:
    for block in (
        fused.LinearNormAct(4, 4, norm="layer", activation=module),
        fused.NormAct(4, norm="layer", activation=module),
        fused.MLP(4, [4, 4], activation=module)[1],
    ):
        assert repr(block.act) == repr(module)
        assert block.act is not module  # the blocks of an MLP share nothing
        assert block.plan()[0].fused


@pytest.mark.parametrize("spelled", ["GELU_tanh", "LeakyReLU", "SiLU", "SwiGLU", "ReLU_Squared"])
def test_names_in_any_case(spelled: str) -> None:
    plain = spelled.lower().replace("_", "")
    (name,) = [n for n in fused.activations() if n.replace("_", "") == plain]
    x, weight = torch.randn(3, 4), torch.randn(4, 4)
    for norm in fused.norms()[:2]:
        a = fused.LinearNormAct(4, 4, norm=norm.upper(), activation=spelled)
        b = fused.LinearNormAct(4, 4, norm=norm, activation=name)
        assert repr(a) == repr(b)
        got = F.linear_norm_act(x, weight, norm=norm.title(), activation=spelled)
        assert torch.equal(got, F.linear_norm_act(x, weight, norm=norm, activation=name))
        got = F.norm_act(x, norm=norm.upper(), activation=spelled)
        assert torch.equal(got, F.norm_act(x, norm=norm, activation=name))
    with pytest.raises(
        TypeError, match="norm_act: unknown argument 'atcivation'; did you mean 'act"
    ):
        F.norm_act(x, atcivation="relu")
    with pytest.raises(ValueError, match="unknown activation GELU"):
        F.norm_act(x, activation=nn.GELU())  # type: ignore[arg-type]


def test_one_hidden_layer_as_a_number() -> None:
    assert repr(fused.MLP(4, 8, 2)) == repr(fused.MLP(4, [8], 2))


def test_public_names() -> None:
    """What functions return and blocks are made of has a public place, for type hints."""
    assert set(fused.nn.__all__) <= set(fused.__all__) and fused.__all__ == [
        *dict.fromkeys(fused.__all__)
    ]
    model = fused.MLP(4, 8, 2).eval()
    plan = model.plan()
    assert type(plan) is fused.Plan and type(plan[0]) is fused.Entry
    assert type(fused.fold_(model)) is fused.FoldReport
    assert (
        type(fused.mc_dropout(fused.MLP(4, 8, 2, dropout=0.1), torch.ones(1, 4), 2))
        is fused.MonteCarlo
    )
    for name in fused.activations():
        fused.LinearNormAct(4, 4, activation=name)
    for name in fused.norms():
        fused.NormAct(4, norm=name, num_groups=2 if name == "group" else None)


@pytest.mark.parametrize("fused_path", [True, False], ids=["fused", "one by one"])
def test_residual_must_have_the_outputs_shape(fused_path: bool) -> None:
    block = fused.LinearNormAct(4, 8, norm="layer", activation="relu")
    if not fused_path:
        block.norm.register_forward_hook(lambda m, a, o: o)
    x = torch.randn(2, 3, 4)
    for shape in ((3, 2, 8), (48,), (8,), (2, 3, 1), (1, 3, 8)):
        text = f"LinearNormAct: residual must be (2, 3, 8), got {shape}"
        with pytest.raises(ValueError, match=re.escape(text)):
            block(x, torch.randn(shape))
    with pytest.raises(ValueError, match="on one device"):
        block(x, torch.randn(2, 3, 8, device="meta"))
    with pytest.raises(TypeError, match="residual must be a tensor, got float"):
        block(x, 1.0)
    with pytest.raises(TypeError, match="residual must be floating point, got int64"):
        block(x, torch.ones(2, 3, 8, dtype=torch.int64))
    assert block(x, torch.randn(2, 3, 8)).shape == (2, 3, 8)


def test_residual_of_a_block_that_has_grown() -> None:
    block = fused.NormAct(8, norm="rms", activation="silu")
    block.append(nn.Linear(8, 3))
    x, residual = torch.randn(5, 8), torch.randn(5, 3)
    torch.testing.assert_close(block(x, residual), residual + nn.Sequential(*block)(x))
    with pytest.raises(ValueError, match=re.escape("residual must be (5, 3), got (5, 8)")):
        block(x, x)


def test_residual_of_a_permuted_input() -> None:
    block = fused.NormAct(8, activation="silu", dropout=0.5).eval()
    x = torch.randn(2, 8, 3, 5).to(memory_format=torch.channels_last)
    residual = torch.randn(2, 8, 3, 5)
    for _ in range(2):
        torch.testing.assert_close(block(x, residual), residual + nn.functional.silu(x))
    block.train()
    torch.manual_seed(1)
    y = block(x, residual)
    torch.manual_seed(1)
    torch.testing.assert_close(y, residual + block(x))


def test_slices_are_fused_sequentials() -> None:
    block = fused.LinearNormAct(4, 8, norm="layer", activation="relu", dropout=0.1)
    assert type(block[:2]) is type(block[1:]) is fused.Sequential
    assert list(block[1:].state_dict()) == ["norm.weight", "norm.bias"]
    assert_same(nn.Sequential(block.linear, block.norm), block[:2], 3, 4)
    assert block[0] is block.linear and block[-1] is block.dropout
    mlp = fused.MLP(4, [8, 8], 2)
    assert type(mlp[:1]) is fused.Sequential and mlp[:1][0] is mlp[0]
    assert type(mlp[0] + mlp) is type(2 * mlp) is fused.Sequential and len(2 * mlp) == 6


def test_blocks_that_are_changed() -> None:
    block = fused.LinearNormAct(4, 8, norm="layer", activation="relu")
    block.append(nn.Dropout(0.0)).extend([nn.Linear(8, 2)])
    assert type(block) is fused.LinearNormAct and len(block.plan()) == 2
    assert_same(nn.Sequential(*block), block, 3, 4)
    del block[1]
    assert_same(nn.Sequential(*block), block, 3, 4)
    block.insert(1, nn.LayerNorm(8))
    assert_same(nn.Sequential(*block), block, 3, 4)
    assert [entry.names for entry in block.plan()] == [("0", "1", "2", "3"), ("4",)]
    assert type(block.pop(slice(1, 3))) is fused.Sequential and len(block) == 3


def test_the_plan_of_an_mlp_shows_its_blocks() -> None:
    mlp = fused.MLP(4, [8, 8], 2, norm="rms", activation="silu")
    assert [entry.names for entry in mlp.plan()] == [
        ("0.linear", "0.norm", "0.act"),
        ("1.linear", "1.norm", "1.act"),
        ("2",),
    ]
    mlp(torch.randn(3, 4))
    assert [entry.fused_calls for entry in mlp.plan()] == [1, 1, 0]
