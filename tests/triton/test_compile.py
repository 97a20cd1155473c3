"""Compiles every row kernel as tuning.py would launch it on five GPUs, and reads the binaries.

No GPU needed. Asserted: no spilled registers; 16-byte accesses wherever addresses and widths allow;
in one-row tiles no rearrangement of data between threads. Cold about two minutes on one core, warm
(Triton's cache and .cache/triton-audit) a few seconds.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="compiling Triton kernels needs triton")

from audit import TARGETS, Binary, Launch, audit, captured
from oracle import ALL, Case, make_inputs, run

from fused.ops import WANT_BIAS, WANT_NORM_BIAS, WANT_NORM_WEIGHT
from fused.spec import ACTIVATIONS

ROWS = 64
BF16 = Case(ROWS, 4096, torch.bfloat16)
FP32 = replace(BF16, dtype=torch.float32)
WANT_NORM = WANT_NORM_WEIGHT | WANT_NORM_BIAS
TWO_SUMS_8192 = replace(BF16, cols=8192, wanted=WANT_NORM)
ONE_SUM_8192 = replace(BF16, cols=8192, wanted=WANT_BIAS)

# Every path of tuning.py: several rows a tile, one row, column sums at full width, row sums and
# column blocks, looped forward. Widths of 1000 test the alignment hint (not divisible by 16).
WIDTHS = [replace(BF16, cols=c, residual=c < 100) for c in (64, 1000, 4096, 16384, 40000)]
EVERYWHERE = [
    *WIDTHS,
    TWO_SUMS_8192,
    ONE_SUM_8192,
    replace(ONE_SUM_8192, dtype=torch.float32),
    replace(BF16, norm=None),
]
HOPPER = [
    *(replace(BF16, activation=a) for a in (None, *ACTIVATIONS) if a != "gelu"),
    *(replace(FP32, cols=c) for c in (64, 1000, 4096, 16384)),
    replace(TWO_SUMS_8192, dtype=torch.float32),
    replace(FP32, activation="mish"),
    replace(BF16, norm="rms"),
    replace(BF16, p=0.0, affine=False, bias=False, wanted=0),
    replace(BF16, parameter_dtype=torch.float32),
]
# Frozen parameters, and a bias that z contains.
WANTED = [
    *(replace(BF16, wanted=wanted) for wanted in range(ALL)),
    *(replace(BF16, cols=8192, wanted=wanted) for wanted in (0, 1, 2, 5, 6)),
    *(replace(BF16, cols=cols, bias=False) for cols in (64, 4096, 8192)),
    replace(TWO_SUMS_8192, bias=False),
    replace(BF16, norm=None, wanted=0),
    replace(BF16, norm=None, bias=False),
]
UNALIGNED = [
    replace(BF16, cols=1025),
    replace(BF16, cols=4100, offset=1),
    replace(FP32, offset=1),
]


def launches(case: Case, arch: str) -> list[Launch]:
    with captured(arch) as found:
        run(case, make_inputs(case))
    assert len(found) >= (3 if case.wanted else 2), "forward, backward, column sums"
    return found


def check_spills(launch: Launch, binary: Binary, arch: str) -> None:
    assert binary.spills == 0, f"{launch.kernel.__name__} on {arch}: {binary}"


def check_widths(launch: Launch, binary: Binary, arch: str) -> None:
    what = f"{launch.kernel.__name__} on {arch}: {binary}"
    assert binary.load_widths.get("16", 0) > 0, what
    if launch.kernel.__name__ not in ("_row_sums_kernel", "_column_sum_kernel"):
        assert binary.store_widths.get("16", 0) > 0, what  # the others store little
    # The first element of each row, and that of the bias, are read by themselves.
    narrow = 0
    if "fwd" in launch.kernel.__name__:
        narrow = 2 + launch.arguments["BLOCK_M"]
    assert binary.load_widths.get("2", 0) + binary.load_widths.get("1", 0) <= narrow, what
    # A program of the second stage stores 64 sums with more threads than that: one number each,
    # side by side: `cols` numbers a launch, against programs x cols loaded 16 bytes at a time.
    if launch.kernel.__name__ != "_column_sum_kernel":
        assert "1" not in binary.store_widths and "2" not in binary.store_widths, what


def check_conversions(launch: Launch, binary: Binary, arch: str) -> None:
    """Layout conversions of one-row tiles.

    The statistics of a row change layout on their way to memory, one number each; the column sums
    change it once a program, after the loop over the rows. Nothing else may: the forward's shared
    memory then holds only the partial sums of its warps. Tiles of several rows are exempt: they
    rearrange one row of parameters for all of their rows.
    """
    name = launch.kernel.__name__
    allowed = {"_row_fwd_kernel": 2, "_row_fwd_loop_kernel": 2, "_row_sums_kernel": 2}
    allowed["_row_bwd_kernel"] = 3
    if launch.arguments["BLOCK_M"] > 1:
        return
    assert binary.conversions <= allowed[name], f"{name} on {arch}: {binary}"
    if name != "_row_bwd_kernel":
        assert binary.shared <= 1024, f"{name} on {arch}: {binary}"


def check_all(case: Case, arch: str, *, aligned: bool = True) -> None:
    for launch in launches(case, arch):
        binary = audit(launch, arch)
        check_spills(launch, binary, arch)
        if aligned:
            check_widths(launch, binary, arch)
            check_conversions(launch, binary, arch)


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("case", EVERYWHERE, ids=lambda c: f"{c}-{c.wanted}")
def test_every_path_on_every_gpu(case: Case, arch: str) -> None:
    check_all(case, arch)


@pytest.mark.parametrize("case", HOPPER, ids=lambda c: f"{c}-{c.parameter_dtype}-{c.p}")
def test_activations_and_dtypes_on_sm_90(case: Case) -> None:
    check_all(case, "sm_90")


@pytest.mark.parametrize("case", WANTED, ids=lambda c: f"{c}-{c.wanted}-{c.bias}")
def test_wanted_sums_on_sm_90(case: Case) -> None:
    check_all(case, "sm_90")


@pytest.mark.parametrize("case", UNALIGNED, ids=str)
def test_unaligned_compiles_without_spills(case: Case) -> None:
    check_all(case, "sm_90", aligned=False)


def test_batch_size_does_not_recompile() -> None:
    """The same constants and pointer types for any number of rows."""

    def constants(rows: int) -> list[dict[str, object]]:
        found = launches(replace(BF16, rows=rows, cols=200), "sm_90")
        return [
            {p.name: launch.arguments[p.name] for p in launch.kernel.params if p.is_constexpr}
            for launch in found
        ]

    assert constants(1) == constants(17) == constants(4096)


def test_the_audit_sees_a_spill() -> None:
    """Regression: a tile that is too wide for its warps has to be reported."""
    launch = launches(replace(FP32, cols=16384), "sm_90")[0]
    crowded = replace(launch, num_warps=4)
    assert audit(crowded, "sm_90").spills > 0
