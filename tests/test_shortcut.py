"""The shortcut in front of the activation by the C++ kernels, against float64.

y = residual + dropout(activation(norm(z) + shortcut))
"""

from __future__ import annotations

import math

import channel_cases
import pytest
import torch
from cases import DTYPES, EVERY_ACTIVATION, NORMS, make_epilogue, make_inputs, run_operator
from test_row import check

from fused.backends import ops

pytestmark = pytest.mark.usefixtures("one_thread")
# Rows as in test_row.py: around a vector and a random block, and longer than a segment.
ROWS = [(5, 1), (3, 7), (70, 64), (33, 65), (7, 200), (2, 1025)]
# Planes in the cache, rows of few positions, and what takes two passes over memory.
PLANES = [(3, 6, 37, 2), (4, 16, 4, 4), (70, 8, 3, 2), (300, 24, 1, 3), (2, 2, 4099, 1)]
PLANES += [(1, 320, 700, 4), (40, 96, 49, 32)]
SMOOTH = ("silu", "tanh", "gelu")
HALF = (torch.bfloat16, torch.float16)


def activation_for(name: str | None, dtype: torch.dtype) -> str | None:
    """Not one with a kink, where eager rounds the norm's result: the sum changes its side."""
    kinks = ("relu", "relu6", "leaky_relu", "hardswish", "hardsigmoid")
    return "silu" if name in kinks and dtype in HALF else name


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", EVERY_ACTIVATION)
def test_rows(activation: str | None, norm: str | None, dtype: torch.dtype) -> None:
    activation = activation_for(activation, dtype)
    for (rows, cols), p in (((37, 65), 0.0), ((6, 200), 0.3)):
        inputs = make_inputs(rows, cols, dtype, norm, residual=p > 0, shortcut=True)
        check(inputs, make_epilogue(norm, activation, p), f"({rows}, {cols}) p={p}")


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_shapes_of_rows(shape: tuple[int, int], norm: str | None, dtype: torch.dtype) -> None:
    for activation in SMOOTH:
        check(make_inputs(*shape, dtype, norm, shortcut=True), make_epilogue(norm, activation, 0.1))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", channel_cases.NORMS)
@pytest.mark.parametrize("activation", EVERY_ACTIVATION)
def test_planes(activation: str | None, norm: str | None, dtype: torch.dtype) -> None:
    activation = activation_for(activation, dtype)
    for last in channel_cases.LAYOUTS:
        for p in (0.0, 0.3):
            inputs = channel_cases.make_inputs(3, 6, 37, dtype, norm, last, shortcut=True)
            epilogue = channel_cases.make_epilogue(norm, activation, p, 6, 2, last)
            channel_cases.check(inputs, epilogue, f"last={last} p={p}")


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("channels_last", channel_cases.LAYOUTS)
@pytest.mark.parametrize("norm", channel_cases.NORMS)
@pytest.mark.parametrize("shape", PLANES, ids=str)
def test_shapes_of_planes(
    shape: tuple[int, int, int, int], norm: str | None, channels_last: bool
) -> None:
    *sizes, groups = shape
    for dtype, activation, p, constant in (
        *((torch.float32, "silu", 0.1, False), (torch.bfloat16, "silu", 0.1, False)),
        *((torch.float32, "relu", 0.0, False), (torch.float16, "tanh", 0.0, True)),
        (torch.float64, "relu", 0.1, False),
    ):
        if constant and norm in (None, "group"):
            continue
        given = {"constant": constant, "shortcut": True, "residual": p > 0}
        inputs = channel_cases.make_inputs(*sizes, dtype, norm, channels_last, **given)
        epilogue = channel_cases.make_epilogue(norm, activation, p, sizes[1], groups, channels_last)
        channel_cases.check(inputs, epilogue, f"{activation} p={p} {dtype} constant={constant}")


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("norm", channel_cases.NORMS)
def test_padding_and_dropout_of_channels(norm: str | None) -> None:
    for sizes, groups in (((4, 6, 50), 2), ((5, 3, 1), 3), ((2, 8, 1200), 2)):
        for dtype in DTYPES:
            given = {"masked": True, "shortcut": True}
            inputs = channel_cases.make_inputs(*sizes, dtype, norm, True, **given)
            epilogue = channel_cases.make_epilogue(norm, "silu", 0.3, sizes[1], groups, True, True)
            channel_cases.check(inputs, epilogue, f"{sizes}")
            found = channel_cases.run_operator(inputs, epilogue)
            for name in ("y", "dz", "dshortcut"):
                if name in found:
                    assert (found[name][~inputs.mask] == 0).all(), name


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("channels_last", channel_cases.LAYOUTS)
def test_batch_norm_in_parts(channels_last: bool) -> None:
    for sizes in ((3, 5, 400), (70, 16, 4)):
        inputs = channel_cases.make_inputs(
            *sizes, torch.float32, "batch", channels_last, shortcut=True
        )
        epilogue = channel_cases.make_epilogue("batch", "silu", 0.1, sizes[1], 1, channels_last)
        whole = channel_cases.run_operator(inputs, epilogue)
        for name, t in channel_cases.run_in_parts(inputs, epilogue).items():
            torch.testing.assert_close(t, whole[name], rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("cpp")
def test_the_bits_do_not_depend_on_the_threads() -> None:
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        inputs = channel_cases.make_inputs(40, 96, 49, torch.float32, "batch", shortcut=True)
        epilogue = channel_cases.make_epilogue("batch", "relu", 0.0, 96)
        rows = make_inputs(900, 130, torch.float32, "layer", shortcut=True)
        of_rows = run_operator(rows, make_epilogue("layer", "gelu", 0.1))
        found.append([*channel_cases.run_operator(inputs, epilogue).values(), *of_rows.values()])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.usefixtures("cpp")
def test_infinite_and_missing_values_go_through() -> None:
    inputs = make_inputs(4, 40, torch.float32, "layer", shortcut=True, residual=False)
    assert inputs.shortcut is not None
    places = {(0, 3): math.inf, (1, 5): -math.inf, (2, 7): math.nan}
    for place, value in places.items():
        inputs.shortcut[place] = value
    for activation in ("relu", "gelu", "sigmoid"):
        y = run_operator(inputs, make_epilogue("layer", activation))["y"]
        others = torch.ones(4, 40, dtype=torch.bool)
        for place in places:
            expected = getattr(torch.nn.functional, activation)(inputs.shortcut[place])
            torch.testing.assert_close(y[place], expected, equal_nan=True)
            others[place] = False
        assert y[others].isfinite().all()


@pytest.mark.usefixtures("cpp")
def test_what_is_refused() -> None:
    z, codes = torch.randn(4, 8), make_epilogue("layer", "gelu").row
    gated = (*codes[:2], 17, *codes[3:])
    nothing = (None,) * 5
    for sentence, shortcut, scalars in (
        ("takes no shortcut", z, gated),
        ("shortcut must be contiguous", torch.randn(8, 4).t(), codes),
        ("shortcut must be", z[:3], codes),
        ("dtype", z.double(), codes),
    ):
        with pytest.raises(RuntimeError, match=sentence):
            ops.row_forward(z, *nothing, *scalars, shortcut)
    planes = torch.randn(2, 3, 5)
    codes = channel_cases.make_epilogue("batch", "relu", 0.0, 3).channel
    for shortcut in (planes[:1], planes.double(), planes.transpose(1, 2)):
        with pytest.raises(RuntimeError, match="shortcut must be contiguous, with the shape"):
            ops.channel_forward(planes, *nothing, *codes, shortcut)
