"""`python -m fused tune` and the table that it writes, without a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the rules are those of Triton kernels")

from fused.kernels import tuned, tuning

from fused import tune
from fused.__main__ import main

GPU = tuning.Device(132, 32, 90, "Some GPU")
CASE = tune.Case("row_forward", 4096, "layer", torch.bfloat16)


@pytest.fixture(autouse=True)
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "tuning.json"
    monkeypatch.setenv("FUSED_TUNING", str(path))
    tuned.forget()
    yield path
    tuned.forget()


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
    ["", "[]", '{"version": 0}', '{"version": 1, "tiles": {"Some GPU": {"row_forward": [3, 4]}}}'],
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


# ---- the search ----


def fake(fastest: tuple[int, int], *, wrong: bool = False) -> tuple[Callable[[], Any], Any]:
    """A call that asks the rule as a launcher does, and a clock that likes one tile best."""

    def call() -> list[torch.Tensor]:
        tile = forward_tile()
        made.append((tile.block_m, tile.num_warps))
        if tile.num_warps == 4:
            raise RuntimeError("out of registers")
        return [torch.full((3,), 2.0 if wrong and made[-1] == fastest else 1.0)]

    made: list[tuple[int, int]] = []

    def measure(calls: list[Callable[[], Any]]) -> list[list[float]]:
        found = []
        for one in calls:
            one()
            found.append([1.0 if made[-1] == fastest else 2.0] * 3)
        return found

    return call, measure


def test_a_faster_neighbour_is_found() -> None:
    rows, warps = forward_tile().block_m, forward_tile().num_warps
    call, measure = fake((rows, warps * 2))
    assert tune.best_tile(CASE, call, 32, measure) == (
        *(key(), (rows, warps), (rows, warps * 2)),
        2.0,
    )
    assert forward_tile() == tuning.Tile(rows, 4096, warps), "nothing stays behind"


def test_a_tile_that_fails_or_errs_is_left_out() -> None:
    rows, warps = forward_tile().block_m, forward_tile().num_warps
    assert (rows, 4) in tune.neighbours((rows, warps), 4096, 32)
    call, measure = fake((rows, 4))
    assert tune.best_tile(CASE, call, 32, measure)[2] is None
    call, measure = fake((rows, warps * 2), wrong=True)
    assert tune.best_tile(CASE, call, 32, measure)[2] is None


def test_neighbours_are_tiles() -> None:
    for case in tune.cases():
        tile = (
            tuning.forward_tile(case.cols, case.norm, GPU)
            if case.kernel == "row_forward"
            else tuning.backward_tile(case.cols, case.norm, 1, case.dtype.itemsize, GPU)
        )
        found = tune.neighbours((tile.block_m, tile.num_warps), case.cols, 32)
        assert found and (tile.block_m, tile.num_warps) not in found
        for rows, warps in found:
            assert 4 <= rows * case.cols / (warps * 32) <= 64 and warps <= 32


@pytest.mark.parametrize("case", list(tune.cases()), ids=str)
def test_calls_run_the_operators(case: tune.Case) -> None:
    call = tune.make_call(case, "cpu", elements=4 * case.cols)
    assert all(bool(t.isfinite().all()) for t in call())


def test_without_a_gpu_the_command_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], table: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune"]) == 0
    assert "no CUDA device" in capsys.readouterr().out
    assert not table.exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu(table: Path) -> None:
    assert main(["tune", "--max-seconds", "20"]) == 0
    found = json.loads(table.read_text())
    assert list(found["tiles"]) == [torch.cuda.get_device_name()]
    from fused import functional

    functional.norm_act(torch.randn(64, 256, device="cuda"), norm="layer", activation="gelu")
