"""Cases of a Linear that is one kernel with what follows it, and how they are judged.

The rule is that of oracle.py, the oracle the chain from x on in float64, eager the same in the
dtype of x. What is run is the dispatcher's own path with FUSED_GEMM=fused, forward and backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F
from oracle import complaint
from torch import Tensor

from fused.backends import gemm, ops
from fused.run import prepare, reference
from fused.run.running import ChannelNorm
from fused.spec import ACTIVATIONS, CHANNEL_NORMS, Spec, dropout_threshold

# The tensors of a chain that have gradients.
LEAVES = ("x", "weight", "bias", "norm_weight", "norm_bias", "residual")


@dataclass(frozen=True)
class Case:
    """One chain. `gap` widens the row strides of x and residual."""

    rows: int
    inner: int
    cols: int
    dtype: torch.dtype = torch.bfloat16
    norm: str | None = "layer"
    activation: str | None = "gelu"
    p: float = 0.1
    bias: bool = True
    affine: bool = True
    residual: bool = False
    gap: int = 0
    groups: int = 2

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.norm}-{self.activation}-{dtype}-{self.rows}x{self.inner}x{self.cols}"

    @property
    def epilogue(self) -> Spec:
        parameters = ()
        if self.activation is not None:
            parameters = tuple(value for _, value in ACTIVATIONS[self.activation].parameters)
        alpha, beta = (*parameters, 0.0, 0.0)[:2]
        eps = 1e-5 if self.norm else 0.0
        return Spec(self.norm, eps, self.activation, alpha, beta, dropout_threshold(self.p))

    @property
    def is_channel(self) -> bool:
        return self.norm in CHANNEL_NORMS

    @property
    def channel_epilogue(self) -> Spec:
        groups = self.groups if self.norm == "group" else self.cols
        return Spec(*self.epilogue[:6], groups=groups, channels_last=True)

    @property
    def view(self) -> tuple[int, int, int]:
        """z as samples, positions and channels."""
        batch = self.norm == "batch"
        return (1, self.rows, self.cols) if batch else (self.rows, 1, self.cols)


@dataclass(frozen=True)
class Inputs:
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    residual: Tensor | None
    dy: Tensor
    seed: Tensor


def make_inputs(case: Case, device: str = "cpu") -> Inputs:
    """Random inputs of a case, the same on every device; z has mean 0.5 and deviation 2."""
    generator = torch.Generator().manual_seed(case.rows * 1009 + case.inner * 31 + case.cols)

    def random(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        values = torch.randn(shape, generator=generator) * scale + mean
        return values.to(device, case.dtype)

    def matrix(cols: int) -> Tensor:
        return random(case.rows, cols + case.gap)[:, :cols]

    vector = case.cols
    normed = case.affine and case.norm is not None
    return Inputs(
        x=matrix(case.inner),
        weight=random(case.cols, case.inner, scale=2.0 / max(case.inner, 1) ** 0.5),
        bias=random(vector, mean=0.5) if case.bias else None,
        norm_weight=random(vector, scale=0.3, mean=1.0) if normed else None,
        norm_bias=random(vector, scale=0.5) if normed else None,
        residual=matrix(case.cols) if case.residual else None,
        dy=random(case.rows, case.cols),
        seed=torch.tensor([0x9E3779B97F4A7C15 - 2**64 + case.cols], device=device),
    )


@contextmanager
def fused_gemm() -> Iterator[None]:
    """As with FUSED_GEMM=fused."""
    with mock.patch.multiple(gemm, mode="fused", enabled=True):
        yield


def forward_arguments(case: Case, x: Inputs, save_z: bool = True) -> tuple[object, ...]:
    """The arguments of linear_row_forward or linear_channel_forward, in the order of the schema."""
    seed = x.seed if case.epilogue.threshold else None
    parameters = (x.bias, x.norm_weight, x.norm_bias)
    codes = case.channel_epilogue.channel if case.is_channel else case.epilogue.row
    return (x.x, x.weight, *parameters, x.residual, seed, save_z, *codes)


def run(case: Case, x: Inputs) -> dict[str, Tensor]:
    """y and the gradient of every input by the kernels, by name."""
    leaves = {n: t.detach().requires_grad_() for n in LEAVES if (t := getattr(x, n)) is not None}
    name = "linear_channel_forward" if case.is_channel else "linear_row_forward"
    with fused_gemm(), mock.patch.object(ops, name, wraps=getattr(ops, name)) as called:
        *given, residual = map(leaves.get, LEAVES)
        norm = ChannelNorm(case.norm, case.groups, *given[3:]) if case.is_channel else None
        given = given[:3] if case.is_channel else given
        y = prepare.run(case.epilogue, *given, residual=residual, seed=x.seed, norm=norm)
    called.assert_called_once()
    gradients = torch.autograd.grad(y, list(leaves.values()), x.dy)
    return {"y": y.detach()} | dict(zip(leaves, gradients, strict=True))


def expected(case: Case, x: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same by torch in a dtype."""
    leaves = {
        n: t.detach().to(dtype).requires_grad_() for n in LEAVES if (t := getattr(x, n)) is not None
    }
    z = F.linear(leaves["x"], leaves["weight"], leaves.get("bias"))
    affine, residual = (leaves.get("norm_weight"), leaves.get("norm_bias")), leaves.get("residual")
    if case.is_channel:
        residual = None if residual is None else residual.reshape(case.view)
        rest = (None, None, *affine, residual, None, x.seed)
        y = reference.channel(z.view(case.view), case.channel_epilogue, *rest).view(z.shape)
    else:
        y = reference.row(z, case.epilogue, None, *affine, residual, x.seed)
    gradients = torch.autograd.grad(y, list(leaves.values()), x.dy.to(dtype))
    return {"y": y.detach()} | dict(zip(leaves, gradients, strict=True))


def check(case: Case, device: str = "cpu") -> dict[str, Tensor]:
    """Runs a case and judges it; returns the results.

    Raises:
        AssertionError: naming every output that breaks the rule.
    """
    x = make_inputs(case, device)
    result = run(case, x)
    oracle, eager = expected(case, x, torch.float64), expected(case, x, case.dtype)
    assert result.keys() == oracle.keys()
    assert all(result[name].dtype == case.dtype for name in result)
    found = [complaint(n, result[n], oracle[n], eager[n], case.dtype) for n in result]
    assert not any(found), f"{case}\n" + "\n".join(c for c in found if c)
    return result


def matrix_of_cases(norms: tuple[str | None, ...] = ("layer", "rms", None)) -> list[Case]:
    """Every norm x activation x dtype, with the other properties taken in turn."""
    cases = []
    for norm in norms:
        for activation in (None, *ACTIVATIONS):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                i = len(cases)
                cases.append(
                    Case(
                        *(5, (72, 40)[i % 2], (64, 200, 40)[i % 3], dtype, norm, activation),
                        p=(0.1, 0.0, 0.5)[i // 3 % 3],
                        bias=i % 7 < 4,
                        affine=i % 11 < 8,
                        residual=i % 5 < 2,
                    )
                )
    return cases
