"""The CUDA C++ channel kernels, emulated: the tests of the C++ kernels, and what is their own."""

from __future__ import annotations

import pytest
import torch
from channel_cases import (
    LAYOUTS,
    NORMS,
    check,
    make_epilogue,
    make_inputs,
    run_operator,
    wanted_of,
)
from emulated import LAUNCHERS
from test_channel import (  # noqa: F401  collected here too, and run on these kernels (conftest.py)
    LARGE,
    test_absent_parameters,
    test_batch_norm_in_parts_gives_the_same_bits,
    test_constant_statistics,
    test_dropout_of_whole_channels,
    test_every_activation,
    test_every_shape,
    test_masks,
    test_masks_with_constant_statistics_and_without_any_position,
    test_statistics,
    test_the_mask_of_dropout_is_that_of_the_reference,
    test_wider_parameters,
)
from test_channel_memory import (  # noqa: F401
    test_in_place_writes_y_and_nothing_else,
    test_offsets_and_red_zones,
    test_outputs_are_written_completely,
)
from test_channel_values import (  # noqa: F401
    test_a_first_mean_that_is_far_off,
    test_adversarial_values,
    test_nan_and_infinity_stay_in_their_statistic,
    test_squares_that_overflow,
    test_without_a_norm_values_pass_as_they_are,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from fused import spec
from fused.backends import ops
from fused.run import reference

pytestmark = pytest.mark.usefixtures("emulation")


@pytest.mark.parametrize("channels_last", LAYOUTS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_large(shape: tuple[int, int, int, int], norm: str | None, channels_last: bool) -> None:
    """Several chunks, teams of a whole block; rounding moves no element across a kink of silu."""
    *sizes, groups = shape
    for dtype, p, constant in (
        (torch.float32, 0.1, False),
        (torch.float32, 0.0, True),
        (torch.bfloat16, 0.1, False),
    ):
        if constant and norm in (None, "group"):
            continue
        inputs = make_inputs(*sizes, dtype, norm, channels_last, constant=constant)
        epilogue = make_epilogue(norm, "silu", p, sizes[1], groups, channels_last)
        check(inputs, epilogue, f"p={p} {dtype} constant={constant}")


@pytest.mark.parametrize("channels_last", LAYOUTS)
@pytest.mark.parametrize("norm", NORMS)
def test_same_bits_twice(norm: str | None, channels_last: bool) -> None:
    """Sums over several chunks, whole packs of 16 bytes and single elements."""
    for shape in ((2, 6, 9001), (3, 8, 10000), (5, 40, 64)):
        inputs = make_inputs(*shape, torch.bfloat16, norm, channels_last)
        epilogue = make_epilogue(norm, "gelu", 0.1, shape[1], 2, channels_last)
        first, second = (run_operator(inputs, epilogue) for _ in range(2))
        for name, t in first.items():
            assert torch.equal(t, second[name]), (name, shape)


@pytest.mark.parametrize("channels_last", LAYOUTS)
@pytest.mark.parametrize("norm", ["group", "instance"])
def test_constants_of_each_sample(norm: str, channels_last: bool) -> None:
    """Given statistics, not those of z, of every sample: their gradients and sums."""
    channels, groups = 6, 2 if norm == "group" else 6
    for dtype in (torch.float32, torch.float64):
        x = make_inputs(3, channels, 37, dtype, norm, channels_last, residual=False)
        epilogue = make_epilogue(norm, "silu", 0.0, channels, groups, channels_last)
        mean, variance = torch.randn(3, groups), torch.rand(3, groups) + 0.5
        leaves = [t.double().requires_grad_() for t in (x.z, *x.parameters)]
        h = reference.normalize_channels(
            leaves[0], epilogue, mean.double(), variance.double(), *leaves[1:]
        )
        expected = torch.nn.functional.silu(h)
        gradients = torch.autograd.grad(expected, leaves, x.dy.double())
        codes = epilogue.channel
        y = LAUNCHERS.channel_apply(x.z, mean, variance, *x.parameters, None, None, None, *codes)
        wanted = 7 if norm == "instance" else 3
        found = LAUNCHERS.channel_backward(
            *(x.dy, x.z, mean, variance, None, *x.parameters, None, None, wanted, True, *codes)
        )
        rtol = 2e-5 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(y.double(), expected.detach(), rtol=rtol, atol=rtol)
        for t, oracle in zip(found, gradients, strict=False):
            torch.testing.assert_close(t.double(), oracle, rtol=rtol, atol=10 * rtol)
        if wanted == 7:
            dbias = gradients[0].sum((0, 1) if channels_last else (0, 2))
            torch.testing.assert_close(found[3].double(), dbias, rtol=rtol, atol=10 * rtol)


def test_a_bias_before_group_norm_is_refused() -> None:
    x = make_inputs(2, 4, 5, torch.float32, "group")
    codes = make_epilogue("group", None, 0.0, 4, 2).channel
    statistics = torch.zeros(2, 2), torch.ones(2, 2), None
    with pytest.raises(ValueError, match="bias in front of group norm"):
        LAUNCHERS.channel_backward(
            *(x.dy, x.z, *statistics, None, None, None, None, spec.WANT_BIAS, False, *codes)
        )


@pytest.mark.parametrize("positions", [0, 9])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_fake_kernels_foretell_shapes_and_dtypes(
    norm: str | None, dtype: torch.dtype, masked: bool, positions: int
) -> None:
    """opcheck does this for the C++ kernels; it cannot reach kernels that need a GPU."""
    x = make_inputs(3, 6, positions, dtype, norm, True, masked=masked)
    epilogue = make_epilogue(norm, "gelu", 0.1, 6, 2, True)
    codes, rest = epilogue.channel, (x.mask, x.seed)

    def run(given: object) -> tuple[torch.Tensor, ...]:
        mean = variance = count = None
        found: tuple[torch.Tensor, ...] = ()
        if norm is not None:
            found = given.channel_statistics(x.z, x.mask, *codes[:3])
            found += given.channel_forward(x.z, *x.parameters, x.residual, *rest, *codes)
            mean, variance, count = found[:3]
        statistics = mean, variance
        found += (given.channel_apply(x.z, *statistics, *x.parameters, x.residual, *rest, *codes),)
        found += given.channel_backward(
            *(x.dy, x.z, *statistics, count if masked else None, *x.parameters, *rest),
            *(wanted_of(x, epilogue), False, *codes),
        )
        if norm == "batch":
            count = mean.new_ones(1) if count is None or not masked else count
            sums, nothing = given.channel_sums(x.dy, x.z, *statistics, *x.parameters, *rest, *codes)
            dz = given.channel_gradient(
                x.dy, x.z, *statistics, sums, count, *x.parameters, *rest, *codes
            )
            found += (sums, nothing, dz)
        return found

    real = run(LAUNCHERS)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = run(ops)
    for r, f in zip(real, fake, strict=True):
        assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())
