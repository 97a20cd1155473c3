"""nn.Sequential that runs the chains among its children as one operation each."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import nn

from ..modules.norms import BatchNorm
from .chain import Chain
from .plan import Entry, Plan, Single, make_entry, make_steps

_compiling = torch.compiler.is_dynamo_compiling


class Planned(NamedTuple):
    """The steps, and the children and their classes that they were made for.

    One tuple, because other threads read it; in a copy or a pickle of the module it is None.
    """

    children: list[nn.Module]
    types: list[type]
    steps: list[Chain | Single]

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()


class Sequential(nn.Sequential):
    """nn.Sequential that runs chains of its children as one operation each.

    A chain is a maximal run of Linear, norm (LayerNorm, RMSNorm, BatchNorm, GroupNorm,
    InstanceNorm), activation, dropout in that order, at least two of them. Children stay ordinary
    torch modules: same state_dict, same hooks, same everything; and the result is always
    nn.Sequential's, dropout masks aside. A chain falls back to its children one by one when
    something was done to one of them that a kernel would not see; `plan` says what and why.

    Shape: the children's.

    Example:
        >>> net = Sequential(nn.Linear(784, 512), nn.LayerNorm(512), nn.ReLU(), nn.Dropout(0.2))
        >>> net(torch.randn(4, 784)).shape
        torch.Size([4, 512])
    """

    _planned: Planned | None = None

    def forward(self, input: Any) -> Any:
        planned = None if _compiling() else self._planned
        children = [*self._modules.values()]
        # A child may change its class: lazy modules do, parametrisations too.
        if planned and planned[0] == children and planned[1] == [*map(type, children)]:
            steps = planned[2]
        else:
            steps = self._current_steps()
        for step in steps:
            input = step(input)
        return input

    def _current_steps(self) -> list[Chain | Single]:
        if _compiling():
            # Nothing is kept: checkpointing inside a graph forbids side effects.
            return make_steps(tuple(self._modules.items()))
        planned = self._planned
        children: list[Any] = [*self._modules.values()]
        if planned is None or planned[0] != children or planned[1] != [*map(type, children)]:
            steps = make_steps(tuple(self._modules.items()))
            planned = Planned(children, [*map(type, children)], steps)
            self.__dict__["_planned"] = planned
        return planned[2]

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """As of nn.Module; called by `nn.SyncBatchNorm.convert_sync_batchnorm`, too.

        Raises:
            TypeError: a SyncBatchNorm in the place of a norm that it cannot stand for.
        """
        before = self._modules.get(name)
        if (
            type(module) is nn.SyncBatchNorm
            and isinstance(before, BatchNorm)
            and (before.channel_dim == -1 or before.virtual_batch_size is not None)
        ):
            raise TypeError(
                f"{type(self).__name__}: nn.SyncBatchNorm normalises dimension 1 of a whole batch"
                f" and cannot replace {before}; make that norm, or the block around it, with"
                " process_group=torch.distributed.group.WORLD"
            )
        super().add_module(name, module)

    def plan(self) -> Plan:
        """What runs fused and why the rest does not; print it.

        Returns:
            One `Entry` per step, with the eager calls counted so far; compiled calls are not
            counted. A `fused.Sequential` inside shows its own steps. Without an input it can only
            say what the children themselves allow; an input of another dtype, device or shape makes
            a call fall back too, and the entry's reason then says so.
        """
        return Plan(self._entries(""))

    def _entries(self, prefix: str) -> list[Entry]:
        entries = []
        for step in self._current_steps():
            if isinstance(step, Single) and isinstance(step.child, Sequential):
                entries += step.child._entries(f"{prefix}{step.name}.")
            else:
                entries.append(make_entry(step, prefix))
        return entries

    def __add__(self, other: Any) -> Sequential:
        return Sequential(*super().__add__(other))

    def __mul__(self, other: int) -> Sequential:
        return Sequential(*super().__mul__(other))

    def __prepare_scriptable__(self) -> NoReturn:
        """Called by torch.jit.script, which would put what this returns into the caller's model."""
        raise TypeError(
            f"torch.jit.script cannot read a fused {type(self).__name__}; script the model after "
            "fused.unfuse_(model), with nn.Sequential(*block) for each explicit block, or use "
            "torch.export or torch.jit.trace"
        )
