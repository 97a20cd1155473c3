"""Turning the nn.Sequentials of a model that exists into fused ones, in place, and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .chain import Chain
from .grammar import LINEAR, NORM
from .guard import KIND_OF
from .plan import Entry, make_entry, make_steps, printable
from .sequential import Sequential
from .subclass import convert_reason, fused_class, original_class

__all__ = ["Report", "fuse_", "unfuse_"]

_NAMED = 4  # classes in a report


@dataclass
class Report:
    """What `fuse_` did: print it; after a run it also says how often each chain ran fused.

    Calls of a compiled model are not counted.

    Attributes:
        modules: the path of each converted (or, in a dry run, convertible) Sequential → the module.
        skipped: the path of each Sequential that was left alone → why.
        elsewhere: the class of each other module that calls norms, activations or dropouts itself →
            how many of each, which fuse_ cannot reach.
    """

    modules: dict[str, nn.Sequential] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    dry_run: bool = False
    elsewhere: dict[str, list[int]] = field(default_factory=dict)

    def entries(self) -> list[tuple[str, Entry]]:
        """(path, entry) of every chain, as it stands now."""
        found = []
        for path, module in self.modules.items():
            steps = (
                module._current_steps()
                if isinstance(module, Sequential)
                else make_steps(tuple(module._modules.items()))
            )
            found += [(path, make_entry(step)) for step in steps if isinstance(step, Chain)]
        return found

    @property
    def fused(self) -> int:
        """How many chains run as one operation."""
        return sum(entry.fused for _, entry in self.entries())

    def __str__(self) -> str:
        entries = self.entries()
        verb = "would be fused" if self.dry_run else "fused"
        lines = [f"{self.fused} of {len(entries)} chains {verb}"]
        lines += [f"  {path or '(the model itself)'} {entry}" for path, entry in entries]
        lines += [f"  {path or '(the model itself)'}: {why}" for path, why in self.skipped.items()]
        if any(entry.fused_calls or entry.unfused_calls for _, entry in entries):
            lines.append("calls of a compiled model are not counted")
        if self.elsewhere:
            norms, activations, dropouts = map(sum, zip(*self.elsewhere.values(), strict=True))
            names = ", ".join([*self.elsewhere][:_NAMED]) + ", …" * (len(self.elsewhere) > _NAMED)
            lines.append(
                f"{norms} norms, {activations} activations, {dropouts} dropouts are called in the"
                f" forward of other modules ({names}), which fuse_ does not change;"
                ' torch.compile(model, backend="fused") reaches them'
            )
        return printable("\n".join(lines))


def _elsewhere(model: nn.Module) -> dict[str, list[int]]:
    """Class → norms, activations and dropouts of its modules, but for the Sequentials in reach."""
    found: dict[str, list[int]] = {}
    owners, seen = [(model, type(model).__name__)], {model}
    while owners:
        module, owner = owners.pop(0)
        reached = isinstance(module, nn.Sequential) and not convert_reason(module)
        for child in module.children():
            kind = KIND_OF.get(type(child), LINEAR)
            if kind != LINEAR and not reached:
                found.setdefault(owner, [0, 0, 0])[kind - NORM] += 1
            if child not in seen:
                seen.add(child)
                # A list does not call what it holds.
                holder = isinstance(child, nn.ModuleList | nn.ModuleDict)
                owners.append((child, owner if holder else type(child).__name__))
    return found


def fuse_(
    model: nn.Module,
    where: Callable[[str, nn.Module], bool] | None = None,
    dry_run: bool = False,
) -> Report:
    """Turns every nn.Sequential inside a model into `fused.Sequential`, in place.

    Parameters, optimizer state, hooks and state_dict keys stay what they are: only the class of
    each Sequential changes. A subclass that keeps nn.Sequential's forward becomes a class of the
    same name, derived from it and from `fused.Sequential`. Calling it twice changes nothing more.

    Args:
        model: the model; itself converted when it is an nn.Sequential.
        where: takes the path and the Sequential, and says whether to convert it; all where None.
        dry_run: only report.

    Returns:
        A `Report`, which names each chain: fused, or the reason why not.

    Raises:
        TypeError: model is not an nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse_: model must be an nn.Module, got {type(model).__name__}")
    report = Report(dry_run=dry_run, elsewhere=_elsewhere(model))
    for path, module in model.named_modules():
        if not isinstance(module, nn.Sequential):
            continue
        if isinstance(module, Sequential):
            report.modules[path] = module
            continue
        if not any(isinstance(s, Chain) for s in make_steps(tuple(module._modules.items()))):
            continue
        reason = convert_reason(module)
        if reason:
            report.skipped[path] = f"{reason}; left as it is"
            continue
        if where is not None and not where(path, module):
            report.skipped[path] = "left out by `where`"
            continue
        if not dry_run:
            kind: Any = type(module)
            object.__setattr__(module, "__class__", fused_class(kind))
        report.modules[path] = module
    return report


def unfuse_(model: nn.Module) -> nn.Module:
    """Turns what `fuse_` converted, and every other `fused.Sequential`, back, in place.

    Blocks (`LinearNormAct`, `NormAct`) keep their class. Worth doing before a whole model is
    pickled for a machine without this library, or meets code that compares classes exactly.

    Returns:
        The model.

    Raises:
        TypeError: model is not an nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unfuse_: model must be an nn.Module, got {type(model).__name__}")
    for module in model.modules():
        original = original_class(type(module))
        if original is not None:
            module.__dict__.pop("_planned", None)
            object.__setattr__(module, "__class__", original)
    return model
