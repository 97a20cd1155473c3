"""One step of a model, training or inference: run, timed, and compared with another's.

The inputs, the loss and the random numbers are the same for every model that runs the step.
"""

from __future__ import annotations

import ctypes
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

_SEED = 0


def floating_tensors(value: Any) -> Iterator[Tensor]:
    """Every floating-point tensor in an output: a tensor, sequence, mapping or dataclass."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from floating_tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from floating_tensors(item)
    elif is_dataclass(value):
        for each in fields(value):
            yield from floating_tensors(getattr(value, each.name))


def mean_square(output: Any) -> Tensor:
    """The loss where none is given: the sum of the mean squares of all floating-point tensors."""
    losses = [
        t.to(torch.promote_types(t.dtype, torch.float32)).square().mean()
        for t in floating_tensors(output)
        if t.requires_grad
    ]
    if not losses:
        raise TypeError(
            "compare: training needs a floating-point output that depends on the parameters, got"
            f" {type(output).__name__}; give `loss`, a function of the output, or train=False"
        )
    return torch.stack([loss.to(losses[0].device) for loss in losses]).sum()


@dataclass
class Outcome:
    """What a step left: values and gradients by name; those of one module share a prefix."""

    values: dict[str, Tensor]
    gradients: dict[str, Tensor]


@dataclass
class Step:
    """A step of one model, which is its own copy.

    Args:
        model: holds the parameters and buffers.
        call: what is called in the model's place.
        arguments, keywords: the inputs; a step gets clones, so none sees what another wrote.
        loss: of the output; None for inference.
        device: where it runs, "cpu" or "cuda".
    """

    model: nn.Module
    call: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    loss: Callable[[Any], Tensor] | None
    device: torch.device

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def run(self, seed: int = _SEED) -> tuple[float, Any, list[Tensor]]:
        """Seconds of one step, from the call to the last gradient; the output; the inputs."""
        arguments, keywords = tree_map(_clone, (self.arguments, self.keywords))
        self.model.zero_grad(set_to_none=True)
        torch.manual_seed(seed)
        self._wait()
        start = time.perf_counter()
        with torch.set_grad_enabled(self.loss is not None):
            output = self.call(*arguments, **keywords)
            if self.loss is not None:
                self.loss(output).backward()
        self._wait()
        taken = time.perf_counter() - start
        return taken, output, [*floating_tensors((arguments, keywords))]

    def outcome(self, seed: int = _SEED) -> tuple[float, Outcome]:
        """Seconds of one step; its outputs, buffers and gradients."""
        taken, output, inputs = self.run(seed)
        values = {f"outputs.{i}": t for i, t in enumerate(floating_tensors(output))}
        values |= {name: t for name, t in self.model.named_buffers() if t.is_floating_point()}
        held: dict[str, Tensor] = dict(self.model.named_parameters())
        held |= {f"inputs.{index}": t for index, t in enumerate(inputs)}
        gradients = {name: t.grad for name, t in held.items() if t.grad is not None}
        return taken, Outcome(_copied(values), _copied(gradients))

    def peak(self) -> float:
        """Bytes at the peak of a step above those before it; NaN where the system cannot tell.

        On a GPU torch counts them. On Linux it is the process's resident memory, after free memory
        was given back, so that memory which torch does not allocate counts too.
        """
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            self.run()
            return float(torch.cuda.max_memory_allocated(self.device) - before)
        self.model.zero_grad(set_to_none=True)
        with suppress(OSError, AttributeError):  # another system, or another libc
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
            resident = _resident("VmRSS")
            self.run()
            return max(0.0, _resident("VmHWM") - resident)
        return math.nan


def _clone(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone().requires_grad_(value.requires_grad)


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in tensors.items()}


def _resident(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(name))) * 1024


def largest_difference(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], by_module: bool = False
) -> float:
    """The largest |ours − theirs| of all tensors, each relative to the largest |theirs| in it.

    by_module: relative to the largest of its module. Some gradients are zero but for rounding, as
    that of a bias in front of a norm, and the weight beside it says how large rounding is.
    """
    if ours.keys() != theirs.keys():
        return math.inf
    scales: dict[str, float] = {}
    worst = 0.0
    owner = {name: name.rpartition(".")[0] if by_module else name for name in theirs}
    for name, t in theirs.items():
        scales[owner[name]] = max(scales.get(owner[name], 0.0), _largest(t))
    for name, t in theirs.items():
        if ours[name].shape != t.shape:
            return math.inf
        difference = _largest(ours[name].double() - t.double())
        if difference:  # NaN, too
            scale = scales[owner[name]]
            relative = difference / scale if scale else math.inf
            worst = max(worst, math.inf if math.isnan(relative) else relative)
    return worst


def _largest(t: Tensor) -> float:
    return float(t.double().abs().max()) if t.numel() else 0.0


def switch_dropout_off(model: nn.Module) -> None:
    """Puts every module whose class is named as a dropout, and only it, into evaluation mode."""
    for module in model.modules():
        if "drop" in type(module).__name__.lower() and not any(module.children()):
            module.training = False
