"""Compiles the channel kernels as channel_tuning.py would launch them, and reads the binaries.

No GPU needed. Asserted: no spilled registers; 16-byte accesses and no narrow ones wherever a row of
memory allows them, in both layouts; no rearrangement between threads in the kernels that only walk.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="compiling Triton kernels needs triton")

import channel_cases
from audit import TARGETS, Binary, Launch, audit, captured
from channel_oracle import LAUNCHERS


@dataclass(frozen=True)
class Case:
    """One call, forward and backward. `wide`: rows of memory are multiples of 16 bytes."""

    norm: str | None
    last: bool
    shape: tuple[int, int, int]  # samples, channels, positions
    dtype: torch.dtype = torch.bfloat16
    activation: str | None = "gelu"
    groups: int = 32
    masked: bool = False
    constant: bool = False
    channel_dropout: bool = False
    wide: bool = True

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        layout = "last" if self.last else "planar"
        return f"{self.norm}-{layout}-{self.activation}-{dtype}-{'x'.join(map(str, self.shape))}"


BATCH = Case("batch", False, (8, 64, 3136))
BATCH_LAST = replace(BATCH, last=True)
HELD_LAST = Case("group", True, (64, 256, 196))
LOOP = Case("group", False, (64, 256, 3136))
EVERYWHERE = [BATCH, BATCH_LAST, HELD_LAST, LOOP]
HOPPER = [
    replace(BATCH, dtype=torch.float32, activation="mish"),
    replace(BATCH_LAST, dtype=torch.float32, activation="mish"),
    replace(BATCH_LAST, masked=True, channel_dropout=True),
    replace(BATCH, norm=None, channel_dropout=True),
    replace(BATCH_LAST, constant=True, activation="relu"),
    replace(HELD_LAST, masked=True, activation="silu"),
    replace(HELD_LAST, shape=(64, 256, 49), dtype=torch.float32),
    replace(HELD_LAST, shape=(4096, 512, 1)),
    Case("group", True, (8, 320, 4096)),
    Case("group", True, (512, 256, 1024), groups=8),
    Case("group", True, (512, 256, 1024), activation="relu", groups=8, masked=True),
    Case("group", True, (8, 320, 4096), activation="relu", masked=True),
    Case("group", False, (8, 320, 4096), torch.float32),
    Case("group", False, (64, 512, 16), groups=1),
    Case("instance", False, (16, 64, 3136)),
    Case("instance", False, (16, 64, 12544)),
    Case("instance", True, (64, 256, 196)),
]
NARROW = [
    Case("batch", False, (64, 512, 49), wide=False),
    Case("group", False, (64, 512, 49), wide=False),
    Case("group", False, (64, 256, 196), wide=False),
    Case("instance", True, (8, 30, 100), wide=False),
]


def launches(case: Case, arch: str) -> list[Launch]:
    samples, channels, positions = case.shape
    epilogue = channel_cases.make_epilogue(
        *(case.norm, case.activation, 0.1, channels, case.groups),
        *(case.last, case.channel_dropout),
    )
    x = channel_cases.make_inputs(
        *(1, channels, 1, case.dtype, case.norm, case.last), constant=case.constant
    )
    shape = (samples, positions, channels) if case.last else case.shape
    x.z, x.dy, x.residual = (torch.empty(shape, dtype=case.dtype) for _ in range(3))
    # Of 16 bits, parameters of a planar tile would be two-byte loads: one number for each row.
    for name in ("norm_weight", "norm_bias", "mean", "variance"):
        value = getattr(x, name)
        setattr(x, name, None if value is None else value.float())
    if case.masked:
        x.mask = torch.ones(samples, positions, dtype=torch.bool)
    with captured(arch) as found, mock.patch.object(channel_cases, "ops", LAUNCHERS):
        channel_cases.run_operator(x, epilogue)
    return found


def check_widths(launch: Launch, binary: Binary, what: str) -> None:
    # The second stages have float32 and their own columns.
    if any(stage in launch.kernel.__name__ for stage in ("finish", "sum_kernel")):
        return
    assert binary.load_widths.get("16", 0) > 0, what
    # A mask has one byte for each position.
    narrow = binary.load_widths.get("2", 0)
    if launch.arguments.get("mask_ptr") is None:
        narrow += binary.load_widths.get("1", 0)
    assert narrow == 0, what
    if launch.arguments.get("y_ptr") is not None or launch.arguments.get("dz_ptr") is not None:
        assert binary.store_widths.get("16", 0) > 0, what
    assert "1" not in binary.store_widths and "2" not in binary.store_widths, what


def check_conversions(launch: Launch, binary: Binary, what: str) -> None:
    """A walk keeps its layout; sums change it on their way to memory, once a program."""
    writes_sums = launch.arguments.get("partial_ptr") is not None
    if launch.kernel.__name__ in ("_channel_apply_kernel", "_channel_bwd_kernel"):
        assert binary.conversions <= (3 if writes_sums else 0), what


def check_all(case: Case, arch: str) -> None:
    found = launches(case, arch)
    assert len(found) >= 3
    for launch in found:
        binary = audit(launch, arch)
        what = f"{launch.kernel.__name__} of {case} on {arch}: {binary}"
        assert binary.spills == 0, what
        if case.wide:
            check_widths(launch, binary, what)
            check_conversions(launch, binary, what)


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("case", EVERYWHERE, ids=str)
def test_every_path_on_every_gpu(case: Case, arch: str) -> None:
    check_all(case, arch)


@pytest.mark.parametrize("case", HOPPER, ids=str)
def test_shapes_and_dtypes_on_sm_90(case: Case) -> None:
    check_all(case, "sm_90")


@pytest.mark.parametrize("case", NARROW, ids=str)
def test_narrow_rows_compile_without_spills(case: Case) -> None:
    check_all(case, "sm_90")


@pytest.mark.parametrize(
    "case, forward, backward",
    [
        (HELD_LAST, "held", "held"),
        (LOOP, "loop", "loop"),
        (Case("group", False, (8, 1280, 256)), "held", "loop"),  # 64 x 256 places
        (Case("instance", False, (16, 64, 12544)), "held", "loop"),
        (Case("instance", False, (2, 16, 2**20)), "split", "split"),  # 2 MB a plane
        (Case("group", False, (1, 64, 16384)), "split", "split"),  # 32 groups, 132 SMs
        (Case("group", True, (8, 320, 4096)), "split", "split"),  # 20 bytes a group and position
        (Case("group", True, (8, 64, 65536)), "split", "split"),
    ],
    ids=str,
)
def test_groups_take_the_way_of_their_size(case: Case, forward: str, backward: str) -> None:
    names = [launch.kernel.__name__ for launch in launches(case, "sm_90")]
    for way, kernel in ((forward, "fwd"), (backward, "bwd")):
        if way == "split":
            assert sum(
                n == f"_channel_{'apply' if kernel == 'fwd' else 'bwd'}_kernel" for n in names
            )
        else:
            assert f"_channel_{way}_{kernel}_kernel" in names


@pytest.mark.parametrize("case", [BATCH, BATCH_LAST, HELD_LAST, LOOP], ids=str)
def test_number_of_samples_does_not_recompile(case: Case) -> None:
    def constants(samples: int) -> list[dict[str, object]]:
        return [
            {p.name: launch.arguments[p.name] for p in launch.kernel.params if p.is_constexpr}
            for launch in launches(replace(case, shape=(samples, *case.shape[1:])), "sm_90")
        ]

    assert constants(40) == constants(97) == constants(1024)
