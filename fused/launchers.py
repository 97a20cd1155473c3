"""The launchers of the Triton kernels, by operator; kernels/ is imported at the first call.

They are called with the operators' own lists of arguments (ops.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from torch import Tensor


def triton_row_forward(z: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    from .kernels.row import row_forward

    return row_forward(z, *args)


def triton_row_forward_(z: Tensor, *args: Any) -> None:
    from .kernels.row import row_forward

    row_forward(z, *args, out=z)


def triton_row_backward(dy: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from .kernels.row_backward import row_backward

    return row_backward(dy, *args)


def triton_linear(name: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        module = import_module(f".kernels.gemm_{name}", __package__)
        return getattr(module, f"linear_{name}_forward")(*args)

    return call


def triton_channel(name: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        return getattr(import_module(".kernels.channel", __package__), name)(*args)

    return call


def triton_channel_apply_(z: Tensor, *args: Any) -> None:
    from .kernels.channel import channel_apply

    channel_apply(z, *args, out=z)


# Those whose launcher in kernels/channel.py has the operator's name and arguments.
CHANNEL_LAUNCHERS = tuple(
    f"channel_{name}" for name in ("statistics", "forward", "apply", "backward", "sums", "gradient")
)
Launchers = Mapping[str, Callable[..., Any]]
TRITON: Launchers = {
    "row_forward": triton_row_forward,
    "row_forward_": triton_row_forward_,
    "row_backward": triton_row_backward,
    "channel_apply_": triton_channel_apply_,
    **{name: triton_channel(name) for name in CHANNEL_LAUNCHERS},
}
