"""Models on several processes through the graph pass: the gradients are those without it.

Two processes with gloo are started once for each backend and make all the checks.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from processes import start_processes
from reach import Log
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

PROCESSES, ROWS, N = 2, 6, 16
TAKEN = ("linear → layer → gelu", "linear → batch → relu")


class Block(nn.Module):
    """No nn.Sequential: behind the hooks of FSDP, Dynamo skips the forwards of torch itself."""

    def __init__(self, norm: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.linear, self.norm, self.activation = nn.Linear(N, N), norm, activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.norm(self.linear(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = Block(nn.LayerNorm(N), nn.GELU())
        self.second = Block(nn.BatchNorm1d(N), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def gradients(net: nn.Module, rank: int) -> list[Tensor]:
    torch.manual_seed(1 + rank)
    for _ in range(2):
        net(torch.randn(ROWS, N)).square().sum().backward()
    state = [*(p.grad for p in net.parameters()), *net.buffers()]
    return [t.full_tensor() if hasattr(t, "full_tensor") else t for t in state if t is not None]


def same_gradients(
    wrap: Callable[[nn.Module], nn.Module],
    compile: Callable[[nn.Module], nn.Module],
    rank: int,
    tolerance: float = 1e-5,
    taken: tuple[str, ...] = TAKEN,
) -> None:
    log, logger = Log(), logging.getLogger("fused.graph")
    logger.setLevel(logging.INFO)
    logger.addHandler(log)
    wanted = gradients(wrap(Net()), rank)
    found = gradients(compile(wrap(Net())), rank)
    logger.removeHandler(log)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert {*log.fused} == {*taken}, (log.fused, log.left)


def ddp(rank: int, how: dict[str, Any]) -> None:
    same_gradients(DistributedDataParallel, lambda net: torch.compile(net, **how), rank)


def ddp_of_several_buckets(rank: int, how: dict[str, Any]) -> None:
    """Dynamo cuts the graph where a bucket ends."""

    def wrap(net: nn.Module) -> nn.Module:
        return DistributedDataParallel(net, bucket_cap_mb=1e-3)

    with mock.patch.object(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 1000):
        same_gradients(wrap, lambda net: torch.compile(net, **how), rank)


def blocks(net: Any, how: dict[str, Any]) -> nn.Module:
    for block in net.children():
        block.compile(**how)
    return net


def sharded(net: Any, **options: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for block in net.children():
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(net, mesh=mesh, **options)


def fsdp2_block_by_block(rank: int, how: dict[str, Any]) -> None:
    same_gradients(sharded, lambda net: blocks(net, how), rank)


def fsdp2_as_a_whole(rank: int, how: dict[str, Any]) -> None:
    same_gradients(sharded, lambda net: torch.compile(net, **how), rank)


def fsdp2_of_bfloat16(rank: int, how: dict[str, Any]) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

    def wrap(net: Any) -> nn.Module:
        # BatchNorm has float32 statistics, and takes no bfloat16 weights beside them.
        net.second.norm = nn.LayerNorm(N)
        return sharded(net, mp_policy=policy)

    taken = "linear → layer → gelu", "linear → layer → relu"
    same_gradients(wrap, lambda net: blocks(net, how), rank, 0.1, taken)


CHECKS = (
    *(ddp, ddp_of_several_buckets, fsdp2_block_by_block, fsdp2_as_a_whole, fsdp2_of_bfloat16),
)


def work(rank: int, folder: str, backend: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(seconds=120),
    )
    failures = {}
    torch._inductor.config.fx_graph_cache = False
    torch._functorch.config.enable_autograd_cache = False
    torch._inductor.config.compile_threads = 1
    for check in CHECKS:
        torch._dynamo.reset()
        try:
            check(rank, {"backend": backend})
        except (AssertionError, RuntimeError, TypeError, ValueError):
            failures[check.__name__] = traceback.format_exc()
        dist.barrier()
    torch.save(failures, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, str]]]:
    @cache
    def run(backend: str) -> list[dict[str, str]]:
        folder: Path = tmp_path_factory.mktemp("distributed")
        start_processes(work, PROCESSES, str(folder), backend)
        return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]

    return run


@pytest.mark.parametrize("backend", ["fused_eager", pytest.param("fused", marks=pytest.mark.full)])
@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_two_processes(check: str, backend: str, failures: Callable[..., Any]) -> None:
    found = [f"process {r}:\n{f[check]}" for r, f in enumerate(failures(backend)) if check in f]
    assert not found, "\n".join(found)
