"""Folding norms with fixed statistics, and scalers, into the Linear or convolution beside them.

    BatchNorm behind:  weight' = weight · s, bias' = (bias − mean) · s + norm_bias,
                       s = norm_weight / sqrt(variance + eps)
    scaler in front:   weight' = weight / scale, bias' = bias + weight · (low − center / scale)

The first is `torch.nn.utils.fusion`'s; both are computed in float64 and rounded once.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .foldable import (
    Leaf,
    fold_reason,
    leaves_of,
    only_calls_children,
    overflow_reason,
    runs_in_order,
)
from .scaler import FeatureScaler

__all__ = ["FoldReport", "fold_"]


@dataclass
class FoldReport:
    """What `fold_` did; print it.

    Attributes:
        folded: the path of each norm and scaler that is gone → the path of the Linear or
            convolution that it is now part of.
        skipped: the path of each one that stays → why.
    """

    folded: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    dry_run: bool = False

    def __str__(self) -> str:
        verb = "would be folded" if self.dry_run else "folded"
        total = len(self.folded) + len(self.skipped)
        lines = [f"{len(self.folded)} of {total} norms and scalers {verb}"]
        lines += [f"  {path} into {target}" for path, target in self.folded.items()]
        lines += [f"  {path or '(the model itself)'}: {why}" for path, why in self.skipped.items()]
        return "\n".join(lines)


def fold_(model: nn.Module, dry_run: bool = False) -> FoldReport:
    """Folds BatchNorms and FeatureScalers into the Linear or convolution beside them, in place.

    For inference: the model must be in eval mode, and neither an optimizer nor a checkpoint of the
    model as it was fits it afterwards. What is folded is

    - a BatchNorm1d, 2d, 3d or SyncBatchNorm directly behind a Linear, a convolution or a
      transposed one;
    - a `FeatureScaler` directly in front of a Linear

    inside an nn.Sequential or one of this library's, also across the borders of those nested in
    one another. The norm or scaler is deleted from its Sequential. The others keep their names in
    the state_dict, but not their positions, so `model[2]` may be another child afterwards; and
    without a norm in between, a `fused.Sequential` runs Linear, activation and dropout as one
    operation. A Linear without bias gets one. New parameters keep `requires_grad`. Calling it
    twice changes nothing more.

    Two things are taken for granted, since the modules do not say them: BatchNorm1d behind a
    Linear sees two dimensions (of three it would normalise the middle one; torch's own folding
    takes that for granted too), and no child is called by other ways than its Sequential. Behind a
    folded scaler the features come unscaled into the Linear: in its dtype, or that of autocast.

    Args:
        model: the model.
        dry_run: only report.

    Returns:
        A `FoldReport`, which names what was folded, and what was not and why: among others hooks,
        shared, parametrised or quantised weights, missing statistics, and results that overflow
        the weight's dtype. A scaler stays, too, where its center is so large beside its scale that
        more than half of the digits of the weight's dtype would cancel.

    Raises:
        TypeError: model is not an nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fold_: model must be an nn.Module, got {type(model).__name__}")
    report = FoldReport(dry_run=dry_run)
    modules = dict(model.named_modules())
    uses = Counter(
        id(used)
        for module in modules.values()
        for used in chain(module._modules.values(), module._parameters.values())
        if used is not None
    )
    nested = {
        id(child)
        for module in filter(only_calls_children, modules.values())
        for child in module.children()
        if uses[id(child)] == 1 and runs_in_order(child)
    }
    for path, module in modules.items():
        if only_calls_children(module) and id(module) not in nested:
            _fold_run(leaves_of(path, module, nested), uses, report)
    for path, module in modules.items():
        known = path in report.folded or path in report.skipped
        if isinstance(module, _BatchNorm | FeatureScaler) and not known:
            report.skipped[path] = "it is not a child of a Sequential that only calls its children"
    return report


def _fold_run(leaves: list[Leaf], uses: Counter[int], report: FoldReport) -> None:
    """Folds what can be folded among modules that run one after the other."""
    # The path of what was folded into → it, its new weight and bias. They stay in float64 until the
    # end, so that two folds round once.
    pending: dict[str, tuple[nn.Module, Tensor, Tensor]] = {}
    # First the scalers, from the last to the first, then the norms, from the first to the last: of
    # two in a row the second then stands beside the Linear too.
    for kind in (FeatureScaler, _BatchNorm):
        kept: list[Leaf] = []
        for leaf in reversed(leaves):
            if not isinstance(leaf.module, kind):
                kept.append(leaf)
                continue
            target = kept[-1] if kept else None
            why = fold_reason(leaf.module, target, uses)
            if target is None or why:
                report.skipped[leaf.path] = why
                kept.append(leaf)
                continue
            into = target.module
            _, weight, bias = pending.get(target.path) or (into, *_float64(into))
            weight, bias = _folded(leaf.module, into, weight, bias)
            why = overflow_reason(into, weight, bias)
            if why:
                report.skipped[leaf.path] = why
                kept.append(leaf)
                continue
            pending[target.path] = into, weight, bias
            report.folded[leaf.path] = target.path
            if not report.dry_run:
                del leaf.owner._modules[leaf.name]
        leaves = kept
    if not report.dry_run:
        for into, weight, bias in pending.values():
            _write(into, weight, bias)


def _float64(into: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias in float64, on the CPU: not every device has float64."""
    weight = into.weight.detach().to("cpu", torch.float64)
    if into.bias is not None:
        return weight, into.bias.detach().to("cpu", torch.float64)
    features = into.out_features if type(into) is nn.Linear else into.out_channels
    return weight, torch.zeros(features, dtype=torch.float64)


def _folded(module: Any, into: Any, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The weight and bias with the norm or scaler in them."""
    if isinstance(module, FeatureScaler):
        center, scale = module.center.cpu(), module.scale.cpu()
        low = module.feature_range[0] if module.mode == "minmax" else 0.0
        return weight / scale, bias + weight @ (low - center / scale)
    given = (module.running_mean, module.running_var, module.weight, module.bias)
    statistics: list[Any] = [
        None if t is None else t.detach().to("cpu", torch.float64) for t in given
    ]
    mean, variance, *affine = statistics
    # A transposed convolution has (in, out / groups, ...), and is turned so that out comes first.
    shape, turned = weight.shape, isinstance(into, _ConvTransposeNd)
    if turned:
        parts = weight.reshape(into.groups, -1, *shape[1:]).transpose(1, 2)
        weight = parts.flatten(0, 1)  # (out, in / groups, ...)
    new = fuse_conv_bn_weights(weight, bias, mean, variance, module.eps, *affine)
    weight, bias = (t.detach() for t in new)
    if turned:
        weight = weight.reshape(parts.shape).transpose(1, 2).reshape(shape)
    return weight, bias


def _write(into: Any, weight: Tensor, bias: Tensor) -> None:
    """Gives it new parameters: the old ones may be in use outside of the model."""
    old = into.weight
    into.weight = nn.Parameter(torch.empty_like(old).copy_(weight), old.requires_grad)
    kind = old if into.bias is None else into.bias
    into.bias = nn.Parameter(bias.to(kind.device, kind.dtype), kind.requires_grad)
