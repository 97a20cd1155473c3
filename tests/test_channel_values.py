"""The C++ kernels of batch, group and instance norm on values that are hard on them."""

from __future__ import annotations

import math

import pytest
import torch
from channel_cases import (
    LAYOUTS,
    NORMS,
    Inputs,
    check,
    largest_rstd,
    make_epilogue,
    make_inputs,
    run_operator,
    run_reference,
)
from tolerances import FLOOR, assert_close

pytestmark = pytest.mark.usefixtures("one_thread")


def adversarial(kind: str) -> torch.Tensor:
    """(samples, channels, positions) = (4, 6, 50), the same channels in all samples."""
    z = torch.randn(4, 6, 50, generator=torch.Generator().manual_seed(1))
    match kind:
        case "mean 1e4":
            return z + 1e4
        case "constant channels":
            return z[:1, :, :1].expand(4, -1, 50) * 3
        case "one outlier first":
            z[0, :, 0] = 1e4
            return z
        case "one outlier last":
            z[-1, :, -1] = -1e6
            return z
        case "denormal":
            return z * 1e-40
        case "tiny deviation":
            return 1 + z * 1e-6
        case "large":
            return z * 1e15
        case "zeros":
            return z * 0
    raise AssertionError(kind)


ADVERSARIAL = ["mean 1e4", "constant channels", "one outlier first", "one outlier last"]


ADVERSARIAL += ["denormal", "tiny deviation", "large", "zeros"]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("channels_last", LAYOUTS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", ADVERSARIAL)
def test_adversarial_values(kind: str, norm: str | None, channels_last: bool) -> None:
    for activation in ("gelu", None):
        inputs = make_inputs(4, 6, 50, torch.float32, norm, channels_last, residual=False)
        inputs.z = adversarial(kind)
        inputs.z = (inputs.z.transpose(1, 2) if channels_last else inputs.z).contiguous()
        epilogue = make_epilogue(norm, activation, 0.0, 6, 6, channels_last)
        found = run_operator(inputs, epilogue)
        oracle = run_reference(inputs, epilogue, torch.float64)
        eager = run_reference(inputs, epilogue, torch.float32)
        # A mean that is rounded shifts all of a channel by half an ulp of |z|, so the normalised
        # values and what is made of them by that times rstd. Nothing else excuses more than
        # eager's error.
        rstd = largest_rstd(inputs, epilogue) if norm else 0.0
        shift = float(inputs.z.abs().max()) * rstd / (2 * FLOOR)
        terms = shift * float(inputs.dy.square().sum().sqrt())
        for name, result in found.items():
            assert result.isfinite().all(), name
            magnitude = shift if name == "y" else terms * (rstd if name == "dz" else 1.0)
            assert_close(name, result, oracle[name], eager[name], torch.float32, magnitude)
        if norm and kind in ("zeros", "constant channels"):
            # Every normalised value is zero, and no rounding error may pass for one that is not.
            assert bool((found["dnorm_weight"] == 0).all())


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("channels_last", LAYOUTS)
@pytest.mark.parametrize("norm", ["batch", "group", "instance"])
def test_a_first_mean_that_is_far_off(norm: str, channels_last: bool) -> None:
    """The statistics start from the mean of some of the elements."""
    channels, positions = (256, 256) if channels_last else (4, 4096)
    for height in (100.0, 1e4):
        inputs = make_inputs(
            *(2, channels, positions, torch.float32, norm, channels_last), residual=False
        )
        view = inputs.z.transpose(1, 2) if channels_last else inputs.z
        view[:, :, : positions // 8] += height
        check(inputs, make_epilogue(norm, None, 0.0, channels, 2, channels_last), f"{height}")


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("channels_last", LAYOUTS)
@pytest.mark.parametrize("norm", ["batch", "group", "instance"])
def test_squares_that_overflow(norm: str, channels_last: bool) -> None:
    """The variance, a float, is infinite: the limit is that of z = mean."""
    z = torch.randn(4, 6, 50).sign().mul_(1e38)
    inputs = Inputs(z, torch.randn_like(z), torch.ones(6), torch.arange(6.0))
    if channels_last:
        inputs.z, inputs.dy = (t.transpose(1, 2).contiguous() for t in (inputs.z, inputs.dy))
    epilogue = make_epilogue(norm, None, 0.0, 6, 2, channels_last)
    found = run_operator(inputs, epilogue)
    bias = inputs.norm_bias if channels_last else inputs.norm_bias[:, None]
    assert torch.equal(found["y"], bias.expand_as(z if not channels_last else found["y"]))
    assert (found["dz"] == 0).all()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("channels_last", LAYOUTS)
def test_nan_and_infinity_stay_in_their_statistic(channels_last: bool) -> None:
    for value in (math.nan, math.inf):
        for norm in ("batch", "group", "instance"):
            inputs = make_inputs(3, 6, 40, torch.float32, norm, channels_last, residual=False)
            view = inputs.z.transpose(1, 2) if channels_last else inputs.z
            view[1, 2, 3] = value
            epilogue = make_epilogue(norm, "silu", 0.0, 6, 3, channels_last)
            y = run_operator(inputs, epilogue)["y"]
            y = y.transpose(1, 2) if channels_last else y
            spoiled = torch.zeros(3, 6, 40, dtype=torch.bool)
            samples = slice(None) if norm == "batch" else 1
            spoiled[samples, 2 : 4 if norm == "group" else 3] = True
            assert torch.equal(y.isnan(), spoiled), (value, norm)


BREAKPOINTS = [0.0, -0.0, 3.0, -3.0, 6.0, -6.0, 1.0, -1.0, 20.0, 20.5, -20.0, 88.0, -88.0, 1e-30]


BREAKPOINTS += [math.inf, -math.inf, math.nan]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("activation", [None, "relu", "relu6", "hardswish", "silu"])
def test_without_a_norm_values_pass_as_they_are(activation: str | None) -> None:
    values = torch.tensor(BREAKPOINTS).expand(2, 3, -1).contiguous()
    for channels_last in LAYOUTS:
        inputs = Inputs(values, torch.ones_like(values))
        epilogue = make_epilogue(
            None, activation, 0.0, values.shape[2 if channels_last else 1], 1, channels_last
        )
        found = run_operator(inputs, epilogue)
        eager = run_reference(inputs, epilogue, torch.float32)
        for name in ("y", "dz"):
            known = ~eager[name].isnan() & (values.isfinite() if name == "dz" else True)
            torch.testing.assert_close(found[name][known], eager[name][known], rtol=1e-6, atol=0)
        if activation is None:
            assert torch.equal(found["y"].view(torch.int32), values.view(torch.int32))
