"""Training on several processes: what one process gives, and fused where it can be.

Two processes with gloo are started once and make all the checks, each of which is a test.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from processes import start_processes
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import fused

PROCESSES, SAMPLES, FEATURES = 2, 12, 8
SERVED = fused.backends.backend.cpu_isa() is not None
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        fused.MLP(FEATURES, [16, 16], 16, norm="layer"),
        fused.Sequential(nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, FEATURES), nn.SiLU()),
        fused.LinearNormAct(FEATURES, FEATURES, norm="rms", activation="swiglu"),
        fused.LinearNormAct(FEATURES, FEATURES, norm="group", num_groups=2, activation="gelu"),
    )


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(SAMPLES, FEATURES), torch.randn(SAMPLES, FEATURES)


def own(t: Tensor, rank: int) -> Tensor:
    return t.chunk(PROCESSES)[rank]


def train(net: nn.Module, x: Tensor, target: Tensor) -> nn.Module:
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x).to(target.dtype), target).backward()
        optimizer.step()
    return net


def whole(t: Tensor) -> Tensor:
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).detach()


def compare(found: nn.Module, expected: nn.Module, **within: float) -> None:
    named = dict(expected.named_parameters())
    for name, t in found.named_parameters():
        torch.testing.assert_close(whole(t), named[name], **(within or CLOSE))


def all_fused(net: nn.Module) -> bool:
    """Whether every call of every chain was fused."""
    plans = [m.plan() for m in net.modules() if isinstance(m, fused.Sequential)]
    calls = [(e.fused_calls, e.unfused_calls) for plan in plans for e in plan]
    return not SERVED or (any(f for f, _ in calls) and not any(u for _, u in calls))


def check_ddp(rank: int, folder: str) -> None:
    x, target = batch()
    net = DistributedDataParallel(make_net())
    train(net, own(x, rank), own(target, rank))
    compare(net.module, train(make_net(), x, target))
    assert all_fused(net)


def check_ddp_process_group(rank: int, folder: str) -> None:
    x, target = batch()

    def make(group: object) -> nn.Module:
        torch.manual_seed(0)
        return fused.MLP(FEATURES, [16], FEATURES, norm="batch", process_group=group)

    net = DistributedDataParallel(make(dist.group.WORLD))
    train(net, own(x, rank), own(target, rank))
    expected = train(make(None), x, target)
    compare(net.module, expected)
    for name, t in expected.named_buffers():
        torch.testing.assert_close(dict(net.module.named_buffers())[name], t, **CLOSE)


def shard(net: nn.Module, **options: object) -> nn.Module:
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for child in net.children():
        fully_shard(child, mesh=mesh, **options)
    return fully_shard(net, mesh=mesh, **options)


def check_fsdp2(rank: int, folder: str) -> None:
    x, target = batch()
    net = shard(make_net())
    train(net, own(x, rank), own(target, rank))
    compare(net, train(make_net(), x, target))
    assert all_fused(net)
    text = str(net[0].plan())
    assert not SERVED or "not fused now: Linear: its weight is a DTensor; 3 calls fused" in text


def check_fsdp2_bfloat16(rank: int, folder: str) -> None:
    x, target = batch()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    net = shard(make_net(), mp_policy=policy)
    train(net, own(x, rank), own(target, rank))
    eager = shard(fused.unfuse_(make_net()), mp_policy=policy)
    train(eager, own(x, rank), own(target, rank))
    compare(net, train(make_net(), x, target), rtol=0.02, atol=0.02)
    with torch.no_grad():
        plain = {name: whole(t) for name, t in eager.named_parameters()}
    for name, t in net.named_parameters():
        assert t.dtype == torch.float32
        torch.testing.assert_close(whole(t), plain[name], rtol=0.01, atol=0.01)
    assert all_fused(net)


def check_checkpoint(rank: int, folder: str) -> None:
    x, target = batch()
    net = train(shard(make_net()), own(x, rank), own(target, rank))
    state = {"model": get_model_state_dict(net)}
    dcp.save(state, checkpoint_id=f"{folder}/checkpoint")
    other = shard(make_net())
    state = {"model": get_model_state_dict(other)}
    dcp.load(state, checkpoint_id=f"{folder}/checkpoint")
    set_model_state_dict(other, state["model"])
    for t, expected in zip(other.parameters(), net.parameters(), strict=True):
        assert torch.equal(whole(t), whole(expected))
    torch.testing.assert_close(other(own(x, rank)), net(own(x, rank)), **CLOSE)
    plain = make_net()  # by one process, as it is
    state = {"model": plain.state_dict()}
    dcp.load(state, checkpoint_id=f"{folder}/checkpoint", no_dist=True)
    compare(net, plain, rtol=0.0, atol=0.0)


def make_feed_forward() -> nn.Module:
    torch.manual_seed(0)
    return fused.Sequential(
        *(nn.Linear(FEATURES, 16), nn.GELU(), nn.Linear(16, FEATURES)),
        *(nn.LayerNorm(FEATURES), nn.SiLU()),
    )


def check_tensor_parallel(rank: int, folder: str) -> None:
    x, target = batch()
    mesh = init_device_mesh("cpu", (PROCESSES,))
    net = parallelize_module(
        make_feed_forward(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()}
    )
    train(net, x, target)
    compare(net, train(make_feed_forward(), x, target))
    first, second = net.plan()
    assert first.unfused_calls == 3 and not first.fused_calls
    assert "hooks" in str(first) and "hooks" in str(second)


def check_gated_columns(rank: int, folder: str) -> None:
    """Columns cut a gated Linear wrongly, in eager torch too: docs/distributed.md warns of it."""
    x, _ = batch()
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for make in (fused.Sequential, nn.Sequential):
        torch.manual_seed(0)
        net = make(nn.Linear(FEATURES, 16), nn.GLU())
        expected = net(x).detach()
        y = parallelize_module(net, mesh, {"0": ColwiseParallel()})(x).detach()
        parts = [torch.empty_like(y) for _ in range(PROCESSES)]
        dist.all_gather(parts, y)
        assert (torch.cat(parts, 1) - expected).abs().max() > 0.01


def check_functions_of_dtensors(rank: int, folder: str) -> None:
    mesh = init_device_mesh("cpu", (PROCESSES,))
    torch.manual_seed(0)
    x, weight, scale = torch.randn(4, 6, FEATURES), torch.randn(16, FEATURES), torch.rand(16)

    def run(x: Tensor, put: Callable[[Tensor], Tensor], **options: object) -> list[Tensor]:
        tensors = [put(t.clone().requires_grad_()) for t in (weight, scale, scale)]
        y = fused.functional.linear_norm_act(
            *(x, tensors[0]), norm_weight=tensors[1], norm_bias=tensors[2], **options
        )
        return [y, *torch.autograd.grad(y.square().sum(), tensors)]

    cases = (
        {"norm": "layer", "activation": "gelu"},
        {"norm": "layer", "activation": "swiglu"} | {"p": 0.5, "seed": 3},
        {"norm": "layer", "activation": "relu", "p": 0.5, "seed": 3},
        {"norm": "layer", "channel_dropout": True, "p": 0.5, "seed": 3},
        {"norm": "batch", "activation": "silu"},
    )
    for placement in (Shard(0), Replicate()):
        for options in cases:
            expected = run(x, lambda t: t, **options)
            found = run(
                distribute_tensor(x, mesh, [placement]),
                lambda t: distribute_tensor(t, mesh, [Replicate()]),
                **options,
            )
            for t, e in zip(found, expected, strict=True):
                torch.testing.assert_close(whole(t), e, rtol=1e-4, atol=1e-4)
    z = distribute_tensor(x, mesh, [Shard(0)])
    y = fused.functional.norm_act(z, norm="rms", activation="silu", residual=z)
    expected = fused.functional.norm_act(x, norm="rms", activation="silu", residual=x)
    torch.testing.assert_close(whole(y), expected, rtol=1e-5, atol=1e-5)


def check_seeds(rank: int, folder: str) -> None:
    block = fused.LinearNormAct(FEATURES, 64, norm="layer", dropout=0.5)

    def masks(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        kept = (block(torch.ones(4, FEATURES)) != 0).to(torch.uint8)
        found = [torch.empty_like(kept) for _ in range(PROCESSES)]
        dist.all_gather(found, kept)
        return found

    nn.init.ones_(block.norm.bias)
    one, other = masks(7)
    assert torch.equal(one, other)
    one, other = masks(7 + rank)
    assert not torch.equal(one, other)


def check_restart(rank: int, folder: str) -> None:
    """Parameters, optimizer and generator saved: the same steps follow, dropout included."""
    x, target = (own(t, rank) for t in batch())

    def steps(net: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> list[float]:
        losses = []
        for _ in range(count):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(net(x), target)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        net = DistributedDataParallel(fused.MLP(FEATURES, [64], FEATURES, dropout=0.5))
        return net, torch.optim.AdamW(net.parameters(), 0.01)

    net, optimizer = make()
    torch.manual_seed(10 + rank)
    steps(net, optimizer, 2)
    saved = copy.deepcopy((net.module.state_dict(), optimizer.state_dict()))
    generator = torch.get_rng_state()
    expected = steps(net, optimizer, 2)
    net, optimizer = make()
    net.module.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    torch.set_rng_state(generator)
    assert steps(net, optimizer, 2) == expected


CHECKS = {n.removeprefix("check_"): f for n, f in globals().items() if n.startswith("check_")}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(seconds=60),
    )
    failures = {}
    for name, check in CHECKS.items():
        try:
            check(rank, folder)
        except (AssertionError, RuntimeError, TypeError, ValueError):
            failures[name] = traceback.format_exc()
        dist.barrier()
    torch.save(failures, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    folder: Path = tmp_path_factory.mktemp("distributed")
    start_processes(work, PROCESSES, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(name: str, failures: list[dict[str, str]]) -> None:
    found = [f"process {rank}:\n{f[name]}" for rank, f in enumerate(failures) if name in f]
    assert not found, "\n".join(found)
