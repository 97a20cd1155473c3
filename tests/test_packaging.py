"""What is built and installed: the wheel's content and metadata; building where something lacks.

Every build runs in a copy of the sources, so that nothing left in build/ gets into a wheel.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest
import setuptools

import fused

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(fused.__file__).parent
WITHOUT = "fused-lnad: installing without the C++ kernels"


def copy_sources(target: Path) -> Path:
    ignore = shutil.ignore_patterns("*.so", "*.missing", "__pycache__")
    for name in ("fused", "kernels", "csrc"):
        shutil.copytree(ROOT / name, target / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, target)
    return target


def build_wheel(sources: Path, **environment: str) -> tuple[Path, str]:
    """Builds without isolation; returns the wheel and what the build said."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps"),
            *("--wheel-dir", str(sources / "dist"), str(sources)),
        ],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (sources / "dist").glob("*.whl")
    return wheel, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel without the C++ kernels."""
    sources = copy_sources(tmp_path_factory.mktemp("wheel"))
    path, output = build_wheel(sources, FUSED_NO_EXT="1")
    assert WITHOUT in output
    assert "FUSED_NO_EXT=1 is set" in output
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site folder with the wheel in it."""
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def run_python(code: str, folder: Path, site: Path | None = None) -> str:
    """What Python prints when it runs the code in a folder, with a site folder behind that one."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(site or "")},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_wheel_holds_the_two_packages_and_nothing_else(wheel: Path) -> None:
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "fused").rglob("*.py")}
    expected |= {f"fused/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").rglob("*.py")}
    expected |= {"fused/py.typed", "fused/_C.missing", "fused/_cuda.missing"}
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == expected
    assert wheel.name == f"fused_lnad-{fused.__version__}-py3-none-any.whl"


def test_every_package_folder_is_listed() -> None:
    """A new subpackage must be named in pyproject.toml."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {"fused" + ".".join(("", *p.parent.relative_to(ROOT / "fused").parts))
             for p in (ROOT / "fused").rglob("__init__.py")}  # fmt: skip
    found |= {".".join(("fused", *p.parent.relative_to(ROOT).parts))
              for p in (ROOT / "kernels").rglob("__init__.py")}  # fmt: skip
    assert found == set(listed)


def test_metadata(installed: Path) -> None:
    (path,) = installed.glob("*.dist-info/METADATA")
    metadata = Parser().parsestr(path.read_text())
    assert metadata["Name"] == "fused-lnad"
    assert metadata["Version"] == fused.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    required = metadata.get_all("Requires-Dist") or []
    assert [r for r in required if "extra ==" not in r] == ["torch>=2.11"]
    assert set(metadata.get_all("Provides-Extra") or []) == {"triton", "demo", "bench", "dev"}


def test_build_requirements_leave_torch_alone() -> None:
    """With torch listed, pip would download another torch to build against."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]
    assert build["build-backend"] == "setuptools.build_meta"
    assert [re.split(r"[<>=~! ]", r)[0] for r in build["requires"]] == ["setuptools"]


def test_pins_agree_with_the_declared_dependencies() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    names = {re.split(r"[<>=\[]", name)[0] for names in lists for name in names} - {"fused-lnad"}
    pins = (ROOT / "requirements" / "dev.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower() for line in pins if not line.startswith("#")}
    assert names <= pinned
    assert all("==" in line for line in pins if not line.startswith("#"))


def test_installed_wheel_works_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "import importlib.util, torch, fused\n"
        "y = fused.LinearNormAct(8, 16, norm='layer', activation='gelu')(torch.randn(4, 8))\n"
        "print(fused.__file__, tuple(y.shape), importlib.util.find_spec('fused.kernels').origin)"
    )
    package = installed / "fused"
    expected = f"{package}/__init__.py (4, 16) {package}/kernels/__init__.py"
    assert run_python(code, tmp_path, installed) == expected


WHERE = """
import warnings; warnings.simplefilter("ignore")
import fused, fused.kernels
print(fused.__file__, fused.kernels.__file__)
from fused.backends.backend import cpu_isa, why_not
print(cpu_isa(), why_not("cpp", "cpu", __import__("torch").float32))
"""


@pytest.mark.parametrize("with_library", [True, False], ids=["built", "not built"])
def test_a_checkout_in_front_of_the_installed_package(
    installed: Path, tmp_path: Path, with_library: bool
) -> None:
    """From the root of a clone ./fused is found first; kernels/ and csrc/ are beside it."""
    library = PACKAGE / "_C.abi3.so"
    if with_library and not library.exists():
        pytest.skip("the C++ extension is not built")
    site = shutil.copytree(installed, tmp_path / "site")
    if with_library:
        shutil.copy(library, site / "fused")
    checkout = copy_sources(tmp_path / "checkout")
    # Other builds leave their metadata in a checkout, which Python finds first.
    (metadata,) = site.glob("*.dist-info/METADATA")
    (checkout / "fused_lnad.egg-info").mkdir()
    shutil.copy(metadata, checkout / "fused_lnad.egg-info" / "PKG-INFO")
    where, served = run_python(WHERE, checkout, site).splitlines()
    assert where == f"{checkout}/fused/__init__.py {checkout}/kernels/__init__.py"
    if with_library:
        assert served == fused.backends.backend.cpu_isa()
    else:
        assert "the build said: FUSED_NO_EXT=1 is set" in served


@pytest.mark.full
def test_a_checkout_that_was_never_built(tmp_path: Path) -> None:
    checkout = copy_sources(tmp_path / "checkout")
    where, served = run_python(WHERE, checkout).splitlines()
    assert where == f"{checkout}/fused/__init__.py {checkout}/kernels/__init__.py"
    assert served.startswith("None the C++ extension was not built; install a C++20 compiler")


def test_source_distribution_holds_what_readme_links(tmp_path: Path) -> None:
    sources = copy_sources(tmp_path / "sources")
    shutil.copytree(ROOT / "docs", sources / "docs")
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "sdist"],
        env=os.environ | {"FUSED_NO_EXT": "1"},
        cwd=sources,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (path,) = (sources / "dist").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    linked = re.findall(r"\]\((docs/[^)#]+)", (ROOT / "README.md").read_text())
    assert linked and set(linked) <= held
    assert {"setup.py", "kernels/__init__.py", "csrc/row.cpp", "LICENSE"} <= held


def test_kernels_folder_refuses_its_own_name() -> None:
    """From the checkout's root the folder would import as `kernels`, Hugging Face's name."""
    done = subprocess.run(
        [sys.executable, "-c", "import kernels"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1].startswith("ImportError")
    assert "fused.kernels" in done.stderr.splitlines()[-1]


def functions_of_setup(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """setup.py's functions; nothing is built."""
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    return runpy.run_path(str(ROOT / "setup.py"))


@pytest.mark.parametrize("compiler", [["g++"], None], ids=["compiler", "no compiler"])
@pytest.mark.parametrize("torch", [Path("torch"), None], ids=["torch", "no torch"])
def test_the_build_names_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, torch: Path | None, compiler: list[str] | None
) -> None:
    monkeypatch.delenv("FUSED_NO_EXT", raising=False)
    why_not = functions_of_setup(monkeypatch)["why_not"]
    monkeypatch.setitem(why_not.__globals__, "find_torch", lambda: torch)
    monkeypatch.setitem(why_not.__globals__, "find_compiler", lambda: compiler)
    reason = why_not()
    assert ("no torch" in reason) == (torch is None)
    assert ("no C++ compiler" in reason) == (compiler is None)
    assert ("--no-build-isolation" in reason) == (torch is None or compiler is None)


@pytest.mark.full
@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("/nonexistent/c++", "no C++ compiler was found"), ("false", "the compiler failed")],
)
def test_installs_without_a_working_compiler(tmp_path: Path, compiler: str, reason: str) -> None:
    """The reason is said by the build, which pip seldom shows, and again where it is imported."""
    wheel, output = build_wheel(copy_sources(tmp_path), CXX=compiler, FUSED_NO_EXT="")
    said = [line.strip() for line in output.splitlines() if WITHOUT in line]
    assert len(said) == 1
    assert reason in said[0]
    assert "pip install --no-build-isolation" in said[0]
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
        assert archive.read("fused/_C.missing").decode() in said[0]


def test_extension_is_built_where_there_is_a_compiler() -> None:
    """Without this a broken build would leave every test to the reference backend."""
    if os.environ.get("FUSED_NO_EXT") == "1" or not shutil.which("g++"):
        pytest.skip("FUSED_NO_EXT=1 or no g++")
    assert (PACKAGE / "_C.abi3.so").exists()


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_instruction_sets_do_not_leak(isa: str) -> None:
    """An inline function compiled for AVX-512 must not be the one that the linker keeps for all.

    Weak symbols of the same name are merged, so those of each instruction set need its namespace;
    a shared one would raise SIGILL on a machine without that instruction set. So would a static
    initialiser, which runs when the library is loaded.
    """
    built = sorted(ROOT.glob(f"build/objects-*/*_{isa}*.o"), key=lambda p: p.stat().st_mtime)
    if not built or not shutil.which("nm") or not shutil.which("objdump"):
        pytest.skip("no object files of an in-place build, or no nm or objdump")
    objects = [str(path) for path in built[-1].parent.glob(f"*_{isa}*.o")]

    def said(*command: str) -> str:
        return subprocess.run(
            [*command, *objects], capture_output=True, text=True, check=True
        ).stdout

    weak = re.findall(r"^[0-9a-f]* [WVu] (.*)$", said("nm", "-C", "--defined-only"), re.M)
    assert weak
    data = {"DW.ref.__gxx_personality_v0"}  # a pointer, for exceptions
    assert [name for name in weak if f"fused::{isa}::" not in name and name not in data] == []
    assert not re.search(r"\.init_array|\.ctors|\.text\.startup", said("objdump", "-h"))


def test_kernels_prefetch() -> None:
    """GCC drops the calls of a function that only prefetches, unless it is inlined."""
    objects = list(ROOT.glob("build/objects-*/csrc_cpu_row_avx2.o"))
    if not objects or not shutil.which("objdump"):
        pytest.skip("no object files of an in-place build, or no objdump")
    newest = max(objects, key=lambda p: p.stat().st_mtime)
    command = ["objdump", "-d", "--no-show-raw-insn", str(newest)]
    assert "prefetch" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
