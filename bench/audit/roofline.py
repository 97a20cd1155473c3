"""Where a kernel stands between arithmetic and memory: an estimate, never a measurement.

    headroom = elements a second that the instructions allow / elements a second that memory allows

Both by a GPU's data sheet (targets.py): issue slots over instructions an element, and bandwidth
over bytes an element. What a GPU reaches of either in practice, about nine tenths, is taken to be
the same share of both. Below 1 arithmetic is the bound, far above 1 memory is.

Counted: issue slots, and the pipe of special functions. Not counted: other pipes, latency,
occupancy, L2, launches, tails, and that loads may wait for each other. It ranks variants of a
kernel and shows regressions; it does not tell a speed.
"""

from __future__ import annotations

from .report import Measured
from .targets import TARGETS


def slots_per_element(measured: Measured) -> float | None:
    """Issue slots that an element takes on the measured target, or None (report.py says when)."""
    instructions = measured.instructions_per_element
    if instructions is None:
        return None
    special = measured.binary.special / measured.per_thread
    return max(instructions, special * TARGETS[measured.target].special)


def headroom(measured: Measured) -> float | None:
    """How far above what memory allows the instructions are; None where there is no estimate."""
    slots = slots_per_element(measured)
    if not slots or not measured.element_bytes:
        return None
    gpu = TARGETS[measured.target]
    return (gpu.issue / slots) / (gpu.bandwidth / measured.element_bytes)
