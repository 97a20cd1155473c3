"""Turning the nn.Sequentials of a model that exists into fused ones, in place, and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from .chain import Chain
from .grammar import LINEAR, NORM
from .guard import KIND_OF
from .plan import Entry, make_entry, make_steps, printable
from .sequential import Sequential

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
        if self.elsewhere:
            norms, activations, dropouts = map(sum, zip(*self.elsewhere.values(), strict=True))
            names = ", ".join([*self.elsewhere][:_NAMED]) + ", …" * (len(self.elsewhere) > _NAMED)
            lines.append(
                f"{norms} norms, {activations} activations, {dropouts} dropouts are called in the"
                f" forward of other modules ({names}), which fuse_ does not change; use"
                " fused.LinearNormAct or fused.NormAct there"
            )
        if any(entry.fused_calls or entry.unfused_calls for _, entry in entries):
            lines.append("calls of a compiled model are not counted")
        return printable("\n".join(lines))


def _elsewhere(model: nn.Module) -> dict[str, list[int]]:
    """Class → norms, activations and dropouts that its modules hold outside nn.Sequentials."""
    found: dict[str, list[int]] = {}
    owners, seen = [(model, type(model).__name__)], {model}
    while owners:
        module, owner = owners.pop(0)
        for child in module.children():
            kind = KIND_OF.get(type(child), LINEAR)
            if kind != LINEAR and not isinstance(module, nn.Sequential):
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
    """Turns every plain nn.Sequential inside a model into `fused.Sequential`, in place.

    Parameters, optimizer state, hooks and state_dict keys stay what they are: only the class of
    each Sequential changes. Calling it twice changes nothing more.

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
        chains = [s for s in make_steps(tuple(module._modules.items())) if isinstance(s, Chain)]
        if type(module) is not nn.Sequential:
            if chains:
                name = type(module).__name__
                own = type(module).forward is not nn.Sequential.forward
                why = " with a forward of its own" if own else "; derive it from fused.Sequential"
                report.skipped[path] = f"{name} is a subclass of nn.Sequential{why}; left as it is"
            continue
        if "forward" in module.__dict__:
            report.skipped[path] = "its forward was replaced; left as it is"
            continue
        if not chains:
            continue
        if where is not None and not where(path, module):
            report.skipped[path] = "left out by `where`"
            continue
        if not dry_run:
            module.__class__ = Sequential
        report.modules[path] = module
    return report


def unfuse_(model: nn.Module) -> nn.Module:
    """Turns every `fused.Sequential` inside a model back into nn.Sequential, in place.

    Blocks (`LinearNormAct`, `NormAct`) keep their class. Worth doing before a whole model is
    pickled for a machine without this library.

    Returns:
        The model.

    Raises:
        TypeError: model is not an nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unfuse_: model must be an nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if type(module) is Sequential:
            module.__dict__.pop("_planned", None)
            module.__class__ = nn.Sequential  # type: ignore[assignment]
    return model
