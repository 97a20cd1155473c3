"""The CUDA C++ kernels of gated activations, emulated: the C++ kernels' tests, and their own."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, NORMS, Inputs, make_epilogue, run_operator
from emulated import LAUNCHERS
from gated_cases import GATED, make_gated_epilogue, make_gated_inputs
from test_gated import (  # noqa: F401  collected here too, and run on these kernels (conftest.py)
    test_absent_parameters,
    test_adversarial_values,
    test_an_infinite_gradient_is_zero_where_the_gate_is_flat,
    test_breakpoints_and_special_values,
    test_dropped_elements_multiply_by_zero,
    test_every_gate,
    test_every_shape,
    test_wider_parameters,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from fused.backends import cuda_library, cuda_row, ops
from fused.run.random import keep_mask
from fused.spec import Spec, dropout_scale

pytestmark = pytest.mark.usefixtures("emulation")


@pytest.mark.parametrize("threshold", [1, 6554, 32768, 65535, 65536])
@pytest.mark.parametrize("rows, half", [(37, 9), (3, 100), (2, 515)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_mask_over_half_the_columns_is_random_py_bit_for_bit(
    dtype: torch.dtype, rows: int, half: int, threshold: int
) -> None:
    """reglu of ones: 1 where kept, and so are both gradients."""
    z = torch.ones(rows, 2 * half, dtype=dtype)
    codes = make_gated_epilogue(None, "reglu")._replace(threshold=threshold).row
    for number in (0, -1, 2**62 + 2**33 + 7):
        seed = torch.tensor([number])
        y, statistics = LAUNCHERS.row_forward(z, None, None, None, None, seed, *codes)
        dy = torch.ones_like(y)
        dz = LAUNCHERS.row_backward(dy, z, None, None, None, statistics, seed, 0, *codes)[0]
        keep = keep_mask(rows, half, threshold, seed)
        scale = torch.tensor(dropout_scale(threshold), dtype=torch.float64).to(dtype)
        assert torch.equal(y, torch.where(keep, scale, torch.zeros_like(y)))
        assert torch.equal(dz, y.repeat(1, 2))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(3000, 10), (130, 350), (2, 4500)], ids=str)
def test_same_bits_twice(shape: tuple[int, int], norm: str | None) -> None:
    """Sums over several chunks of rows and blocks of columns."""
    inputs = make_gated_inputs(*shape, torch.bfloat16, norm)
    assert cuda_row.chunks_of(*shape) == {3000: 47, 130: 3, 2: 1}[shape[0]]
    epilogue = make_gated_epilogue(norm, "geglu", 0.1)
    first, second = (run_operator(inputs, epilogue) for _ in range(2))
    for name, t in first.items():
        assert torch.equal(t, second[name]), name


@pytest.mark.parametrize("wanted", range(8))
@pytest.mark.parametrize("norm", NORMS)
def test_wanted_sums(norm: str | None, wanted: int) -> None:
    """Any subset, and none of the others changes by a bit."""
    inputs = make_gated_inputs(70, 33, torch.bfloat16, norm)
    codes = make_gated_epilogue(norm, "swiglu", 0.1).row
    parameters, seed = inputs.parameters, inputs.seed
    _, statistics = LAUNCHERS.row_forward(inputs.z, *parameters, None, seed, *codes)

    def backward(bits: int) -> tuple[torch.Tensor, ...]:
        given = (inputs.dy, inputs.z, *parameters, statistics, seed, bits)
        *found, dshortcut = LAUNCHERS.row_backward(*given, *codes)
        assert dshortcut.shape == (0,)
        return tuple(found)

    every = backward(7)
    for i, (t, expected) in enumerate(zip(backward(wanted), every, strict=True)):
        present = i == 0 or wanted >> (i - 1) & 1
        assert torch.equal(t, expected if present else expected.new_empty((0,)).float()), i
    assert [t.numel() for t in every[1:]] == ([66] * 3 if norm else [0, 0, 66])


def test_statistics_are_those_without_a_gate() -> None:
    for norm in NORMS[1:]:
        x = make_gated_inputs(9, 70, torch.bfloat16, norm)
        given = (x.z, *x.parameters, None, x.seed)
        gated = LAUNCHERS.row_forward(*given, *make_gated_epilogue(norm, "glu").row)[1]
        plain = LAUNCHERS.row_forward(*given, *make_epilogue(norm, "relu").row)[1]
        torch.testing.assert_close(gated, plain, rtol=1e-6, atol=1e-6)  # summed by another team


@pytest.mark.parametrize("rows, cols", [(3, 40), (0, 8), (4, 0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_fake_kernels_foretell_shapes_and_dtypes(
    norm: str | None, dtype: torch.dtype, rows: int, cols: int
) -> None:
    """opcheck does this for the C++ kernels; it cannot reach kernels that need a GPU."""
    x = make_gated_inputs(rows, cols // 2, dtype, norm)
    codes = make_gated_epilogue(norm, "swiglu", 0.1).row
    forward = (x.z, *x.parameters, x.residual, x.seed, *codes)
    real = LAUNCHERS.row_forward(*forward)
    backward = (x.dy, x.z, *x.parameters, real[1], x.seed, 7, *codes)
    real += LAUNCHERS.row_backward(*backward)
    assert not any(t.isnan().any() for t in real)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = ops.row_forward(*forward) + ops.row_backward(*backward)
    for r, f in zip(real, fake, strict=True):
        assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_rows_offsets_and_red_zones(dtype: torch.dtype, aligned: bool) -> None:
    """Rows at an odd offset and an odd stride in poisoned memory, or at multiples of 16 bytes.

    No bit differs. Of 10 columns a half, the gate's are no multiple of a pack away; of 12, they are
    in backward alone where elements have 16 bits.
    """
    epilogue = make_gated_epilogue("layer", "swiglu", 0.2)
    for half in (1, 7, 10, 12, 16, 48):
        plain = make_gated_inputs(6, half, dtype)
        strided = {
            name: getattr(plain, name) for name in ("bias", "norm_weight", "norm_bias", "seed")
        }
        for name in ("z", "dy", "residual"):
            dense = getattr(plain, name)
            rows, cols = dense.shape
            offset, stride = (0, cols // 16 * 16 + 32) if aligned else (1, cols + 3)
            buffer = torch.full((offset + rows * stride,), float("nan"), dtype=dtype)
            strided[name] = buffer[offset:].view(rows, stride)[:, :cols]
            strided[name].copy_(dense)
        expected = run_operator(plain, epilogue)
        for name, t in run_operator(Inputs(**strided), epilogue).items():
            assert torch.equal(t, expected[name]), (name, half)


@pytest.mark.parametrize("activation", GATED)
def test_what_cannot_be_halved_is_said(activation: str) -> None:
    x = make_gated_inputs(3, 4, torch.float32)
    codes = make_gated_epilogue("layer", activation).row
    odd, statistics = x.z[:, :7], torch.zeros(2, 3)
    sentence = f"fused: {activation} halves the columns of z, so their number must be even, got 7"
    with pytest.raises(ValueError, match=sentence):
        LAUNCHERS.row_forward(odd, None, None, None, None, None, *codes)
    with pytest.raises(ValueError, match=sentence):
        LAUNCHERS.row_backward(x.dy, odd, None, None, None, statistics, None, 0, *codes)
    before = x.z.clone()
    with pytest.raises(ValueError, match=f"fused: y of {activation} has half the columns of z"):
        LAUNCHERS.row_forward_(x.z, None, None, None, None, None, *codes)
    assert torch.equal(x.z, before)


def test_channel_kernels_say_that_they_have_no_gates() -> None:
    codes = Spec(activation="reglu", channels_last=True).channel
    with pytest.raises(ValueError, match="reglu halves the columns, which row_forward and row_"):
        LAUNCHERS.channel_apply(torch.ones(1, 3, 4), *[None] * 7, *codes)


def test_a_launch_that_fails_says_so() -> None:
    for direction in ("forward", "backward"):
        given = {"rows": 1 << 50, "cols": 1 << 20, "chunks": 1 << 40, "activation": 16}
        with pytest.raises(RuntimeError, match=f"gated_{direction} cannot be launched: invalid"):
            cuda_library.launch(f"gated_{direction}", torch.empty(0), {}, given)
