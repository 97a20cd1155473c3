"""Modules on a real GPU: graphs, streams, autocast, compilation; skipped without one.

The kernels themselves are tested in tests/triton/test_row_gpu.py and test_channel_gpu.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from sequentials import assert_close, outcome
from test_channel_sequential import CASES
from tolerances import assert_close as assert_accurate
from tolerances import decades
from torch import Tensor, nn

import fused
from fused import functional
from fused.run import reference
from fused.spec import ACTIVATIONS, make_spec
from fused.tools import doctor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
DEVICE = "cuda"


def block(norm: nn.Module, p: float = 0.2) -> list[nn.Module]:
    return [nn.Linear(64, 96), norm, nn.GELU(), nn.Dropout(p), nn.Linear(96, 8)]


NORMS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: nn.LayerNorm(96),
    "rms": lambda: nn.RMSNorm(96),
    "batch": lambda: nn.BatchNorm1d(96),
    "group": lambda: nn.GroupNorm(4, 96),
}
EVERY_NORM = pytest.mark.parametrize("norm", NORMS)


def twins(modules: list[nn.Module], dtype: torch.dtype = torch.float32) -> tuple[nn.Module, ...]:
    plain = nn.Sequential(*modules).to(DEVICE, dtype)
    return plain, fused.Sequential(*copy.deepcopy(modules)).to(DEVICE, dtype)


def test_the_doctor_finds_nothing() -> None:
    results = [r for r in doctor.examine() if r.device == DEVICE]
    assert results and not [r for r in results if not r.passed]
    assert {r.backend for r in results if r.dtype == "float32"} == {"triton"}


# ---- what nn.Sequential gives ----


@EVERY_NORM
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_blocks(norm: str, dtype: torch.dtype) -> None:
    plain, net = twins(block(NORMS[norm](), p=0.0), dtype)
    exact = copy.deepcopy(plain).double()
    names = ["y", "dx", *(name for name, _ in net.named_parameters())]
    for rows in (1000, 3, 130):
        x = torch.randn(rows, 64, device=DEVICE, dtype=dtype)
        runs = (outcome(net, x), outcome(exact, x.double()), outcome(plain, x))
        for name, ours, right, theirs in zip(names, *runs, strict=True):
            assert ours is not None and right is not None and theirs is not None
            if norm == "batch" and name == "0.bias":  # the norm takes it out again
                assert not ours.any()
                continue
            magnitude = rows**0.5 if name.startswith(("0.", "1.")) else 0.0
            assert_accurate(name, ours, right, theirs, dtype, magnitude)
    assert net.plan()[0].fused_calls == 3


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("case", ["batch 2d", "group 2d", "instance 2d", "instance tracking"])
def test_images(case: str, layout: torch.memory_format) -> None:
    make, shape = CASES[case]
    plain, net = twins(make())
    for _ in range(3):
        x = torch.randn(shape, device=DEVICE).to(memory_format=layout)
        assert_close(outcome(net, x), outcome(plain, x), 1e-4)
        assert net(x).is_contiguous(memory_format=layout)
        plain(x)  # the running statistics go on together
    state = plain.state_dict()
    for name, ours in net.state_dict().items():
        torch.testing.assert_close(ours, state[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_approximate_instructions(activation: str, dtype: torch.dtype) -> None:
    """The activation over all magnitudes, forward and backward, within twice eager's error."""
    values = torch.cat([torch.linspace(-12, 12, 400_000), torch.logspace(-30, 4, 50_000)])
    z = torch.cat([values, -values]).to(dtype).view(-1, 1000)
    dy = torch.randn(z.shape).to(dtype)
    epilogue = make_spec(None, 0.0, activation, 0.0)

    def run(convert: Callable[[Tensor], Tensor], ours: bool) -> tuple[Tensor, Tensor]:
        x = convert(z).requires_grad_()
        y = (
            functional.norm_act(x, norm=None, activation=activation)
            if ours
            else reference.row(x, epilogue)
        )
        (dx,) = torch.autograd.grad(y, x, convert(dy))
        return y.detach().cpu(), dx.cpu()

    exact = run(lambda t: t.double(), False)
    eager = run(lambda t: t.to(DEVICE), False)
    found = run(lambda t: t.to(DEVICE), True)
    for name, ours, right, theirs in zip(("y", "dz"), found, exact, eager, strict=True):
        for decade, where in decades(z):
            values = (ours[where], right[where], theirs[where])
            # Far out a function may vanish that is made of factors near one.
            magnitude = min(1.0, float(z[where].abs().max()))
            assert_accurate(f"{name} where z is {decade}", *values, dtype, magnitude)


# ---- graphs and streams ----


@EVERY_NORM
def test_replays_of_a_graph_draw_new_masks(norm: str) -> None:
    """Forward and backward in one captured graph; backward uses the mask of its own forward."""
    modules = [nn.Linear(64, 96), NORMS[norm](), nn.ReLU(), nn.Dropout(0.5)]
    net = fused.Sequential(*modules).to(DEVICE)
    x = torch.randn(256, 64, device=DEVICE, requires_grad=True)
    leaves = [x, *net.parameters()]

    def step() -> tuple[Tensor, tuple[Tensor, ...]]:
        y = net(x)
        return y, torch.autograd.grad(y, leaves, torch.ones_like(y))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, gradients = step()
    masks = []
    for _ in range(3):
        graph.replay()
        masks.append((y != 0).cpu())
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[1], masks[2])
    torch.manual_seed(5)
    graph.replay()
    first = y.clone(), [t.clone() for t in gradients]
    torch.manual_seed(5)
    graph.replay()
    assert torch.equal(first[0], y)
    assert all(map(torch.equal, first[1], gradients))
    if norm != "rms":  # the last gradient is that of the norm's bias: Σ keep · 2 · relu'
        torch.testing.assert_close(gradients[-1], (y != 0).float().sum(0) * 2)


def test_two_streams() -> None:
    """Work on one stream does not wait for the other, nor read what the other writes.

    Within rounding: cuBLAS promises the same bits on one stream alone.
    """
    net = fused.Sequential(*block(nn.LayerNorm(96), p=0.0)).to(DEVICE)
    inputs = [torch.randn(4096, 64, device=DEVICE) for _ in range(8)]
    expected = [net(x) for x in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    for _ in range(10):
        found = []
        for i, x in enumerate(inputs):
            with torch.cuda.stream(streams[i % 2]):
                found.append(net(x))
        torch.cuda.synchronize()
        for ours, right in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, right)


@EVERY_NORM
def test_compiles_as_one_graph(norm: str) -> None:
    net = fused.Sequential(*block(NORMS[norm](), p=0.0)).to(DEVICE)
    run = torch.compile(net, fullgraph=True, dynamic=True)
    for rows in (64, 200, 96):
        x = torch.randn(rows, 64, device=DEVICE)
        assert_close(outcome(run, x), outcome(net, x), 1e-4)


# ---- training ----


@EVERY_NORM
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_and_grad_scaler(norm: str, dtype: torch.dtype) -> None:
    """A hundred steps under autocast follow eager's loss as eager follows itself.

    Training enlarges rounding errors, by how much eager shows that starts a rounding error away.
    """
    plain, net = twins(block(NORMS[norm](), p=0.0))
    nudged = copy.deepcopy(plain)
    with torch.no_grad():
        for parameter in nudged.parameters():
            noise = torch.rand_like(parameter) - 0.5
            parameter.mul_(1 + torch.finfo(dtype).eps * noise)
    target = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 8)).to(DEVICE)
    losses: list[list[float]] = []
    for model in (plain, nudged, net):
        generator = torch.Generator(DEVICE).manual_seed(3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        scaler = torch.amp.GradScaler(DEVICE, enabled=dtype == torch.float16)
        losses.append([])
        for _ in range(100):
            x = torch.randn(512, 64, device=DEVICE, generator=generator)
            with torch.autocast(DEVICE, dtype):
                loss = nn.functional.mse_loss(model(x).float(), target(x).detach().float())
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses[-1].append(float(loss))
    assert losses[0][-1] < losses[0][0] / 2, "it learns"
    spread, ours = (
        max(abs(a - b) / a for a, b in zip(losses[0], others, strict=True)) for others in losses[1:]
    )
    assert ours <= 4 * spread, (ours, spread)


def test_device_and_cpu_draw_the_same_mask() -> None:
    seed = torch.tensor([2**40 + 17])
    z = torch.rand(333, 500) + 0.5
    ours = functional.norm_act(z.to(DEVICE), norm=None, p=0.3, seed=seed.to(DEVICE))
    on_cpu = functional.norm_act(z, norm=None, p=0.3, seed=seed)
    assert torch.equal(ours.cpu() != 0, on_cpu != 0)
