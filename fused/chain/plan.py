"""Which children of a Sequential form a chain, and what `plan` prints about each step.

A chain is a maximal run of Linear, norm, activation, dropout in that order, at least two of them.
Its structure is found once per list of children; whether it may run as one operation is decided at
every call (chain.py).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .chain import Chain
from .channel_chain import ChannelChain, is_channel_chain
from .grammar import NO_PART, extends, is_chain
from .guard import KIND_OF


def printable(text: str) -> str:
    """The text as the terminal can show it: on one without arrows, → becomes ->."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return text.replace("→", "->")
    return text


@dataclass
class Single:
    """A child that runs by itself because it is not part of a chain."""

    name: str
    child: nn.Module

    def __call__(self, x: Any) -> Any:
        return self.child(x)


def make_steps(named: Sequence[tuple[str, nn.Module]]) -> list[Chain | Single]:
    """Splits children into maximal chains and single children."""
    steps: list[Chain | Single] = []
    start = 0
    while start < len(named):
        end = start
        kinds: list[int] = []
        while end < len(named):
            kind = KIND_OF.get(type(named[end][1]), NO_PART)
            if not extends(kinds, kind):
                break
            kinds.append(kind)
            end += 1
        if is_chain(kinds):
            names = [name for name, _ in named[start:end]]
            children = [child for _, child in named[start:end]]
            make = ChannelChain if is_channel_chain(children) else Chain
            steps.append(make(names, children))
        else:
            end = start + 1
            steps.append(Single(*named[start]))
        start = end
    return steps


@dataclass(frozen=True)
class Entry:
    """One step of a plan.

    Args:
        names: the children's names.
        chain: what they form ("linear → layer → gelu"), or the class of a single child.
        fused: whether they would run as one operation now, as far as can be known without an input.
        reason: why not; else why the last call, if it was unfused, was; else empty.
        fused_calls, unfused_calls: calls so far. Those of a compiled model are not counted: the
            compiler keeps the operators, not the code that counts.
    """

    names: tuple[str, ...]
    chain: str
    fused: bool
    reason: str
    fused_calls: int
    unfused_calls: int

    def __str__(self) -> str:
        state = "fused" if self.fused else "not fused"
        reason = "" if self.fused else f": {self.reason}"
        calls = last = ""
        if self.fused_calls or self.unfused_calls:
            calls = f"; {self.fused_calls} calls fused, {self.unfused_calls} not"
        if not self.fused and self.fused_calls:
            state += " now"
        if self.fused and self.reason:
            last = f"; the last call was not: {self.reason}"
        names = ", ".join(self.names)
        return printable(f"[{names}] {self.chain}: {state}{reason}{calls}{last}")


class Plan(list[Entry]):
    """The steps of a `fused.Sequential`, printable."""

    def __str__(self) -> str:
        return "\n".join(map(str, self))


def make_entry(step: Chain | Single, prefix: str = "") -> Entry:
    """What one step would do now; `prefix` is that of the children's names."""
    if isinstance(step, Single):
        why = "not part of a chain of Linear, norm, activation, dropout"
        if type(step.child) in KIND_OF:
            why = "a chain needs two or more of Linear, norm, activation, dropout, in this order"
        return Entry((prefix + step.name,), type(step.child).__name__, False, why, 0, 0)
    stopped = step.own_reason()
    return Entry(
        tuple(prefix + name for name in step.names),
        step.describe(),
        not stopped,
        stopped or step.reason,
        step.fused_calls,
        step.unfused_calls,
    )
