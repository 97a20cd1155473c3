"""Which chains are worth rewriting."""

from __future__ import annotations

from ..chain.grammar import is_chain
from .chains import Found


def reason(chain: Found, rest: str) -> str:
    """Why a chain is left to what runs the rest; empty where ours is faster.

    Args:
        rest: "inductor" or "eager", what runs the rest of the graph.
    """
    if not is_chain(chain.kinds):
        return "a chain needs two or more of Linear, norm, activation, dropout, in this order"
    return ""
