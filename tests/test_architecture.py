"""The shape of the code: one list of names, one way of imports, files that can be read."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch

from fused import reference
from fused.plan import ReLUSquared, activation_of
from fused.spec import ACTIVATION_CODES, ACTIVATIONS, NORM_CODES

ROOT = Path(__file__).parent.parent
LONGEST = 460  # lines of a source file; around 150 is normal

# Each module may import only those before it.
ORDER = ["spec", "random", "reference", "ops", "backend", "autograd", "dispatch"]
ORDER += ["functional", "plan", "nn", "convert"]


def camel(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_exists_in_every_layer(name: str) -> None:
    assert f"struct {camel(name)} {{" in (ROOT / "csrc/activation.h").read_text()
    assert f'"{name}"' in (ROOT / "kernels/activation.py").read_text()
    h = torch.linspace(-3, 3, 7)
    assert reference.activate(h, name, 1.0, 20.0).shape == h.shape
    module = ACTIVATIONS[name].module
    if module is not None:
        child = module(approximate="tanh") if name == "gelu_tanh" else module()
        found, parameters = activation_of(child)
        assert found == name
        assert parameters == ACTIVATIONS[name].parameters
    else:
        assert activation_of(ReLUSquared())[0] == name


def test_cpp_codes_are_those_of_the_specification() -> None:
    source = (ROOT / "csrc/activation.h").read_text()
    listed = re.findall(r"apply\((\w+)\)", source.split("FUSED_FOR_EACH_ACTIVATION")[1])
    expected = [camel(name) if name else "Identity" for name in ACTIVATION_CODES]
    assert listed == expected
    norms = re.search(r"enum class Norm : int \{(.*?)\}", (ROOT / "csrc/cpu/row.h").read_text())
    assert norms is not None
    found = dict(re.findall(r"(\w+) = (\d+)", norms[1]))
    assert found == {name or "none": str(code) for name, code in NORM_CODES.items()}
    assert f"kActivations = {len(ACTIVATION_CODES)}" in (ROOT / "csrc/cpu/row.h").read_text()


def test_imports_go_one_way() -> None:
    for position, name in enumerate(ORDER):
        tree = ast.parse((ROOT / f"fused/{name}.py").read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                targets = [node.module] if node.module else [a.name for a in node.names]
                for target in targets:
                    first = str(target).split(".")[0]
                    if first == "kernels":
                        assert name in ("ops", "backend"), f"{name} imports the kernels"
                    else:
                        assert ORDER.index(first) < position, f"{name} imports {first}"


def test_kernels_import_nothing_but_the_specification() -> None:
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 2:
                assert node.module in ("spec", "random"), f"{path.name} imports {node.module}"


def test_files_can_be_read() -> None:
    for pattern in ("fused/*.py", "kernels/*.py", "csrc/**/*.h", "csrc/**/*.cpp", "bench/*.py"):
        for path in ROOT.glob(pattern):
            lines = len(path.read_text().splitlines())
            assert lines <= LONGEST, f"{path.relative_to(ROOT)} has {lines} lines"
