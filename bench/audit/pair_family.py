"""Calls of the kernels of a gate of two tensors: two tensors for each one of the result."""

from __future__ import annotations

import torch
from fused.kernels.row.pair import gate_backward, gate_forward

from fused.spec import GATED_CODES, dropout_threshold

from .covering import Case
from .family import DTYPES, Family, Make
from .row_family import matrix

_COMMON = {
    "rows": (64,),
    # Several rows a tile, parts of a row.
    "width": (2048, 64, 16384),
    "fit": ("even", "ragged", "odd", "offset"),  # as row_family.py has them
    "activation": ("swiglu", "glu", "geglu", "geglu_tanh", "reglu"),
    "p": (0.1, 0.0),
    "dtype": tuple(DTYPES),
}
_SMALL = {"even": {"rows": 5, "width": 200}, "odd": {"rows": 3, "width": 1001, "fit": "odd"}}


def _arguments(case: Case, make: Make) -> tuple[object, ...]:
    both = matrix(case, make), matrix(case, make)
    code, threshold = GATED_CODES[case["activation"]], dropout_threshold(case["p"])
    return *both, make((1,), torch.int64), code, threshold


def _forward(case: Case, make: Make) -> object:
    return gate_forward(*_arguments(case, make))


def _backward(case: Case, make: Make) -> object:
    return gate_backward(matrix(case, make), *_arguments(case, make), case["joined"])


FORWARD = Family("pair forward", _COMMON, [{}, {"width": 64}], _SMALL, _forward)
BACKWARD = Family(
    name="pair backward",
    properties=_COMMON | {"joined": (False, True)},
    headlines=[{}, {"width": 64}],
    small=_SMALL | {"joined": {"rows": 5, "width": 200, "joined": True}},
    call=_backward,
)
