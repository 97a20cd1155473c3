"""Who is measured: eager torch, torch.compile, fused, and the machine's limits.

All of them but the limits run the same children with the same parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused
from fused.spec import dropout_scale, dropout_threshold

from .cells import AUTOTUNED_SIZES, NUM_GROUPS, Cell
from .shapes import fuse, make_shape


class SwiGLU(nn.Module):
    """As models write it in plain torch, which has no module of it."""

    def forward(self, h: Tensor) -> Tensor:
        value, gate = h.chunk(2, -1)
        return value * F.silu(gate)


ACTIVATIONS: dict[str, type[nn.Module]] = {
    **{"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU},
    **{"glu": nn.GLU, "swiglu": SwiGLU},
}


def _ours(child: nn.Module) -> nn.Module:
    """The module that fused knows in place of one that torch lacks."""
    return fused.nn.SwiGLU() if isinstance(child, SwiGLU) else child


def make_norm(cell: Cell) -> nn.Module:
    """The cell's norm, in plain torch; its parameters are not the defaults."""
    norm = _plain_norm(cell)
    for name, parameter in norm.named_parameters():
        nn.init.normal_(parameter, float(name == "weight"), 0.2)
    return norm


def _plain_norm(cell: Cell) -> nn.Module:
    if cell.norm in ("layer", "rms"):
        return nn.LayerNorm(cell.width) if cell.norm == "layer" else nn.RMSNorm(cell.width)
    if cell.norm == "group":
        return nn.GroupNorm(NUM_GROUPS, cell.N)
    if cell.norm == "instance":
        return nn.InstanceNorm2d(cell.N, affine=True)
    return nn.BatchNorm2d(cell.N) if cell.shape else nn.BatchNorm1d(cell.N)


@dataclass(frozen=True)
class Inputs:
    """x (M, K, N or 2N), a leaf that wants its gradient in training; dy (M, N). Or images, both.

    Of the suite shapes also a second input, and with add & norm the gradient of the sum.
    """

    x: Tensor
    dy: Tensor
    more: tuple[Tensor, ...] = ()
    more_dy: tuple[Tensor, ...] = ()


@dataclass
class Provider:
    """Something that can be measured.

    Attributes:
        forward: takes the inputs; what it returns is given to `backward`.
        backward: None where there is nothing to differentiate.
        mode: under which mode its time counts; for a limit it need not be the cell's.
        checked: whether it computes the chain, and so must pass the check.
        keep_scale: what it multiplies kept elements by.
        steps: how many steps one call of `forward` makes.
    """

    name: str
    forward: Callable[[Inputs], Any]
    mode: str
    backward: Callable[[Inputs, Any], Any] | None = None
    checked: bool = True
    keep_scale: float = 1.0
    steps: int = 1
    parameters: list[nn.Parameter] = field(default_factory=list)


def _make_layers(cell: Cell, features: int) -> list[nn.Module]:
    """One chain."""
    children: list[nn.Module] = []
    if cell.has_linear:
        children.append(nn.Linear(features, cell.width))
    if cell.norm:
        children.append(make_norm(cell))
    if cell.activation:
        children.append(ACTIVATIONS[cell.activation]())
    if "D" in cell.chain:
        children.append(nn.Dropout(cell.p))
    return children


def make_chain(cell: Cell, device: str) -> Any:
    """The cell's layers, in plain torch: nn.Sequential, or of two inputs a module of shapes.py."""
    dtype = getattr(torch, cell.dtype)
    if cell.takes_two:
        chain = make_shape(cell, make_norm(cell) if cell.norm else None)
    else:
        children = _make_layers(cell, cell.K)
        if cell.blocks > 1:
            for _ in range(cell.blocks - 1):
                children += _make_layers(cell, cell.N)
            children.append(nn.Linear(cell.N, cell.N))
        chain = nn.Sequential(*children)
    return chain.to(device, dtype).train(cell.mode != "inference")


def module_provider(
    name: str, module: Callable[..., Any], chain: nn.Module, cell: Cell, scale: float
) -> Provider:
    parameters = list(chain.parameters())

    def backward(inputs: Inputs, y: Any) -> tuple[Tensor, ...]:
        wanted = [inputs.x, *inputs.more, *parameters]
        return torch.autograd.grad(y, wanted, (inputs.dy, *inputs.more_dy))

    return Provider(
        name,
        lambda inputs: module(inputs.x, *inputs.more),
        cell.mode,
        backward if cell.needs_gradients else None,
        keep_scale=scale if cell.drops else 1.0,
        parameters=parameters,
    )


def _copy(like: Tensor) -> Provider:
    """Reads and writes each element once: what a forward pass cannot beat without streaming."""
    out = torch.empty_like(like)
    return Provider("copy_", lambda inputs: out.copy_(inputs.x), "forward", checked=False)


def _add(like: Tensor, mode: str = "backward") -> Provider:
    """Two streams in, one out, as backward has (z, dy, dz), or forward of two inputs."""
    out = torch.empty_like(like)

    def add(inputs: Inputs) -> Tensor:
        return torch.add(inputs.x.detach(), inputs.dy, out=out)

    return Provider("add", add, mode, checked=False)


def _gemms(cell: Cell, weight: Tensor, like: Inputs) -> Provider:
    """The matrix products that the step cannot do without; they allocate their outputs."""
    weight = weight.detach()
    wide = like.dy.repeat(1, 2) if cell.gated else None

    def three(inputs: Inputs) -> tuple[Tensor, ...]:
        x, dz = inputs.x.detach(), inputs.dy if wide is None else wide
        return torch.mm(x, weight.t()), torch.mm(dz, weight), torch.mm(dz.t(), x)

    def one(inputs: Inputs) -> Tensor:
        return torch.mm(inputs.x, weight.t())

    return Provider("gemms", three if cell.needs_gradients else one, cell.mode, checked=False)


def make_providers(
    cell: Cell, chain: Any, like: Inputs, max_autotune: bool = False
) -> list[Provider]:
    """The providers of a cell; `like` has the sizes of its inputs."""
    ours: Callable[..., Any]
    if cell.takes_two:
        ours = fuse(cell, chain)
    else:
        ours = fused.Sequential(*map(_ours, chain.children())).train(chain.training)
    eager_scale = 1 / (1 - cell.p)
    our_scale = dropout_scale(dropout_threshold(cell.p))
    found = [
        module_provider("fused", ours, chain, cell, our_scale),
        module_provider("eager", chain, chain, cell, eager_scale),
    ]
    if cell.suite == "host":
        return found
    torch.compiler.reset()  # one cell must not use up the recompilations of the next
    compiled = torch.compile(chain, dynamic=False, fullgraph=True)
    found.append(module_provider("compile", compiled, chain, cell, eager_scale))
    if max_autotune and (cell.M, cell.K, cell.N) in AUTOTUNED_SIZES:
        tuned = torch.compile(chain, dynamic=False, fullgraph=True, mode="max-autotune")
        found.append(module_provider("max-autotune", tuned, chain, cell, eager_scale))
    if cell.suite == "peers":
        from .peers import make_peers

        found += make_peers(cell, chain)
    if cell.has_linear:
        linear = chain[0]
        assert isinstance(linear, nn.Linear)
        if cell.blocks == 1:
            found.append(_gemms(cell, linear.weight, like))
    elif cell.takes_two and not cell.needs_gradients:
        found.append(_add(like.dy, cell.mode))
    elif not cell.gated:  # torch has nothing that reads as many streams and writes half
        found.append(_add(like.dy) if cell.needs_gradients else _copy(like.dy))
    return found
