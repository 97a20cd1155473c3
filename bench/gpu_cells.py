"""What the GPU suites measure; sizes that a GPU is filled by.

The cells that tell most come first: gpu_pass.sh stops a suite after some minutes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

from .cells import CPU_SUITES, DTYPES, Cell, P
from .cells import is_quick as is_quick_on_cpu

# Columns of the rows suite; each tensor has ROW_ELEMENTS elements, 128 MiB of bfloat16 and more
# than any GPU's cache.
ROW_COLS = tuple(256 << i for i in range(10))  # to 131072
ROW_ELEMENTS = 1 << 26
GATED_COLS = (1024, 4096, 16384)  # of the result; the input has twice as many
# (M, K, N) of the blocks suite.
BLOCK_SIZES = (
    *((4096, 1024, 1024), (65536, 256, 256), (16384, 4096, 4096), (65536, 64, 256)),
    *((256, 8192, 8192), (4096, 8192, 8192), (65536, 1024, 1024), (16384, 1024, 4096)),
    *((16384, 4096, 1024), (256, 1024, 1024), (65536, 512, 512), (65536, 64, 64)),
)
BLOCK_NORMS = (("layer", "gelu"), ("rms", "silu"), ("batch", "relu"), ("group", "silu"))
# Three blocks and a last Linear, all of N features: (M, K, N).
MLP_SIZES = ((4096, 1024, 1024), (65536, 256, 256), (256, 4096, 4096))
# Images as they are in residual networks, in diffusion models' U-Nets and in style transfer.
IMAGES = (
    *(("batch", (64, 64, 112, 112)), ("batch", (64, 256, 56, 56)), ("batch", (64, 2048, 7, 7))),
    *(("group", (16, 320, 64, 64)), ("group", (16, 1280, 16, 16)), ("group", (2, 64, 1024, 1024))),
    *(("instance", (8, 64, 256, 256)), ("instance", (16, 256, 64, 64))),
)
DECIDING_IMAGES = (IMAGES[1], IMAGES[3])


def row_cells() -> Iterator[Cell]:
    """Norm + activation + dropout along rows: bandwidth by the number of columns."""
    pairs = (("layer", "gelu", P), ("rms", "silu", 0.0))
    for (norm, activation, p), dtype, cols in product(pairs, DTYPES[::-1], ROW_COLS):
        chain = "N-A-D" if p else "N-A"
        size = (ROW_ELEMENTS // cols, 0, cols)
        for mode in ("forward", "training"):
            yield Cell("rows", chain, norm, activation, dtype, *size, p, mode)
    for (norm, chain), cols in product((("", "A-D"), ("rms", "N-A-D")), GATED_COLS):
        size = (ROW_ELEMENTS // (2 * cols), 0, cols)
        for mode in ("forward", "training"):
            yield Cell("rows", chain, norm, "swiglu", "bfloat16", *size, P, mode)


def block_cells() -> Iterator[Cell]:
    """A training step of Linear + norm + activation + dropout, and of a network of three."""
    for size, (norm, activation) in product(BLOCK_SIZES, BLOCK_NORMS):
        yield Cell("blocks", "L-N-A-D", norm, activation, "bfloat16", *size, P, "training")
    for size, (norm, activation) in product(MLP_SIZES, BLOCK_NORMS[:3]):
        yield Cell("blocks", "3 L-N-A-D", norm, activation, "bfloat16", *size, P, "training")
    for size in BLOCK_SIZES[:4]:
        yield Cell("blocks", "L-N-A-D", "layer", "gelu", "float32", *size, P, "training")
    for (M, K, width), norm in product(BLOCK_SIZES[:4], ("", "rms")):
        chain = "L-N-A-D" if norm else "L-A-D"
        yield Cell("blocks", chain, norm, "swiglu", "bfloat16", M, K, width // 2, P, "training")


def image_cells() -> Iterator[Cell]:
    """Norms over samples or positions, on images in both layouts."""
    for (norm, sizes), layout, dtype in product(IMAGES, ("channels-last", ""), DTYPES[::-1]):
        shape, channels = "×".join(map(str, sizes)), sizes[1]
        size = (math.prod(sizes) // channels, 0, channels)
        activation = "silu" if norm == "group" else "relu"
        for p, mode in ((0.0, "training"), (P, "training"), (0.0, "forward")):
            chain = "N-A-D" if p else "N-A"
            yield Cell("images", chain, norm, activation, dtype, *size, p, mode, shape, layout)


def peer_cells() -> Iterator[Cell]:
    """The norm alone, which is what other libraries fuse."""
    for norm, cols in product(("layer", "rms"), ROW_COLS[:8]):
        size = (ROW_ELEMENTS // cols, 0, cols)
        yield Cell("peers", "N", norm, "", "bfloat16", *size, 0.0, "training")


GPU_SUITES = {
    "rows": row_cells,
    "blocks": block_cells,
    "images": image_cells,
    "peers": peer_cells,
}
SUITES = CPU_SUITES | GPU_SUITES


def is_quick(cell: Cell) -> bool:
    """Whether --quick measures it: the sizes that decide, few enough for a minute."""
    if cell.suite in CPU_SUITES:
        return is_quick_on_cpu(cell)
    if cell.suite == "blocks":
        decides = (cell.M, cell.K, cell.N) in BLOCK_SIZES[:2] and cell.norm in ("layer", "batch")
        return decides and cell.blocks == 1 and cell.dtype == "bfloat16"
    if cell.suite == "images":
        decides = (cell.norm, cell.sizes) in DECIDING_IMAGES and cell.layout != ""
        return decides and cell.dtype == "bfloat16" and not cell.p
    return cell.N == 4096 and cell.dtype == "bfloat16"
