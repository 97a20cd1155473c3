"""What the gates let pass, each with its reason. Everything else is held to the rule.

A new kernel needs no entry here as long as it keeps the rules.
"""

from __future__ import annotations

from typing import NamedTuple


class Allowed(NamedTuple):
    """A limit, and why it is not the rule's."""

    limit: float
    reason: str


# ---- readings of a tensor in one launch; the rule is 1.00. All are served by L1 or L2. ----
_WALKS_TWICE = "the group or row is walked over twice; the second walk finds it in L2"
_READ_BACK = (
    "the program that writes a tile of z reads it back from L2, a few rows at a time: in registers"
    " the tile would spill; with a norm also the first element of each row"
)
_FIRST = Allowed(
    1.01, "layer norm takes differences from the first element of a row: once more, from L1"
)
_TWICE_AND_FIRST = Allowed(2.01, f"{_WALKS_TWICE}; and the first element of each row")
READINGS: dict[tuple[str, str], Allowed] = {
    ("_row_fwd_kernel", "z_ptr"): _FIRST,
    ("_row_fwd_loop_kernel", "z_ptr"): _TWICE_AND_FIRST,
    ("_gated_fwd_kernel", "z_ptr"): _FIRST,
    ("_gated_fwd_loop_kernel", "z_ptr"): _TWICE_AND_FIRST,
    ("_channel_moments_kernel", "z_ptr"): Allowed(
        1.3, "each program takes differences from the mean of its first tile: once more, from L1"
    ),
    ("_channel_finish_kernel", "partial_ptr"): Allowed(
        2.0, "a mean, then squares of differences from it; the chunks' sums are in L1"
    ),
    ("_channel_loop_fwd_kernel", "z_ptr"): Allowed(
        2.5, f"{_WALKS_TWICE}; and the first tile, for a value near the mean"
    ),
    ("_channel_loop_bwd_kernel", "z_ptr"): Allowed(2.0, _WALKS_TWICE),
    ("_channel_loop_bwd_kernel", "dy_ptr"): Allowed(2.0, _WALKS_TWICE),
    ("_channel_loop_bwd_kernel", "dshortcut_ptr"): Allowed(
        2.0, "the first walk writes it, and the second finds it in L2, in place of dy"
    ),
    ("_gemm_row_kernel", "z_ptr"): Allowed(2.02, _READ_BACK),
    ("_gemm_group_kernel", "z_ptr"): Allowed(2.13, _READ_BACK),
}

# ---- DRAM bytes of a whole call over the least; the rule is 1.00 ----
_STATISTICS_FIRST = (
    "statistics need all of a segment before its first output, and a segment is too large for a"
    " program: one kernel for the sums, one for the result"
)
_FORWARD, _BACKWARD = Allowed(4 / 3, _STATISTICS_FIRST), Allowed(5 / 3, _STATISTICS_FIRST)
# The shortcut and its gradient are two more tensors, and the second kernel needs neither dy nor it.
_BACKWARD_MORE = Allowed(7 / 5, _STATISTICS_FIRST)
_MEANS_FIRST = "a row and its column sums do not fit into registers: one kernel for the row's means"
CALLS: dict[str, Allowed] = {
    "row backward: wide": Allowed(5 / 3, _MEANS_FIRST),
    "gated backward: wide": Allowed(8 / 5, _MEANS_FIRST),
    "row backward with shortcut: wide": Allowed(7 / 5, _MEANS_FIRST),
    "add & norm forward: wide": Allowed(
        5 / 3, "the kernel of the sum, then that of its norm, which finds it in L2"
    ),
    "add & norm backward: wide": Allowed(5 / 3, _MEANS_FIRST),
    "channel forward: batch, planar": _FORWARD,
    "channel forward: batch, channels last": _FORWARD,
    "channel forward: group split, channels last": _FORWARD,
    "channel backward: batch, planar": _BACKWARD,
    "channel backward: batch, channels last": _BACKWARD,
    "channel backward: group split, channels last": _BACKWARD,
    "channel forward with shortcut: batch, planar": _FORWARD,
    "channel forward with shortcut: batch, channels last": _FORWARD,
    "channel forward with shortcut: group split, channels last": _FORWARD,
    "channel backward with shortcut: batch, planar": _BACKWARD_MORE,
    "channel backward with shortcut: batch, channels last": _BACKWARD_MORE,
    "channel backward with shortcut: group split, channels last": _BACKWARD_MORE,
    "linear forward: batch": Allowed(
        3 / 2, f"{_STATISTICS_FIRST}; that of the sums is the product itself"
    ),
}

# ---- rearrangements of data between threads in kernels of one row a tile; the rule is 0 ----
_STATISTICS = "the two numbers of a row change layout on their way to memory"
CONVERSIONS: dict[str, Allowed] = {
    "_row_fwd_kernel": Allowed(2, _STATISTICS),
    "_row_fwd_loop_kernel": Allowed(2, _STATISTICS),
    "_row_sums_kernel": Allowed(2, _STATISTICS),
    "_row_bwd_kernel": Allowed(3, "column sums change layout once a program, after its loop"),
    "_gated_fwd_kernel": Allowed(2, _STATISTICS),
    "_gated_fwd_loop_kernel": Allowed(2, _STATISTICS),
    "_gated_sums_kernel": Allowed(2, _STATISTICS),
    "_gated_bwd_kernel": Allowed(
        6, "column sums of either half change layout once a program, after its loop"
    ),
}
# The same for kernels that walk over z in tiles of several rows: where they leave partial sums.
WALKS: dict[str, Allowed] = {
    "_channel_apply_kernel": Allowed(0, "nothing is summed"),
    "_channel_bwd_kernel": Allowed(3, "sums change layout once a program, after its loop"),
}
# Shared memory of one-row kernels that add up along the row: the partial sums of the warps. The
# others need it for the conversion above, or fetch rows ahead into it.
ROW_SHARED = 1024
MORE_SHARED = ("_row_bwd_kernel", "_gated_bwd_kernel")

# ---- registers put aside (accesses and bytes of stack) by version of Triton; the rule is 0 ----
SPILLS_OF_VERSION: dict[str, Allowed] = {
    "3.6.0": Allowed(
        10, "its ptxas puts one word aside in 4 of 716 binaries, in two of them in a loop"
    ),
}

# ---- accesses narrower than 4 bytes ----
# Loads, once a program. Besides, layer norm takes the first element of each row of a tile.
_FEW = "16-bit parameters of a row that has fewer of them than the tile has threads, once a program"
NARROW_LOADS: dict[str, Allowed] = {
    "_row_bwd_kernel": Allowed(3, f"{_FEW}; in tiles of several rows alone"),
    "_channel_bwd_kernel": Allowed(2, _FEW),
    "_gemm_row_kernel": Allowed(5, _FEW),
    "_gemm_group_kernel": Allowed(2, _FEW),
}
FIRST_ELEMENTS = ("_row_fwd_kernel", "_row_fwd_loop_kernel")
FIRST_ELEMENTS += ("_gated_fwd_kernel", "_gated_fwd_loop_kernel")
NARROW_STORES: dict[str, str] = {
    "_column_sum_kernel": "64 sums a program and more threads than that: one number each, side by"
    " side; cols numbers a launch against programs x cols loaded 16 bytes at a time",
}

# ---- kernels that not all targets have; the rules take others there and in the interpreter ----
ONLY_ON: dict[str, tuple[tuple[str, ...], str]] = {
    "_gemm_tma_kernel": (("sm_90", "sm_100", "sm_120"), "tensor descriptors in hardware"),
}
