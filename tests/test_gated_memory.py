"""The C++ kernels of gated activations: what they read, what they write, what they refuse."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, NORMS, run_operator
from gated_cases import make_gated_epilogue, make_gated_inputs
from test_row_memory import (
    check_streams_alike,
    in_poisoned_buffers,
    rows_that_stream,
    with_rows_far_apart,
)

from fused.backends import backend, ops


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_rows_offsets_and_red_zones(dtype: torch.dtype, norm: str | None) -> None:
    epilogue = make_gated_epilogue(norm, "swiglu", 0.2)
    for half in (1, 15, 32, 100):
        plain = make_gated_inputs(6, half, dtype, norm)
        expected = run_operator(plain, epilogue)
        for name, t in run_operator(in_poisoned_buffers(plain), epilogue).items():
            assert torch.equal(t, expected[name]), (name, half)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("rows, half", [(5, 33), (1, 1), (0, 8), (4, 0), (3, 1000), (70, 32)])
def test_outputs_are_written_completely(rows: int, half: int, norm: str | None) -> None:
    backend.poison_outputs(True)
    try:
        for dtype in DTYPES:
            inputs = make_gated_inputs(rows, half, dtype, norm)
            epilogue = make_gated_epilogue(norm, "geglu", 0.1)
            found = run_operator(inputs, epilogue)
            seed, codes = inputs.seed, epilogue.row
            _, statistics = ops.row_forward(inputs.z, *inputs.parameters, None, seed, *codes)
            found["statistics"] = statistics
            assert found["y"].shape == (rows, half) and found["dz"].shape == (rows, 2 * half)
            for name, t in found.items():
                assert not t.isnan().any(), (name, dtype)
    finally:
        backend.poison_outputs(False)


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(
    "dtype, norm, half",
    [
        (torch.float32, None, 512),
        (torch.float32, None, 1000),
        (torch.float32, "rms", 1000),
        (torch.bfloat16, "rms", 512),
    ],
    ids=str,
)
def test_streaming_stores_give_the_same(dtype: torch.dtype, norm: str | None, half: int) -> None:
    """Outputs beyond the last-level cache take another store instruction, and get the same bits.

    With N = 1000 rows of dz are aligned for it, but not their halves, nor rows of y.
    """
    inputs = make_gated_inputs(rows_that_stream(half, dtype), half, dtype, norm)
    check_streams_alike(inputs, make_gated_epilogue(norm, "reglu"))


@pytest.mark.slow
@pytest.mark.usefixtures("isa")
def test_rows_beyond_two_to_the_31_elements() -> None:
    plain = make_gated_inputs(3, 35, torch.bfloat16, residual=False)
    epilogue = make_gated_epilogue("layer", "geglu_tanh", 0.1)
    expected = run_operator(plain, epilogue)
    for name, t in run_operator(with_rows_far_apart(plain), epilogue).items():
        assert torch.equal(t, expected[name]), name


@pytest.mark.usefixtures("cpp")
def test_what_is_refused() -> None:
    codes = make_gated_epilogue(None, "swiglu").row
    nothing = (None, None, None)
    z, y = torch.zeros(3, 8), torch.zeros(3, 4)
    odd = torch.zeros(3, 7)
    statistics = torch.zeros(0, 3)
    for call, message in (
        (lambda: ops.row_forward(odd, *nothing, None, None, *codes), "must be even, got 7"),
        (
            lambda: ops.row_backward(odd, odd, *nothing, statistics, None, 0, *codes),
            "must be even, got 7",
        ),
        (lambda: ops.row_forward(z, *nothing, z, None, *codes), r"residual must be \(3, 4\)"),
        (
            lambda: ops.row_backward(z, z, *nothing, statistics, None, 0, *codes),
            r"dy must be \(3, 4\)",
        ),
        (lambda: ops.row_forward_(z, *nothing, None, None, *codes), "halves the columns"),
        (
            lambda: ops.row_forward(z, y[0], None, None, None, None, *codes),
            "contiguous with 8 elements, got 4",
        ),
        (lambda: ops.row_forward(z, *nothing, None, None, 0, 0.0, 21, 0.0, 0.0, 0), "unknown"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
