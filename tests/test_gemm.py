"""When a Linear runs as one kernel with what follows it, and that nothing else changes then.

The kernel needs a GPU (tests/triton has its own tests). Here its operator is given a CPU
implementation from the library's GEMM and the C++ pass, and CPU tensors are taken for a GPU's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from fused.kernels.tuning import gemm as gemm_tuning
from gemm_calls import HALF, gradients, recorded
from processes import run_python
from torch import Tensor, nn

import fused
from fused.backends import gemm, ops
from fused.run import prepare
from fused.spec import default_eps, make_spec

pytestmark = pytest.mark.usefixtures("cpp")


def linear_row(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    save_z: bool,
    *codes: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    z = F.linear(x, weight, bias)
    y, statistics = ops.row_forward(z, None, norm_weight, norm_bias, residual, seed, *codes)
    return y, z if save_z else z.new_empty(0), statistics


@pytest.fixture
def calls() -> Iterator[list[tuple[Any, ...]]]:
    """The calls of linear_row_forward."""
    with recorded("linear_row_forward", linear_row) as made:
        yield made


def block(norm: str | None = "layer", **options: Any) -> fused.LinearNormAct:
    net = fused.LinearNormAct(40, 64, norm=norm, activation="gelu", dtype=HALF, **options)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return net


def given_eps(net: fused.LinearNormAct) -> float:
    norm = net._modules.get("norm")
    return 0.0 if norm is None else default_eps("rms", norm.eps, HALF)


@pytest.mark.parametrize(
    "asked, expected",
    [
        ("", "auto False"),
        ("auto", "auto False"),
        ("library", "library False"),
        ("fused", "fused True"),
    ],
)
def test_the_environment_is_read(asked: str, expected: str) -> None:
    code = (
        "import sys; from fused.backends import gemm; print(gemm.mode, gemm.enabled);"
        "assert 'triton' not in sys.modules"
    )
    done = run_python(code, FUSED_GEMM=asked, FUSED_TUNING="0")
    assert done.stdout.strip() == expected, done.stderr


def test_another_value_is_one_clear_error() -> None:
    done = run_python("import fused", FUSED_GEMM="triton")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last == "ValueError: FUSED_GEMM must be one of auto, library, fused; got 'triton'"


@pytest.mark.parametrize("training", [True, False])
def test_by_default_the_library_multiplies(calls: list[Any], training: bool) -> None:
    assert gemm_tuning.RULES == ()
    net, x = block(dropout=0.5).train(training), torch.randn(6, 40, dtype=HALF)
    gradients(net, x.requires_grad_())
    with torch.no_grad():
        net(x)
    assert not calls


def test_a_rule_makes_auto_choose(calls: list[Any]) -> None:
    rule = gemm_tuning.Rule("layer", HALF, 90, most_cols=64, most_inner=40)
    with (
        mock.patch.multiple(gemm, mode="auto", enabled=True),
        mock.patch.object(gemm_tuning, "RULES", (rule,)),
    ):
        gradients(block(), torch.randn(6, 40, dtype=HALF))
        assert len(calls) == 1
        gradients(block("rms"), torch.randn(6, 40, dtype=HALF))
        for inner, cols in ((48, 64), (40, 72)):
            wider = fused.LinearNormAct(inner, cols, norm="layer", dtype=HALF)
            gradients(wider, torch.randn(6, inner, dtype=HALF))
        with mock.patch.object(gemm, "_device", lambda index: (80, 32)):
            gradients(block(), torch.randn(6, 40, dtype=HALF))
    assert len(calls) == 1


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("norm", ["layer", "rms", None])
@pytest.mark.usefixtures("fused_mode")
def test_training_by_one_kernel(
    calls: list[Any], norm: str | None, p: float, residual: bool
) -> None:
    net = block(norm, dropout=p)
    x = torch.randn(3, 6, 40, dtype=HALF, requires_grad=True)
    r = torch.randn(3, 6, 64, dtype=HALF, requires_grad=True) if residual else None
    found = gradients(net, x, r)
    ((given_x, weight, bias, norm_weight, norm_bias, given_r, seed, save_z, *codes),) = calls
    assert given_x.shape == (18, 40) and given_x.data_ptr() == x.data_ptr()
    assert weight.data_ptr() == net.linear.weight.data_ptr()
    assert bias.data_ptr() == net.linear.bias.data_ptr()
    assert (norm_weight is not None) == (norm is not None)
    assert (norm_bias is not None) == (norm == "layer")
    assert (given_r is not None) == residual
    assert (seed is not None) == (p > 0)
    assert save_z is True
    assert tuple(codes) == make_spec(norm, given_eps(net), "gelu", p).row
    with mock.patch.object(gemm, "enabled", False):
        library = gradients(net, x, r)
    assert len(calls) == 1
    assert found.keys() == library.keys()
    for name, value in library.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)


@pytest.mark.usefixtures("fused_mode")
def test_inference_by_one_kernel(calls: list[Any]) -> None:
    net, x = block().eval(), torch.randn(6, 40, dtype=HALF)
    with torch.no_grad():
        y = net(x)
        assert [args[7] for args in calls] == [False]
        with mock.patch.object(gemm, "enabled", False):
            assert torch.equal(y, net(x))


@pytest.mark.usefixtures("fused_mode")
def test_parameters_without_gradients(calls: list[Any]) -> None:
    """Any of them, and x; a frozen weight is torch's, because nn.Linear then does not keep x."""
    for frozen in ("x", "linear.bias", "norm.weight", "norm.bias", "linear.weight"):
        net = block()
        x = torch.randn(6, 40, dtype=HALF, requires_grad=frozen != "x")
        if frozen != "x":
            net.get_parameter(frozen).requires_grad_(False)
        calls.clear()
        found = gradients(net, x)
        assert len(calls) == (frozen != "linear.weight")
        with mock.patch.object(gemm, "enabled", False):
            library = gradients(net, x)
        assert found.keys() == library.keys()
        assert all(torch.equal(found[name], library[name]) for name in found)


@pytest.mark.parametrize("x_needs", [True, False])
@pytest.mark.parametrize("norm", ["layer", None])
@pytest.mark.usefixtures("fused_mode")
def test_second_derivatives(calls: list[Any], norm: str | None, x_needs: bool) -> None:
    net = fused.LinearNormAct(12, 8, norm=norm, activation="gelu", dropout=0.3)
    x = torch.randn(6, 12, requires_grad=x_needs)

    def second() -> tuple[Tensor, ...]:
        first = gradients(net, x, create_graph=True)
        total = sum((t.square().sum() for t in first.values()), torch.zeros(()))
        leaves = [*net.parameters(), *([x] if x_needs else [])]
        return torch.autograd.grad(total, leaves)

    found = second()
    assert len(calls) == 1
    with mock.patch.object(gemm, "enabled", False):
        for a, b in zip(found, second(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("fused_mode")
def test_memory_kept_for_backward(calls: list[Any]) -> None:
    """x, weight, z, the statistics and the parameters: what the library's way keeps."""
    net, x = block(), torch.randn(600, 40, dtype=HALF, requires_grad=True)

    def kept() -> int:
        saved: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            net(x)
        return sum(saved.values())

    fused_bytes = kept()
    assert len(calls) == 1
    with mock.patch.object(gemm, "enabled", False):
        assert fused_bytes == kept()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.usefixtures("fused_mode")
def test_compiled(calls: list[Any], backend: str) -> None:
    torch._dynamo.reset()
    net = fused.Sequential(nn.Linear(40, 64), nn.LayerNorm(64), nn.ReLU())
    x = torch.randn(6, 40, requires_grad=True)
    eager = gradients(net, x)
    compiled = gradients(torch.compile(net, backend=backend, fullgraph=True, dynamic=True), x)
    assert len(calls) == 2
    compiled = {name.removeprefix("_orig_mod."): t for name, t in compiled.items()}
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, msg=name)


def served(x: Tensor, weight: Tensor, norm: str | None = "layer") -> bool:
    return gemm.serves(x, weight, norm)


@pytest.mark.usefixtures("calls", "fused_mode")
def test_what_no_kernel_serves_is_left_to_the_library() -> None:
    x, weight = torch.randn(6, 40, dtype=HALF), torch.randn(64, 40, dtype=HALF)
    assert served(x, weight)
    assert served(torch.randn(6, 96, dtype=HALF)[:, 8:48], weight)
    assert not served(x[:, :36], weight[:, :36])  # not 16 bytes
    assert not served(x, torch.randn(36, 40, dtype=HALF))
    assert not served(torch.randn(6, 44, dtype=HALF)[:, :40], weight)  # row stride
    assert not served(torch.randn(40, 6, dtype=HALF).t(), weight)
    assert not served(x, torch.randn(40, 64, dtype=HALF).t())
    assert not served(x.double(), weight.double())
    assert not served(x[:, :0], weight[:, :0])
    assert served(x, torch.randn(512, 40, dtype=HALF))
    assert not served(x, torch.randn(520, 40, dtype=HALF))
    assert served(x, torch.randn(520, 40, dtype=HALF), norm=None)
    assert served(x.float(), torch.randn(256, 40))
    assert not served(x.float(), torch.randn(264, 40))


@pytest.mark.usefixtures("fused_mode")
def test_autocast_mixes_are_left_to_the_library(calls: list[Any]) -> None:
    """Under CUDA's autocast layer norm reads bf16 as float32: not this kernel's function."""
    x, weight = torch.randn(6, 40), torch.randn(64, 40)
    spec = make_spec("layer", 1e-5, "relu")
    with (
        mock.patch.object(prepare, "autocast_dtype", lambda device: HALF),
        mock.patch.object(prepare, "float32_under_autocast", lambda *args: True),
    ):
        y = prepare.run(spec, x, weight)
    assert y.dtype == torch.float32 and not calls
