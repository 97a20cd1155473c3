"""Pure rules (channels, positions, dtype, architecture) → tiles of the channel kernels.

The number of samples never enters a value that is compiled in: only numbers of programs, and the
choice between kernels, depend on it. "static" figures are as in rules.py.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import triton

from . import tuned
from .rules import (
    INTERPRETER_PROGRAMS,
    PERSISTENT_THREADS_PER_SM,
    Device,
    Tile,
    alignment,
    power_of_two,
    warps_of,
)


class ChannelTile(NamedTuple):
    """Channels and positions of a program's tile, and its warps."""

    units: int
    run: int
    num_warps: int


class GroupTile(NamedTuple):
    """Groups that a program treats together, channels and positions of its tile, and its warps."""

    groups: int
    units: int
    run: int
    num_warps: int


class ChannelKind(NamedTuple):
    """What the rules know of a channel kernel that walks over z.

    Elements of a tile and of a thread; threads that an SM holds at its registers; and the most
    tiles that a program walks over (0: any number, because each program leaves partial sums).
    """

    elements: int
    per_thread: int
    threads: int
    steps: int


# static registers, channels last and planar: moments 100, 63; apply 72, 56; sums 96, 63; gradient
# 80, 50.
KINDS = {
    "moments": ChannelKind(8192, 32, 512, 0),
    "apply": ChannelKind(2048, 16, 1024, 8),
    "sums": ChannelKind(1024, 8, 512, 0),
    "gradient": ChannelKind(1024, 8, 512, 8),
}
# Channels of a channels-last tile: 128 bytes of bf16, so that a warp reads whole lines, and few
# enough that the partial sums (programs x channels of a tile) stay small.
UNITS = 64
# Positions of a planar tile: at most what a warp loads of bf16 with 16 bytes a thread, and at least
# 128 bytes.
RUN = 256
SHORT_RUN = 64


def _near_power_of_two(n: int, limit: int) -> int:
    """The largest power of two up to `limit` in whose multiples n leaves at most 1/6 unused."""
    size = limit
    while size > 1 and triton.cdiv(n, size) * size > n + n // 6:
        size //= 2
    return size


AnyTile = TypeVar("AnyTile", ChannelTile, GroupTile)


def _measured(
    kernel: str, last: bool, parts: tuple[int, ...], tile: AnyTile, device: Device
) -> AnyTile:
    """The tile with the rows and warps that were measured on this GPU, where they were.

    Rows are what does not lie along the contiguous dimension: positions, in planar memory channels.
    parts: what a tile of this shape depends on besides the layout.
    """
    width, rows = (tile.units, tile.run) if last else (tile.run, tile.units)
    key = tuned.key_of(kernel, "last" if last else "planar", *parts, tile.units, tile.run)
    rows, warps = tuned.choose(device.name, key, (rows, tile.num_warps), width)
    if last:
        return tile._replace(run=rows, num_warps=warps)
    return tile._replace(units=rows, num_warps=warps)


@tuned.cached
def walk_tile(
    channels: int, run_limit: int | None, last: bool, align: int, kind: str, device: Device
) -> ChannelTile:
    """Tile of a kernel that walks over z; run_limit as in channel_problem.Walk."""
    elements, per_thread, *_ = KINDS[kind]
    # A thread that reads narrowly has more rows of a planar tile, each with its own coefficients.
    narrow = max(1, per_thread // (4 * align))
    elements, per_thread = elements // narrow, per_thread // narrow
    if last:
        # 16 channels at least: one 16-byte access of bf16 and one Philox call are 8.
        units = power_of_two(channels, UNITS)
        run = elements // units
        if run_limit is not None and run_limit < run:
            run = triton.next_power_of_2(run_limit)
            units = power_of_two(channels, elements // run)
    else:
        assert run_limit is not None
        run = max(SHORT_RUN, _near_power_of_two(run_limit, RUN))
        run = min(run, max(8, triton.next_power_of_2(run_limit)))
        units = min(triton.next_power_of_2(channels), elements // run)
    warps = warps_of(units * run, per_thread, device.warp_size, 1024 // device.warp_size)
    tile = ChannelTile(units, run, warps)
    return _measured(f"channel_{kind}", last, (align,), tile, device)


def walk_chunks(
    tiles: int, blocks: int, tile: ChannelTile, kind: str, device: Device
) -> tuple[int, int]:
    """(programs to share the tiles of a segment and block of channels, tiles of each).

    `blocks` is the number of segments times blocks of channels. As many programs as the GPU holds
    at once; more where a program would walk too far.
    """
    if device.processors == 0:
        chunks = INTERPRETER_PROGRAMS
    else:
        threads, steps = KINDS[kind][2:]
        resident = max(1, threads // (tile.num_warps * device.warp_size))
        chunks = max(1, device.processors * resident // blocks)
        if steps:
            chunks = max(chunks, triton.cdiv(tiles, steps))
    steps = triton.cdiv(tiles, min(chunks, tiles))
    return triton.cdiv(tiles, steps), steps


def merge_tile(width: int, device: Device) -> Tile:
    """Tile of the kernels that merge chunks: groups, and entries (chunks x channels) of each.

    16 groups of one channel are 64 bytes of float32.
    """
    groups = max(1, 16 // triton.next_power_of_2(width))
    return Tile(groups, 1024 // groups, 128 // device.warp_size)


# Elements of a tile that holds whole groups, forward and backward: 16 a thread of 1024 and of 512
# threads. static: 61 and 124 registers where channels lie last, 58 and 99 in planar memory.
HELD_ELEMENTS = (16384, 8192)
DIRECTIONS = ("forward", "backward")
# Elements of a step of the kernels that walk over a group twice: 8 a thread at 16 warps. static: 55
# registers forward, 108 backward.
LOOP_ELEMENTS = 4096
# Bytes of a group that such a program of 512 threads walks over. An SM holds two of them in forward
# and one, with dy as well, in backward: on the 132 SMs of an H100 34 MB of its 50 MB of L2. Larger
# groups are read from memory twice in any case.
LOOP_BYTES = 128 * 1024


def group_tile(
    problem: tuple[int, int, int, int],
    last: bool,
    itemsize: int,
    backward: bool,
    device: Device,
    shortcut: bool = False,
) -> tuple[str, GroupTile | None]:
    """How group or instance norm runs, and on which tiles.

    Args:
        problem: samples, channels, positions, groups.
        shortcut: whether there is one; backward then walks over four tensors, not over two.

    Returns:
        "held" (a tile holds whole groups of a sample: one reading), "loop" (a program walks over
        its group twice), or "split" (a group is shared by programs, or its channels do not make
        whole accesses) and None. The number of samples decides between the last two alone.
    """
    samples, channels, positions, groups = problem
    tile = _held_tile(channels, positions, groups, last, itemsize, backward, device)
    if tile is not None:
        return "held", tile
    width = channels // groups
    if last and width & (width - 1):
        return "split", None
    tile = _loop_tile(channels, positions, groups, last, device)
    programs = samples * triton.cdiv(groups, tile.groups)
    size = width * tile.groups * positions * itemsize * (2 if backward and shortcut else 1)
    # With fewer programs than half the SMs, sharing groups is worth a second reading.
    if size > LOOP_BYTES or programs < device.processors // 2:
        return "split", None
    return "loop", _measured_loop_tile(tile, width, last, backward, device)


@tuned.cached
def _held_tile(
    channels: int,
    positions: int,
    groups: int,
    last: bool,
    itemsize: int,
    backward: bool,
    device: Device,
) -> GroupTile | None:
    width = channels // groups
    limit = HELD_ELEMENTS[backward]
    align = alignment(channels if last else positions, itemsize)
    units = triton.next_power_of_2(width)
    run = triton.next_power_of_2(positions)
    together = 1
    small, per_thread = (1024, 8) if backward else (2048, 16)
    # As in walk_tile.
    narrow = max(1, per_thread // (4 * align))
    small //= narrow
    if last:
        if units != width:
            return None
        # Rows of 128 bytes where there is room, and at least of a sector.
        wide = max(16, 128 // itemsize)
        while units < channels or units < 16:
            if units * run * 2 > limit or (units >= wide and units * run * 2 > small):
                break
            units, together = units * 2, together * 2
        if units < 16:
            return None
    else:
        run = max(8, run)
        while together < groups and units * run * 2 <= small:
            units, together = units * 2, together * 2
    if units * run > limit:
        return None
    most = (512 if backward else 1024) // device.warp_size
    warps = warps_of(units * run, per_thread // narrow, device.warp_size, most)
    # Of whole groups there can be more or fewer, and nothing else.
    of_group = units // together
    parts = ("last" if last else "planar", itemsize, align, width, units, run)
    key = tuned.key_of(f"channel_held_{DIRECTIONS[backward]}", *parts)
    together, warps = tuned.choose(device.name, key, (together, warps), of_group * run)
    return GroupTile(together, together * of_group, run, warps)


@tuned.cached
def _loop_tile(channels: int, positions: int, groups: int, last: bool, device: Device) -> GroupTile:
    width = channels // groups
    elements = LOOP_ELEMENTS
    together = 1
    if last:
        units = min(width, UNITS)
        while units < 16 or (units < UNITS and units < channels):
            units, together = units * 2, together * 2
        run = min(elements // units, triton.next_power_of_2(positions))
    else:
        units = _near_power_of_two(width, elements // RUN)
        run = max(RUN, _near_power_of_two(positions, elements // units))
        run = min(run, max(8, triton.next_power_of_2(positions)))
    warps = warps_of(units * run, 8, device.warp_size, 512 // device.warp_size)
    return GroupTile(together, units, run, warps)


# Asked for the tiles that are used alone: tune.py measures what was asked.
@tuned.cached
def _measured_loop_tile(
    tile: GroupTile, width: int, last: bool, backward: bool, device: Device
) -> GroupTile:
    return _measured(f"channel_loop_{DIRECTIONS[backward]}", last, (width,), tile, device)


def held_programs(samples: int, group_blocks: int, tile: GroupTile, device: Device) -> int:
    """Programs that share the samples of a block of groups in the held backward."""
    if device.processors == 0:
        return min(samples, INTERPRETER_PROGRAMS)
    resident = max(1, PERSISTENT_THREADS_PER_SM // (tile.num_warps * device.warp_size))
    return max(1, min(samples, device.processors * resident // group_blocks))


def register_options(tile: GroupTile, device: Device) -> dict[str, int]:
    """Registers a thread of the held backward may have, at 8 elements a thread; and of the looped
    forward with a shortcut.

    static: left alone, two of 45 binaries stop at 64 and 80 registers by putting a word aside.
    """
    threads = tile.num_warps * device.warp_size
    few = tile.units * tile.run <= 8 * threads
    return {"maxnreg": 128} if device.arch and few else {}


def stages(elements: int, wide: bool) -> int:
    """2 where the next tile can be fetched while one is computed (tuning.backward_stages), else 1.

    `wide`: accesses are of 16 bytes. static, sm_120, 196 bf16 positions: 12 spilled words with 2;
    sm_90, 8192 elements of a held tile at 16 warps: 11 to 13.
    """
    return 2 if wide and elements <= 4096 else 1
