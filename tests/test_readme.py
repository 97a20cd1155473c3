"""The README's examples run and its commands exist; what the pages list is complete."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

from fused.backends import backend
from fused.spec import ACTIVATIONS, GATED_ACTIVATIONS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKS = [
    (page, link)
    for page in PAGES
    for link in sorted(set(re.findall(r"\]\(([^):]+)\)", page.read_text())))
]


def table_of(page: str, first: str) -> list[list[str]]:
    """The lines of the table whose first column has this heading, as cells."""
    text = (ROOT / "docs" / page).read_text()
    body = re.search(rf"^\| {first} \|.*\n\|[-| ]+\n((?:\|.*\n)+)", text, re.M)
    assert body is not None, first
    return [line.strip("|\n").split("|") for line in body[1].splitlines()]


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


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
    lines = (ROOT / "docs" / "what-is-fused.md").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("| activation |")]
    names = line.split("|")[2].replace(" ", "").split(",")
    assert names == [*ACTIVATIONS, "none"]
    (line,) = [line for line in lines if line.startswith("| gated activation |")]
    assert line.split("|")[2].partition("(")[0].replace(" ", "").split(",") == [*GATED_ACTIVATIONS]


def test_every_variable_is_in_the_table() -> None:
    rows = table_of("configuration.md", "variable")
    assert all(len(row) == 5 and all(cell.strip() for cell in row) for row in rows)
    listed = set(re.findall(r"`(\w+)`", "\n".join(row[0] for row in rows)))
    # In Python each FUSED_ name is a variable, but for macros that the build passes on by -D.
    python = [ROOT / "setup.py", *(ROOT / "fused").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    python += [*(ROOT / "bench").rglob("*.py")]
    named = {n for p in python for n in re.findall(r"(?<!-D)\bFUSED_[A-Z_]+", p.read_text())}
    named |= set(re.findall(r'environ(?:\.get\(|\[)"(\w+)"', (ROOT / "setup.py").read_text()))
    for path in (ROOT / "csrc").rglob("*.*"):
        named |= set(re.findall(r'getenv\("(\w+)"', path.read_text()))
    assert len(named) > 10
    assert named <= listed
    assert {name for name in listed if name.startswith("FUSED_")} <= named


def test_the_readme_leads_to_every_page() -> None:
    linked = {link for page, link in LINKS if page.name == "README.md"}
    assert {f"docs/{page.name}" for page in PAGES[2:]} <= linked


@pytest.mark.parametrize("page, link", LINKS, ids=lambda given: getattr(given, "name", given))
def test_links_lead_somewhere(page: Path, link: str) -> None:
    name, _, heading = link.partition("#")
    target = page.parent / name if name else page
    assert target.exists()
    if heading:
        headings = re.findall(r"^#+ (.*)", target.read_text(), re.M)
        assert heading in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]


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
