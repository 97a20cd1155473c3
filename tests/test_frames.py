"""The way from a call to the operator is short: Python frames of the library in a training step."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType

import pytest
import torch
from torch import Tensor, nn

import fused

pytestmark = pytest.mark.usefixtures("cpp")
HOME = str(Path(fused.__file__).parent)
NETS = {
    "rows": [nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU(), nn.Dropout(0.1)],
    "images": [nn.BatchNorm2d(16), nn.ReLU()],
}


def frames_of(net: nn.Module, x: Tensor) -> list[str]:
    """The functions of the library that forward and backward enter, in order."""
    entered = []

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(HOME):
            entered.append(frame.f_code.co_name)

    dy = torch.ones(net(x).shape)
    sys.setprofile(note)
    try:
        net(x).backward(dy)
    finally:
        sys.setprofile(None)
    return entered


@pytest.mark.parametrize(
    "net, shapes, most",
    [
        ("rows", [(256, 64), (8, 32, 64), (255, 64)], 10),
        ("images", [(8, 16, 32, 32), (9, 16, 32, 32), (8, 16, 30, 28)], 14),
    ],
)
def test_a_training_step_passes_few_frames(
    net: str, shapes: list[tuple[int, ...]], most: int
) -> None:
    """A change of the batch or of the images' size does not leave the short guard."""
    chain = fused.Sequential(*NETS[net])
    chain(torch.randn(shapes[0]))
    for shape in shapes:
        entered = frames_of(chain, torch.randn(shape, requires_grad=True))
        assert len(entered) <= most, entered
        assert not any("reason" in name for name in entered), entered
