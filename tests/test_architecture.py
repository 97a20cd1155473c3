"""The shape of the code: one list of names, one way of imports, files that can be read."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fused.chain.guard import ReLUSquared, activation_of
from fused.run import reference
from fused.spec import (
    ACTIVATION_CODES,
    ACTIVATIONS,
    FIRST_GATED,
    GATED_ACTIVATIONS,
    GATED_CODES,
    NORM_CODES,
)

ROOT = Path(__file__).parent.parent
LONGEST = 300  # lines of a source file; around 150 is normal
SOURCES = ("fused/**/*.py", "kernels/**/*.py", "bench/**/*.py", "csrc/**/*.h", "csrc/**/*.cpp")
SOURCES += ("csrc/**/*.cu", "csrc/**/*.cuh", "tests/cuda/*.py", "tests/cuda/emulation/*.h")
SOURCES += ("setup.py",)
# What may be longer, and why.
LONGER: dict[str, tuple[int, str]] = {"setup.py": (330, "pip runs it by itself")}

# The rooms of fused/ ("": the public modules) and what is in them, in order: a module may import
# only modules before it, so no room imports a later one.
ROOMS: list[tuple[str, str]] = [
    ("", "spec"),
    ("backends", "location launchers schemas extension ops cuda_library cuda_row cuda_channel"),
    ("backends", "cuda_channel_backward first_kernel backend gemm"),
    ("run", "random layout reference moments synchronize recording double_backward autograd"),
    ("run", "autocast running checks by_torch rows gate channels prepare add_norm"),
    ("modules", "jagged gated norms"),
    ("chain", "grammar guard stages chain channel_chain plan sequential subclass block build"),
    ("chain", "convert add_norm"),
    ("graph", "forms memory written gates chains call policy rewrite doors"),
    ("", "sublayers functional nn"),
    ("extras", "progress scaler foldable fold ensemble"),
    ("tools", "selftest doctor clock tune_cases tune_linear tune steps comparison compare explain"),
    ("", "__main__"),
]
ORDER = [f"{room}.{name}".lstrip(".") for room, names in ROOMS for name in names.split()]


def relative_imports(path: Path) -> Iterator[str]:
    """The modules of the package that a module imports, wherever in it: run.rows, kernels.row."""
    own = path.parent.relative_to(ROOT / "fused").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*own[: len(own) + 1 - node.level], *(node.module or "").split(".")]
            base = [part for part in base if part]
            module = ".".join(base)
            if module in ORDER or base[:1] == ["kernels"]:
                yield module
            else:
                names = [alias.name for alias in node.names]
                # The package's own version, which it has before any import.
                yield from (".".join([*base, name]) for name in names if name != "__version__")
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names]
            assert not any(str(n).split(".")[0] == "fused" for n in names), "import it relatively"


def camel(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_exists_in_every_layer(name: str) -> None:
    assert f"struct {camel(name)} {{" in (ROOT / "csrc/activation.h").read_text()
    assert f'"{name}"' in (ROOT / "kernels/parts/activation.py").read_text()
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
    source = source.split("define FUSED_FOR_EACH_ACTIVATION")[1].partition("\n\n")[0]
    listed = re.findall(r"apply\((\w+)\)", source)
    expected = [camel(name) if name else "Identity" for name in ACTIVATION_CODES]
    assert listed == expected
    codes = (ROOT / "csrc/cpu/codes.h").read_text()
    norms = re.search(r"enum class Norm : int \{(.*?)\}", codes)
    assert norms is not None
    found = dict(re.findall(r"(\w+) = (\d+)", norms[1]))
    assert found == {name or "none": str(code) for name, code in NORM_CODES.items()}
    assert f"kActivations = {len(ACTIVATION_CODES)}" in codes
    assert f"kGelu = {ACTIVATION_CODES['gelu']}, kSilu = {ACTIVATION_CODES['silu']}" in codes


def test_cpp_gates_are_those_of_the_specification() -> None:
    source = (ROOT / "csrc/activation.h").read_text()
    listed = re.findall(r"apply\((\w+)\)", source.split("define FUSED_FOR_EACH_GATE")[1])
    assert listed == [camel(gated.gate) for gated in GATED_ACTIVATIONS.values()]
    assert list(GATED_CODES.values()) == list(range(FIRST_GATED, FIRST_GATED + len(listed)))
    assert len(ACTIVATION_CODES) == FIRST_GATED  # kFirstGated is kActivations
    codes = (ROOT / "csrc/cpu/codes.h").read_text()
    assert f"kFirstGated = kActivations, kGatedActivations = {len(listed)}" in codes


def test_cpp_output_stage_is_written_once() -> None:
    """Dropout, the residual and the activations are the same for every family of CPU kernels."""
    for part in ("keep.factor(", "row.residual,", "stages.gradient(", "stages.gate_gradient("):
        holding = [p.name for p in (ROOT / "csrc/cpu").glob("*.h") if part in p.read_text()]
        assert holding == ["epilogue.h"], part


def test_imports_go_one_way() -> None:
    paths = [path for path in (ROOT / "fused").rglob("*.py") if path.name != "__init__.py"]
    names = {
        ".".join(path.relative_to(ROOT / "fused").with_suffix("").parts): path for path in paths
    }
    assert names.keys() == set(ORDER)
    for position, name in enumerate(ORDER):
        for target in relative_imports(names[name]):
            if target.startswith("kernels"):
                holders = ("backends.launchers", "backends.gemm", "tools.tune_linear", "tools.tune")
                assert name in holders, f"{name} imports the kernels"
            else:
                assert ORDER.index(target) < position, f"{name} imports {target}"


def test_kernels_import_nothing_but_the_specification() -> None:
    """And one way: a folder those behind it."""
    order = ("tuning", "parts", "row", "channel", "gemm")
    for folder in order:
        for path in (ROOT / "kernels" / folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and node.level == 3:
                    assert node.module == "spec", f"{path} imports {node.module}"
                elif isinstance(node, ast.ImportFrom) and node.level == 2:
                    target = str(node.module).partition(".")[0]
                    assert order.index(target) < order.index(folder), f"{path} imports {target}"
    assert {path.name for path in (ROOT / "kernels").glob("*.py")} == {"__init__.py"}
    assert {path.parent.name for path in (ROOT / "kernels").glob("*/*.py")} == set(order)


def test_files_can_be_read() -> None:
    for pattern in SOURCES:
        for path in ROOT.glob(pattern):
            name = str(path.relative_to(ROOT))
            lines = len(path.read_text().splitlines())
            longest, _ = LONGER.get(name, (LONGEST, ""))
            assert lines <= longest, f"{name} has {lines} lines"
    for name, (_, reason) in LONGER.items():
        assert reason and len((ROOT / name).read_text().splitlines()) > LONGEST, f"{name} is short"
