"""Gated activations: along any dimension, and as modules, of which torch has nn.GLU alone.

    y = a · gate(b)        of the halves a (value, first) and b (gate, second) of the features

Behind a Linear and a norm along rows a gated activation is part of their one operation; behind a
norm over samples or positions, or along another dimension than the last, it is a second one, with
the dropout (prepare.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from ..run import reference
from ..run.prepare import gate
from ..run.recording import is_plain, recorded_plain
from ..spec import make_spec


class _Gated(nn.Module):
    """a · activation(b) of the halves (a, b) of one dimension."""

    activation = ""

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        plain = is_plain(x) and x.is_floating_point() and x.dim() > 0 and not x.is_nested
        if not plain or recorded_plain():
            return self._by_torch(x)
        size = x.shape[self.dim]
        if size % 2:
            raise ValueError(
                f"{type(self).__name__} halves dimension {self.dim}, whose size {size} is odd"
            )
        return gate(make_spec(activation=self.activation), x, self.dim % x.dim())

    def _by_torch(self, x: Tensor) -> Tensor:
        y = reference.activate(x.transpose(self.dim, -1), self.activation)
        return y.transpose(self.dim, -1)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class SwiGLU(_Gated):
    """value · SiLU(gate), of the first and the second half of a dimension (Shazeer, 2020).

    torch's nn.GLU has the same order. Weights of models that keep the gate first (Llama's gate_proj
    before up_proj) are to be concatenated the other way round.

    Args:
        dim: the dimension that is halved.

    Shape:
        (..., 2N, ...) to (..., N, ...).

    Raises:
        ValueError: the dimension's size is odd.
    """

    activation = "swiglu"


class GeGLU(_Gated):
    """value · GELU(gate), as `SwiGLU`.

    Args:
        dim: the dimension that is halved.
        approximate: "none" or "tanh", as of nn.GELU.
    """

    def __init__(self, dim: int = -1, approximate: str = "none") -> None:
        super().__init__(dim)
        if approximate not in ("none", "tanh"):
            raise ValueError(f"approximate must be 'none' or 'tanh', got {approximate!r}")
        self.approximate = approximate

    @property
    def activation(self) -> str:  # type: ignore[override]
        return "geglu" if self.approximate == "none" else "geglu_tanh"

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, approximate={self.approximate!r}"


class ReGLU(_Gated):
    """value · ReLU(gate), as `SwiGLU`."""

    activation = "reglu"


# GeGLU is also geglu_tanh, by its `approximate`.
GATED_MODULES: dict[type, str] = {
    nn.GLU: "glu",
    SwiGLU: "swiglu",
    GeGLU: "geglu",
    ReGLU: "reglu",
}
_MAKERS: dict[str, Callable[[int], nn.Module]] = {
    **{name: kind for kind, name in GATED_MODULES.items()},
    "geglu_tanh": partial(GeGLU, approximate="tanh"),
}


def make_gate(name: str, dim: int) -> nn.Module:
    """The module of a gated activation."""
    return _MAKERS[name](dim)
