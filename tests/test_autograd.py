"""Differentiation and the compiler: gradcheck, torch.func, checkpointing, saved bytes, compile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import EVERY_ACTIVATION, Inputs, make_epilogue, make_inputs
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import fused
from fused import functional
from fused.backends import ops
from fused.run.prepare import run as run_chain
from fused.spec import make_spec

pytestmark = pytest.mark.usefixtures("cpp")


def doubles(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]


# Every activation behind layer norm, every norm with gelu; the rest of the product is `full`.
DIFFERENTIATED = [
    pytest.param(a, n, marks=[] if n == "layer" or a == "gelu" else pytest.mark.full)
    for a in EVERY_ACTIVATION
    for n in (None, "layer", "rms")
]


@pytest.mark.parametrize("activation, norm", DIFFERENTIATED)
def test_gradcheck_and_gradgradcheck(activation: str | None, norm: str | None) -> None:
    x, weight, bias, scale, shift, residual = doubles((3, 4), (5, 4), (5,), (5,), (5,), (3, 5))
    spec = make_spec(norm, 1e-5 if norm else 0.0, activation, 0.3)
    seed = torch.tensor([3])

    def run(x, weight, bias, residual, *affine):  # type: ignore[no-untyped-def]
        return run_chain(spec, x, weight, bias, *affine, residual=residual, seed=seed)

    inputs = (x, weight, bias, residual, *((scale, shift) if norm else ()))
    assert gradcheck(run, inputs)
    assert gradgradcheck(run, inputs)


def test_gradgradcheck_without_linear_and_with_a_shared_tensor() -> None:
    (z, scale) = doubles((4, 6), (6,))
    spec = make_spec("layer", 1e-5, "tanh", 0.2)
    seed = torch.tensor([3])

    def run(z, scale):  # type: ignore[no-untyped-def]
        return run_chain(spec, z, None, None, scale, scale, z, seed=seed)

    assert gradcheck(run, (z, scale)) and gradgradcheck(run, (z, scale))


def opcheck_all(inputs: Inputs, norm: str | None, p: float, wanted: tuple[int, ...]) -> None:
    codes = make_epilogue(norm, "gelu", p).row
    seed = inputs.seed if p else None
    forward = (inputs.z, *inputs.parameters, inputs.residual, seed, *codes)
    torch.library.opcheck(ops.row_forward, forward)
    torch.library.opcheck(ops.row_forward_, forward)
    _, statistics = ops.row_forward(*forward)
    for bits in wanted:
        torch.library.opcheck(
            ops.row_backward,
            (inputs.dy, inputs.z, *inputs.parameters, statistics, seed, bits, *codes),
        )


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("norm", [None, "layer", "rms"])
def test_opcheck(norm: str | None, p: float, affine: bool) -> None:
    inputs = make_inputs(5, 12, torch.float32, norm, affine=affine, bias=affine)
    opcheck_all(inputs, norm, p, (0, 3, 4, 7))


@pytest.mark.parametrize("parameters", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "norm, rows, cols",
    # With a norm, rows without elements have statistics that nothing writes or reads.
    [(n, rows, 12) for n in (None, "layer", "rms") for rows in (5, 0)] + [(None, 5, 0)],
)
def test_opcheck_of_bfloat16_and_of_nothing(
    norm: str | None, rows: int, cols: int, parameters: torch.dtype
) -> None:
    inputs = make_inputs(rows, cols, torch.bfloat16, norm)
    if norm:
        inputs.norm_weight = inputs.norm_weight.to(parameters)
        inputs.norm_bias = inputs.norm_bias.to(parameters)
    opcheck_all(inputs, norm, 0.2, (0, 7))


def make_net(p: float = 0.0) -> fused.Sequential:
    return fused.Sequential(
        nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Dropout(p), nn.Linear(16, 3)
    )


def test_torch_func() -> None:
    net, x = make_net(), torch.randn(5, 8)
    parameters = dict(net.named_parameters())

    def loss(parameters, row):  # type: ignore[no-untyped-def]
        return torch.func.functional_call(net, parameters, (row,)).square().sum()

    gradient = torch.func.grad(loss)(parameters, x)
    loss(parameters, x).backward()
    for name, t in net.named_parameters():
        torch.testing.assert_close(gradient[name], t.grad, rtol=1e-4, atol=1e-5)
    rows = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    plain = nn.Sequential(*net)
    for i, row in enumerate(x):
        plain.zero_grad()
        plain(row).square().sum().backward()
        for name, t in plain.named_parameters():
            torch.testing.assert_close(rows[name][i], t.grad, rtol=1e-4, atol=1e-5)


def test_jacobians_are_nn_sequentials() -> None:
    net, x = make_net(), torch.randn(5, 8)
    plain = nn.Sequential(*net)
    expected = torch.autograd.functional.jacobian(plain, x[0])
    assert expected.shape == (3, 8) and expected.abs().max() > 0.01
    jacrev, vmap = torch.func.jacrev, torch.func.vmap
    torch.testing.assert_close(jacrev(net)(x[0]), expected, rtol=1e-4, atol=1e-5)
    every = torch.stack([torch.autograd.functional.jacobian(plain, row) for row in x])
    torch.testing.assert_close(vmap(jacrev(net))(x), every, rtol=1e-4, atol=1e-5)
    # And of the functions, whose layer norm has a jacobian with rows that sum to zero.
    jacobian = jacrev(lambda row: functional.norm_act(row, norm="layer", activation="gelu"))(x[0])
    expected = torch.autograd.functional.jacobian(nn.Sequential(nn.LayerNorm(8), nn.GELU()), x[0])
    torch.testing.assert_close(jacobian, expected, rtol=1e-4, atol=1e-5)


def test_vmap_draws_masks_as_its_randomness_says() -> None:
    x = torch.ones(4, 64)

    def run(row):  # type: ignore[no-untyped-def]
        return functional.norm_act(row, activation="relu", p=0.5)

    different = torch.func.vmap(run, randomness="different")(x)
    same = torch.func.vmap(run, randomness="same")(x)
    assert not torch.equal(different[0], different[1])
    assert torch.equal(same[0], same[1])


def test_forward_mode_is_right_and_never_zero() -> None:
    """The reference serves it; the fused operator has no jvp."""
    x, tangent = torch.randn(3, 8), torch.randn(3, 8)

    def run(x):  # type: ignore[no-untyped-def]
        return functional.norm_act(x, norm="layer", activation="silu")

    def plain(x):  # type: ignore[no-untyped-def]
        return torch.nn.functional.silu(torch.nn.functional.layer_norm(x, (8,)))

    expected = torch.func.jvp(plain, (x,), (tangent,))[1]
    torch.testing.assert_close(torch.func.jvp(run, (x,), (tangent,))[1], expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        found = torch.autograd.forward_ad.unpack_dual(run(dual)).tangent
    torch.testing.assert_close(found, expected)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError):
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        fused.run.autograd.RowFunction.apply(dual, *[None] * 7, make_spec("layer", 1e-5))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    x = torch.randn(6, 8)
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        net = make_net(0.5)
        inputs = x.clone().requires_grad_()
        torch.manual_seed(2)
        y = checkpoint(net, inputs, use_reentrant=reentrant) if checkpointed else net(inputs)
        y.square().sum().backward()
        results.append([inputs.grad, *(t.grad for t in net.parameters())])
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)


def kept_storages(run: Callable[[], object]) -> dict[int, int]:
    """Bytes of every storage that a forward pass saves for backward, by address."""
    storages: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        alive = run()  # until all are counted, so no address comes twice
    del alive
    return storages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm, statistics", [("layer", 2), ("rms", 1), (None, 0)])
def test_bytes_kept_for_backward(norm: str | None, statistics: int, dtype: torch.dtype) -> None:
    """Beyond what nn.Linear keeps: z, the statistics, the seed and the norm's parameters."""
    rows, inputs, features = 64, 32, 48
    block = fused.LinearNormAct(
        inputs, features, norm=norm, activation="gelu", dropout=0.1, dtype=dtype
    )
    x = torch.randn(rows, inputs, dtype=dtype, requires_grad=True)
    kept = kept_storages(lambda: block(x))
    for t in (x, *block.parameters()):
        kept.pop(t.untyped_storage().data_ptr(), None)
    assert sum(kept.values()) == rows * features * dtype.itemsize + statistics * rows * 4 + 8


@pytest.mark.parametrize("frozen", ["input", "weight", "both"])
def test_a_frozen_linear_keeps_what_eager_keeps(frozen: str) -> None:
    block = fused.LinearNormAct(32, 48, norm="layer", activation="gelu")
    plain = nn.Linear(32, 48)
    x = torch.randn(64, 32, requires_grad=frozen == "weight")
    for linear in (block.linear, plain):
        linear.weight.requires_grad_(frozen == "input")
    ours, theirs = kept_storages(lambda: block(x)), kept_storages(lambda: plain(x))
    assert (x.data_ptr() in ours) == (x.data_ptr() in theirs)
    assert (block.linear.weight.data_ptr() in ours) == (plain.weight.data_ptr() in theirs)
    assert block.linear.bias.data_ptr() not in ours


def test_the_linear_bias_may_change_before_backward() -> None:
    """Its value is not needed for any gradient, in eager as here."""
    block = fused.LinearNormAct(8, 16, norm="layer", activation="tanh")
    x = torch.randn(4, 8)
    block(x).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in block.named_parameters()}
    block.zero_grad()
    loss = block(x).square().sum()
    with torch.no_grad():
        block.linear.bias.mul_(5)
    loss.backward()
    for name, p in block.named_parameters():
        assert torch.equal(p.grad, expected[name]), name


def test_only_the_residual_needs_a_gradient() -> None:
    block = fused.LinearNormAct(8, 16, norm="layer", activation="tanh").requires_grad_(False)
    residual = torch.randn(4, 16, requires_grad=True)
    for create_graph in (False, True):
        y = block(torch.randn(4, 8), residual)
        (found,) = torch.autograd.grad(y.sum(), residual, create_graph=create_graph)
        assert torch.equal(found, torch.ones(4, 16))


def test_gradients_only_where_wanted() -> None:
    block = fused.LinearNormAct(8, 16, norm="layer", activation="relu")
    block.linear.weight.requires_grad_(False)
    block.norm.bias.requires_grad_(False)
    x = torch.randn(4, 8, requires_grad=True)
    block(x).sum().backward()
    assert block.linear.weight.grad is None and block.norm.bias.grad is None
    assert x.grad is not None and block.linear.bias.grad is not None
    with torch.no_grad():
        assert not block(x).requires_grad
    with torch.inference_mode():
        block(x)


@pytest.mark.slow
@pytest.mark.parametrize(  # aot_eager compiles in test_graphs.py
    "engine", [pytest.param("aot_eager", marks=pytest.mark.full), "inductor"]
)
def test_compile_full_graph_with_dynamic_batch(engine: str) -> None:
    net = make_net()
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend=engine)
    for rows in (4, 7, 12):
        x = torch.randn(rows, 8)
        y = compiled(x)
        expected = net(x)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        found = torch.autograd.grad(y.square().sum(), list(net.parameters()))
        wanted = torch.autograd.grad(expected.square().sum(), list(net.parameters()))
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), net(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_compiled_dropout_drops_forward_and_backward_alike() -> None:
    net = torch.compile(fused.NormAct(64, activation="relu", dropout=0.5), fullgraph=True)
    x = torch.ones(8, 64, requires_grad=True)
    y = net(x)
    y.sum().backward()
    assert torch.equal(y != 0, x.grad != 0) and (y == 0).any()
    assert not torch.equal(net(x), y)


@pytest.mark.slow
def test_export_with_dynamic_batch() -> None:
    net = make_net().eval()
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(net, (torch.randn(4, 8),), dynamic_shapes=({0: batch},))
    x = torch.randn(9, 8)
    torch.testing.assert_close(program.module()(x), net(x), rtol=1e-5, atol=1e-5)
