"""The launchers against the operators' schemas, without a GPU.

ops.py hands an operator's arguments on by position to a function that only CUDA tensors reach: a
missing or misplaced parameter would show on a GPU and nowhere else.
"""

from __future__ import annotations

import contextlib
import inspect
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="Triton kernels need triton")

from fused.kernels.channel import backward as channel_backward
from fused.kernels.channel import forward as channel
from fused.kernels.gemm import channel as gemm_channel
from fused.kernels.gemm import row as gemm_row
from fused.kernels.row import add_norm, pair
from fused.kernels.row import backward as row_backward
from fused.kernels.row import forward as row
from fused.kernels.tuning import rules as tuning

from fused.backends import launchers
from fused.spec import NORM_CODES

PLACES = launchers.PLACES | launchers.LINEAR_PLACES
MODULES = {
    module.__name__.removeprefix("fused.kernels."): module
    for module in (
        *(add_norm, channel, channel_backward, gemm_channel, gemm_row),
        *(pair, row, row_backward),
    )
}


def schema_names(operator: str) -> list[str]:
    schema = getattr(torch.ops.fused_lnad, operator).default._schema
    return [argument.name for argument in schema.arguments]


def test_every_cuda_kernel_is_listed() -> None:
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("fused_lnad::") and torch._C._dispatch_has_kernel_for_dispatch_key(
            name, "CUDA"
        ):
            assert name.removeprefix("fused_lnad::") in PLACES


@pytest.mark.parametrize("operator", PLACES)
def test_signature_is_the_schema(operator: str) -> None:
    place = PLACES[operator]
    function = getattr(MODULES[place.module], place.function)
    parameters = inspect.signature(function).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == schema_names(operator)
    # Anything more is by keyword, and optional.
    assert all(p.default is None for p in parameters if p.kind is p.KEYWORD_ONLY)


@pytest.mark.parametrize("operator", PLACES)
def test_registered_function_passes_every_argument_on(operator: str) -> None:
    place = PLACES[operator]
    registered = launchers.launcher(place)
    arguments = {n: mock.MagicMock(name=n) for n in schema_names(operator)}
    with mock.patch.object(MODULES[place.module], place.function, autospec=True) as launcher:
        registered(*arguments.values())
        with mock.patch.object(launchers, "import_module", side_effect=AssertionError):
            registered(*arguments.values())  # looked up once
    assert launcher.call_count == 2
    z = arguments[schema_names(operator)[0]]
    assert launcher.call_args.kwargs == ({"out": z} if place.in_place else {})
    called = inspect.signature(launcher).bind(*launcher.call_args.args, **launcher.call_args.kwargs)
    passed = {n: value for n, value in called.arguments.items() if n != "out"}
    assert passed == arguments


class OnGPU:
    """A tensor on a GPU as far as `tuning.device_of` looks."""

    def __init__(self, index: int) -> None:
        self.is_cuda, self.index = index >= 0, index

    def get_device(self) -> int:
        return self.index


def test_only_another_gpu_is_made_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[int] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(
        torch.cuda, "device_of", lambda z: entered.append(z.index) or contextlib.nullcontext()
    )
    for index in (-1, 1, 1, 3):
        with tuning.device_of(OnGPU(index)):  # type: ignore[arg-type]
            pass
    assert entered == [3]


@pytest.mark.parametrize("norm, shape", [("batch", (1, 5, 8)), ("group", (5, 1, 8))])
def test_a_shape_is_passed_as_a_shape(
    norm: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tensor is made only to say how large another one would be."""
    made: list[Any] = []
    monkeypatch.setattr(gemm_channel, f"{norm}_forward", lambda *args: made.append(args[-1]))
    x, weight = (mock.Mock(spec=["shape", "element_size"], shape=s) for s in ((5, 16), (8, 16)))
    x.element_size.return_value = 2
    scalars = (1 if norm == "batch" else 2, True, 1e-5, 0, 0.0, 0.0, 0, False)
    code = NORM_CODES[norm]
    gemm_channel.linear_channel_forward(x, weight, *(None,) * 5, True, code, *scalars)
    (problem,) = made
    assert (problem.samples, problem.positions, problem.channels) == shape
    assert problem.itemsize == 2
