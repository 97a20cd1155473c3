"""Which combinations of properties are compiled: every pair of values meets in some case.

The whole product of norms, activations, dtypes, widths, ... has tens of thousands of members. A
mistake of a kernel or a compiler nearly always shows under one or two properties together (this
activation at that width, this dtype on that target), so the cases are chosen such that every value
of a property meets every value of every other one. The choice is greedy, without chance: the same
cases every time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

Case = dict[str, Any]
Pair = tuple[str, Any, str, Any]


def pairs_of(case: Mapping[str, Any], order: Sequence[str]) -> list[Pair]:
    """The pairs of values that meet in a case."""
    return [(a, case[a], b, case[b]) for a, b in combinations(order, 2) if a in case and b in case]


def possible_pairs(
    properties: Mapping[str, Sequence[Any]], excluded: Callable[[Case], bool]
) -> list[Pair]:
    """Every pair that a case could have."""
    return [
        (a, x, b, y)
        for a, b in combinations(properties, 2)
        for x in properties[a]
        for y in properties[b]
        if not excluded({a: x, b: y})
    ]


def covering(
    properties: Mapping[str, Sequence[Any]],
    start: Iterable[Mapping[str, Any]],
    excluded: Callable[[Case], bool],
) -> list[Case]:
    """The cases of `start`, and as many more as it takes until every possible pair has met.

    Args:
        properties: the values of each, the most ordinary one first.
        excluded: whether a case, which may lack properties, cannot be.
    """
    order = list(properties)
    cases = [dict(case) for case in start]
    missing = dict.fromkeys(possible_pairs(properties, excluded))
    for case in cases:
        for pair in pairs_of(case, order):
            missing.pop(pair, None)
    while missing:
        a, x, b, y = next(iter(missing))
        case: Case | None = {a: x, b: y}
        for name in order:
            case = None if case is None else _extended(case, name, properties, missing, excluded)
        if case is None:
            del missing[(a, x, b, y)]  # no whole case has this pair
            continue
        cases.append({name: case[name] for name in order})
        for pair in pairs_of(case, order):
            missing.pop(pair, None)
    return cases


def _extended(
    case: Case,
    name: str,
    properties: Mapping[str, Sequence[Any]],
    missing: Mapping[Pair, None],
    excluded: Callable[[Case], bool],
) -> Case | None:
    """The case with that value of one more property which brings most missing pairs; or None."""
    if name in case:
        return case
    order = list(properties)
    best, most = None, -1
    for value in properties[name]:
        candidate = case | {name: value}
        if excluded(candidate):
            continue
        found = sum(pair in missing for pair in pairs_of(candidate, order))
        if found > most:
            best, most = candidate, found
    return best
