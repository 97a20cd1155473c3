"""A gate of two tensors on a real GPU at full size; skipped without one."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton kernels need triton")

import fused
from fused.functional import dropout_mask, gate
from fused.spec import GATES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


@pytest.mark.parametrize("cols", [1, 63, 1000, 4096, 20000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", [*GATES])
def test_twice_eagers_error(activation: str, dtype: torch.dtype, cols: int) -> None:
    """Against float64; each half of a tensor has strides of its own."""
    halves = torch.randn(301, 2 * cols, device="cuda").to(dtype)
    dy = torch.randn(301, cols, device="cuda").to(dtype)
    results = []
    for kind, backend in ((dtype, "triton"), (torch.float64, "reference"), (dtype, "reference")):
        z = halves.to(kind).requires_grad_()
        value, other = z.chunk(2, 1)
        with fused.use_backend(backend):
            y = gate(value, other, activation, p=0.1, seed=7)
            (dz,) = torch.autograd.grad(y, z, dy.to(kind))
        results.append((y.detach().double(), dz.double()))
    for found, oracle, eager in zip(*results, strict=True):
        allowed = 2 * (eager - oracle).abs().max() + 8 * torch.finfo(dtype).eps * oracle.abs().max()
        assert (found - oracle).abs().max() <= allowed


def test_the_mask() -> None:
    value, other = torch.ones(37, 1001, device="cuda"), torch.ones(37, 1001, device="cuda")
    keep = dropout_mask(37, 1001, 0.3, torch.tensor([11], device="cuda"))
    assert torch.equal(gate(value, other, p=0.3, seed=11) != 0, keep)
