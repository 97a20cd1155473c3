"""Calls of the GEMM kernels: a Linear and what follows it."""

from __future__ import annotations

from unittest import mock

import torch
from fused.kernels.gemm.channel import linear_channel_forward
from fused.kernels.gemm.row import linear_row_forward
from fused.kernels.tuning import gemm as gemm_tuning

from fused.spec import CHANNEL_NORMS, Spec, make_spec

from .covering import Case
from .family import DTYPES, Family, Make
from .targets import TARGETS


def _kind(case: Case) -> gemm_tuning.Kind:
    return gemm_tuning.Kind(case["norm"], DTYPES[case["dtype"]], case["precision"])


def _excluded(case: Case) -> bool:
    """TF32 is for float32; and what has no tile."""
    if case.get("precision") == "tf32" and case.get("dtype", "fp32") != "fp32":
        return True
    if case.get("norm") == "group" and case.get("cols", GROUPS) % (8 * GROUPS):
        return True  # no whole groups of a power of two of features
    if not {"norm", "dtype", "precision", "cols", "target"} <= set(case):
        return False
    device = TARGETS[case["target"]].device
    rest = (_kind(case), device.arch, device.warp_size)
    if case["norm"] == "group":
        return gemm_tuning.group_tile(case["cols"] // GROUPS, *rest) is None
    return case["norm"] != "batch" and gemm_tuning.row_tile(case["cols"], *rest) is None


GROUPS = 8


def _call(case: Case, make: Make) -> object:
    dtype, cols = DTYPES[case["dtype"]], case["cols"]
    x, weight = make((case["rows"], case["inner"]), dtype), make((cols, case["inner"]), dtype)
    kind = case["parameters"]
    parameter = DTYPES["fp32"] if kind == "float32" else dtype
    present = (kind in ("same", "float32"), kind != "none", kind != "none")
    parameters = [make((cols,), parameter) if here else None for here in present]
    residual = make((case["rows"], cols), dtype) if case["residual"] else None
    epilogue = make_spec(case["norm"], 1e-5, case["activation"], case["p"])
    launcher, codes = linear_row_forward, epilogue.row
    if case["norm"] in CHANNEL_NORMS:
        groups = GROUPS if case["norm"] == "group" else cols
        channel = Spec(*epilogue[:6], groups=groups, channels_last=True)
        launcher, codes = linear_channel_forward, channel.channel
    seed = make((1,), torch.int64)
    with mock.patch.object(gemm_tuning, "precision", lambda dtype: case["precision"]):
        return launcher(x, weight, *parameters, residual, seed, case["save_z"], *codes)


FORWARD = Family(
    name="linear forward",
    properties={
        "rows": (64,),
        "inner": (256, 1000),
        # The widths of tiles, and one that leaves places of its tile empty.
        "cols": (256, 64, 128, 512, 200),
        "norm": ("layer", "rms", None, "batch", "group"),
        "activation": ("gelu", None, "relu", "mish"),
        "p": (0.1, 0.0),
        "dtype": tuple(DTYPES),
        "precision": ("ieee", "tf32"),
        "parameters": ("same", "float32", "affine", "none"),
        "residual": (False, True),
        "save_z": (True, False),
    },
    headlines=[{}, {"norm": None, "cols": 512}, {"norm": "batch"}, {"norm": "group"}],
    small={
        "layer": {"rows": 70, "inner": 72, "cols": 64, "residual": True},
        "no norm": {"rows": 70, "inner": 72, "cols": 64, "norm": None},
        "batch": {"rows": 70, "inner": 72, "cols": 64, "norm": "batch"},
        "group": {"rows": 70, "inner": 72, "cols": 64, "norm": "group"},
    },
    call=_call,
    excluded=_excluded,
)
