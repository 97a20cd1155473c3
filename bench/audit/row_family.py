"""Calls of the row kernels: statistics along a row, or none."""

from __future__ import annotations

import torch
from fused.kernels.row.backward import row_backward
from fused.kernels.row.forward import row_forward
from torch import Tensor

from fused.spec import (
    ACTIVATIONS,
    GATED_ACTIVATIONS,
    WANT_BIAS,
    WANT_NORM_BIAS,
    WANT_NORM_WEIGHT,
    Spec,
    make_spec,
)

from .covering import Case
from .family import DTYPES, Family, Make

EVERY_ACTIVATION = ("gelu", None, *(name for name in ACTIVATIONS if name != "gelu"))
# Every tile of the rules is that of a power of two; 32768 columns are walked over in a loop.
ORDINARY_WIDTH = 4096
OTHER_WIDTHS = [2**i for i in range(15, 3, -1) if 2**i != ORDINARY_WIDTH]
ALL = WANT_NORM_WEIGHT | WANT_NORM_BIAS | WANT_BIAS
_COMMON = {
    "rows": (64,),
    # Several rows a tile, two, one; at most threads; in a loop or in blocks of columns.
    "width": (ORDINARY_WIDTH, 64, 1024, 8192, 16384, 32768),
    # The whole tile; rows of 16-byte multiples that are no multiples of 16 elements; neither; and
    # addresses between 16-byte boundaries.
    "fit": ("even", "ragged", "odd", "offset"),
    "norm": ("layer", "rms", None),
    "activation": EVERY_ACTIVATION,
    "p": (0.1, 0.0),
    "dtype": tuple(DTYPES),
    # Bias and affine parameters: in z's dtype, in float32, without the bias, without any.
    "parameters": ("same", "float32", "affine", "none"),
}


def matrix(case: Case, make: Make, of_z: bool = False) -> Tensor:
    """The width is that of the result; before a gated activation z has twice as many columns."""
    cols = case["width"] - {"ragged": 8, "odd": 1}.get(case["fit"], 0)
    cols *= 2 if of_z and case["activation"] in GATED_ACTIVATIONS else 1
    first = int(case["fit"] == "offset")
    flat = make((first + case["rows"] * cols,), DTYPES[case["dtype"]])
    return flat[first:].view(case["rows"], cols)


def _parameters(case: Case, make: Make, cols: int) -> tuple[Tensor | None, ...]:
    kind = case["parameters"]
    dtype = DTYPES["fp32" if kind == "float32" else case["dtype"]]
    present = (kind not in ("affine", "none"), kind != "none", kind != "none")
    return tuple(make((cols,), dtype) if here else None for here in present)


def _epilogue(case: Case) -> Spec:
    return make_spec(case["norm"], 1e-5, case["activation"], case["p"])


def _shortcut(case: Case, make: Make) -> Tensor | None:
    return matrix(case, make) if case.get("shortcut") else None


def forward(case: Case, make: Make) -> object:
    """Calls the forward on the tensors of a case."""
    z = matrix(case, make, of_z=True)
    parameters = _parameters(case, make, z.shape[1])
    residual = matrix(case, make) if case["residual"] else None
    seed = make((1,), torch.int64)
    return row_forward(z, *parameters, residual, seed, *_epilogue(case).row, _shortcut(case, make))


def backward(case: Case, make: Make) -> object:
    """Calls the backward on the tensors of a case."""
    dy, z = matrix(case, make), matrix(case, make, of_z=True)
    parameters = _parameters(case, make, z.shape[1])
    statistics = make((2, z.shape[0]), DTYPES["fp32"])
    seed = make((1,), torch.int64)
    codes = (*_epilogue(case).row, _shortcut(case, make))
    return row_backward(dy, z, *parameters, statistics, seed, case["wanted"], *codes)


FORWARD = Family(
    name="row forward",
    properties=_COMMON | {"residual": (False, True)},
    headlines=[{}, *({"width": w} for w in OTHER_WIDTHS)],
    small={
        "layer": {"rows": 5, "width": 200, "residual": True},
        "rms": {"rows": 5, "width": 1025, "residual": True, "norm": "rms"},
        "no norm": {"rows": 5, "width": 1200, "norm": None},
        "wide": {"rows": 2, "width": 20000},
    },
    call=forward,
)
BACKWARD = Family(
    name="row backward",
    # The number of sums over the rows decides how wide a tile may be: three, none, two, one. The
    # other choices of which are headlines.
    properties=_COMMON | {"wanted": (ALL, 0, WANT_NORM_WEIGHT | WANT_NORM_BIAS, WANT_BIAS)},
    headlines=[
        {},
        *({"width": w} for w in OTHER_WIDTHS),
        {"width": 8192, "wanted": WANT_NORM_WEIGHT | WANT_NORM_BIAS},
        {"width": 8192, "wanted": WANT_BIAS},
        {"width": 8192, "wanted": WANT_BIAS, "dtype": "fp32"},
        {"wanted": WANT_NORM_WEIGHT},
        {"wanted": WANT_NORM_BIAS},
        {"wanted": WANT_NORM_WEIGHT | WANT_BIAS},
        {"wanted": WANT_NORM_BIAS | WANT_BIAS},
    ],
    small={
        "layer": {"rows": 5, "width": 200},
        "rms": {"rows": 5, "width": 1025, "norm": "rms"},
        "no norm": {"rows": 5, "width": 1200, "norm": None},
        "wide": {"rows": 2, "width": 9000},
    },
    call=backward,
)
