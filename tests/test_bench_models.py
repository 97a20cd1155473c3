"""The benchmark of whole models: what it writes, with small models and torch's own backends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODELS

pytestmark = pytest.mark.usefixtures("bench_harness", "one_thread")


def wrong(graph: Any, _: Any) -> Callable[..., Any]:
    """A backend whose outputs are off."""
    return lambda *given: tuple(y * 1.1 for y in graph(*given))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The suite with a small model, backends that compile nothing, and one that is wrong."""
    from bench import models

    backends = {"eager": None, "compile": "eager", "fused": "eager", "fused_eager": wrong}
    monkeypatch.setattr(models, "PROVIDERS", backends)
    only = {"mlp-layer": (MODELS["mlp layer"], 0.1)}
    monkeypatch.setattr(models, "MODELS", only)
    monkeypatch.setattr(models, "KNOWN", only)
    monkeypatch.setattr(models, "warm_up_compiler", lambda: None)
    return models


def test_a_run_writes_rows(small: Any, tmp_path: Path) -> None:
    from bench import results
    from bench.__main__ import main

    run = ["models", "--threads", "1", "--seconds", "0", "--out", str(tmp_path)]
    assert main(run) == 1
    assert main([*run, "--providers", "eager"]) == 0
    rows = results.read(tmp_path / "models.csv", small.ModelRow)
    cases = [("training", 0.1), ("training", 0.0), ("inference", 0.0)]
    assert [(r.mode, r.dropout, r.provider) for r in rows] == [
        (*case, provider) for case in cases for provider in small.PROVIDERS
    ]
    for r in rows:
        if r.provider == "eager":
            assert r.over_fused == "", "the second run, which had no other, replaces the first"
            continue
        compared = not (r.mode == "training" and r.dropout)
        if r.provider == "fused_eager" and compared:
            assert r.refused.startswith("differs from eager torch by")
            assert r.median_ms == r.over_fused == ""
            continue
        assert 0 < r.p20_ms <= r.median_ms <= r.p80_ms and r.rounds >= 7 and not r.refused
        assert (r.difference == "") == (not compared)
        assert r.over_fused == 1 if r.provider == "fused" else r.over_fused > 0
        assert r.commit and r.torch == torch.__version__ and r.threads == 1


def test_a_backend_that_raises_has_a_row_that_says_so(small: Any) -> None:
    from bench.machine import this_machine

    small.PROVIDERS["fused"] = "no such backend"
    chosen = ["eager", "fused"]
    rows = small.measure_model("mlp-layer", 0.0, True, chosen, 0.0, this_machine("cpu"))
    assert [bool(r.refused) for r in rows] == [False, True]
    assert "no such backend" in rows[1].refused


def test_unknown_models_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    from bench.__main__ import main

    with pytest.raises(SystemExit):
        main(["models", "--models", "bert,alexnet"])
    assert "unknown model alexnet; known: mlp-layer" in capsys.readouterr().err


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_report(small: Any, tmp_path: Path) -> None:
    from bench import model_tables, results
    from bench.machine import this_machine

    rows = small.measure_model("mlp-layer", 0.1, True, ["eager"], 0.0, this_machine("cpu"))
    ratios = {"eager": (1.5, 0.9), "compile": (2.0, 1.25), "fused": (1, 0.5), "fused_eager": (2, 1)}
    found = [
        replace(rows[0], provider=name, over_fused=a, over_fused_eager=b)
        for name, (a, b) in ratios.items()
    ]
    lost = replace(found[0], mode="inference", dropout=0.0, provider="fused", refused="no")
    results.write(tmp_path / "models.csv", [*found, lost], small.ModelRow)
    text = model_tables.report(tmp_path, tmp_path)
    assert "| training, own dropout | 1 | `fused` | 1 | 1.50 | 1.50 | none |" in text
    assert (
        "| training, own dropout | 1 | `fused_eager` | 1 | 0.90 | 0.90 | mlp-layer (0.90)" in text
    )
    assert "1.50 / 2.00 | 0.90 / 1.25 ▼" in text
    assert "- mlp-layer, inference, dropout 0, `fused`: no" in text
    assert (tmp_path / "docs/images/models.png").stat().st_size > 10_000
