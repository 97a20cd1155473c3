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


def test_the_pages_on_deployment_name_tests_that_exist() -> None:
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    pages = [(ROOT / "docs" / f"{name}.md").read_text() for name in ("deployment", "distributed")]
    for page in pages:
        for file in re.findall(r"tests/\w+\.py", page):
            assert (ROOT / file).exists(), file
        for name in re.findall(r"\btest_\w+\b(?!\.py)", page):
            assert f"def {name}(" in sources, name
    checks = re.findall(r"\| `(\w+)` \|$|\(`(\w+)`\)", pages[1], re.M)
    assert len(checks) >= 10
    for name in ("".join(pair) for pair in checks):
        assert f"def check_{name}(" in sources, name
    code = re.search(r"```python\n(.*?)```", pages[0], re.DOTALL)
    assert code is not None
    exec(compile(code[1], "deployment.md", "exec"), {"__name__": "deployment"})
