"""The CUDA C++ row kernels, emulated: the tests of the C++ kernels, and what is their own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import NORMS, Inputs, make_epilogue, make_inputs, run_operator
from emulated import LAUNCHERS
from test_row import (  # noqa: F401  collected here too, and run on these kernels (conftest.py)
    test_absent_parameters,
    test_adversarial_values,
    test_an_infinite_gradient_is_zero_where_the_activation_is_flat,
    test_breakpoints_and_special_values,
    test_dropped_elements_multiply_by_zero,
    test_every_activation,
    test_every_shape,
    test_relative_accuracy_near_zero_and_in_tails,
    test_squares_that_overflow,
    test_wider_parameters,
)
from test_row_memory import (  # noqa: F401
    test_in_place_writes_y_and_nothing_else,
    test_outputs_are_written_completely,
    test_rows_beyond_two_to_the_31_elements,
    test_strided_rows_offsets_and_red_zones,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from fused import spec
from fused.backends import cuda_library, ops
from fused.backends.cuda_row import chunks_of
from fused.run.random import keep_mask
from fused.spec import dropout_scale

pytestmark = pytest.mark.usefixtures("emulation")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("threshold", [1, 6554, 32768, 65535, 65536])
@pytest.mark.parametrize("rows, cols", [(37, 9), (3, 200), (2, 1031)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mask_is_random_py_bit_for_bit(
    dtype: torch.dtype, rows: int, cols: int, threshold: int
) -> None:
    ones = torch.ones(rows, cols, dtype=dtype)
    for number in (0, -1, 2**62 + 2**33 + 7):
        seed = torch.tensor([number])
        codes = (0, 0.0, 0, 0.0, 0.0, threshold)
        y, statistics = LAUNCHERS.row_forward(ones, None, None, None, None, seed, *codes)
        dz = LAUNCHERS.row_backward(
            ones, ones, None, None, None, statistics, seed, spec.WANT_BIAS, *codes
        )[0]
        keep = keep_mask(rows, cols, threshold, seed)
        scale = torch.tensor(dropout_scale(threshold), dtype=torch.float64).to(dtype)
        assert torch.equal(y, torch.where(keep, scale, torch.zeros_like(y)))
        assert torch.equal(dz, y)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(3000, 20), (130, 700), (2, 9000)], ids=str)
def test_same_bits_twice(shape: tuple[int, int], norm: str | None) -> None:
    """Sums over several chunks of rows and blocks of columns."""
    inputs = make_inputs(*shape, torch.bfloat16, norm)
    assert chunks_of(*shape) == {3000: 47, 130: 3, 2: 1}[shape[0]]
    epilogue = make_epilogue(norm, "gelu", 0.1)
    first, second = (run_operator(inputs, epilogue) for _ in range(2))
    for name, t in first.items():
        assert torch.equal(t, second[name]), name


@pytest.mark.parametrize("wanted", range(8))
@pytest.mark.parametrize("norm", NORMS)
def test_wanted_sums(norm: str | None, wanted: int) -> None:
    """Any subset, and none of the others changes by a bit."""
    inputs = make_inputs(70, 65, torch.bfloat16, norm)
    codes = make_epilogue(norm, "silu", 0.1).row
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
    if norm is None:
        assert [t.numel() for t in every[1:]] == [0, 0, 65]


@pytest.mark.parametrize("wanted", [7, 1, 0])
@pytest.mark.parametrize("rows, cols", [(3, 40), (0, 8), (4, 0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_fake_kernels_foretell_shapes_and_dtypes(
    norm: str | None, dtype: torch.dtype, rows: int, cols: int, wanted: int
) -> None:
    """opcheck does this for the C++ kernels; it cannot reach kernels that need a GPU."""
    x = make_inputs(rows, cols, dtype, norm)
    if norm is not None:
        x = replace(x, norm_weight=x.norm_weight.float(), norm_bias=x.norm_bias.float())
    codes = make_epilogue(norm, "gelu", 0.1).row
    forward = (x.z, *x.parameters, x.residual, x.seed, *codes)
    real = LAUNCHERS.row_forward(*forward)
    backward = (x.dy, x.z, *x.parameters, real[1], x.seed, wanted, *codes)
    real += LAUNCHERS.row_backward(*backward)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = ops.row_forward(*forward) + ops.row_backward(*backward)
    for r, f in zip(real, fake, strict=True):
        assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())


def test_packs_of_16_bytes_and_single_elements_give_the_same_bits() -> None:
    """Rows of whole packs at multiples of 16 bytes, and the same rows at odd places."""
    for dtype in DTYPES:
        plain = make_inputs(40, 96, dtype)
        odd = {
            name: torch.zeros(1 + getattr(plain, name).numel(), dtype=dtype)[1:]
            .view_as(getattr(plain, name))
            .copy_(getattr(plain, name))
            for name in ("z", "dy", "residual", "bias", "norm_weight", "norm_bias")
        }
        assert plain.z.data_ptr() % 16 == 0 and odd["z"].data_ptr() % 16
        epilogue = make_epilogue("layer", "gelu_tanh", 0.1)
        expected = run_operator(plain, epilogue)
        for name, t in run_operator(Inputs(**odd), epilogue).items():
            assert torch.equal(t, expected[name]), (dtype, name)


def test_a_launch_that_fails_says_so() -> None:
    given = {"rows": 1 << 50, "cols": 1 << 20}
    with pytest.raises(RuntimeError, match="row_forward cannot be launched: invalid configuration"):
        cuda_library.launch("row_forward", torch.empty(0), {}, given)
    with pytest.raises(RuntimeError, match="invalid argument"):
        cuda_library.launch("row_forward", torch.empty(0), {}, given | {"z_storage": 7})
