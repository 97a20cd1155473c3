"""The table that `python -m fused tune` writes, and the rules that read it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="the rules are those of Triton kernels")

from fused.kernels.tuning import channel as channel_tuning
from fused.kernels.tuning import rules as tuning
from fused.kernels.tuning import tuned

pytestmark = pytest.mark.usefixtures("table")
GPU = tuning.Device(132, 32, 90, "Some GPU")


def forward_tile(cols: int = 4096, device: tuning.Device = GPU) -> tuning.Tile:
    return tuning.forward_tile(cols, "layer", device)


def key(cols: int = 4096) -> str:
    return tuned.key_of("row_forward", cols, "layer")


def test_the_rules_read_the_table(table: Path) -> None:
    rule = forward_tile()
    tuned.write(table, {GPU.name: {key(): [2, 16]}})
    assert forward_tile() == rule, "read once"
    tuned.forget()
    assert forward_tile() == tuning.Tile(2, 4096, 16)
    assert forward_tile(3000) == tuning.Tile(2, 4096, 16), "all widths of a tile"
    assert forward_tile(2048).block_n == 2048
    assert forward_tile(device=GPU._replace(name="Another")) == rule
    assert forward_tile(device=GPU._replace(name="")) == rule


def test_backward_has_keys_of_its_own(table: Path) -> None:
    own = tuned.key_of("row_backward", 1024, "rms", 1, 2)
    tuned.write(table, {GPU.name: {own: [2, 2]}})
    assert tuning.backward_tile(1000, "rms", 1, 2, GPU) == tuning.Tile(2, 1024, 2)
    assert tuning.backward_tile(1000, "rms", 1, 4, GPU) != tuning.Tile(2, 1024, 2)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"version": 0}',
        '{"version": 1, "tiles": {"Some GPU": {"row_forward": [3, 4]}}}',
        '{"version": 1, "linear": {"Some GPU": {"linear layer": 0.9}}}',
    ],
)
def test_a_broken_table_is_said_once_and_not_used(table: Path, content: str) -> None:
    rule = forward_tile()
    table.write_text(content)
    tuned.forget()
    with pytest.warns(UserWarning, match="is not used .*run 'python -m fused tune'"):
        assert forward_tile() == rule
    assert forward_tile(512).block_n == 512, "no second warning, which would be an error here"


def test_the_table_can_be_turned_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FUSED_TUNING", "0")
    assert tuned.table_path() is None
    monkeypatch.delenv("FUSED_TUNING")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuned.table_path() == tmp_path / "fused" / "tuning.json"

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert tuned.table_path() is None, "importing the package reads the table"


# Case → the kernel that is asked, and how its tile is got again.
CHANNEL_TILES: dict[str, Callable[[], Any]] = {
    "channel_moments last 8 64 128": lambda: channel_tuning.walk_tile(
        200, None, True, 8, "moments", GPU
    ),
    "channel_apply planar 8 8 256": lambda: channel_tuning.walk_tile(
        64, 3136, False, 8, "apply", GPU
    ),
    "channel_held_forward planar 2 1 16 16 64": lambda: channel_tuning.group_tile(
        (1000, 512, 49, 32), False, 2, False, GPU
    )[1],
    "channel_loop_backward last 8 64 64": lambda: channel_tuning.group_tile(
        (1000, 256, 784, 32), True, 2, True, GPU
    )[1],
}


@pytest.mark.parametrize("name", CHANNEL_TILES)
def test_the_channel_rules_read_the_table(name: str, table: Path) -> None:
    with tuned.asked() as asked:
        rule = CHANNEL_TILES[name]()
    (one,) = asked
    assert one.key == name
    rows, warps = one.tile
    assert rows * one.width == rule.units * rule.run and warps == rule.num_warps
    tuned.write(table, {GPU.name: {name: [rows * 2, warps * 2]}})
    tuned.forget()
    found = CHANNEL_TILES[name]()
    assert (found.units * found.run, found.num_warps) == (rule.units * rule.run * 2, warps * 2)
    # What lies along the contiguous dimension stays, and groups stay whole.
    if "held" in name:
        assert found == rule._replace(
            groups=rule.groups * 2, units=rule.units * 2, num_warps=warps * 2
        )
    elif "last" in name:
        assert found.units == rule.units
    else:
        assert found.run == rule.run


def test_channel_keys_never_have_the_batch() -> None:
    """Nor whether the samples are one walk; what is asked follows from channels and positions."""
    for last in (False, True):
        keys = set()
        for samples in (64, 1000, 4096):
            with tuned.asked() as asked:
                channel_tuning.group_tile((samples, 256, 784, 32), last, 2, False, GPU)
            keys.add(tuple(one.key for one in asked))
        assert len(keys) == 1 and keys != {()}


@pytest.mark.parametrize("kind", ["missing", "a folder"])
def test_a_table_that_was_asked_for_and_cannot_be_read_is_said_once(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mine.json" if kind == "missing" else tmp_path
    monkeypatch.setenv("FUSED_TUNING", str(path))
    tuned.forget()
    with pytest.warns(UserWarning, match=f"{path} of FUSED_TUNING is not used") as said:
        tuned._table()
        tuned._table()
    assert len(said) == 1
    tuned.forget()
