"""Which modules a chain is made of, and what may have been done to one that a kernel would not see.

Every `..._reason` function returns a sentence, or the empty string when nothing is in the way.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

from ..modules.gated import GATED_MODULES, GeGLU
from ..modules.norms import NORM_CLASSES, ChannelDropout
from ..run.recording import is_plain
from ..spec import ACTIVATIONS, NORMS, ROW_NORMS, is_nan, known_parameters
from .grammar import ACTIVATION, DROPOUT, LINEAR, NORM

_NO_PARAMETERS: tuple[tuple[str, float], ...] = ()
# Of the modules that have two activations, by their `approximate`.
_BY_APPROXIMATE: dict[type, dict[str, str]] = {
    nn.GELU: {"none": "gelu", "tanh": "gelu_tanh"},
    GeGLU: {"none": "geglu", "tanh": "geglu_tanh"},
}
_HALF = (torch.bfloat16, torch.float16)


class ReLUSquared(nn.Module):
    """relu(x)² (So et al., "Primer", 2021), as a module; torch has none.

    Shape: any to the same.
    """

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x).square()


# The module of each activation → its name, or one of its names.
_ACTIVATION_OF: dict[type, str] = {
    **{a.module: name for name, a in ACTIVATIONS.items() if a.module is not None},
    ReLUSquared: "relu_squared",
    **GATED_MODULES,
}
NORM_OF: dict[type, str] = {c: name for name in ROW_NORMS for c in NORMS[name]}
NORM_OF |= NORM_CLASSES
# Dropout of whole channels → the number of dimensions that it takes without a warning, batch and
# channels included; None: any.
CHANNEL_DROPOUTS: dict[type, int | None] = {
    nn.Dropout1d: 3,
    nn.Dropout2d: 4,
    nn.Dropout3d: 5,
    ChannelDropout: None,
}
KIND_OF: dict[type, int] = {nn.Linear: LINEAR, nn.Dropout: DROPOUT}
KIND_OF |= dict.fromkeys(NORM_OF, NORM) | dict.fromkeys(_ACTIVATION_OF, ACTIVATION)
KIND_OF |= dict.fromkeys(CHANNEL_DROPOUTS, DROPOUT)


def _own_forward(kind: Any) -> Any:
    return kind.forward if kind.forward.__module__ == kind.__module__ else None


# Each class's own forward; None where it was replaced before this module was imported.
FORWARD_OF: dict[type, Any] = {kind: _own_forward(kind) for kind in KIND_OF}


def activation_of(child: nn.Module) -> tuple[str, tuple[tuple[str, float], ...]]:
    """The name and parameters of an activation module that `activation_reason` has passed."""
    given: Any = child
    kind = type(child)
    several = _BY_APPROXIMATE.get(kind)
    name = several[given.approximate] if several else _ACTIVATION_OF[kind]
    known = known_parameters(name)
    if not known:
        return name, _NO_PARAMETERS
    return name, tuple((key, float(getattr(child, key))) for key, _ in known)


def activation_attributes(child: nn.Module, first: bool) -> Callable[[Any], Any] | None:
    """What reads the attributes on which `activation_reason` and `activation_of` depend."""
    kind = type(child)
    names = [key for key, _ in known_parameters(_ACTIVATION_OF[kind])]
    if kind in GATED_MODULES:
        names.append("dim")
    if kind in _BY_APPROXIMATE:
        names.append("approximate")
    if kind is nn.ReLU6:
        names += ["min_val", "max_val"]
    if first and hasattr(child, "inplace"):
        names.append("inplace")
    return attrgetter(*names) if names else None


def activation_reason(child: nn.Module, first: bool) -> str:
    """Why the activation is not the one of its class; `first`: it reads the chain's own input."""
    kind: Any = type(child)
    given: Any = child
    if first and getattr(child, "inplace", False):
        return "it works in place on the chain's input"
    if kind in _BY_APPROXIMATE and given.approximate not in _BY_APPROXIMATE[kind]:
        return f"its approximate is {given.approximate!r}"
    if kind is nn.ReLU6 and (given.min_val, given.max_val) != (0, 6):
        return f"it clamps to ({given.min_val}, {given.max_val})"
    if kind in GATED_MODULES and type(given.dim) is not int:
        return f"its dim is {given.dim!r}"
    for key, _ in known_parameters(_ACTIVATION_OF[kind]):
        value = getattr(child, key)
        if not isinstance(value, Real) or is_nan(value):
            return f"its {key} is {value!r}"
    return ""


def module_reason(child: nn.Module, expected: Any) -> str:
    """Why this child must run by itself."""
    own = child.__dict__
    if type(child) is not expected:
        return f"its class is now {type(child).__name__}"
    if own["_forward_hooks"] or own["_forward_pre_hooks"]:
        return "it has forward hooks"
    if own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return "it has backward hooks"
    if "forward" in own:
        return "its forward was replaced"
    if expected.forward is not FORWARD_OF[expected]:
        return f"the forward of {expected.__name__} was replaced"
    return ""


def global_hooks() -> bool:
    """Whether hooks that apply to every module are set."""
    return bool(
        _module._global_forward_hooks
        or _module._global_forward_pre_hooks
        or _module._global_backward_hooks
        or _module._global_backward_pre_hooks
    )


def parameter_reason(
    child: nn.Module, name: str, device: torch.device, optional: bool = True
) -> str:
    """Why a parameter of the child cannot be read by a kernel on this device."""
    parameters = child.__dict__["_parameters"]
    if name not in parameters:
        return f"its {name} is not a plain parameter"
    return tensor_of_child_reason(name, parameters[name], device, optional)


def buffer_reason(child: nn.Module, name: str, device: torch.device) -> str:
    """Why a buffer of the child cannot be read by a kernel on this device."""
    buffers = child.__dict__["_buffers"]
    if name not in buffers:
        return f"its {name} is not a plain buffer"
    return tensor_of_child_reason(name, buffers[name], device, optional=True)


def tensor_of_child_reason(
    name: str, t: Tensor | None, device: torch.device, optional: bool
) -> str:
    if t is None:
        return "" if optional else f"it has no {name}"
    if not is_plain(t):
        return f"its {name} is a {type(t).__name__}"
    if t.layout is not torch.strided:
        return f"its {name} is {_short(t.layout)}"
    if t.device != device:
        return f"its {name} is on {t.device}, the input on {device}"
    if t.dim() == 1 and not t.is_contiguous():
        return f"its {name} is not contiguous"
    return ""


def linear_dtype(
    linear: nn.Linear, dtype: torch.dtype, cast: torch.dtype | None
) -> tuple[torch.dtype, str]:
    """The dtype of the Linear's output for an input of `dtype`, or why eager raises.

    `cast` is what autocast casts to, None where it is off; it never casts float64.
    """
    weight, bias = linear.weight, linear.bias
    given = {dtype, weight.dtype} | (set() if bias is None else {bias.dtype})
    if cast is not None:
        given = {d if d == torch.float64 else cast for d in given}
    if len(given) == 1:
        return given.pop(), ""
    own = weight.dtype if bias is None or bias.dtype == weight.dtype else "mixed dtypes"
    return dtype, f"Linear has {_short(own)}, its input {_short(dtype)}"


def norm_reason(norm: nn.LayerNorm | nn.RMSNorm, device: torch.device, dtype: torch.dtype) -> str:
    """Why the norm's parameters cannot be read with an input of this device and dtype."""
    dtypes = set()
    for name, t in norm._parameters.items():
        reason = parameter_reason(norm, name, device)
        if reason:
            return reason
        if t is not None:
            dtypes.add(t.dtype)
            if tuple(t.shape) != norm.normalized_shape:
                return f"its {name} is {tuple(t.shape)}, it normalises {norm.normalized_shape}"
    return dtypes_reason(dtypes, device, dtype, NORM_OF[type(norm)])


def dtypes_reason(
    dtypes: set[torch.dtype], device: torch.device, dtype: torch.dtype, norm: str | None
) -> str:
    """Why a norm's parameters and statistics of these dtypes do not go with an input of `dtype`."""
    # torch takes float32 ones, all of them, with a 16-bit input: on CPUs and, of batch and instance
    # norm, on GPUs.
    mixed = device.type == "cpu" or norm in ("batch", "instance")
    if dtypes <= {dtype} or (mixed and dtype in _HALF and dtypes == {torch.float32}):
        return ""
    own = " and ".join(sorted(_short(d) for d in dtypes))
    return f"it has {own}, its input {_short(dtype)}"


def open_size_reason(x: Tensor) -> str:
    """Why images whose sizes the compiler leaves open are left to Inductor.

    It (torch 2.13) cannot order the symbolic strides of a view that a convolution saves for its
    backward; our result would be one.
    """
    if x.dim() < 4 or not torch.is_grad_enabled():
        return ""
    from torch.fx.experimental.symbolic_shapes import has_static_value

    fixed = all(has_static_value(size) for size in x.shape[1:])
    return "" if fixed else "the compiler leaves the sizes of the images open"


def tensor_reason(x: Any) -> str:
    """Why the input, whatever its shape, cannot be read by a kernel."""
    if not is_plain(x):
        return f"the input is a {type(x).__name__}"
    if x.is_nested:
        return "the input is a nested tensor"
    if x.layout is not torch.strided:
        return f"the input is {_short(x.layout)}"
    if not x.is_floating_point():
        return f"the input is {_short(x.dtype)}"
    if x.dim() < 1:
        return "the input has no dimension"
    return ""


def memory_order(x: Tensor) -> tuple[int, ...] | None:
    """The order of x's dimensions in memory, in which torch's pointwise operators lay their output.

    None where that is not plain: gaps or overlaps, with dimensions out of order.
    """
    strides = x.stride()
    order = tuple(sorted(range(x.dim()), key=lambda d: -strides[d]))
    in_order = order == tuple(range(x.dim()))
    if x.permute(order).is_contiguous() or (in_order and 0 not in strides):
        return order
    return None


def _short(name: object) -> str:
    return str(name).removeprefix("torch.")
