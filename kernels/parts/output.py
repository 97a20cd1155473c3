"""The output stage of every kernel, and its gradient: what lies between the norm and the result.

    y = residual + dropout(activation(h)),        or with a gate      y = … dropout(h · act(gate))

Everything is float32 between one load and one rounding at the store.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..tuning.rules import Device
from .activation import activate, activate_grad
from .dropout import channel_multiplier, dropout_multiplier
from .tile import load_place, store_place


class Form(NamedTuple):
    """What a kernel is compiled for, besides its tile: one constant of the launch.

    PTX, PER_THREAD and MASKED: inline assembly may be used; neighbours that one thread loads with
    16 bytes; z has padding. EVEN_N: the tile is as wide as the rows. LAST, SHARED and WIDTH are of
    the channel kernels (channel/tile.py).
    """

    NORM: str | None
    ACTIVATION: str | None  # with a gate the gate's
    DROPOUT: str | None  # of "elements", or of whole "channels" of a sample
    ALIGN: int
    PTX: bool
    PER_THREAD: int
    EVEN_N: bool = False
    MASKED: bool = False
    LAST: bool = False
    SHARED: bool = False
    WIDTH: int = 1


def form_of(
    z: Tensor,
    device: Device,
    norm: str | None,
    activation: str | None,
    threshold: int,
    align: int,
    even_n: bool = False,
    width: int = 1,
) -> Form:
    """The form of a row kernel for z, or of a kernel that works as one."""
    dropout = "elements" if threshold else None
    per_thread = min(8, 16 // z.element_size())
    ptx = device.arch > 0
    return Form(norm, activation, dropout, align, ptx, per_thread, even_n, WIDTH=width)


class Drop(NamedTuple):
    """A tile's part of dropout's mask, which lies over rows of `cols` elements.

    row, col0: the rows of the tile (int64) and its first column, a multiple of 8; of whole channels
    the sample and the channels, in the shape of a tile's channels.
    """

    seed: Any  # its value, or a pointer to it; None without dropout
    row: Any
    col0: Any
    cols: Any
    threshold: Any


@triton.jit
def drop(x, part, FORM: tl.constexpr):
    """x times dropout's multiplier; part is a `Drop`."""
    PER_THREAD: tl.constexpr = FORM.PER_THREAD
    if FORM.DROPOUT is None:
        return x
    else:
        seed = tl.load(part.seed) if part.seed.dtype.is_ptr() else part.seed
        if FORM.DROPOUT == "channels":
            keep = channel_multiplier(seed, part.row, part.col0, part.cols, part.threshold)
        else:
            keep = dropout_multiplier(
                *(seed, part.row, part.col0, part.cols, part.threshold),
                *(PER_THREAD, x.shape[0], x.shape[1]),
            )
        return x * keep


@triton.jit
def write_output(h, gate, part, residual, y, scalars, FORM: tl.constexpr):
    """residual + dropout(activation(h)) to memory.

    h, gate: float32 tiles; gate is None where the activation has none.
    part: a `Drop`.
    residual, y: a `Place` each. Where z has padding, y is 0 outside the residual's mask.
    scalars: eps, alpha and beta.
    """
    ACTIVATION: tl.constexpr = FORM.ACTIVATION
    PTX: tl.constexpr = FORM.PTX
    alpha, beta = tl.cast(scalars[1], tl.float32), tl.cast(scalars[2], tl.float32)
    if gate is None:
        x = activate(h, alpha, beta, ACTIVATION, PTX)
    else:
        x = h * activate(gate, alpha, beta, ACTIVATION, PTX)
    x = drop(x, part, FORM)
    if residual.ptr is not None:
        x += load_place(residual)
    if FORM.MASKED:
        x = tl.where(residual.mask, x, 0.0)
    store_place(y, x)


@triton.jit
def output_gradient(g, h, gate, part, scalars, FORM: tl.constexpr):
    """The gradient of h, and where there is a gate (of h, of the gate), from g, that of y."""
    ACTIVATION: tl.constexpr = FORM.ACTIVATION
    PTX: tl.constexpr = FORM.PTX
    alpha, beta = tl.cast(scalars[1], tl.float32), tl.cast(scalars[2], tl.float32)
    g = drop(g, part, FORM)
    if gate is None:
        return activate_grad(g, h, alpha, beta, ACTIVATION, PTX)
    else:
        dh = g * activate(gate, alpha, beta, ACTIVATION, PTX)
        return dh, activate_grad(g * h, gate, alpha, beta, ACTIVATION, PTX)
