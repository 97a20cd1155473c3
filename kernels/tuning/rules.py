"""Pure rules (cols, dtype, architecture) → tile sizes, warps and number of programs.

The batch never enters a value that is compiled in: only `programs`, a grid size, depends on it. No
autotuning: a row kernel's best tile follows from its width, and a search costs seconds per shape.
`python -m fused tune` searches once, and writes what it finds to a table (tuned.py).
"static" figures are registers a thread (65536 per SM: 128 at 512 threads, 64 at 1024) and spilled
words, read from sm_90 binaries (triton 3.7.1, bf16, GELU, dropout) by bench/audit.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from . import tuned

# One tile holds a whole row up to here. 32768 columns spill with a linear bias (static: 124 to 685
# spilled words at 16 or 32 warps), and the looped kernel finds such a row in L2 the second time.
FORWARD_TILE_COLS = 16384
# Rows whose column sums fit in a program's registers, by the number of sums (norm_weight,
# norm_bias, bias): 8192 columns at 16 warps hold two (static: 128 registers, 0 spilled words; with
# a third 72 to 80).
BACKWARD_TILE_COLS = {0: 8192, 1: 8192, 2: 8192, 3: 4096}
# Rows of at most this many columns share a program, several at a time.
SHARED_COLS = 1024
# Columns of a step of the two kernels that walk along a row.
FORWARD_LOOP_COLS = 8192
ROW_SUMS_COLS = 4096
# Enough resident persistent programs to fill an SM at 128 registers a thread (65536 / 128).
PERSISTENT_THREADS_PER_SM = 512


class Tile(NamedTuple):
    """Rows and columns of a program's tile, and its warps (of 32 threads; AMD's have 64)."""

    block_m: int
    block_n: int
    num_warps: int


class Device(NamedTuple):
    """What the rules need to know of a GPU: its SMs, threads of a warp, and 90 for sm_90.

    `arch` is 0 where inline PTX cannot be used: AMD and the interpreter.
    """

    processors: int
    warp_size: int
    arch: int
    name: str = ""  # by which tiles are found that were measured (tuned.py)


# Two persistent programs make the interpreter run the second stage as well.
INTERPRETER = Device(processors=0, warp_size=32, arch=0)
INTERPRETER_PROGRAMS = 2


def device(z: Tensor) -> Device:
    """The device of a tensor."""
    return gpu(z.get_device()) if z.is_cuda else INTERPRETER


_CURRENT: AbstractContextManager[object] = nullcontext()


def device_of(z: Tensor) -> AbstractContextManager[object]:
    """Makes a tensor's GPU the current one; where it is that already, nothing is entered."""
    if not z.is_cuda or z.get_device() == torch.cuda.current_device():
        return _CURRENT
    return torch.cuda.device_of(z)


@cache
def gpu(index: int) -> Device:
    """The GPU of this number."""
    properties = torch.cuda.get_device_properties(index)
    plain = torch.version.hip is not None or triton.knobs.runtime.interpret
    arch = 0 if plain else properties.major * 10 + properties.minor
    return Device(properties.multi_processor_count, properties.warp_size, arch, properties.name)


def programs(row_tiles: int, col_blocks: int, tile: Tile, device: Device) -> int:
    """Persistent programs of one block of columns: together what the GPU holds at once."""
    if device.processors == 0:
        return min(row_tiles, INTERPRETER_PROGRAMS)
    per_processor = max(1, PERSISTENT_THREADS_PER_SM // (tile.num_warps * device.warp_size))
    return max(1, min(row_tiles, device.processors * per_processor // col_blocks))


def power_of_two(cols: int, limit: int) -> int:
    # 16 columns at least: one 16-byte access of bf16 and one Philox call are 8.
    return min(max(triton.next_power_of_2(cols), 16), limit)


def warps_of(elements: int, per_thread: int, width: int, limit: int) -> int:
    return max(1, min(limit, elements // (per_thread * width)))


@tuned.cached
def forward_tile(cols: int, norm: str | None, device: Device, crowded: bool = False) -> Tile:
    """Tile of the forward kernel; `block_n < cols` says that the row has to be looped over.

    `crowded`: there is a shortcut, and accesses are narrow. static: at 16384 columns of float32 it
    puts 4 words aside on sm_100.
    """
    if norm is None:
        block_n = power_of_two(cols, SHARED_COLS)
    else:
        block_n = power_of_two(cols, FORWARD_TILE_COLS // (2 if crowded else 1))
    block_m = max(1, 2048 // block_n)
    # 16 elements a thread are two 16-byte loads in flight of bf16;
    # static, with a linear bias: 1024 columns 47 registers, 4096 48, 8192 63, 16384 60.
    warps = warps_of(block_m * block_n, 16, device.warp_size, 1024 // device.warp_size)
    key = tuned.key_of("row_forward", block_n, norm)
    block_m, warps = tuned.choose(device.name, key, (block_m, warps), block_n)
    return Tile(block_m, block_n, warps)


def forward_loop_tile(device: Device) -> Tile:
    """Tile of the looped forward kernel: static 64 registers."""
    return Tile(1, FORWARD_LOOP_COLS, 512 // device.warp_size)


@tuned.cached
def backward_tile(
    cols: int, norm: str | None, sums: int, itemsize: int, device: Device, wide: bool = True
) -> Tile:
    """Tile of the persistent backward kernel; `block_n < cols` says that it works by column blocks.

    `wide`: rows and addresses allow 16-byte accesses.

    static, three sums, 8 elements a thread: 1024 and 4096 columns 104 registers.
    """
    limit = BACKWARD_TILE_COLS[sums]
    # static: at 8192 columns sm_100 and sm_120 spill where sm_90 does not: 12 to 22 words with two
    # sums, and in float32 22 to 48 with one.
    if device.arch >= 100 and sums > (1 if itemsize == 2 else 0):
        limit = 4096
    # static: narrow accesses at 8192 columns spill 10 to 273 words on NVIDIA's targets, even
    # where nothing is summed; at 4096 none.
    if not wide:
        limit = min(limit, 4096)
    whole = norm is not None and cols <= limit
    block_n = power_of_two(cols, limit if whole else SHARED_COLS)
    block_m = max(1, 1024 // block_n)
    warps = warps_of(block_m * block_n, 8, device.warp_size, 512 // device.warp_size)
    key = tuned.key_of("row_backward", block_n, norm, sums, itemsize)
    block_m, warps = tuned.choose(device.name, key, (block_m, warps), block_n)
    return Tile(block_m, block_n, warps)


def backward_stages(tile: Tile) -> int:
    """2 where the next rows can be fetched ahead (8 elements a thread), else 1.

    16 bytes of dy and of z a thread at 512 threads an SM are 16 KB in flight, and only
    while a program waits; the rule of thumb for an H100 is 32 KB. Fetching ahead keeps them in
    flight during the arithmetic. A choice by counting: it has not been timed on a GPU.
    """
    return 2 if tile.block_n <= 4096 else 1


def row_sums_tile(device: Device) -> Tile:
    """Tile of the looped kernel that takes the two row sums of a wide backward."""
    return Tile(1, ROW_SUMS_COLS, 256 // device.warp_size)


def column_sum_tile(device: Device) -> Tile:
    """Tile of the second stage: 64 columns are two 128-byte lines of float32."""
    return Tile(32, 64, 128 // device.warp_size)


def alignment(cols: int, itemsize: int, *strides: int) -> int:
    """Largest power of two (elements, at most 16 bytes) that divides cols and every stride.

    Triton's own specialisation tests divisibility by 16 elements only, so that 1000 columns of
    bf16 would be read two bytes at a time; the kernels take this number as a hint instead. Base
    addresses need no hint: Triton tests them for 16 bytes, and falls back to narrow accesses.
    """
    align = 16 // itemsize
    while align > 1 and any(n % align for n in (cols, *strides)):
        align //= 2
    return align
