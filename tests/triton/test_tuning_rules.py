"""Which kernels the tuning rules choose, and that no batch size is compiled in."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton", reason="the tuning rules are those of Triton kernels")

from bench.audit import channel_family, gated_family, row_family, shortcut_family
from bench.audit.channel_family import Scene
from bench.audit.family import Family
from bench.audit.launch import Launch
from bench.audit.measure import launches_of

ROW = (row_family.FORWARD, row_family.BACKWARD)
GATED = (gated_family.FORWARD, gated_family.BACKWARD)
SHORTCUT = tuple(shortcut_family.FAMILIES)  # row and channel kernels, forward and backward
CHANNEL = (channel_family.FORWARD, channel_family.BACKWARD)


def launches(family: Family, **different: Any) -> list[Launch]:
    return launches_of(family, family.ordinary | {"target": "sm_90"} | different)


def constants(family: Family, **different: Any) -> list[tuple[object, ...]]:
    """What is compiled in: constants, types and what Triton makes of integers within packs."""
    sources = [launch.source() for launch in launches(family, **different)]
    return [(s.constants, s.signature, s.attrs) for s in sources]


@pytest.mark.parametrize("family", ROW + GATED + SHORTCUT[:2], ids=lambda f: f.name)
@pytest.mark.parametrize("width", [200, 4096, 9000])
def test_number_of_rows_does_not_recompile(family: Family, width: int) -> None:
    one, some, many = (constants(family, width=width, rows=rows) for rows in (1, 17, 4096))
    assert one == some == many


@pytest.mark.parametrize("fit, whole", [("even", True), ("odd", False), ("offset", False)])
def test_narrow_accesses_take_half_as_wide_a_tile(fit: str, whole: bool) -> None:
    """Regression: at 8192 columns they spilled up to 273 words."""
    names = [launch.name for launch in launches(ROW[1], width=8192, fit=fit, wanted=3)]
    assert ("_row_sums_kernel" not in names) == whole


@pytest.mark.parametrize("fit, whole", [("even", True), ("odd", False), ("offset", False)])
def test_narrow_accesses_with_a_shortcut_walk_over_the_widest_rows(fit: str, whole: bool) -> None:
    """Regression: at 16384 columns of float32 they spilled 4 words on sm_100."""
    (launch,) = launches(SHORTCUT[0], width=16384, fit=fit, dtype="fp32")
    assert (launch.name == "_row_fwd_kernel") == whole


@pytest.mark.parametrize("family", GATED, ids=lambda f: f.name)
@pytest.mark.parametrize("half, align", [(1000, 8), (1004, 4), (1002, 2), (1001, 1)])
def test_the_gate_is_as_aligned_as_half_a_row(family: Family, half: int, align: int) -> None:
    """1004 columns: rows of z are whole 16-byte units of bf16, and the gate begins between two."""
    gated = [launch for launch in launches(family, width=half) if "gated" in launch.name]
    assert gated
    assert all(launch.values["ALIGN"] == align for launch in gated)


@pytest.mark.parametrize(
    "wanted, width, whole",
    [(7, 2048, True), (7, 2049, False), (3, 4096, True), (3, 4097, False), (0, 4096, True)],
)
def test_gated_rows_are_whole_where_their_sums_fit(wanted: int, width: int, whole: bool) -> None:
    """Regression: three sums of 4096 columns spilled up to 132 words on sm_120."""
    for norm in ("layer", "rms"):
        names = [
            launch.name for launch in launches(GATED[1], width=width, wanted=wanted, norm=norm)
        ]
        assert ("_gated_sums_kernel" not in names) == whole


@pytest.mark.parametrize("fit", ["odd", "offset"])
def test_narrow_accesses_of_gated_rows_are_fewer_a_thread(fit: str) -> None:
    """Regression: at eight elements a thread and half, parts of rows spilled up to 37 words."""
    (launch,) = (la for la in launches(GATED[1], width=16384, fit=fit) if "bwd" in la.name)
    assert launch.tile == 4 * 32 * launch.options["num_warps"]


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a scene and returns its name."""

    def make(*given: Any) -> str:
        monkeypatch.setitem(channel_family._EVERY_SCENE, "here", Scene(*given))
        return "here"

    return make


@pytest.mark.parametrize("family", CHANNEL + SHORTCUT[2:], ids=lambda f: f.name)
@pytest.mark.parametrize("name", list(channel_family.SCENES)[:4])
def test_number_of_samples_does_not_recompile(family: Family, name: str, scene: Any) -> None:
    of = channel_family.SCENES[name]
    some, more, many = (
        constants(family, scene=scene(*of._replace(samples=samples))) for samples in (40, 97, 1024)
    )
    assert some == more == many


@pytest.mark.parametrize(
    "given, forward, backward",
    [
        (channel_family.SCENES["group held last"], "held", "held"),
        (channel_family.SCENES["group loop planar"], "loop", "loop"),
        (Scene("group", False, 8, 1280, 256), "held", "loop"),  # 64 x 256 places
        (Scene("instance", False, 16, 64, 12544), "held", "loop"),
        (Scene("instance", False, 2, 16, 2**20), "split", "split"),  # 2 MB a plane
        (Scene("group", False, 1, 64, 16384), "split", "split"),  # 32 groups, 132 SMs
        (Scene("group", True, 8, 320, 4096), "split", "split"),  # 20 bytes a group and position
        (Scene("group", True, 8, 64, 65536), "split", "split"),
    ],
    ids=str,
)
def test_groups_take_the_way_of_their_size(
    given: Scene, forward: str, backward: str, scene: Any
) -> None:
    name = scene(*given)
    for family, way, kernel in zip(CHANNEL, (forward, backward), ("fwd", "bwd"), strict=True):
        names = [launch.name for launch in launches(family, scene=name)]
        if way == "split":
            assert f"_channel_{'apply' if kernel == 'fwd' else 'bwd'}_kernel" in names
        else:
            assert f"_channel_{way}_{kernel}_kernel" in names


@pytest.mark.parametrize("positions, way", [(3136, "loop"), (6272, "split")])
def test_a_shortcut_leaves_a_loop_half_of_its_room(positions: int, way: str, scene: Any) -> None:
    """Backward four tensors of a group go through L2 between its two walks, not two."""
    name = scene("group", False, 64, 256, positions)
    plain, shortcut = (
        [launch.name for launch in launches(family, scene=name)]
        for family in (channel_family.BACKWARD, shortcut_family.CHANNEL_BACKWARD)
    )
    assert plain[0] == "_channel_loop_bwd_kernel"
    kernel = "_channel_bwd_kernel" if way == "split" else "_channel_loop_bwd_kernel"
    assert shortcut[0] == kernel
