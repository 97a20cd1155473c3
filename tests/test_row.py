"""The C++ row kernels against float64: every norm, activation, dtype and instruction set."""

from __future__ import annotations

import math

import pytest
import torch
from cases import (
    DTYPES,
    EVERY_ACTIVATION,
    NORMS,
    Inputs,
    make_epilogue,
    make_inputs,
    run_operator,
    run_reference,
)
from tolerances import FLOOR, assert_close, decades

from fused.run import reference
from fused.spec import Spec

# Rows of one element, below, at and above a vector and a random block, odd, and a long row.
SHAPES = [(5, 1), (3, 7), (9, 63), (70, 64), (33, 65), (7, 200), (3, 1000), (2, 1025), (3, 8192)]


def check(inputs: Inputs, epilogue: Spec, what: str = "") -> None:
    dtype = inputs.z.dtype
    found = run_operator(inputs, epilogue)
    oracle = run_reference(inputs, epilogue, torch.float64)
    eager = run_reference(inputs, epilogue, dtype)
    rows, cols = inputs.z.shape
    terms = float(inputs.dy.abs().max()) if inputs.dy.numel() else 0.0
    if epilogue.threshold:
        terms *= 65536 / max(1, 65536 - epilogue.threshold)
    for name, result in found.items():
        # Sums of terms of both signs: their size is that of the terms, not of what is left.
        summed = name not in ("dz", "dshortcut")
        magnitude = 0.0 if name == "y" else terms * (math.sqrt(rows) if summed else 1.0)
        if name == "dz" and cols == 1 and epilogue.norm:
            magnitude /= math.sqrt(epilogue.eps)
        assert result.dtype == dtype
        assert_close(f"{what} {name}", result, oracle[name], eager[name], dtype, magnitude)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", EVERY_ACTIVATION)
def test_every_activation(activation: str | None, norm: str | None, dtype: torch.dtype) -> None:
    for rows, cols in ((37, 65), (6, 200)):
        for p in (0.0, 0.3):
            inputs = make_inputs(rows, cols, dtype, norm, generator=rows)
            check(inputs, make_epilogue(norm, activation, p), f"({rows}, {cols}) p={p}")


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(shape: tuple[int, int], norm: str | None, dtype: torch.dtype) -> None:
    check(make_inputs(*shape, dtype, norm), make_epilogue(norm, "silu", 0.1))


def with_present(inputs: Inputs, present: int) -> Inputs:
    """Without the parameters, and the residual, whose bit is not set."""
    for bit, name in enumerate(("bias", "norm_weight", "norm_bias", "residual")):
        if not present >> bit & 1:
            setattr(inputs, name, None)
    return inputs


def check_wider_parameters(inputs: Inputs, epilogue: Spec, parameter: torch.dtype) -> None:
    """The norm's parameters in a wider dtype: the same numbers, and their gradients in it."""
    narrow = run_operator(inputs, epilogue)
    assert inputs.norm_weight is not None and inputs.norm_bias is not None
    inputs.norm_weight = inputs.norm_weight.to(parameter)
    inputs.norm_bias = inputs.norm_bias.to(parameter)
    wide = run_operator(inputs, epilogue)
    assert wide["dnorm_weight"].dtype == parameter
    for name in narrow:
        assert torch.equal(narrow[name], wide[name].to(inputs.z.dtype))


@pytest.mark.usefixtures("cpp")
@pytest.mark.parametrize("present", range(16))
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_absent_parameters(norm: str, present: int) -> None:
    inputs = with_present(make_inputs(9, 40, torch.float32, norm), present)
    check(inputs, make_epilogue(norm, "tanh", 0.2))


@pytest.mark.usefixtures("cpp")
@pytest.mark.parametrize("parameter", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wider_parameters(dtype: torch.dtype, parameter: torch.dtype) -> None:
    inputs = make_inputs(33, 70, dtype, residual=False, bias=False)
    check_wider_parameters(inputs, make_epilogue("layer", "gelu", 0.1), parameter)


def adversarial(kind: str, cols: int = 200) -> torch.Tensor:
    z = torch.randn(12, cols, generator=torch.Generator().manual_seed(1))
    match kind:
        case "mean 1e4":
            return z + 1e4
        case "constant rows":
            return z[:, :1].expand(-1, cols) * 3
        case "one outlier first":
            z[:, 0] = 1e4
            return z
        case "one outlier last":
            z[:, -1] = -1e6
            return z
        case "denormal":
            return z * 1e-40
        case "huge":
            return z.sign() * 1e38
        case "tiny deviation":
            return 1 + z * 1e-6
        case "zeros":
            return z * 0
    raise AssertionError(kind)


ADVERSARIAL = ["mean 1e4", "constant rows", "one outlier first", "one outlier last", "denormal"]
ADVERSARIAL += ["huge", "tiny deviation", "zeros"]


def adversarial_inputs(kind: str, norm: str | None) -> Inputs:
    inputs = make_inputs(12, 200, torch.float32, norm, bias=False, residual=False)
    inputs.z = adversarial(kind).contiguous()
    return inputs


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("activation", ["gelu", "relu", None])
@pytest.mark.parametrize(
    "kind, norm",
    # The others' squares overflow: test_squares_that_overflow.
    [(kind, norm) for kind in ADVERSARIAL for norm in NORMS if kind != "huge" or norm is None],
)
def test_adversarial_values(kind: str, norm: str | None, activation: str | None) -> None:
    inputs = adversarial_inputs(kind, norm)
    epilogue = make_epilogue(norm, activation)
    if activation == "relu" and norm == "layer":
        # Rounding moves an element across the kink, in eager as here: none may be near it.
        parameters = (t if t is None else t.double() for t in inputs.parameters[1:])
        h = reference.normalize(inputs.z.double(), epilogue, *parameters)
        inputs.dy[(h.abs() < 0.01) & (h != 0)] = 0
    found = run_operator(inputs, epilogue)
    oracle = run_reference(inputs, epilogue, torch.float64)
    eager = run_reference(inputs, epilogue, torch.float32)
    # A mean that is rounded shifts all of a row by half an ulp of |z|, so the normalised values
    # and what is made of them by that times rstd. Nothing else excuses more than eager's error.
    deviation = float(inputs.z.double().var(dim=1, correction=0).min())
    rstd = 1 / math.sqrt(deviation + 1e-5) if norm == "layer" else 0.0
    shift = float(inputs.z.abs().max()) * rstd / (2 * FLOOR)
    terms = shift * float(inputs.dy.square().sum(0).sqrt().max())
    for name, result in found.items():
        assert result.isfinite().all() and eager[name].isfinite().all(), name
        magnitude = 0.0 if name == "y" else terms * (rstd if name == "dz" else 1.0)
        assert_close(name, result, oracle[name], eager[name], torch.float32, magnitude)
    if norm and (kind == "zeros" or (kind == "constant rows" and norm == "layer")):
        # Every normalised value is zero, and no rounding error may pass for one that is not.
        assert bool((found["dnorm_weight"] == 0).all())
        assert torch.equal(found["y"], found["y"][:1].expand(12, -1))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("activation", ["gelu", "relu", None])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_squares_that_overflow(norm: str, activation: str | None) -> None:
    """LayerNorm gives eager's NaN; RMSNorm the limit, as if z were 0, where eager's dz is NaN."""
    inputs = adversarial_inputs("huge", norm)
    epilogue = make_epilogue(norm, activation)
    found = run_operator(inputs, epilogue)
    eager = run_reference(inputs, epilogue, torch.float32)
    if norm == "layer":
        assert found["y"].isnan().all() and found["dz"].isnan().all()
        for name, result in found.items():
            torch.testing.assert_close(result, eager[name], equal_nan=True, msg=name)
        return
    inputs.z = torch.zeros_like(inputs.z)
    oracle = run_reference(inputs, epilogue, torch.float64)
    eager = run_reference(inputs, epilogue, torch.float32)
    for name in ("y", "dnorm_bias"):
        assert_close(name, found[name], oracle[name], eager[name], torch.float32)
    assert bool((found["dz"] == 0).all()) and bool((found["dnorm_weight"] == 0).all())


BREAKPOINTS = [0.0, -0.0, 3.0, -3.0, 6.0, -6.0, 1.0, -1.0, 20.0, 20.5, -20.0, 0.625, 88.0, -88.0]
BREAKPOINTS += [100.0, -100.0, 1e-8, -1e-8, 1e-30, 5.0, -5.0, 9.0, -9.0, 12.0, -12.0]
WITH_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
SPECIAL = [float("inf"), float("-inf"), float("nan")]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("activation", EVERY_ACTIVATION)
def test_breakpoints_and_special_values(activation: str | None) -> None:
    values = BREAKPOINTS + SPECIAL
    inputs = Inputs(z=torch.tensor([values] * 2), dy=torch.ones(2, len(values)))
    epilogue = make_epilogue(None, activation)
    found = run_operator(inputs, epilogue)
    oracle = run_reference(inputs, epilogue, torch.float64)
    eager = run_reference(inputs, epilogue, torch.float32)
    for name in ("y", "dz"):
        for i, value in enumerate(values):
            got, want, torchs = (t[name][0, i].double() for t in (found, oracle, eager))
            where = f"{activation} {name} at {value}: got {got}, oracle {want}, eager {torchs}"
            if not math.isfinite(value):
                # What eager gives; or the limit, where eager computes 0·∞ on the way to it.
                assert not got.isnan() or torchs.isnan(), where
                assert got.isnan() or got == torchs or torchs.isnan(), where
                assert name != "y" or got.isnan() or not math.isnan(value), where
                continue
            allowed = 2 * (torchs - want).abs() + 4e-7 * want.abs() + 1e-7 * abs(value) * 1e-3
            # The derivative of GELU is a sum with 1/2, and is right to an ulp of that.
            allowed += 1.2e-7 if (activation, name) == ("gelu", "dz") else 1e-12
            # So is its value, times |z|; torch's erf without AVX-512 is nearer in the left tail.
            if (activation, name) == ("gelu", "y") and not WITH_AVX512:
                allowed += 4e-8 * abs(value)
            assert (got - want).abs() <= allowed, where


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("activation", ["relu", "relu6", "hardsigmoid", "hardswish"])
def test_an_infinite_gradient_is_zero_where_the_activation_is_flat(activation: str) -> None:
    """Losses scaled for float16 overflow; 0·inf would spread NaN where eager has zeros."""
    z = torch.tensor([[-9.0, -4.0, -3.5] * 8])
    inputs = Inputs(z=z, dy=torch.full_like(z, math.inf))
    epilogue = make_epilogue(None, activation)
    eager = run_reference(inputs, epilogue, torch.float32)["dz"]
    assert torch.equal(run_operator(inputs, epilogue)["dz"], eager) and bool((eager == 0).all())


@pytest.mark.parametrize("activation", ["silu", "relu_squared", None])
def test_an_error_near_zero_is_seen_beside_large_values(activation: str | None) -> None:
    """The rule that test_gpu.py has for approximate instructions, by decades of z."""
    values = torch.cat([torch.linspace(-12, 12, 4000), torch.logspace(-30, 4, 500)])
    z = torch.cat([values, -values])[None]
    inputs, epilogue = Inputs(z=z, dy=torch.ones_like(z)), make_epilogue(None, activation)
    ours = run_operator(inputs, epilogue)["y"]
    right, eager = (run_reference(inputs, epilogue, d)["y"] for d in (torch.float64, z.dtype))

    def judge(found: torch.Tensor) -> None:
        for name, where in decades(z):
            assert_close(name, found[where], right[where], eager[where], z.dtype)

    judge(ours)
    spoiled = torch.where(z.abs() < 1e-3, ours * 1.001, ours)
    assert_close("all at once", spoiled, right, eager, z.dtype)
    with pytest.raises(AssertionError, match=r"[+-]1e-\d+: .* times the allowed error"):
        judge(spoiled)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("activation", ["tanh", "elu", "selu", "softplus", "mish", "silu", "gelu"])
def test_relative_accuracy_near_zero_and_in_tails(activation: str) -> None:
    z = torch.cat([torch.logspace(-20, 1.0, 400), -torch.logspace(-20, 0.9, 400)])[None]
    inputs = Inputs(z=z, dy=torch.ones_like(z))
    epilogue = make_epilogue(None, activation)
    oracle = run_reference(inputs, epilogue, torch.float64)["y"]
    error = ((run_operator(inputs, epilogue)["y"] - oracle) / oracle).abs()
    eager = run_reference(inputs, epilogue, torch.float32)["y"]
    theirs = ((eager - oracle) / oracle).abs()
    assert float(error.max()) <= 2 * float(theirs.max()) + 8e-7


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropped_elements_multiply_by_zero(dtype: torch.dtype) -> None:
    z = torch.full((4, 64), float("inf"), dtype=dtype)
    inputs = Inputs(z=z, dy=torch.ones_like(z))
    y = run_operator(inputs, make_epilogue(None, None, 0.5))["y"]
    assert y.isnan().any() and y.isposinf().any() and not (y == 0).any()
    everything = run_operator(Inputs(z=torch.ones_like(z), dy=z), make_epilogue(None, "relu", 1.0))[
        "y"
    ]
    assert (everything == 0).all()


@pytest.mark.usefixtures("cpp")
def test_same_bits_at_any_thread_count() -> None:
    inputs = make_inputs(3000, 129, torch.float32)
    epilogue = make_epilogue("layer", "gelu", 0.1)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run_operator(inputs, epilogue))
    torch.set_num_threads(before)
    for other in results[1:]:
        for name, t in other.items():
            assert torch.equal(t, results[0][name]), name
