"""What a CUDA graph cannot capture is never done: no value is read on the host, or brought there.

On the CPU, where every operator of a training step can be watched; tests/test_gpu.py replays
graphs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fused

# Of a CUDA tensor they wait for the device, or copy from memory that a replay would read again.
FORBIDDEN = {"_local_scalar_dense", "is_nonzero", "nonzero", "equal", "lift_fresh", "masked_select"}


class Watch(TorchDispatchMode):
    """Notes the operators that are called, and raises at a forbidden one."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        assert name not in FORBIDDEN, f"{name} cannot be captured"
        self.seen.append(f"{func.namespace}.{name}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("call", [lambda t: t.sum().item(), lambda t: torch.tensor([1.0]) + t])
def test_the_watch_sees(call: Any) -> None:
    t = torch.ones(2)
    with Watch(), pytest.raises(AssertionError, match="cannot be captured"):
        call(t)


BLOCKS: dict[str, dict[str, Any]] = {
    "none": {"norm": None},
    "layer": {"norm": "layer"},
    "rms": {"norm": "rms"},
    "batch": {"norm": "batch"},
    "batch, cumulative": {"norm": "batch", "momentum": None},
    "batch, virtual": {"norm": "batch", "virtual_batch_size": 4},
    "group": {"norm": "group", "num_groups": 4},
    "instance": {"norm": "instance", "track_running_stats": True},
    "gated": {"norm": "rms", "activation": "swiglu"},
    "channels": {"norm": "batch", "dropout": 0.0, "channel_dropout": 0.2},
}


@pytest.mark.parametrize("case", BLOCKS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_step_can_be_captured(case: str, training: bool, cpp: None) -> None:
    options = {"activation": "gelu", "dropout": 0.1} | BLOCKS[case]
    block = fused.LinearNormAct(6, 16, **options).train(training)
    x = torch.randn(8, 5, 6, requires_grad=True)
    block(x).sum().backward()  # what is made once, a graph's warm-up makes
    with Watch() as watch:
        block(x).sum().backward()
    ours = [name for name in watch.seen if name.startswith("fused_lnad.")]
    assert len(ours) >= 2 and any(name.endswith("_backward") for name in ours), watch.seen
    assert ("aten.randint" in watch.seen) == training, "the seed is drawn on the device, by torch"
