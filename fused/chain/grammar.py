"""What a chain is: Linear, norm, activation, dropout and, where there is one, what is added.

Each at most once and in this order, at least two of them; what is added may also stand between norm
and activation (a shortcut). Or Linear, dropout, what is added, and then the norm of the sum (add &
norm). chain/plan.py reads the children of a Sequential by it, graph/chains.py the calls of a graph.
"""

from __future__ import annotations

from collections.abc import Sequence

LINEAR, NORM, ACTIVATION, DROPOUT, RESIDUAL = range(5)
NO_PART = -1
SHORTEST = 2


def extends(kinds: Sequence[int], kind: int) -> bool:
    """Whether a part of this kind may come next; `kinds` are those of the chain so far."""
    if kind == NORM and kinds and kinds[-1] == RESIDUAL:
        return {*kinds} <= {LINEAR, DROPOUT, RESIDUAL}
    if kind == ACTIVATION and is_behind_norm(kinds):
        return True
    return kind > (kinds[-1] if kinds else NO_PART) and not is_add_norm(kinds)


def is_add_norm(kinds: Sequence[int]) -> bool:
    """Whether the norm is that of the sum."""
    return tuple(kinds[-2:]) == (RESIDUAL, NORM)


def is_behind_norm(kinds: Sequence[int]) -> bool:
    """Whether the last part is added to a norm's result."""
    return tuple(kinds[-2:]) == (NORM, RESIDUAL)


def is_chain(kinds: Sequence[int]) -> bool:
    """Whether these parts are worth one operation."""
    # A Linear and what is added to it leave nothing to a kernel.
    return len(kinds) >= SHORTEST and tuple(kinds) != (LINEAR, RESIDUAL)
