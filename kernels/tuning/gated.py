"""Rules for the kernels of gated activations: as rules.py, with two tiles a program.

A tile's columns are those of y; z has as many in either half.
"static" figures are registers a thread and spilled words, as rules.py has them (bf16, SwiGLU,
dropout, sm_90 unless another target is named).
"""

from __future__ import annotations

from functools import cache

from .rules import Device, Tile, power_of_two, warps_of

# Both tiles hold a whole row of z up to twice as many columns, which are those of one tile of
# row/forward.py: static 40 to 48 registers at 32 warps.
FORWARD_TILE_COLS = 8192
# Rows whose column sums fit in a program's registers, by the number of sums. static, at 16 warps:
# 4096 columns hold two (128 registers, 0 spilled words); three, which are 48 registers of sums,
# spill 10 words on sm_100 and 86 on sm_120.
BACKWARD_TILE_COLS = {0: 4096, 1: 4096, 2: 4096, 3: 2048}
# Where rows or addresses do not allow 16-byte accesses. Forward: 8192 columns spill 36 words on
# sm_120. Backward: 4096 spill 25 to 294, and 2048 at 4 elements a thread 11 on sm_100.
NARROW_FORWARD_TILE_COLS = 4096
NARROW_TILE_COLS = 1024
# Rows of at most this many columns share a program, several at a time; without a norm also the
# columns of a part of a row, of which there is then one a tile: parameters are read once.
SHARED_COLS = 1024
# Columns of a step, in each half, of the two kernels that walk along a row.
FORWARD_LOOP_COLS = 4096
SUMS_COLS = 2048


@cache
def forward_tile(cols: int, norm: str | None, device: Device, wide: bool = True) -> Tile:
    """Tile of the forward kernel; `block_n < cols` says that the row has to be looped over.

    `wide`: rows and addresses allow 16-byte accesses.
    """
    limit = FORWARD_TILE_COLS if wide else NARROW_FORWARD_TILE_COLS
    block_n = power_of_two(cols, SHARED_COLS if norm is None else limit)
    block_m = max(1, SHARED_COLS // block_n)
    # 8 elements a thread are a 16-byte load in flight of either half in bf16;
    # static, with a linear bias: 1024 columns without a norm 32 registers, 2048 with 40, 8192 44.
    warps = warps_of(block_m * block_n, 8, device.warp_size, 1024 // device.warp_size)
    return Tile(block_m, block_n, warps)


def forward_options(norm: str | None, device: Device, wide: bool) -> dict[str, int]:
    """Registers a thread of the forward kernels may have: see `backward_options`.

    static: left alone, narrow accesses of 4096 columns stop at 64 and spill two words on sm_100.
    """
    return {} if wide or norm is None or device.arch == 0 else {"maxnreg": 128}


def forward_loop_tile(device: Device) -> Tile:
    """Tile of the looped forward kernel: static 59 registers."""
    return Tile(1, FORWARD_LOOP_COLS, 512 // device.warp_size)


@cache
def backward_tile(
    cols: int, norm: str | None, sums: int, itemsize: int, device: Device, wide: bool = True
) -> Tile:
    """Tile of the persistent backward kernel; `block_n < cols` says that it works by column blocks.

    `wide`: rows and addresses allow 16-byte accesses.
    """
    limit = BACKWARD_TILE_COLS[sums]
    # static: two sums with the gate of tanh-GELU and float32 parameters spill 36 words on sm_100
    # and, with float32 throughout, 40 on sm_90.
    if sums > 1 and (device.arch >= 100 or itemsize == 4):
        limit = min(limit, 2048)
    if not wide:
        limit = min(limit, NARROW_TILE_COLS)
    whole = norm is not None and cols <= limit
    block_n = power_of_two(cols, limit if whole else SHARED_COLS)
    block_m = max(1, SHARED_COLS // block_n)
    # 8 elements a thread in either half, or 4: of float32, where they are 16 bytes, as long as 512
    # threads hold the row; and where accesses are narrow. static, parts of rows of a norm at 8:
    # float32 and two sums 13 spilled words on sm_100, narrow and three sums 25 to 37.
    per_thread = 8 if wide and (itemsize == 2 or block_n > 2048) else 4
    warps = warps_of(block_m * block_n, per_thread, device.warp_size, 512 // device.warp_size)
    return Tile(block_m, block_n, warps)


def backward_stages(norm: str | None) -> int:
    """2 where the next rows are fetched ahead and the bias stays in registers, else 1.

    Under a norm its parameters have no room in registers, and would be fetched ahead as well, again
    and again. A choice by counting: it has not been timed on a GPU.
    """
    return 2 if norm is None else 1


def backward_options(
    tile: Tile, norm: str | None, sums: int, device: Device, wide: bool
) -> dict[str, int]:
    """How many registers a thread of the backward kernel may have, where a norm makes them scarce.

    Left alone the compiler aims at 64, 80, 128 or 168 registers, and spills a word or two in the
    loop to get there; a limit that is said is taken as it is. `wide` as in `backward_tile`.

    static: with 128 registers three sums at 8 elements a thread spill 10 to 74 words under the
    gates of GELU, and 92 under any on sm_120; rows that share a program spill up to 127 with two.
    """
    if norm is None or device.arch == 0:
        return {}
    threads = tile.num_warps * device.warp_size
    crowded = sums == 3 and tile.block_m * tile.block_n == 8 * threads
    if not wide or (crowded and tile.block_m > 1):
        limit = 255
    else:
        limit = 168 if crowded or tile.block_m > 1 else 128
    return {"maxnreg": min(limit, 65536 // threads)}


def sums_tile(device: Device) -> Tile:
    """Tile of the looped kernel that takes the two row sums of a wide backward."""
    return Tile(1, SUMS_COLS, 256 // device.warp_size)


def sums_options(device: Device) -> dict[str, int]:
    """Left alone the compiler aims at 80 registers and spills two words in the loop on sm_120."""
    return {"maxnreg": 128} if device.arch else {}
