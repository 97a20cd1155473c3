"""`python -m fused tune linear`, and the Linears that its table makes one kernel, without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from fused.kernels.tuning import gemm as gemm_tuning
from fused.kernels.tuning import tuned
from gemm_calls import H100, HALF, gradients

import fused
from fused.__main__ import main
from fused.backends import gemm, ops
from fused.tools import tune, tune_linear
from fused.tools.tune_linear import LinearCase

pytestmark = pytest.mark.usefixtures("table")
GPU = "Some GPU"
CASE = LinearCase(64, 40, HALF, "layer")


@pytest.fixture
def h100() -> Iterator[None]:
    """CPU tensors count as a GPU's."""
    with mock.patch.multiple(
        gemm, _is_on_gpu=lambda x: True, _device=lambda index: H100, _name=lambda index: GPU
    ):
        yield


def write(table: Path, gpu: str = GPU) -> None:
    tuned.write(table, {}, {gpu: {CASE.key: 1.2}})
    tuned.forget()


def test_the_rule_reads_the_table(table: Path) -> None:
    arguments = (CASE.cols, CASE.inner, CASE.kind, 90)
    assert not gemm_tuning.has_rules() and not gemm_tuning.is_faster(*arguments, GPU)
    write(table)
    assert gemm_tuning.has_rules() and gemm_tuning.is_faster(*arguments, GPU)
    assert not gemm_tuning.is_faster(*arguments, "Another GPU")
    assert not gemm_tuning.is_faster(*arguments)
    for cols, inner, norm, dtype in (
        (64, 48, "layer", HALF),
        (72, 40, "layer", HALF),
        (64, 40, "rms", HALF),
        (64, 40, "layer", torch.float16),
    ):
        other = LinearCase(cols, inner, dtype, norm)
        assert not gemm_tuning.is_faster(cols, inner, other.kind, 90, GPU)


@pytest.mark.usefixtures("h100")
def test_auto_takes_the_kernel_where_the_table_says_so(table: Path) -> None:
    x, weight = torch.randn(6, 40, dtype=HALF), torch.randn(64, 40, dtype=HALF)
    layer, rms = "layer", "rms"
    with mock.patch.object(gemm, "mode", "auto"):
        assert not gemm.serves(x, weight, layer)
        write(table)
        assert gemm.serves(x, weight, layer)
        assert gemm.serves(x[:2], weight, layer), "whatever the batch"
        assert not gemm.serves(x, weight, rms)
        assert not gemm.serves(x, weight, "batch", 64)
        with mock.patch.object(gemm, "_name", lambda index: "Another GPU"):
            assert not gemm.serves(x, weight, layer)


@pytest.mark.usefixtures("h100")
def test_the_compiler_takes_what_the_table_says(table: Path) -> None:
    """Without tracing into the file."""
    write(table)
    torch._dynamo.reset()
    net = fused.LinearNormAct(40, 64, norm="layer", activation="relu", dtype=HALF)
    x = torch.randn(6, 40, dtype=HALF)
    made: list[int] = []

    def run(x: Any, weight: Any, bias: Any, *args: Any) -> Any:
        made.append(1)
        z = torch.nn.functional.linear(x, weight, bias)
        *parameters, residual, seed, _ = args[:5]
        y, statistics = ops.row_forward(z, None, *parameters, residual, seed, *args[5:])
        return y, z, statistics

    library = torch.library.Library("fused_lnad", "IMPL")
    library.impl("linear_row_forward", run, "CPU")
    try:
        with mock.patch.multiple(gemm, mode="auto", enabled=True):
            gradients(torch.compile(net, backend="aot_eager", fullgraph=True), x)
    finally:
        library._destroy()
    assert made


# ---- the measurement ----


def fake(
    monkeypatch: pytest.MonkeyPatch,
    gains: dict[int, float],
    error: float = 0.0,
    noise: float = 1.0,
) -> Any:
    """A clock by which the kernel is so many times faster at a number of rows."""
    rows_now: list[int] = []

    def make_calls(case: LinearCase, rows: int, device: str) -> tuple[Any, Any]:
        def kernel() -> list[torch.Tensor]:
            if error < 0:
                raise RuntimeError("out of registers")
            return [torch.full((3,), 1.0 + error)]

        rows_now[:] = [rows]
        return (lambda: [torch.ones(3)]), kernel

    def measure(calls: list[Callable[[], Any]]) -> list[list[float]]:
        library, again, kernel = calls
        assert again is library is not kernel
        once = [2.0, 2.0 * noise, 2.0 / noise]
        return [[2.0] * 3, once, [2.0 / gains[rows_now[0]]] * 3]

    monkeypatch.setattr(tune_linear, "make_calls", make_calls)
    monkeypatch.setattr(tune_linear, "is_served", lambda case, device: True)
    monkeypatch.setattr(tune, "is_served", lambda case, device: case.cols != 8)
    return measure


def measured(measure: Any, gains: dict[str, float]) -> dict[str, float]:
    cases = [LinearCase(8, 8, HALF, "layer"), CASE]
    assert len(list(tune.tune_linear(iter(cases), gains, "cpu", measure))) == 1
    return gains


def test_the_kernel_has_to_be_faster_at_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = tune_linear.ROWS
    faster = fake(monkeypatch, {small: 1.5, large: 1.1})
    assert measured(faster, {"another": 1.3}) == {"another": 1.3, CASE.key: 1.1}
    at_one = fake(monkeypatch, {small: 1.5, large: 1.01})
    assert measured(at_one, {CASE.key: 1.1}) == {}
    noisy = fake(monkeypatch, {small: 1.5, large: 1.1}, noise=1.3)
    assert measured(noisy, {CASE.key: 1.1}) == {}


@pytest.mark.parametrize("error", [0.1, -1.0])
def test_a_kernel_that_errs_or_fails_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, error: float
) -> None:
    gains = dict.fromkeys(tune_linear.ROWS, 2.0)
    assert measured(fake(monkeypatch, gains, error), {}) == {}


@pytest.mark.parametrize("norm", tune_linear.NORMS)
def test_both_calls_get_the_same_chain(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's operator by the library's two: the arguments are what the other call means."""

    def row(x: Any, weight: Any, bias: Any, *args: Any) -> Any:
        *parameters, residual, seed, save_z = args[:5]
        assert save_z
        z = torch.nn.functional.linear(x, weight, bias)
        y, statistics = ops.row_forward(z, None, *parameters, residual, seed, *args[5:])
        return y, z, statistics

    def channel(x: Any, weight: Any, bias: Any, *args: Any) -> Any:
        *parameters, residual, seed, save_z = args[:5]
        assert save_z
        z = torch.nn.functional.linear(x, weight, bias)
        given = (z[None], *parameters, residual, None, seed, *args[5:])
        y, mean, variance, _ = ops.channel_forward(*given)
        return y[0], z, mean, variance

    monkeypatch.setattr(ops, "linear_row_forward", row)
    monkeypatch.setattr(ops, "linear_channel_forward", channel)
    case = tune_linear.parse(f"32,24,float32,{norm}")
    library, kernel = tune_linear.make_calls(case, 50, "cpu")
    for a, b in zip(library(), kernel(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("h100")
def test_what_has_a_kernel() -> None:
    assert tune_linear.is_served(tune_linear.parse("512,64,bfloat16,layer"), "cpu")
    assert not tune_linear.is_served(tune_linear.parse("1024,64,bfloat16,layer"), "cpu")
    assert not tune_linear.is_served(tune_linear.parse("512,63,bfloat16,none"), "cpu")
    assert tune_linear.is_served(tune_linear.parse("1024,64,bfloat16,batch"), "cpu")
    assert sum(tune_linear.is_served(case, "cpu") for case in tune_linear.default_cases()) > 40


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--linear", "256,1024,bfloat16"], "--linear: expected N,K,DTYPE,NORM with a dtype of"),
        (["--linear", "0,8,float32,rms"], "N and K must be positive numbers of features"),
        (["--linear", "8,8,float64,rms"], "a dtype of float32, bfloat16, float16 and a norm of"),
        (["tiles"], "unknown tiles; known: rows, channels, linear"),
    ],
)
def test_the_command_says_what_it_expects(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["tune", *arguments])
    assert said in capsys.readouterr().err
