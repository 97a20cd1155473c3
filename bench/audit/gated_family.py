"""Calls of the row kernels with a gated activation: z has two columns for each of the result."""

from __future__ import annotations

from . import row_family
from .family import DTYPES, Family
from .row_family import ALL, WANT_BIAS, WANT_NORM_BIAS, WANT_NORM_WEIGHT

_COMMON = {
    "rows": (64,),
    # Of the result: one row a tile, several; at most threads; in a loop or in blocks of columns.
    "width": (2048, 64, 1024, 4096, 8192, 16384),
    "fit": ("even", "ragged", "odd", "offset"),  # as row_family.py has them
    "norm": ("layer", "rms", None),
    "activation": ("swiglu", "glu", "geglu", "geglu_tanh", "reglu"),
    "p": (0.1, 0.0),
    "dtype": tuple(DTYPES),
    "parameters": ("same", "float32", "affine", "none"),
}
_HEADLINES = [{}, {"width": 16384}]
FORWARD = Family(
    name="gated forward",
    properties=_COMMON | {"residual": (False, True)},
    headlines=_HEADLINES,
    small={
        "layer": {"rows": 5, "width": 200, "residual": True},
        "rms": {"rows": 3, "width": 1001, "residual": True, "norm": "rms"},
        "no norm": {"rows": 5, "width": 600, "norm": None},
        "wide": {"rows": 2, "width": 10000},
    },
    call=row_family.forward,
)
BACKWARD = Family(
    name="gated backward",
    properties=_COMMON | {"wanted": (ALL, 0, WANT_NORM_WEIGHT | WANT_NORM_BIAS, WANT_BIAS)},
    headlines=_HEADLINES,
    small={
        "layer": {"rows": 5, "width": 200},
        "rms": {"rows": 3, "width": 1001, "norm": "rms"},
        "no norm": {"rows": 5, "width": 600, "norm": None},
        "wide": {"rows": 2, "width": 4500},
    },
    call=row_family.backward,
)
