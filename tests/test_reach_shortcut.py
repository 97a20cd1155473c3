"""The graph pass on shortcuts: what is added between norm and activation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reach import Log, N, equal_to_eager, rows
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("fresh_compiler")

IMAGE = (4, N, 24, 24)
CHAIN = "batch → shortcut → relu"


class Block(nn.Module):
    """A function of two batch norms, an image and what is added."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(N).double()
        self.other = nn.BatchNorm2d(N).double()
        self.function = function

    def forward(self, x: Tensor, added: Tensor) -> Any:
        return self.function(self, x, added)


def _torchvision(m: Any, x: Tensor, added: Tensor) -> Tensor:
    out = m.norm(x)
    out += added
    return F.relu(out, inplace=True)


def _dropped(m: Any, x: Tensor, added: Tensor) -> Tensor:
    return F.dropout(torch.relu(added + m.norm(x)), 1.0) + x


def _projected(m: Any, x: Tensor, added: Tensor) -> Tensor:
    out = m.norm(x)
    return F.relu(out + m.other(added))


def _gelu(m: Any, x: Tensor, added: Tensor) -> Tensor:
    return F.gelu(m.norm(x).add(added), approximate="tanh")


TAKEN = {
    _torchvision: CHAIN,
    _dropped: "batch → shortcut → relu → dropout → residual",
    _projected: CHAIN,
    _gelu: "batch → shortcut → gelu_tanh",
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("function", TAKEN)
def test_what_is_taken(
    function: Callable[..., Any], memory_format: torch.memory_format, training: bool, log: Log
) -> None:
    x, added = (rows(*IMAGE).detach().to(memory_format=memory_format) for _ in range(2))
    block = Block(function).train(training)
    equal_to_eager(block, x.requires_grad_(), added.requires_grad_())
    assert TAKEN[function] in log.fused


def test_row_norms(log: Log) -> None:
    norm = nn.LayerNorm(N).double()
    equal_to_eager(lambda x, s: F.silu(norm(x) + s), rows(), rows())
    equal_to_eager(lambda x, s: F.gelu(F.rms_norm(x, (N,)) + s), rows(), rows())
    assert log.fused == ["layer → shortcut → silu", "rms → shortcut → gelu"]


def test_an_activation_in_front_of_the_norm_ends_a_chain(log: Log) -> None:
    linear, norm = nn.Linear(N, N).double(), nn.LayerNorm(N).double()
    equal_to_eager(lambda x: F.dropout(norm(F.gelu(linear(x))), 1.0), rows())
    assert log.fused == ["linear → gelu", "layer → dropout"]


def _sum_read_twice(m: Any, x: Tensor, added: Tensor) -> Any:
    total = m.norm(x) + added
    return F.relu(total), total * 2


def _norm_read_twice(m: Any, x: Tensor, added: Tensor) -> Any:
    normed = m.norm(x)
    return F.relu(normed + added), normed * 2


def _laid_out_otherwise(m: Any, x: Tensor, added: Tensor) -> Tensor:
    return F.relu(m.norm(x) + added.mT)


def _broadcast(m: Any, x: Tensor, added: Tensor) -> Tensor:
    return F.relu(m.norm(x) + added[:1])


def _halved(m: Any, x: Tensor, added: Tensor) -> Tensor:
    return F.glu(m.norm(x) + added, -1)


def _written_later(m: Any, x: Tensor, added: Tensor) -> Any:
    z = x * 2
    y = F.gelu(m.norm(z) + added)
    return y, z.mul_(3)


@pytest.mark.parametrize(
    "function",
    [_sum_read_twice, _norm_read_twice, _laid_out_otherwise, _broadcast, _halved],
)
def test_what_must_stay(function: Callable[..., Any], log: Log) -> None:
    equal_to_eager(Block(function), rows(*IMAGE), rows(*IMAGE))
    assert not any("shortcut" in chain for chain in log.fused)


def test_what_is_written_later_is_no_input(log: Log) -> None:
    x, added = rows(*IMAGE, grad=False), rows(*IMAGE, grad=False)
    equal_to_eager(Block(_written_later).requires_grad_(False), x, added)
    assert not any("shortcut" in chain for chain in log.fused)
