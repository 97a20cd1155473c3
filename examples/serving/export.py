"""Packages a fused model, for any batch, for a C++ program (main.cpp beside this file).

python export.py model.pt2
"""

from __future__ import annotations

import sys

import torch
from torch.export import Dim

import fused


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return fused.MLP(64, [256, 256], 8, norm="layer", activation="gelu").eval()


def main(path: str) -> None:
    with torch.no_grad():
        program = torch.export.export(
            make_model(), (torch.randn(7, 64),), dynamic_shapes=({0: Dim("batch", min=1)},)
        )
        torch._inductor.aoti_compile_and_package(program, package_path=path)


if __name__ == "__main__":
    main(*sys.argv[1:])
