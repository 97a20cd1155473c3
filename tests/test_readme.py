"""The README's examples run, its commands exist, and its links lead somewhere."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

from fused import backend
from fused.spec import ACTIVATIONS, GATED_ACTIVATIONS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
# Without what the bench report writes.
WRITTEN = re.sub(r"<!-- bench:(\w+) -->.*?<!-- /bench:\1 -->", "", README, flags=re.DOTALL)


def test_the_examples_run() -> None:
    code = "\n".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    if backend.cpu_isa() is None:
        pytest.skip("the extension is not built, so nothing runs fused")
    promised = re.findall(r"# (\[.*)", code)
    assert promised
    for line in promised:
        assert line in printed.getvalue()


def test_its_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    mentioned = set(
        re.findall(r"\bmake ([a-z]+)", "\n".join(re.findall(r"`[^`]*`|^    .*", README, re.M)))
    )
    assert {"demo", "test"} <= mentioned <= targets


def test_every_activation_is_named() -> None:
    (line,) = [line for line in README.splitlines() if line.startswith("| activation |")]
    names = line.split("|")[2].replace(" ", "").split(",")
    assert names == [*ACTIVATIONS, "none"]
    (line,) = [line for line in README.splitlines() if line.startswith("| gated activation |")]
    assert line.split("|")[2].partition("(")[0].replace(" ", "").split(",") == [*GATED_ACTIVATIONS]


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^):]+)\)", README))))
def test_links_lead_somewhere(target: str) -> None:
    assert (ROOT / target).exists()
