"""`python -m fused tune`: the search, its cases and the command, without a GPU."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the rules are those of Triton kernels")

from fused.kernels.tuning import channel as channel_tuning
from fused.kernels.tuning import rules as tuning
from fused.kernels.tuning import tuned
from test_tuned import GPU, forward_tile, key

from fused.__main__ import main
from fused.backends import backend
from fused.tools import clock, tune, tune_cases

pytestmark = pytest.mark.usefixtures("table")


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
    expected, (asked,) = tune.tiles_of(call)
    assert asked == (key(), (rows, warps), 4096)
    assert tune.best_tile(asked, call, expected, 32, measure) == ((rows, warps * 2), 2.0)
    assert forward_tile() == tuning.Tile(rows, 4096, warps), "nothing stays behind"


def test_a_tile_that_fails_or_errs_is_left_out() -> None:
    rows, warps = forward_tile().block_m, forward_tile().num_warps
    assert (rows, 4) in tune.neighbours((rows, warps), 4096, 32)
    for call, measure in (fake((rows, 4)), fake((rows, warps * 2), wrong=True)):
        expected, (asked,) = tune.tiles_of(call)
        assert tune.best_tile(asked, call, expected, 32, measure)[0] is None


class Events:
    """torch.cuda's events and graphs on a clock that only replays move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, noise: list[float]) -> None:
        self.now, self.noise, self.timing = 0.0, itertools.cycle(noise), False
        self.made: list[str] = []
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(self))
        monkeypatch.setattr(clock, "capture", self.capture)

    def capture(self, call: Callable[[], Any], times: int = 1) -> Callable[[], None]:
        """Replays take as long as what the call returns while it is captured."""
        assert not self.timing
        (found,) = {call() for _ in range(times)}

        def replay() -> None:
            self.now += times * found * next(self.noise)

        return replay


class Event:
    def __init__(self, events: Events) -> None:
        self.events = events

    def record(self) -> None:
        self.events.timing = not self.events.timing
        self.at = self.events.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


def test_only_replays_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls, and with them `tuned.instead`, are made before the first event."""
    rows, warps = forward_tile().block_m, forward_tile().num_warps
    events = Events(monkeypatch, [1.0])
    timing: list[bool] = []
    instead = tuned.instead
    monkeypatch.setattr(tuned, "instead", lambda t: timing.append(events.timing) or instead(t))

    def call() -> Any:
        tile = forward_tile()
        faster = (tile.block_m, tile.num_warps) == (rows, warps * 2)
        return Time(1.0 if faster else 2.0)

    class Time(float):
        """A time that is also a list of one tensor, as a call's result is."""

        def __iter__(self) -> Any:
            return iter([torch.ones(1)])

    _, (asked,) = tune.tiles_of(call)
    found = tune.best_tile(asked, call, [torch.ones(1)], 32, clock.measure_on_gpu)
    assert found == ((rows, warps * 2), 2.0)
    assert timing and not any(timing)


def test_a_gain_within_the_noise_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert clock.noise_floor([1.0] * 5, [1.0] * 5) == 1.0
    assert clock.noise_floor([1.0, 1.0, 1.0, 1.1, 0.9], [1.0] * 5) == pytest.approx(1 / 0.98)
    rows, warps = forward_tile().block_m, forward_tile().num_warps
    call, liking = fake((rows, warps * 2))
    expected, (asked,) = tune.tiles_of(call)

    def noisy(calls: list[Callable[[], Any]]) -> list[list[float]]:
        times = liking(calls)
        times[0], times[1] = [2.0, 5.0, 2.0, 5.0, 2.0], [5.0, 2.0, 5.0, 2.0, 2.0]
        return [t * 5 if len(t) == 1 else (t + t)[:5] for t in times]

    assert tune.best_tile(asked, call, expected, 32, noisy)[0] is None


class FakeCase:
    """A case whose call asks two rules, of which one was asked by the case before."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def make_call(self, device: str) -> Callable[[], list[torch.Tensor]]:
        def call() -> list[torch.Tensor]:
            for kind in ("moments", self.kind):
                made[kind] = channel_tuning.walk_tile(64, 3136, False, 8, kind, GPU).num_warps
            return [torch.ones(3)]

        return call


made: dict[str, int] = {}  # warps that were used last
# Moments have 8 by the rule, the others 4.
LIKED = {"moments": 16, "apply": 8, "sums": 4}
MOMENTS, APPLY = "channel_moments planar 8 32 256", "channel_apply planar 8 8 256"


def by_liking(calls: list[Callable[[], Any]]) -> list[list[float]]:
    """A clock that likes some numbers of warps."""
    found = []
    for one in calls:
        one()
        found.append([4.0 - sum(made[kind] == LIKED[kind] for kind in made)] * 3)
    return found


def test_every_tile_of_a_case_is_measured_once() -> None:
    made.clear()
    tiles = {APPLY: [16, 16], "channel_sums planar 8 4 256": [8, 8], "another": [1, 1]}
    cases: Any = iter([FakeCase("apply"), FakeCase("sums")])
    assert len(list(tune.tune_tiles(cases, tiles, "cpu", 32, by_liking))) == 3
    assert {key: tile[1] for key, tile in tiles.items()} == {"another": 1, MOMENTS: 16, APPLY: 8}


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU on which a tile takes a second to measure."""
    made.clear()
    seconds = itertools.count()
    for name, value in {
        "is_available": lambda: True,
        "get_device_name": lambda: GPU.name,
        "get_device_properties": lambda index: GPU,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(backend, "why_not", lambda *args: "")
    monkeypatch.setattr(tune.time, "monotonic", lambda: float(next(seconds)))
    monkeypatch.setattr(tune, "measure_on_gpu", by_liking)
    monkeypatch.setattr(tune, "row_cases", lambda: iter([FakeCase("apply"), FakeCase("sums")]))
    monkeypatch.setattr(tune, "channel_cases", lambda: iter([FakeCase("apply")]))
    monkeypatch.setattr(tune, "default_cases", lambda: iter([]))


@pytest.mark.usefixtures("fake_gpu")
def test_the_command_writes_the_table(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    others = {"Another GPU": {"row_forward 256 layer": [1, 1]}}
    tuned.write(table, {**others, GPU.name: {"measured before": [2, 2]}})
    assert main(["tune", "channels"]) == 0
    found = json.loads(table.read_text())["tiles"]
    assert found["Another GPU"] == others["Another GPU"]
    assert set(found[GPU.name]) == {"measured before", MOMENTS, APPLY}
    assert "3 tiles differ from the rules', 0 Linears are faster" in capsys.readouterr().out
    tile = channel_tuning.walk_tile(64, 3136, False, 8, "apply", GPU)
    assert tile.num_warps == 8, "the rules read it at once"


@pytest.mark.usefixtures("fake_gpu")
def test_each_family_has_its_part_of_the_time(
    table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", "--max-seconds", "3"]) == 0
    said = capsys.readouterr().out
    assert "rows stopped by the time limit" in said and "channels stopped" in said
    assert MOMENTS in json.loads(table.read_text())["tiles"][GPU.name], "what was found is kept"


def test_neighbours_are_tiles() -> None:
    for case in tune_cases.row_cases():
        tile = (
            tuning.forward_tile(case.cols, case.norm, GPU)
            if case.direction == "forward"
            else tuning.backward_tile(case.cols, case.norm, 1, case.dtype.itemsize, GPU)
        )
        found = tune.neighbours((tile.block_m, tile.num_warps), case.cols, 32)
        assert found and (tile.block_m, tile.num_warps) not in found
        for rows, warps in found:
            assert 4 <= rows * case.cols / (warps * 32) <= 64 and warps <= 32


CASES = [*tune_cases.row_cases(), *tune_cases.channel_cases()]


def test_calls_run_the_operators() -> None:
    for case in CASES:
        size = case.cols if isinstance(case, tune_cases.RowCase) else case.channels * case.positions
        if size <= 1 << 17:  # the others are as these
            call = case.make_call("cpu", elements=3 * size)
            assert all(bool(t.isfinite().all()) for t in call()), case


def test_the_cases_ask_every_rule() -> None:
    """At the batch that they have on a GPU, where each way of group_tile is taken."""
    kernels = set()
    for case in tune_cases.channel_cases():
        samples = tune_cases.ELEMENTS // (case.channels * case.positions)
        groups = tune_cases.GROUPS if case.norm == "group" else case.channels
        shape = (samples, case.channels, case.positions, groups)
        with tuned.asked() as asked:
            if case.norm != "batch":
                channel_tuning.group_tile(
                    shape, case.last, case.dtype.itemsize, case.direction == "backward", GPU
                )
        kernels |= {one.key.split()[0] for one in asked}
    ways = {f"channel_{way}_{d}" for way in ("held", "loop") for d in tune_cases.DIRECTIONS}
    assert kernels == ways


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
    linear = ["--linear", "128,256,bfloat16,layer"]
    assert main(["tune", *tune.FAMILIES, *linear, "--max-seconds", "60"]) == 0
    found = json.loads(table.read_text())
    assert list(found["tiles"]) == list(found["linear"]) == [torch.cuda.get_device_name()]
    from fused import functional

    functional.norm_act(torch.randn(64, 256, device="cuda"), norm="layer", activation="gelu")
