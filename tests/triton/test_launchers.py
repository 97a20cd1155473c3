"""The launchers against the operators' schemas, without a GPU.

ops.py hands an operator's arguments on by position to a function that only CUDA tensors reach: a
missing or misplaced parameter would show on a GPU and nowhere else.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="Triton kernels need triton")

from fused.kernels import (
    channel,
    channel_backward,
    gemm_channel,
    gemm_row,
    norm,
    row,
    row_backward,
)

from fused import launchers, ops
from fused.spec import NORM_NAMES

# operator: its launcher's module and name, and the function that ops.py registers for CUDA
OPERATORS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "row_forward": (row, "row_forward", launchers.triton_row_forward),
    "row_forward_": (row, "row_forward", launchers.triton_row_forward_),
    "row_backward": (row_backward, "row_backward", launchers.triton_row_backward),
    "linear_row_forward": (gemm_row, "linear_row_forward", launchers.triton_linear("row")),
    "linear_channel_forward": (
        *(gemm_channel, "linear_channel_forward"),
        launchers.triton_linear("channel"),
    ),
    "channel_apply_": (channel, "channel_apply", launchers.triton_channel_apply_),
} | {name: (channel, name, launchers.triton_channel(name)) for name in launchers.CHANNEL_LAUNCHERS}


def schema_names(operator: str) -> list[str]:
    schema = getattr(torch.ops.fused_lnad, operator).default._schema
    return [argument.name for argument in schema.arguments]


def test_every_cuda_kernel_is_listed() -> None:
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("fused_lnad::") and torch._C._dispatch_has_kernel_for_dispatch_key(
            name, "CUDA"
        ):
            assert name.removeprefix("fused_lnad::") in OPERATORS


@pytest.mark.parametrize("operator", OPERATORS)
def test_signature_is_the_schema(operator: str) -> None:
    module, name, _ = OPERATORS[operator]
    parameters = inspect.signature(getattr(module, name)).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == schema_names(operator)
    # Anything more is by keyword, and optional.
    assert all(p.default is None for p in parameters if p.kind is p.KEYWORD_ONLY)


@pytest.mark.parametrize("operator", OPERATORS)
def test_registered_function_passes_every_argument_on(operator: str) -> None:
    module, name, registered = OPERATORS[operator]
    arguments = {n: mock.MagicMock(name=n) for n in schema_names(operator)}
    with mock.patch.object(module, name, autospec=True) as launcher:
        registered(*arguments.values())
    launcher.assert_called_once()
    called = inspect.signature(launcher).bind(*launcher.call_args.args, **launcher.call_args.kwargs)
    passed = {n: value for n, value in called.arguments.items() if n != "out"}
    assert passed == arguments


def test_constants_are_the_operators() -> None:
    for name in ("WANT_NORM_WEIGHT", "WANT_NORM_BIAS", "WANT_BIAS"):
        assert getattr(row_backward, name) == getattr(ops, name)
        assert getattr(channel_backward, name) == getattr(ops, name)
    assert {NORM_NAMES[code]: n for code, n in enumerate(ops.STATISTICS_OF)} == norm.STATISTICS
