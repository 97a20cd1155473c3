"""Each gate of the audit closes on a kernel that is spoiled in just that way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="compiling Triton kernels needs triton")
import triton
import triton.language as tl

from bench.audit import assembly, gates
from bench.audit.binary import compiled
from bench.audit.family import without_memory
from bench.audit.launch import Launch
from bench.audit.measure import launches_of
from bench.audit.report import Measured, Report, Stream
from bench.audit.roofline import headroom, slots_per_element
from bench.audit.row_family import BACKWARD, FORWARD

OF_BINARIES = ("spills", "widths", "conversions", "matrix")


def first_launch(family: Any, **different: Any) -> Launch:
    return launches_of(family, family.ordinary | {"target": "sm_90"} | different)[0]


def measure(launch: Launch, target: str = "sm_90") -> Measured:
    return Measured.of(launch, target, "spoiled", 0, False, compiled(launch, target))


def closed(measured: Measured) -> set[str]:
    """The gates that close on a binary."""
    report = Report(triton="3.7.1", binaries=[measured])
    return {name for name in OF_BINARIES if gates.GATES[name](report)}


def with_form(launch: Launch, **different: Any) -> Launch:
    """Compiled for another form."""
    form = launch.arguments["FORM"]._replace(**different)
    return replace(launch, arguments=launch.arguments | {"FORM": form})


@pytest.fixture(scope="module")
def sound() -> Measured:
    return measure(first_launch(FORWARD))


def test_all_are_open_for_the_kernel_itself(sound: Measured) -> None:
    assert closed(sound) == set()
    assert sound.aligned and sound.per_thread == 16 and sound.element_bytes == 4


def test_spills_close_on_a_tile_too_wide_for_its_warps() -> None:
    launch = first_launch(FORWARD, width=16384, dtype="fp32")
    crowded = measure(replace(launch, options={"num_warps": 4}))
    assert "spills" in closed(crowded) and crowded.binary.body_spills


@pytest.mark.parametrize("spilled, inside, closes", [(0, 0, False), (1, 0, True), (1, 1, True)])
def test_spills_close_on_one_word(sound: Measured, spilled: int, inside: int, closes: bool) -> None:
    binary = replace(sound.binary, spills=spilled, body_spills=inside)
    report = Report(triton="3.7.1", binaries=[replace(sound, binary=binary)])
    assert bool(gates.GATES["spills"](report)) == closes


def test_a_word_put_aside_passes_for_the_listed_version_alone(sound: Measured) -> None:
    word = replace(sound, binary=replace(sound.binary, spills=10, body_spills=2))
    report = Report(triton="3.6.0", binaries=[word])
    assert not gates.GATES["spills"](report)
    assert gates.GATES["spills"](replace(report, triton="3.7.1"))
    more = replace(word, binary=replace(word.binary, spills=11))
    assert gates.GATES["spills"](replace(report, binaries=[more]))


def test_widths_close_on_a_kernel_that_is_not_told_the_alignment() -> None:
    launch = first_launch(FORWARD, width=1024, fit="ragged")
    spoiled = measure(with_form(launch, ALIGN=1))
    assert closed(replace(spoiled, aligned=launch.aligned)) == {"widths"}


@pytest.mark.parametrize("kind", ["load_widths", "store_widths"])
def test_widths_close_on_a_single_narrow_access_too_many(sound: Measured, kind: str) -> None:
    more = getattr(sound.binary, kind) | {"2": 4}
    spoiled = replace(sound, binary=replace(sound.binary, **{kind: more}))
    assert closed(spoiled) == {"widths"}


def pointer(elements: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return without_memory((elements,), dtype)


def launch_of(kernel: Any, **arguments: Any) -> Launch:
    return Launch(kernel, (1,), arguments, {"num_warps": 4})


@triton.jit
def _turned_kernel(z_ptr, y_ptr, ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    column = tl.arange(0, BLOCK_N)
    z = tl.reshape(tl.load(z_ptr + column), (64, BLOCK_N // 64))
    tl.store(y_ptr + column, tl.reshape(tl.trans(z), (BLOCK_N,)))


def test_conversions_close_on_a_row_that_is_rearranged() -> None:
    z, y = pointer(4096), pointer(4096)
    spoiled = launch_of(_turned_kernel, z_ptr=z, y_ptr=y, ALIGN=4, BLOCK_M=1, BLOCK_N=4096)
    assert "conversions" in closed(measure(spoiled))


@triton.jit
def _product_kernel(a_ptr, b_ptr, y_ptr, HOW: tl.constexpr):
    i = tl.arange(0, 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    product = tl.dot(tl.load(a_ptr + i), tl.load(b_ptr + i), input_precision=HOW)
    tl.store(y_ptr + i, product)


def test_matrix_closes_on_a_product_without_matrix_units() -> None:
    tensors = {name: pointer(1024) for name in ("a_ptr", "b_ptr", "y_ptr")}
    spoiled = measure(launch_of(_product_kernel, **tensors, HOW="ieee"))
    assert spoiled.binary.products and closed(spoiled) == {"matrix"}
    assert closed(replace(spoiled, exact=True)) == set()


@pytest.mark.parametrize(
    "dtype, precision, exact",
    [
        (torch.float32, "ieee", True),
        (torch.float32, "tf32", False),
        (torch.bfloat16, "ieee", False),
    ],
)
def test_only_float32_is_exempt_from_matrix_units(
    dtype: torch.dtype, precision: str, exact: bool
) -> None:
    tensors = {name: pointer(1024, dtype) for name in ("a_ptr", "b_ptr", "y_ptr")}
    assert launch_of(_product_kernel, **tensors, PRECISION=precision).exact == exact


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_matrix_units_are_seen(target: str) -> None:
    halves = {name: pointer(1024, torch.float16) for name in ("a_ptr", "b_ptr")}
    launch = launch_of(_product_kernel, **halves, y_ptr=pointer(1024), HOW="tf32")
    found = measure(launch, target)
    assert found.binary.matrix and closed(found) == set()
    assert headroom(found) is None


def test_instructions_close_on_a_slower_formula(sound: Measured) -> None:
    # Without bare PTX, exponential and reciprocal are several instructions each.
    launch = first_launch(FORWARD)
    slower = replace(measure(with_form(launch, PTX=False)), case=sound.case)
    complaints = gates.instructions(Report(binaries=[slower]), Report(binaries=[sound]))
    assert "instructions" in complaints[0] and "--accept" in complaints[-1]
    assert not gates.instructions(Report(binaries=[sound]), Report(binaries=[sound]))


@pytest.mark.parametrize("share, closes", [(1.04, False), (1.06, True), (0.94, True)])
def test_instructions_close_beyond_five_percent(
    sound: Measured, share: float, closes: bool
) -> None:
    count = round(sound.binary.instructions * share)
    changed = replace(sound, binary=replace(sound.binary, instructions=count))
    found = gates.instructions(Report(binaries=[changed]), Report(binaries=[sound]))
    assert bool(found) == closes


def test_instructions_close_on_what_the_baseline_lacks_or_alone_has(sound: Measured) -> None:
    assert "not in the baseline" in gates.instructions(Report(binaries=[sound]), Report())[0]
    assert "no longer" in gates.instructions(Report(), Report(binaries=[sound]))[0]


def test_another_triton_is_not_compared_and_says_so() -> None:
    report = Report()
    assert gates.why_skipped(report, report) is None
    assert "0.0.0" in str(gates.why_skipped(report, replace(report, triton="0.0.0")))
    assert "no baseline" in str(gates.why_skipped(report, None))


@pytest.mark.parametrize("moved, closes", [(100, False), (101, True), (99, True), (200, True)])
def test_traffic_closes_on_a_byte_too_many_or_too_few(moved: int, closes: bool) -> None:
    streams = [Stream("row forward: layer", "_row_fwd_kernel", "y_ptr", moved, 100)]
    assert bool(gates.GATES["traffic"](Report(streams=streams))) == closes


def test_traffic_closes_on_a_call_that_reads_again_in_another_kernel() -> None:
    streams = [
        Stream("row forward: layer", kernel, name, 100, 100)
        for kernel, name in (("_a", "z_ptr"), ("_b", "z_ptr"), ("_b", "y_ptr"))
    ]
    (complaint,) = gates.GATES["traffic"](Report(streams=streams))
    assert "1.500 times the least" in complaint


def test_compiles_closes_on_what_does_not() -> None:
    with pytest.raises(RuntimeError, match="_product_kernel for sm_90"):
        compiled(launch_of(_product_kernel, a_ptr=1.0, b_ptr=1.0, y_ptr=1.0, HOW="x"), "sm_90")
    assert gates.GATES["compiles"](Report(failed=["a"])) == ["a"]


@triton.jit
def _walk_kernel(z_ptr, y_ptr, tiles, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    for tile in tl.range(0, tiles):
        i = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        tl.store(y_ptr + i, tl.exp2(tl.load(z_ptr + i)))


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_instructions_an_element_are_those_of_the_loop(target: str) -> None:
    def per_element(tile: int) -> Measured:
        tensors = {name: pointer(1 << 16) for name in ("z_ptr", "y_ptr")}
        return measure(launch_of(_walk_kernel, **tensors, tiles=7, BLOCK_M=1, BLOCK_N=tile), target)

    small, large = per_element(1024), per_element(4096)
    # Each element has one exponential, so the special functions are those of the tile.
    assert large.binary.loops == large.binary.walks == 1
    assert large.binary.special == large.per_thread
    assert large.binary.special < large.binary.body < large.binary.instructions
    assert large.instructions_per_element == large.binary.body / large.per_thread
    assert slots_per_element(large) >= large.instructions_per_element
    # A short body is unrolled for NVIDIA: then it is not that of one step, and no figure is given.
    assert (small.binary.loops > 1) == (small.instructions_per_element is None)
    assert target != "sm_90" or small.binary.loops == 2


def test_estimated_headroom_follows_the_model(sound: Measured) -> None:
    # H100: 132 SMs x 128 slots x 1.98 GHz over 3.35 TB/s are 9.99 slots a byte.
    plain = replace(sound, per_thread=1, element_bytes=4)
    plain = replace(plain, binary=replace(plain.binary, body=20, special=0))
    assert headroom(plain) == pytest.approx(9.986 * 4 / 20, rel=1e-3)
    special = replace(plain, binary=replace(plain.binary, special=5))
    assert headroom(special) == pytest.approx(9.986 * 4 / 40, rel=1e-3)


SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;            /* 0x00 */
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;  /* 0x01 */
        /*0020*/                   FADD R4, R4, R5 ;                 /* 0x02 */
        /*0030*/               @P1 BRA 0x10 ;                        /* 0x03 */
        /*0040*/                   MUFU.EX2 R4, R4 ;                 /* 0x04 */
        /*0050*/                   STG.E.U16 desc[UR4][R2.64], R4 ;  /* 0x05 */
        /*0060*/                   EXIT ;                            /* 0x06 */
        /*0070*/                   MUFU.RCP R4, R4 ;                 /* 0x07 */
        /*0080*/                   RET.REL.NODEC R2 0x0 ;            /* 0x08 */
        /*0090*/                   BRA 0x90;                         /* 0x09 */
        /*00a0*/                   NOP;                              /* 0x0a */
"""


def test_tensors_have_the_types_that_triton_gives_them() -> None:
    """Triton's own launch asks for the name of the dtype, and its cache for the same source."""
    from triton.runtime.jit import mangle_type

    for dtype in (torch.bool, torch.int64, torch.float32, torch.bfloat16, torch.float16):
        found = launch_of(_turned_kernel, z_ptr=pointer(4096, dtype), y_ptr=pointer(4096), ALIGN=1)
        source = replace(
            found, arguments=found.arguments | {"BLOCK_M": 1, "BLOCK_N": 4096}
        ).source()
        assert source.signature["z_ptr"] == mangle_type(torch.empty(1, dtype=dtype))


def test_sass_is_read() -> None:
    code = assembly._parse_sass(SASS)
    assert [at.opcode for at in code][:3] == ["LDC", "LDG.E.128", "FADD"]
    assert [at.opcode for at in code][3:] == ["BRA", "MUFU.EX2", "STG.E.U16", "EXIT"]
    loops = assembly._sass_loops(code)
    assert assembly.innermost(code, loops, assembly._SASS.global_memory) == [frozenset({1, 2, 3})]


AMD = """
\ts_load_dwordx2 s[0:1], s[4:5], 0x0
.LBB0_1:                                ; =>This Loop Header: Depth=1
                                        ;     Child Loop BB0_2 Depth 2
\tglobal_load_dword v0, v1, s[0:1]
.LBB0_2:                                ;   Parent Loop BB0_1 Depth=1
                                        ; =>  This Inner Loop Header: Depth=2
\tglobal_load_dwordx4 v[0:3], v4, s[0:1]
\tv_exp_f32_e32 v0, v0
\ts_cbranch_scc1 .LBB0_2
; %bb.3:                                ;   in Loop: Header=BB0_1 Depth=1
\ts_cbranch_scc1 .LBB0_1
.LBB0_4:
\tglobal_store_dword v1, v0, s[0:1]
\ts_cbranch_scc1 .LBB0_4
"""


def test_amd_loops_are_those_of_the_compilers_comments() -> None:
    code, loops = assembly._parse_amd(AMD)
    assert sorted(map(sorted, loops)) == [[1, 2, 3, 4, 5], [2, 3, 4]]
    facts = assembly._facts(code, loops, assembly._AMD)
    assert (facts["loops"], facts["body"], facts["special"]) == (1, 2, 1)


MIDDLE = """
tt.func {
  %0 = scf.for %i = %a to %b {
    %1 = scf.for %j = %a to %b {
      %2 = tt.load %p loc(#1)
    } loc(#1)
    tt.store %p, %1
  } loc(#1)
  scf.for %i = %a to %b {
    %3 = "tt.reduce"(%2) <{axis = 1 : i32}> ({
      tt.reduce.return %4
    }) : loc(#1)
  } loc(#1)
}
"""


def test_walks_of_tritons_code_are_counted() -> None:
    assert assembly.walks_of(MIDDLE) == 1


def test_backward_shows_its_loop() -> None:
    found = measure(first_launch(BACKWARD))
    assert found.binary.loops == 1 and found.per_thread == 8
