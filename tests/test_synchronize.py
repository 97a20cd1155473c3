"""Batch norm over several processes against one process that has the whole batch."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import start_processes
from torch import Tensor, nn

import fused

FEATURES = 6
# Samples of each process; together always twelve.
SPLITS = [(7, 5), (12, 0), (9, 1, 2), (7, 0, 5)]


def make_net(kind: str) -> nn.Module:
    torch.manual_seed(0)
    everyone = dist.group.WORLD if dist.is_initialized() else None
    if kind == "block":
        net: nn.Module = fused.LinearNormAct(
            5, FEATURES, norm="batch", activation="gelu", process_group=everyone
        )
    else:
        norm = nn.SyncBatchNorm(FEATURES) if dist.is_initialized() else nn.BatchNorm2d(FEATURES)
        net = fused.Sequential(norm, nn.SiLU())
    for t in net.parameters():
        nn.init.normal_(t, 0.5)
    return net


def make_input(kind: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    shape = (12, 5) if kind == "block" else (12, FEATURES, 4, 3)
    out = (12, FEATURES) if kind == "block" else shape
    return torch.randn(shape) * 3 + 1, torch.randn(out)


def step(net: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    y = net(x)
    names = [name for name, _ in net.named_parameters()]
    dx, *gradients = torch.autograd.grad(y, [x, *net.parameters()], dy)
    buffers = {name: t.clone() for name, t in net.named_buffers()}
    return {"y": y.detach(), "dx": dx, **dict(zip(names, gradients, strict=True)), **buffers}


def cases() -> list[tuple[str, str]]:
    backends = ["reference"] if fused.backends.backend.cpu_isa() is None else ["reference", "cpp"]
    return [(kind, backend) for kind in ("block", "sync") for backend in backends]


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    for split in SPLITS:
        if rank < len(split):
            work_on(split, rank, f"{folder}/{split}")


def work_on(split: tuple[int, ...], rank: int, name: str) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{name}",
        rank=rank,
        world_size=len(split),
        timeout=timedelta(seconds=60),
    )
    part = slice(sum(split[:rank]), sum(split[: rank + 1]))
    results = {}
    for kind, backend in cases():
        x, dy = make_input(kind)
        net = make_net(kind)
        with fused.use_backend(backend):
            found = step(net, x[part], dy[part])
            found["evaluation"] = step(net.eval(), x[part], dy[part])["y"]
        results[kind, backend] = found
    torch.save(results, f"{name}{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the processes have saved; they are started once for all splits."""
    path = tmp_path_factory.mktemp("synchronize")
    start_processes(work, max(map(len, SPLITS)), str(path))
    return path


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_equals_one_process(split: tuple[int, ...], folder: Path) -> None:
    found = [torch.load(folder / f"{split}{rank}.pt") for rank in range(len(split))]
    within = {"rtol": 1e-5, "atol": 1e-5}
    for kind, backend in cases():
        parts = [results[kind, backend] for results in found]
        x, dy = make_input(kind)
        whole = make_net(kind)
        with fused.use_backend("reference"):
            expected = step(whole, x, dy)
            expected["evaluation"] = step(whole.eval(), x, dy)["y"]
        for name in ("y", "dx", "evaluation"):
            of_all = torch.cat([p[name] for p in parts])
            torch.testing.assert_close(of_all, expected[name], **within)
        for name, _ in whole.named_parameters():
            total = torch.stack([p[name] for p in parts]).sum(0)
            torch.testing.assert_close(total, expected[name], rtol=1e-4, atol=1e-4)
        for name, _ in whole.named_buffers():
            for part in parts:
                torch.testing.assert_close(part[name], expected[name], **within)


def test_one_process_needs_no_other() -> None:
    net = fused.Sequential(nn.SyncBatchNorm(FEATURES), nn.SiLU())
    x = torch.randn(5, FEATURES)
    plain = nn.Sequential(nn.BatchNorm1d(FEATURES), nn.SiLU())
    torch.testing.assert_close(net(x), plain(x), rtol=1e-5, atol=1e-6)
