"""The CUDA C++ library describes its structures, and Python fills them in by name."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import emulated
import pytest
import torch

from fused.backends import cuda_library

# A library of one launcher, which returns 0 where the fields hold what their names promise.
SOURCE = """
#include <cstdint>
struct Problem {{ {declaration} }};
extern "C" {{
const char* fused_cuda_error(int) {{ return "a field holds another's value"; }}
const char* fused_cuda_description() {{ return "try Problem {size} {declaration}\\n"; }}
int fused_cuda_try(const Problem* p, int, void*) {{
  return !(p->rows == 3 && p->cols == 5 && p->eps == 0.5 && *(const float*)p->z == 7 &&
           p->z_stride == 5 && p->z_storage == 0 && !p->out);
}}
}}
"""
FIELDS = "const void *z; void *out; int64_t rows, cols, z_stride, z_storage; double eps;"


def use(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, declaration: str = FIELDS, size: int = 56
) -> None:
    """Makes it the library that is loaded."""
    command = emulated.compiler()
    if command is None:
        pytest.skip("no C++ compiler")
    # Each at a path of its own: one that is loaded already is not read again.
    source = tmp_path / f"library{len(list(tmp_path.iterdir()))}.cpp"
    path = source.with_suffix(".so")
    source.write_text(SOURCE.format(declaration=declaration, size=size))
    subprocess.run([*command, "-shared", "-fPIC", str(source), "-o", str(path)], check=True)
    library = cuda_library.Library(path)
    monkeypatch.setattr(cuda_library, "load", lambda: (library, ""))


def attempt(cols: int = 5, **more: torch.Tensor | None) -> None:
    z = torch.full((3, 5), 7.0)
    cuda_library.launch("try", z, {"z": z, **more}, {"eps": 0.5, "rows": 3, "cols": cols})


@pytest.mark.parametrize(
    "declaration",
    [
        FIELDS,
        "double eps; int64_t z_storage, cols, z_stride; const void *z; int64_t rows; void *out;",
    ],
)
def test_fields_may_change_places(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, declaration: str
) -> None:
    use(monkeypatch, tmp_path, declaration)
    attempt()
    with pytest.raises(RuntimeError, match="try cannot be launched: a field holds another's value"):
        attempt(cols=4)


def test_a_field_that_the_library_lacks_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use(monkeypatch, tmp_path)
    sentence = (
        "fused: the CUDA C\\+\\+ kernel try cannot be launched: the library, of other sources than"
        " the Python code, has no field planes in its Problem; install nvcc and run"
    )
    for t in (None, torch.ones(1)):
        with pytest.raises(RuntimeError, match=sentence):
            attempt(planes=t)
    with pytest.raises(RuntimeError, match=sentence):
        cuda_library.launch("try", torch.empty(0), {}, {"rows": 3, "planes": 4})
    with pytest.raises(RuntimeError, match=r"fly cannot be launched: .* has no such kernel;"):
        cuda_library.launch("fly", torch.empty(0), {}, {})


def test_a_library_that_python_cannot_follow_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(OSError, match="its Problem has 64 bytes, and its fields 56"):
        use(monkeypatch, tmp_path, size=64)
    with pytest.raises(OSError, match="of other sources than the Python code: 'int'"):
        use(monkeypatch, tmp_path, FIELDS + " int more;")
    path = tmp_path / "empty.so"
    command = [*(emulated.compiler() or []), "-shared", "-fPIC", "-x", "c++", "/dev/null"]
    subprocess.run([*command, "-o", str(path)], check=True)
    with pytest.raises(OSError, match=r"of other sources than the Python code: .*fused_cuda_error"):
        cuda_library.Library(path)


@pytest.mark.usefixtures("emulation")
def test_the_kernels_structures_are_those_of_the_header() -> None:
    """Each launcher that csrc/cuda exports is there, and each field is in its structure's text."""
    folder = emulated.ROOT / "csrc/cuda"
    sources = "".join(path.read_text() for path in folder.glob("*.cu"))
    library, _ = cuda_library.load()
    assert library is not None
    assert set(library.kernels) == set(re.findall(r"FUSED_EXPORT int fused_cuda_(\w+)\(", sources))
    header = (folder / "problems.h").read_text()
    for kernel in library.kernels.values():
        text = header.split(f"FUSED_STRUCTURE({kernel.structure.__name__},")[1].split("\n)")[0]
        for field in kernel.fields:
            assert re.search(rf"\b{field}[,;]", text), field
