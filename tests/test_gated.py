"""The C++ kernels of gated activations against float64: gates, norms, dtypes, instruction sets."""

from __future__ import annotations

import math

import pytest
import torch
from cases import DTYPES, NORMS, Inputs, run_operator, run_reference
from gated_cases import GATED, make_gated_epilogue, make_gated_inputs
from test_row import (
    ADVERSARIAL,
    BREAKPOINTS,
    SPECIAL,
    adversarial,
    check,
    check_wider_parameters,
    with_present,
)
from tolerances import FLOOR, assert_close

from fused.backends import ops
from fused.run import random, reference
from fused.spec import GATED_ACTIVATIONS

# (rows, N): one column a half, below, at and above a vector and a random block, odd, long rows, and
# more rows than a batch of the statistics has.
SHAPES = [(5, 1), (4, 3), (3, 8), (9, 17), (9, 63), (70, 64), (33, 65), (3, 1000), (2, 4097)]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", GATED)
def test_every_gate(activation: str, norm: str | None, dtype: torch.dtype) -> None:
    for rows, half in ((37, 65), (6, 200)):
        for p in (0.0, 0.3):
            inputs = make_gated_inputs(rows, half, dtype, norm, generator=rows)
            check(inputs, make_gated_epilogue(norm, activation, p), f"({rows}, {half}) p={p}")


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(shape: tuple[int, int], norm: str | None, dtype: torch.dtype) -> None:
    if dtype == torch.float64 and shape == SHAPES[-1]:
        shape = (2, 2049)  # the oracle's own rounding, 2 ulp on longer rows, would count as ours
    check(make_gated_inputs(*shape, dtype, norm), make_gated_epilogue(norm, "swiglu", 0.1))


@pytest.mark.usefixtures("cpp")
@pytest.mark.parametrize("present", range(16))
@pytest.mark.parametrize("norm", NORMS)
def test_absent_parameters(norm: str | None, present: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        inputs = with_present(make_gated_inputs(9, 40, dtype, norm), present)
        check(inputs, make_gated_epilogue(norm, "glu", 0.2))


@pytest.mark.usefixtures("cpp")
@pytest.mark.parametrize("parameter", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wider_parameters(dtype: torch.dtype, parameter: torch.dtype) -> None:
    inputs = make_gated_inputs(33, 35, dtype, residual=False, bias=False)
    check_wider_parameters(inputs, make_gated_epilogue("layer", "geglu", 0.1), parameter)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("activation", ["swiglu", "reglu"])
@pytest.mark.parametrize(
    "kind, norm",
    # Two halves that are multiplied overflow with values of 1e38, as do their squares.
    [(kind, norm) for kind in ADVERSARIAL for norm in NORMS if kind != "huge"],
)
def test_adversarial_values(kind: str, norm: str | None, activation: str) -> None:
    inputs = make_gated_inputs(12, 100, torch.float32, norm, bias=False, residual=False)
    inputs.z = adversarial(kind).contiguous()
    epilogue = make_gated_epilogue(norm, activation)
    parameters = (t if t is None else t.double() for t in inputs.parameters[1:])
    h = reference.normalize(inputs.z.double(), epilogue, *parameters)
    if activation == "reglu":
        # Rounding moves a gate across the kink, in eager as here: none may be near it.
        inputs.dy[(h[:, 100:].abs() < 0.01) & (h[:, 100:] != 0)] = 0
    found = run_operator(inputs, epilogue)
    oracle = run_reference(inputs, epilogue, torch.float64)
    eager = run_reference(inputs, epilogue, torch.float32)
    # As in test_row: a rounded mean shifts the normalised values of a row by half an ulp of |z|
    # times rstd, and the factor that a half has in y or in its gradient multiplies that.
    deviation = float(inputs.z.double().var(dim=1, correction=0).min())
    rstd = 1 / math.sqrt(deviation + 1e-5) if norm == "layer" else 0.0
    shift = float(inputs.z.abs().max()) * rstd / (2 * FLOOR) * float(h.abs().max())
    terms = shift * float(inputs.dy.square().sum(0).sqrt().max())
    for name, result in found.items():
        assert result.isfinite().all() and eager[name].isfinite().all(), name
        magnitude = shift if name == "y" else terms * (rstd if name == "dz" else 1.0)
        assert_close(name, result, oracle[name], eager[name], torch.float32, magnitude)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("activation", GATED)
def test_breakpoints_and_special_values(activation: str) -> None:
    """Each value as the gate beside a value of 1.5, and as the value beside gates of both signs."""
    values = BREAKPOINTS + SPECIAL
    count = len(values)
    a = torch.tensor([1.5] * count + values + values)
    b = torch.tensor(values + [0.5] * count + [-0.5] * count)
    inputs = Inputs(z=torch.cat([a, b])[None], dy=torch.ones(1, a.numel()))
    epilogue = make_gated_epilogue(None, activation)
    found = run_operator(inputs, epilogue)
    oracle = run_reference(inputs, epilogue, torch.float64)
    eager = run_reference(inputs, epilogue, torch.float32)
    for name in ("y", "dz"):
        for i in range(found[name].numel()):
            got, want, torchs = (float(t[name][0, i]) for t in (found, oracle, eager))
            column = i % a.numel()
            value, gate = float(a[column]), float(b[column])
            where = f"{name} {i} of {value}, {gate}: got {got}, oracle {want}, eager {torchs}"
            nan = math.isnan(value) or math.isnan(gate)
            assert name != "y" or not nan or math.isnan(got), where
            if got == torchs or math.isnan(torchs):
                continue  # or the limit, where eager computes 0·∞ on the way to it
            allowed = 2 * abs(torchs - want) + 4e-7 * abs(want) + 1e-10 * abs(gate) + 1e-12
            # The derivative of GELU is a sum with 1/2, and is right to an ulp of that.
            allowed += 1.2e-7 * max(1.0, abs(value)) if activation == "geglu" else 0.0
            assert abs(got - want) <= allowed, where


@pytest.mark.usefixtures("isa")
def test_an_infinite_gradient_is_zero_where_the_gate_is_flat() -> None:
    """Losses scaled for float16 overflow; 0·inf would spread NaN where eager has zeros."""
    z = torch.tensor([[2.0] * 24 + [-9.0, -4.0, -3.5] * 8])
    inputs = Inputs(z=z, dy=torch.full((1, 24), math.inf))
    epilogue = make_gated_epilogue(None, "reglu")
    eager = run_reference(inputs, epilogue, torch.float32)["dz"]
    found = run_operator(inputs, epilogue)["dz"]
    torch.testing.assert_close(found, eager, equal_nan=True, rtol=0, atol=0)
    assert bool((found[:, 24:] == 0).all())


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_mask_lies_over_half_the_columns(dtype: torch.dtype) -> None:
    for half in (1, 7, 8, 17, 64, 65, 200, 1000):
        for p in (0.1, 0.5):
            # Neither value nor gate nor derivative is zero, so what is zero has been dropped.
            z = torch.full((5, 2 * half), 0.5, dtype=dtype)
            inputs = Inputs(z=z, dy=torch.ones(5, half, dtype=dtype), seed=torch.tensor([half]))
            epilogue = make_gated_epilogue(None, "swiglu", p)
            found = run_operator(inputs, epilogue)
            keep = random.keep_mask(5, half, epilogue.threshold, inputs.seed)
            assert torch.equal(found["y"] != 0, keep)
            assert torch.equal(found["dz"] != 0, keep.repeat(1, 2))


@pytest.mark.usefixtures("isa")
def test_dropped_elements_multiply_by_zero() -> None:
    z = torch.full((4, 64), float("inf"))
    inputs = Inputs(z=z, dy=torch.ones(4, 32))
    y = run_operator(inputs, make_gated_epilogue(None, "reglu", 0.5))["y"]
    assert y.isnan().any() and y.isposinf().any() and not (y == 0).any()
    inputs.z = torch.ones_like(z)
    assert (run_operator(inputs, make_gated_epilogue(None, "glu", 1.0))["y"] == 0).all()


@pytest.mark.usefixtures("cpp")
@pytest.mark.parametrize("norm", NORMS)
def test_same_bits_at_any_thread_count(norm: str | None) -> None:
    inputs = make_gated_inputs(3000, 65, torch.float32, norm)
    epilogue = make_gated_epilogue(norm, "geglu", 0.1)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run_operator(inputs, epilogue))
    torch.set_num_threads(before)
    for other in results[1:]:
        for name, t in other.items():
            assert torch.equal(t, results[0][name]), name


def test_every_gate_is_an_activation() -> None:
    """The reference takes an activation's own function; the C++ kernels its own struct."""
    h = torch.linspace(-4, 4, 22, dtype=torch.float64)
    for name, gated in GATED_ACTIVATIONS.items():
        expected = h[:11] * reference.activate(h[11:], gated.gate)
        torch.testing.assert_close(reference.activate(h, name), expected)


def opcheck_all(inputs: Inputs, norm: str | None, p: float) -> None:
    codes = make_gated_epilogue(norm, "swiglu", p).row
    seed = inputs.seed if p else None
    forward = (inputs.z, *inputs.parameters, inputs.residual, seed, *codes)
    torch.library.opcheck(ops.row_forward, forward)
    _, statistics = ops.row_forward(*forward)
    for wanted in (0, 3, 7):
        backward = (inputs.dy, inputs.z, *inputs.parameters, statistics, seed, wanted, *codes)
        torch.library.opcheck(ops.row_backward, backward)


@pytest.mark.usefixtures("cpp")
@pytest.mark.parametrize("norm", NORMS)
def test_opcheck(norm: str | None) -> None:
    opcheck_all(make_gated_inputs(5, 6, torch.float32, norm), norm, 0.0)
    opcheck_all(make_gated_inputs(5, 6, torch.bfloat16, norm, bias=False), norm, 0.2)
    opcheck_all(make_gated_inputs(0, 6, torch.float32, norm), norm, 0.2)
