"""Every Triton kernel on every target, held to the gates of bench/audit/gates.py; no GPU needed.

Cold, the report takes some minutes on two cores; what .cache/audit has is not compiled again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="compiling Triton kernels needs triton")

from bench.audit import __main__ as command
from bench.audit import exceptions, gates, measure
from bench.audit.covering import covering, pairs_of, possible_pairs
from bench.audit.families import FAMILIES
from bench.audit.family import Family
from bench.audit.measure import Planned, audit
from bench.audit.report import Report
from bench.audit.table import markdown, markdown_of_exceptions
from bench.audit.targets import TARGETS

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def report() -> Report:
    return audit()


def each_kernel_once(plan: Iterable[Planned]) -> Iterator[Planned]:
    """One binary of each kernel, for one target after the other."""
    binaries: dict[str, dict[str, Planned]] = {}
    for entry in plan:
        _, job, launch, _ = entry
        binaries.setdefault(launch.name, {}).setdefault(job.case["target"], entry)
    for number, of_target in enumerate(binaries.values()):
        yield [*of_target.values()][number % len(of_target)]


def test_a_sample_passes_the_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "sampled", each_kernel_once)
    found = audit(processes=1, sample=True)
    assert {m.target for m in found.binaries} == set(TARGETS)
    for name in ("compiles", "spills", "widths", "conversions", "matrix"):
        complaints = gates.GATES[name](found)
        assert not complaints, "\n".join(complaints)


@pytest.mark.full
@pytest.mark.parametrize("gate", gates.GATES)
def test_gate_is_open(report: Report, gate: str) -> None:
    complaints = gates.GATES[gate](report)
    assert not complaints, "\n".join(complaints)


@pytest.mark.full
def test_instruction_counts_are_those_of_the_committed_report(report: Report) -> None:
    baseline = command.committed()
    skipped = gates.why_skipped(report, baseline)
    if skipped is not None:
        pytest.skip(skipped)
    assert baseline is not None
    complaints = gates.instructions(report, baseline)
    assert not complaints, "\n".join(complaints)


@pytest.mark.full
def test_every_kernel_is_compiled_for_every_target(report: Report) -> None:
    kernels = set()
    for path in (ROOT / "kernels").rglob("*.py"):
        kernels |= set(re.findall(r"^def (_\w+_kernel)\(", path.read_text(), re.M))
    assert kernels
    found = {(m.kernel, m.target) for m in report.binaries}
    assert found == {
        (kernel, target)
        for kernel in kernels
        for target in exceptions.ONLY_ON.get(kernel, (TARGETS,))[0]
    }
    headlines = {(m.kernel, m.target) for m in report.binaries if m.headline}
    # group_sum is that of the groups that programs share, which is no headline.
    assert found - headlines <= {("_channel_group_sum_kernel", target) for target in TARGETS}


@pytest.mark.full
def test_every_binary_has_a_name_of_its_own(report: Report) -> None:
    assert len({m.key for m in report.binaries}) == len(report.binaries)


@pytest.mark.full
def test_every_kernel_is_interpreted(report: Report) -> None:
    found = {s.kernel for s in report.streams}
    assert found == {m.kernel for m in report.binaries} - set(exceptions.ONLY_ON)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_every_pair_of_properties_meets(family: Family) -> None:
    properties = dict(family.properties) | {"target": list(TARGETS)}
    cases = family.cases()
    met = {pair for case in cases for pair in pairs_of(case, list(properties))}
    assert met >= set(possible_pairs(properties, family.excluded))
    assert not any(family.excluded(case) for case in cases)
    assert len({family.label(case) + case["target"] for case in cases}) == len(cases)


def test_covering_leaves_out_what_cannot_be() -> None:
    def excluded(case: dict[str, object]) -> bool:
        return case.get("a") == 1 and case.get("b") == "x"

    cases = covering({"a": (1, 2), "b": ("x", "y"), "c": (True, False)}, [], excluded)
    assert not any(excluded(case) for case in cases)
    met = {(case["a"], case["b"]) for case in cases}
    assert met == {(1, "y"), (2, "x"), (2, "y")}
    assert len(cases) < 7


def test_the_document_has_the_tables_of_the_committed_report() -> None:
    committed, document = command.committed(), command.DOCUMENT.read_text()
    assert committed is not None
    assert markdown(committed) in document
    assert markdown_of_exceptions() in document


@pytest.mark.full
def test_a_report_is_read_as_it_was_written(report: Report, tmp_path: Path) -> None:
    report.write(tmp_path / "report.json")
    assert Report.read(tmp_path / "report.json") == report


@pytest.mark.full
def test_the_exit_status_is_that_of_the_gates(
    report: Report,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(command, "audit", lambda *_, **__: report)
    given = ["--out", str(tmp_path)]
    assert command.main(given) == 0
    assert (tmp_path / "audit.json").exists() and (tmp_path / "audit.png").exists()
    printed = capsys.readouterr().out
    assert "ESTIMATED" in printed and "row_fwd " in printed

    def closed(report: Report) -> list[str]:
        return ["something is wrong"]

    replaced: dict[str, Callable[[Report], list[str]]] = gates.GATES | {"spills": closed}
    monkeypatch.setattr(command, "GATES", replaced)
    assert command.main(given) == 1
    assert "something is wrong" in capsys.readouterr().out
    monkeypatch.setattr(command, "publish", lambda report: pytest.fail("published"))
    assert command.main([*given, "--accept"]) == 1
