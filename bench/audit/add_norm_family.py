"""Calls of add & norm: the sum that is stored on the way to its norm, and its gradient."""

from __future__ import annotations

from fused.kernels.row.add_norm import add_norm_backward, add_norm_forward
from torch import Tensor, int64

from fused.spec import WANT_BIAS, WANT_NORM_BIAS, WANT_NORM_WEIGHT, make_spec

from .covering import Case
from .family import DTYPES, Family, Make

ALL = WANT_NORM_WEIGHT | WANT_NORM_BIAS | WANT_BIAS
ORDINARY_WIDTH = 4096
_COMMON = {
    "rows": (64,),
    "width": (ORDINARY_WIDTH, 64, 1024, 8192, 32768),
    "fit": ("even", "ragged", "odd", "offset"),
    "norm": ("layer", "rms"),
    "p": (0.1, 0.0),
    "dtype": tuple(DTYPES),
    "parameters": ("same", "float32", "none"),
}


def _matrix(case: Case, make: Make) -> Tensor:
    cols = case["width"] - {"ragged": 8, "odd": 1}.get(case["fit"], 0)
    first = int(case["fit"] == "offset")
    flat = make((first + case["rows"] * cols,), DTYPES[case["dtype"]])
    return flat[first:].view(case["rows"], cols)


def _parameters(case: Case, make: Make, cols: int) -> tuple[Tensor | None, ...]:
    if case["parameters"] == "none":
        return None, None
    dtype = DTYPES["fp32" if case["parameters"] == "float32" else case["dtype"]]
    return make((cols,), dtype), make((cols,), dtype)


def _scalars(case: Case) -> tuple[int, float, int]:
    norm, eps, *_, threshold = make_spec(case["norm"], 1e-5, None, case["p"]).row
    return norm, eps, threshold


def forward(case: Case, make: Make) -> object:
    """Calls the forward on the tensors of a case."""
    x, residual = _matrix(case, make), _matrix(case, make)
    parameters = _parameters(case, make, x.shape[1])
    return add_norm_forward(x, residual, *parameters, make((1,), int64), *_scalars(case))


def backward(case: Case, make: Make) -> object:
    """Calls the backward on the tensors of a case."""
    dy, h = _matrix(case, make), _matrix(case, make)
    dh = _matrix(case, make) if case["dh"] else None
    parameters = _parameters(case, make, h.shape[1])
    statistics = make((2, h.shape[0]), DTYPES["fp32"])
    given = (dy, dh, h, *parameters, statistics, make((1,), int64), case["wanted"])
    return add_norm_backward(*given, *_scalars(case))


FORWARD = Family(
    name="add & norm forward",
    properties=_COMMON,
    headlines=[{}, {"width": 1024}, {"width": 8192}],
    small={
        "layer": {"rows": 5, "width": 200},
        "rms": {"rows": 5, "width": 1025, "norm": "rms", "p": 0.0},
        "wide": {"rows": 2, "width": 20000},
    },
    call=forward,
)
BACKWARD = Family(
    name="add & norm backward",
    properties=_COMMON | {"dh": (True, False), "wanted": (ALL, 0, WANT_NORM_WEIGHT)},
    headlines=[{}, {"width": 1024}, {"width": 8192}],
    small={
        "layer": {"rows": 5, "width": 200},
        "rms": {"rows": 5, "width": 1025, "norm": "rms", "p": 0.0},
        "wide": {"rows": 2, "width": 9000},
    },
    call=backward,
)
