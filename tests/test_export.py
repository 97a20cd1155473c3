"""torch.export, torch.jit.trace and ONNX: which operators they record, and that they are right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import fused
from fused.spec import make_spec

FEATURES = 8
SERVED = fused.backends.backend.cpu_isa() is not None
FUSED = {"row_forward", "channel_apply", "channel_forward"} if SERVED else set()


class Functions(nn.Module):
    """The functions, on (samples, positions, features)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, FEATURES)
        self.norm = nn.BatchNorm1d(FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        running = {
            "running_mean": self.norm.running_mean,
            "running_var": self.norm.running_var,
            "training": False,
        }
        scale = {"norm_weight": self.norm.weight, "norm_bias": self.norm.bias}
        y = fused.functional.linear_norm_act(
            x, self.linear.weight, self.linear.bias, norm="layer", activation="gelu", **scale
        )
        options = {"channel_dim": -1, "activation": "silu", "residual": x}
        return fused.functional.norm_act(y, norm="batch", **options, **scale, **running)


class Images(nn.Module):
    """(samples, positions, features) → images of one row and back, batch and group norm."""

    def __init__(self) -> None:
        super().__init__()
        self.net = fused.Sequential(
            *(nn.BatchNorm2d(FEATURES), nn.ReLU(), nn.Conv2d(FEATURES, FEATURES, 1)),
            *(nn.GroupNorm(2, FEATURES), nn.SiLU()),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.transpose(1, 2)[:, :, None])[:, :, 0].transpose(1, 2)


class Recording(nn.Module):
    """Every family, one after another, on (samples, positions, features)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            fused.Sequential(nn.Linear(FEATURES, FEATURES), nn.LayerNorm(FEATURES), nn.GELU()),
            fused.LinearNormAct(FEATURES, FEATURES, activation="swiglu"),
            fused.LinearNormAct(FEATURES, FEATURES, norm="batch", activation="relu"),
            fused.LinearNormAct(FEATURES, FEATURES, norm="group", num_groups=2, activation="relu"),
            fused.NormAct(FEATURES, norm="instance", channel_dim=-1, activation="tanh"),
            Functions(),
            Images(),
            fused.MLP(FEATURES, [FEATURES], 2, norm="layer", dropout=0.1),
        )
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def export(model: nn.Module, strict: bool) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=2)
    x = torch.randn(4, 3, FEATURES)
    return torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=strict)


def check(recorded: nn.Module, model: nn.Module) -> None:
    x = torch.randn(7, 3, FEATURES)
    torch.testing.assert_close(recorded(x), model(x), rtol=1e-4, atol=1e-5)


def operators(program: torch.export.ExportedProgram) -> set[str]:
    """The names of the fused operators in the graph and the graphs inside it."""
    modules = [m for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    targets = [n.target for m in modules for n in m.graph.nodes if n.op == "call_function"]
    found = [t for t in targets if getattr(t, "namespace", "") == "fused_lnad"]
    return {t._schema.name.split("::")[1] for t in found}


@pytest.mark.parametrize("strict", [False, True])
def test_export_under_no_grad_records_the_fused_operators(strict: bool) -> None:
    model = Recording()
    with torch.no_grad():
        program = export(model, strict)
    assert operators(program) == FUSED
    check(program.module(), model)


@pytest.mark.parametrize("strict", [False, True])
def test_export_in_grad_mode_can_be_trained(strict: bool) -> None:
    model = Recording()
    program = export(model, strict)
    assert not operators(program)
    recorded = program.module()
    check(recorded, model)
    x = torch.randn(5, 3, FEATURES)
    for net in (recorded, model):
        net(x).square().sum().backward()
    gradients = dict(recorded.named_parameters())
    for name, t in model.named_parameters():
        torch.testing.assert_close(gradients[name].grad, t.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not SERVED, reason="the C++ kernels are not built")
def test_a_backend_asked_for_holds_for_the_export() -> None:
    with torch.no_grad(), fused.use_backend("reference"):
        assert not operators(export(fused.MLP(FEATURES, [FEATURES]).eval(), False))


def test_export_of_dropout_draws_a_seed_at_every_call() -> None:
    block = fused.LinearNormAct(FEATURES, 64, norm="layer", dropout=0.5)
    with torch.no_grad():
        recorded = export(block, False).module()
    x = torch.randn(5, 3, FEATURES)
    assert not torch.equal(recorded(x), recorded(x))


def test_export_takes_a_residual_and_a_mask() -> None:
    block = fused.LinearNormAct(FEATURES, FEATURES, norm="batch", activation="relu").eval()
    x, residual = torch.randn(2, 4, 3, FEATURES)
    mask = torch.rand(4, 3) < 0.5
    with torch.no_grad():
        program = torch.export.export(block, (x, residual, mask))
    assert operators(program) == FUSED & {"channel_apply"}
    torch.testing.assert_close(program.module()(x, residual, mask), block(x, residual, mask))


def test_for_onnx_plain_operators_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    model = Recording()
    with torch.no_grad():
        program = export(model, False)
    assert not operators(program)
    check(program.module(), model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("grad", [False, True])
def test_jit_trace_records_plain_operators(grad: bool) -> None:
    model = Recording()
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model, (torch.randn(4, 3, FEATURES),))
    assert "fused_lnad" not in str(traced.inlined_graph)
    check(traced, model)


@pytest.mark.filterwarnings("ignore")  # onnxscript, and torch about its older exporter
@pytest.mark.parametrize("dynamo", [False, True])
def test_onnx(dynamo: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model, file = Recording(), str(tmp_path / "model.onnx")
    options = (
        {"dynamic_shapes": ({0: torch.export.Dim("batch", min=2)},), "verbose": False}
        if dynamo
        else {"dynamic_axes": {"x": {0: "batch"}}, "opset_version": 20}
    )
    x = torch.randn(4, 3, FEATURES)
    torch.onnx.export(model, (x,), file, input_names=["x"], dynamo=dynamo, **options)
    session = runtime.InferenceSession(file)
    check(lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), model)


@pytest.mark.parametrize("place", ["eps", "p"])
def test_no_symbol_outlives_its_graph(place: str) -> None:
    def codes_of(symbol: float) -> float:
        eps, p = (symbol, 0.0) if place == "eps" else (1e-5, symbol)
        spec = make_spec("layer", eps, "gelu", p)
        return spec.eps if place == "eps" else spec.threshold

    def run(x: Tensor) -> Tensor:
        return x * codes_of(x.shape[0] / 16)

    def other(x: Tensor) -> Tensor:
        return x * codes_of(x.shape[0] / 16)

    for function in (run, other):
        make_fx(function, tracing_mode="symbolic")(torch.randn(4, 3))


@pytest.mark.full  # test_examples.py loads another package
@pytest.mark.slow
@pytest.mark.skipif(not SERVED, reason="the C++ kernels are not built")
def test_aot_inductor_package(tmp_path: Path) -> None:
    model = fused.Sequential(
        fused.MLP(FEATURES, [16], FEATURES, norm="layer"),
        fused.LinearNormAct(FEATURES, 4, norm="batch", activation="silu"),
    ).eval()
    with torch.no_grad():
        program = export(model, False)
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
        check(torch._inductor.aoti_load_package(package), model)
    assert operators(program) == {"row_forward", "channel_apply"}


def test_a_saved_program(tmp_path: Path) -> None:
    block = fused.LinearNormAct(FEATURES, 4, norm="layer", activation="gelu").eval()
    with torch.no_grad():
        torch.export.save(export(block, False), tmp_path / "model.pt2")
    check(torch.export.load(tmp_path / "model.pt2").module(), block)
