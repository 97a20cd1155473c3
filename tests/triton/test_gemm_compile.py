"""Compiles the GEMM kernels as their rules would launch them on five GPUs; reads the binaries.

No GPU needed. Asserted: no spilled registers; matrix instructions (but for float32 in full
precision, for which there are none); x and weight by 16-byte asynchronous copies or, on AMD, loads;
16-byte stores but on AMD; shared memory that the GPU has.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import replace
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="compiling Triton kernels needs triton")

import triton
from fused.kernels.gemm.channel import linear_channel_forward
from fused.kernels.gemm.row import linear_row_forward
from fused.kernels.tuning import gemm as gemm_tuning
from gemm_oracle import Case, forward_arguments, make_inputs

from bench.audit.assembly import _CUOBJDUMP
from bench.audit.binary import CACHE
from bench.audit.binary import compiled as audit
from bench.audit.launch import Launch, captured
from bench.audit.targets import TARGETS

BF16 = Case(64, 1024, 256, residual=True)
FP32 = replace(BF16, dtype=torch.float32)
WIDTHS = (64, 128, 256, 512)
BATCH = replace(BF16, norm="batch", cols=1024)
GROUP = replace(BATCH, norm="group", groups=32)
EVERYWHERE = [
    *(replace(BF16, cols=cols) for cols in WIDTHS),
    replace(BF16, norm=None, cols=1024),
    BATCH,
    GROUP,
]
HOPPER = [
    *(replace(BF16, activation=a) for a in (None, "softplus", "elu")),
    *(replace(BF16, cols=cols, activation="mish") for cols in (128, 512)),
    replace(BF16, cols=512, dtype=torch.float16),
    *(replace(BF16, cols=cols) for cols in (16, 200, 344)),
    replace(BF16, inner=1000, cols=136),
    replace(BATCH, inner=1000, cols=136),
    replace(BATCH, cols=40, bias=False),
    *(replace(GROUP, groups=groups) for groups in (4, 128)),
    replace(GROUP, cols=96, groups=3, activation="mish", dtype=torch.float16),
    replace(GROUP, activation=None, p=0.0, affine=False, bias=False, residual=False),
    replace(BF16, norm="rms"),
    replace(BF16, p=0.0, affine=False, bias=False, residual=False),
]
# What a program may take of an SM's shared memory.
SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
MATRIX = {
    "sm_80": "HMMA",
    "sm_90": "HGMMA",
    "sm_100": "UTCHMMA",
    "sm_120": "HMMA",
    "gfx942": "v_mfma",
}


def launch_of(case: Case, arch: str, precision: str = "ieee", save_z: bool = True) -> Launch:
    arguments = forward_arguments(case, make_inputs(case), save_z)
    with captured(arch) as found, mock.patch.object(gemm_tuning, "precision", lambda d: precision):
        (linear_channel_forward if case.is_channel else linear_row_forward)(*arguments)
    return found[0]  # what follows the GEMM is a channel kernel


def opcodes(launch: Launch, arch: str) -> Counter[str]:
    """How often each instruction of a binary occurs; kept like the facts of bench/audit."""
    compiled = triton.compile(launch.source(), TARGETS[arch].target, launch.options)
    if "cubin" not in compiled.asm:
        return Counter(re.findall(r"^\s+([a-z]+_\w+)", compiled.asm["amdgcn"], re.M))
    code = compiled.asm["cubin"]
    CACHE.mkdir(parents=True, exist_ok=True)
    kept = CACHE / f"{hashlib.sha256(code).hexdigest()}-opcodes.json"
    if not kept.exists():
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(code)
            file.flush()
            command = [_CUOBJDUMP, "-sass", file.name]
            sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?([A-Z][\w.]*)", sass, re.M)
        kept.write_text(json.dumps(Counter(found)))
    return Counter(json.loads(kept.read_text()))


def check(launch: Launch, arch: str, *, matrix: bool = True) -> None:
    binary = audit(launch, arch)
    found = opcodes(launch, arch)
    copies = {name: n for name, n in found.items() if name.startswith(("LDGSTS", "UTMA"))}
    what = f"{launch.kernel.__name__} {launch.values['BLOCK_N']} on {arch}: {binary} {copies}"
    # What is stored and never read is no spill: with triton 3.6 on sm_120 each TMA load does that.
    reloads = sum(n for name, n in found.items() if name.startswith("LDL"))
    assert binary.spills == 0 or (arch == "sm_120" and reloads == 0), what
    assert binary.shared <= SHARED[arch] * 1024, what
    assert any(name.startswith(MATRIX[arch]) for name in found) == matrix, what
    assert "1" not in binary.store_widths and "2" not in binary.store_widths, what
    if launch.kernel.__name__ == "_gemm_tma_kernel":
        assert copies["UTMALDG.2D"] > 0 and copies["UTMASTG.2D"] == 8, what
        assert set(copies) <= {"UTMALDG.2D", "UTMASTG.2D", "UTMACMDFLUSH"}, what
        return
    if arch == "gfx942":  # accumulators are written as they lie, 8 bytes at a time
        assert found["global_load_dwordx4"] > 0, what
        return
    assert copies and all(name.endswith(".128") for name in copies), what
    assert binary.store_widths.get("16", 0) > 0, what


@pytest.mark.full
@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("case", EVERYWHERE, ids=str)
def test_every_width_on_every_gpu(case: Case, arch: str) -> None:
    if arch == "sm_100" and case.cols == 512 and case.norm:
        pytest.skip("kernels/tuning/gemm.py has no tile: it spills")
    check(launch_of(case, arch), arch)


@pytest.mark.full
@pytest.mark.parametrize("case", HOPPER, ids=str)
def test_activations_and_dtypes_on_sm_90(case: Case) -> None:
    check(launch_of(case, "sm_90"), "sm_90")


@pytest.mark.full
@pytest.mark.parametrize("precision", ["tf32", "ieee"])
@pytest.mark.parametrize(
    "arch, cols", [("sm_90", 64), ("sm_90", 128), *((arch, 256) for arch in list(TARGETS)[:4])]
)
def test_float32(arch: str, cols: int, precision: str) -> None:
    check(launch_of(replace(FP32, cols=cols), arch, precision), arch, matrix=precision == "tf32")


@pytest.mark.full
@pytest.mark.parametrize("precision", ["tf32", "ieee"])
@pytest.mark.parametrize("arch", list(TARGETS)[:4])
@pytest.mark.parametrize("case", [BATCH, GROUP], ids=str)
def test_channel_norms_of_float32(case: Case, arch: str, precision: str) -> None:
    launch = launch_of(replace(case, dtype=torch.float32), arch, precision)
    check(launch, arch, matrix=precision == "tf32")


@pytest.mark.parametrize("cols", [64, 256])
def test_without_z(cols: int) -> None:
    check(launch_of(replace(BF16, cols=cols), "sm_90", save_z=False), "sm_90")


PLAIN = replace(BF16, norm=None, cols=1000)


@pytest.mark.parametrize("activation", [None, "mish", "softplus"])
def test_activations_by_descriptors(activation: str | None) -> None:
    check(launch_of(replace(PLAIN, activation=activation), "sm_90"), "sm_90")


def test_descriptors_with_nothing_but_the_product() -> None:
    bare = replace(PLAIN, activation=None, p=0.0, bias=False, residual=False)
    launch = launch_of(bare, "sm_90", save_z=False)
    assert opcodes(launch, "sm_90")["UTMASTG.2D"] == 4
    assert audit(launch, "sm_90").spills == 0


@pytest.mark.full
@pytest.mark.parametrize("arch", ["sm_90", "sm_100", "sm_120"])
def test_tf32_by_descriptors(arch: str) -> None:
    launch = launch_of(replace(PLAIN, dtype=torch.float32), arch, "tf32")
    assert launch.kernel.__name__ == "_gemm_tma_kernel"
    check(launch, arch)


@pytest.mark.parametrize("arch", TARGETS)
def test_descriptors_where_there_are_any(arch: str) -> None:
    by_descriptors = launch_of(PLAIN, arch).kernel.__name__ == "_gemm_tma_kernel"
    assert by_descriptors == (arch in ("sm_90", "sm_100", "sm_120"))
    full = launch_of(replace(PLAIN, dtype=torch.float32), arch)
    assert full.kernel.__name__ == "_gemm_row_kernel"
    if arch != "gfx942":
        check(full, arch, matrix=False)


def test_two_programs_by_descriptors_fit_an_sm() -> None:
    """On sm_90: 65536 registers and 228 KB, of which a program takes 1 KB more than it asks for."""
    binary = audit(launch_of(PLAIN, "sm_90"), "sm_90")
    assert 2 * binary.registers * 128 <= 65536
    assert 2 * (binary.shared + 1024) <= 228 * 1024


def test_widths_without_a_tile() -> None:
    def tile(cols: int, dtype: torch.dtype = torch.bfloat16, arch: int = 90) -> object:
        return gemm_tuning.row_tile(cols, gemm_tuning.Kind("layer", dtype, "ieee"), arch, 32)

    assert tile(512) is not None and tile(513) is None
    assert tile(256, torch.float32) is not None and tile(257, torch.float32) is None
    assert tile(257, arch=100) is None
    kind = gemm_tuning.Kind("group", torch.bfloat16, "ieee")
    widths = [w for w in range(1, 600) if gemm_tuning.group_tile(w, kind, 90, 32)]
    assert widths == [8, 16, 32, 64, 128, 256]


def test_z_is_written_before_it_is_read() -> None:
    """Between the last store of z and the first load of the epilogue all threads meet."""
    launch = launch_of(replace(BF16, residual=False), "sm_90")
    compiled = triton.compile(launch.source(), TARGETS["sm_90"].target, launch.options)
    order = re.findall(r"st\.global\.v4|bar\.sync|ld\.global\.v4", compiled.asm["ptx"])
    stored = order.index("st.global.v4")
    loaded = order.index("ld.global.v4", stored)
    assert "bar.sync" in order[stored:loaded]
    assert order[stored : order.index("bar.sync", stored)].count("st.global.v4") == 8


@pytest.mark.parametrize("case", [BF16, BATCH, GROUP, PLAIN], ids=str)
def test_batch_size_does_not_recompile(case: Case) -> None:
    def key(rows: int) -> dict[str, object]:
        launch = launch_of(replace(case, rows=rows), "sm_90")
        signature = launch.source()
        return {"signature": signature.signature, "constants": signature.constants}

    assert key(1) == key(17) == key(4096)


def test_the_check_sees_a_spill_and_narrow_copies() -> None:
    """Regressions: a tile too wide for its warps, and rows that are no multiple of 16 bytes."""
    crowded = replace(launch_of(replace(BF16, cols=512), "sm_90"), options={"num_warps": 4})
    with pytest.raises(AssertionError):
        check(crowded, "sm_90")
    narrow = launch_of(replace(BF16, inner=1001), "sm_90")
    with pytest.raises(AssertionError):
        check(narrow, "sm_90")
