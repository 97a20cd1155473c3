"""Pure rules of the GEMM kernels: which tiles there are, and when a kernel takes a Linear's place.

The number of rows never enters a rule, so that a change of the batch compiles nothing. Triton is
not imported here: fused/backends/gemm.py asks before anything is launched.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import tuned


class Kind(NamedTuple):
    """What the rules know of a chain besides its widths."""

    norm: str | None
    dtype: torch.dtype
    precision: str  # of float32 products: "ieee" or "tf32"; "ieee" for other dtypes


class GemmTile(NamedTuple):
    """Rows, columns and inner steps of a program's tile, stages of its pipeline, and its warps.

    `step`: rows that an epilogue by way of memory treats at a time.
    """

    block_m: int
    block_n: int
    block_k: int
    stages: int
    num_warps: int
    step: int = 0


class Rule(NamedTuple):
    """A range of widths where a fused kernel was measured to be the faster way."""

    norm: str | None
    dtype: torch.dtype
    arch: int
    most_cols: int
    most_inner: int


# Of a program: 64 accumulators a thread in a tile of 16384 elements.
THREADS = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Empty, because none has been measured on any GPU: by default the library's GEMM serves every
# Linear, except where `python -m fused tune` found it slower on this machine; FUSED_GEMM=fused asks
# for the kernels.
RULES: tuple[Rule, ...] = ()


def precision(dtype: torch.dtype) -> str:
    """How products are made: "tf32" for float32 where torch's own may be, else "ieee"."""
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if dtype == torch.float32 and tf32 else "ieee"


def is_faster(cols: int, inner: int, kind: Kind, arch: int, gpu: str = "") -> bool:
    """Whether a rule says so, or the table of this machine (tuned.py), by the GPU's name."""
    ruled = any(
        (rule.norm, rule.dtype, rule.arch) == (kind.norm, kind.dtype, arch)
        and cols <= rule.most_cols
        and inner <= rule.most_inner
        for rule in RULES
    )
    return ruled or tuned.linear_is_faster(gpu, key_of(cols, inner, kind))


def has_rules() -> bool:
    """Whether `is_faster` is true of any Linear."""
    return bool(RULES) or tuned.any_linear()


def key_of(cols: int, inner: int, kind: Kind) -> str:
    """The key of a Linear in that table."""
    name = str(kind.dtype).removeprefix("torch.")
    return tuned.key_of("linear", kind.norm, name, kind.precision, cols, inner)


def row_tile(cols: int, kind: Kind, arch: int, warp_size: int) -> GemmTile | None:
    """Tile of the kernel with a row epilogue; None where there is none that does not spill.

    static, with every part of the epilogue, bf16, registers at 64, 128, 256 and 512 columns: sm_80
    102, 174, 178, 255; sm_90 80, 105, 112, 179; sm_120 80, 181, 182, 255; gfx942 148, 204, 217,
    254. 64 x 512 spills 10 words on sm_100, in float32 10 to 18 on sm_80 and sm_120.
    """
    # 64 rows of weight at least, so that each thread copies 16 bytes.
    block_n = max(64, 1 << (cols - 1).bit_length())
    if kind.norm is None:
        block_n = min(block_n, 128)
    half = kind.dtype != torch.float32
    if block_n > (512 if half and not 100 <= arch < 120 else 256):
        return None
    block_m = 128 if block_n <= 128 else 64
    block_k = 32 if block_n == 512 else _block_k(kind)
    # A thread has 16 elements of 2 bytes, or 8 of 4, at a time: two 16-byte loads in flight.
    step = min(block_m, (4096 if half else 2048) // block_n)
    return GemmTile(block_m, block_n, block_k, _stages(kind, arch), THREADS // warp_size, step)


def plain_tile(kind: Kind, arch: int) -> GemmTile | None:
    """Tile of the kernel without a norm by tensor descriptors; None where there are none.

    static, registers of bf16 with every part of the epilogue: sm_90 231, sm_100 204, sm_120 127.
    """
    # Without matrix instructions nothing waits for the copies.
    if arch < 90 or (kind.dtype == torch.float32 and kind.precision != "tf32"):
        return None
    return GemmTile(128, 128, _block_k(kind), 3, 8 if arch >= 120 else 4)


def batch_tile(cols: int, kind: Kind, arch: int, warp_size: int) -> GemmTile:
    """Tile of the kernel with batch norm's statistics.

    static, registers of bf16: sm_80 186, sm_90 179. By TF32 128 x 128 spills on sm_120.
    """
    block_m = 64 if kind.precision == "tf32" else 128
    block_n = min(128, max(64, 1 << (cols - 1).bit_length()))
    warps = THREADS // warp_size
    return GemmTile(block_m, block_n, _block_k(kind), _stages(kind, arch), warps)


def group_tile(width: int, kind: Kind, arch: int, warp_size: int) -> GemmTile | None:
    """Tile of the kernel with group norm, of groups of `width` columns; None where there is none.

    The group's columns must be a power of two (a row of a tile), and whole calls of Philox.
    """
    if width & (width - 1) or not 8 <= width <= 256:
        return None
    return row_tile(max(128, width), kind, arch, warp_size)


def _block_k(kind: Kind) -> int:
    """128 bytes of a row; without TF32 float32 has no matrix instructions, but registers."""
    return 64 if kind.dtype != torch.float32 else 32 if kind.precision == "tf32" else 16


def _stages(kind: Kind, arch: int) -> int:
    """Stages that make two buffers: then two programs of most tiles fit an SM's shared memory, and
    one's epilogue overlaps the other's product.

    Where the matrix instructions read shared memory themselves (sm_90, sm_100) a buffer is a stage;
    elsewhere one stage is in registers.
    """
    reads_memory = 90 <= arch < 120 and (kind.dtype != torch.float32 or kind.precision == "tf32")
    return 2 if reads_memory or not arch else 3
