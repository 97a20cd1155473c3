"""Do two builds of a model agree: in one step to rounding, in training to run-to-run spread?"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from statistics import fmean, variance

import torch
from torch import Tensor, nn
from training import Recipe, Task

# Student's t at 99.75 % by degrees of freedom (2 · repeats − 2): two-sided 0.5 % for each of two
# metrics, so that equal builds are called different once in a hundred times.
STUDENT_T = {2: 14.089, 4: 5.598, 6: 4.317, 8: 3.833, 10: 3.581}


@dataclass(frozen=True)
class StepCheck:
    """Errors of the loss and the gradients of one step without dropout, against float64.

    An error is the largest difference in a tensor over the largest value in it; the worst tensor
    counts. `limit` is twice eager's error plus two machine epsilons of the dtype.
    """

    eager: float
    fused: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.fused <= self.limit

    def sentence(self) -> str:
        return (
            f"one step without dropout, worst error of loss and gradients against float64:"
            f" eager {self.eager:.1e}, fused {self.fused:.1e} (limit {self.limit:.1e}):"
            f" {'passed' if self.passed else 'FAILED'}"
        )


def check_step(eager: nn.Module, fused: nn.Module, task: Task, recipe: Recipe) -> StepCheck:
    """One forward and backward of both builds with dropout 0, each held against float64."""
    exact = _step(copy.deepcopy(eager).double(), task, recipe, torch.float64)
    largest = max(tensor.abs().max().item() for tensor in exact)

    def error(model: nn.Module) -> float:
        found = _step(copy.deepcopy(model), task, recipe, recipe.dtype)
        worst = 0.0
        for tensor, truth in zip(found, exact, strict=True):
            # A gradient that is zero but for rounding is measured by the others' size.
            scale = max(truth.abs().max().item(), 1e-4 * largest)
            difference = (tensor.double() - truth).abs().max().item()
            worst = max(worst, difference / scale if math.isfinite(difference) else math.inf)
        return worst

    eager_error, fused_error = error(eager), error(fused)
    return StepCheck(eager_error, fused_error, 2 * eager_error + 2 * torch.finfo(recipe.dtype).eps)


def without_dropout(model: nn.Module) -> nn.Module:
    """The model itself, whose dropouts now drop nothing."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def _first_batch(task: Task, recipe: Recipe) -> tuple[tuple[Tensor, ...], Tensor]:
    return task.batch(torch.arange(min(recipe.batch, task.rows), device=recipe.device))


def _step(model: nn.Module, task: Task, recipe: Recipe, dtype: torch.dtype) -> list[Tensor]:
    """The loss and the gradient of every parameter of one step without dropout."""
    without_dropout(model).train()
    mixed = dtype not in (torch.float32, torch.float64)

    def cast(tensor: Tensor, other: torch.dtype) -> Tensor:
        return tensor.to(other) if tensor.is_floating_point() else tensor

    inputs, target = _first_batch(task, recipe)
    with torch.autocast(recipe.device.type, recipe.dtype, enabled=mixed):
        output = model(*(tensor if mixed else cast(tensor, dtype) for tensor in inputs))
    output = output.to(torch.promote_types(dtype, torch.float32))
    loss = task.loss(output, cast(target, output.dtype))
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return [loss.detach(), *gradients]


def kept_bytes(model: nn.Module, task: Task, recipe: Recipe) -> int:
    """Bytes that a training forward keeps for backward, each storage once, parameters left out."""
    kept: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    model.train()
    inputs, _ = _first_batch(task, recipe)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), recipe.autocast():
        output = model(*inputs)  # alive, so that no address is used twice
    del output
    return sum(kept.values())


@dataclass(frozen=True)
class Comparison:
    """A metric of both builds at the end of training, over repeats with other batches and masks."""

    metric: str
    eager: tuple[float, ...]
    fused: tuple[float, ...]

    @property
    def difference(self) -> float:
        return fmean(self.fused) - fmean(self.eager)

    @property
    def spread(self) -> float:
        """Standard deviation between repeats of one build, pooled over both."""
        return math.sqrt((variance(self.eager) + variance(self.fused)) / 2)

    @property
    def limit(self) -> float:
        """The largest difference of means that this spread explains, at 0.5 % false alarms."""
        repeats = len(self.eager)
        return STUDENT_T[2 * repeats - 2] * self.spread * math.sqrt(2 / repeats)

    @property
    def agree(self) -> bool:
        return abs(self.difference) <= self.limit  # false for nan

    def sentence(self) -> str:
        verb = "agrees" if self.agree else "DISAGREES"
        return (
            f"{self.metric} {verb}: fused − eager = {self.difference:+.5f}; repeats of one build"
            f" spread by {self.spread:.5f} (standard deviation), which explains up to"
            f" {self.limit:.5f}"
        )
