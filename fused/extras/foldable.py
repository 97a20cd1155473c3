"""What `fold_` may touch: which modules run one after the other, and what is in the way.

Every `..._reason` function returns a sentence, or the empty string when nothing is in the way.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..chain.guard import parameter_reason
from ..modules.norms import BatchNorm
from ..nn import MLP, LinearNormAct, NormAct, Sequential
from .scaler import FeatureScaler

# The forwards that only call the children.
_FORWARDS = [kind.forward for kind in (nn.Sequential, Sequential, LinearNormAct, NormAct, MLP)]
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What may be folded into → torch's norm of its output's features, besides SyncBatchNorm.
_NORM_OF: dict[type, type] = {
    nn.Linear: nn.BatchNorm1d,
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
    nn.ConvTranspose1d: nn.BatchNorm1d,
    nn.ConvTranspose2d: nn.BatchNorm2d,
    nn.ConvTranspose3d: nn.BatchNorm3d,
}


@dataclass
class Leaf:
    """A module in the order of execution, and the Sequential whose child it is."""

    path: str
    owner: nn.Module
    name: str
    module: nn.Module


def only_calls_children(module: nn.Module) -> bool:
    """Whether it is a Sequential whose forward is the usual one."""
    return (
        isinstance(module, nn.Sequential)
        and type(module).forward in _FORWARDS
        and "forward" not in module.__dict__
    )


def runs_in_order(module: nn.Module) -> bool:
    """Whether it is a Sequential whose children may be called in its place: it does nothing else,
    and no hook would miss the call.
    """
    return only_calls_children(module) and not any(module.__dict__[name] for name in _HOOKS)


def leaves_of(path: str, module: nn.Module, nested: set[int]) -> list[Leaf]:
    """The children of a Sequential, and in the place of those in `nested` (by id) their own."""
    leaves = []
    for name, child in module._modules.items():
        where = f"{path}.{name}" if path else name
        if child is not None and id(child) in nested:
            leaves += leaves_of(where, child, nested)
        elif child is not None:
            leaves.append(Leaf(where, module, name, child))
    return leaves


def fold_reason(module: nn.Module, target: Leaf | None, uses: Counter[int]) -> str:
    """Why a norm or scaler cannot be folded into what stands beside it."""
    scaler = isinstance(module, FeatureScaler)
    where = "the child behind it" if scaler else "the child in front of it"
    if target is None:
        return f"{where} is missing"
    into = target.module
    if type(into) not in ((nn.Linear,) if scaler else _NORM_OF):
        return f"{where}, {target.path}, is a {type(into).__name__}"
    reason = _own_reason(module)
    if reason:
        return f"it {reason}"
    reason = _own_reason(into) or _weight_reason(into, uses)
    if reason:
        return f"{where}, {target.path}, {reason}"
    return _scaler_reason(module, into) if scaler else _norm_reason(module, into)


def _own_reason(module: nn.Module) -> str:
    if module.training:
        return "is in training mode; call model.eval() first"
    if any(module.__dict__[name] for name in _HOOKS):
        return "has hooks"
    return "has a forward that was replaced" if "forward" in module.__dict__ else ""


def _weight_reason(into: nn.Module, uses: Counter[int]) -> str:
    """Why a Linear or convolution, of a class that can be folded into, cannot get new weights."""
    if uses[id(into)] > 1:
        return "is used more than once in the model"
    tensors = [t for t in into._parameters.values() if t is not None]
    for name in ("weight", "bias"):
        device = tensors[0].device if tensors else torch.device("cpu")
        reason = parameter_reason(into, name, device, optional=name == "bias")
        if reason:
            return f"cannot be changed: {reason}"
    for t in tensors:
        if uses[id(t)] > 1:
            return "shares its parameters with another module"
        if t.dtype not in _DTYPES or t.is_meta:
            return f"has parameters on {t.device}, in {str(t.dtype).removeprefix('torch.')}"
    return ""


def _norm_reason(norm: Any, into: Any) -> str:
    kind, expected = type(norm), _NORM_OF[type(into)]
    if kind not in (expected, nn.SyncBatchNorm, BatchNorm):
        return (
            f"it is a {kind.__name__}; behind a {type(into).__name__} only {expected.__name__} is"
        )
    if kind is BatchNorm and norm.channel_dim == -1 and type(into) is not nn.Linear:
        return "it normalises the last dimension, a convolution's channels are dimension 1"
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics"
    features = into.out_features if type(into) is nn.Linear else into.out_channels
    if norm.num_features != features:
        return f"it has {norm.num_features} features, what it follows {features}"
    for name in ("weight", "bias"):
        reason = parameter_reason(norm, name, into.weight.device)
        if reason:
            return reason
    return ""


def _scaler_reason(scaler: Any, linear: Any) -> str:
    if type(scaler) is not FeatureScaler:
        return f"it is a {type(scaler).__name__}"
    if scaler.num_features != linear.in_features:
        return f"it has {scaler.num_features} features, the Linear takes {linear.in_features}"
    if scaler.dtype is not None:
        name = str(scaler.dtype).removeprefix("torch.")
        return f"it converts its input to {name}, which a Linear does not"
    unseen = int((scaler.count == 0).sum())
    if unseen:
        return f"it has never seen {unseen} of its {scaler.num_features} features"
    eps = torch.finfo(linear.weight.dtype).eps
    ratio = float((scaler.center / scaler.scale).abs().max())
    if ratio * eps > math.sqrt(eps):
        name = str(linear.weight.dtype).removeprefix("torch.")
        return f"a center is {ratio:.2g} times its scale: half of the digits of {name} would cancel"
    return ""


def overflow_reason(into: Any, weight: Tensor, bias: Tensor) -> str:
    dtype = into.weight.dtype
    if weight.to(dtype).isfinite().all() and bias.to(dtype).isfinite().all():
        return ""
    return f"the result is not finite in {str(dtype).removeprefix('torch.')}"
