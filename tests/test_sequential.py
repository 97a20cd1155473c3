"""fused.Sequential gives what nn.Sequential gives, whatever was done to its children."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import fused
from fused.plan import ReLUSquared


def layers(p: float = 0.0) -> list[nn.Module]:
    return [nn.Linear(16, 32), nn.LayerNorm(32), nn.GELU(), nn.Dropout(p), nn.Linear(32, 4)]


def pair(modules: list[nn.Module]) -> tuple[nn.Sequential, fused.Sequential]:
    plain = nn.Sequential(*modules)
    return plain, fused.Sequential(*modules)


def assert_same(plain: nn.Module, net: nn.Module, *shape: int, tolerance: float = 1e-5) -> None:
    x = torch.randn(*(shape or (6, 16)))
    torch.testing.assert_close(net(x), plain(x), rtol=tolerance, atol=tolerance)


CHAINS = {
    "L N A D": [nn.Linear(16, 32), nn.LayerNorm(32), nn.ReLU(), nn.Dropout(0.0)],
    "L N A": [nn.Linear(16, 32, bias=False), nn.RMSNorm(32), nn.SiLU()],
    "L N": [nn.Linear(16, 32), nn.LayerNorm(32, elementwise_affine=False)],
    "L A": [nn.Linear(16, 32), nn.LeakyReLU(0.2)],
    "L D": [nn.Linear(16, 32), nn.Dropout(0.0)],
    "L N D": [nn.Linear(16, 32), nn.LayerNorm(32, bias=False), nn.Dropout(0.0)],
    "L A D": [nn.Linear(16, 32), nn.ELU(0.7), nn.Dropout(0.0)],
    "N A": [nn.LayerNorm(16), nn.GELU("tanh")],
    "N D": [nn.RMSNorm(16, eps=1e-3), nn.Dropout(0.0)],
    "N A D": [nn.LayerNorm(16), nn.Softplus(2.0, 5.0), nn.Dropout(0.0)],
    "A D": [nn.Mish(), nn.Dropout(0.0)],
}


@pytest.mark.parametrize("chain", CHAINS)
def test_every_subset_of_the_chain(chain: str) -> None:
    plain, net = pair(CHAINS[chain])
    entries = net.plan()
    assert len(entries) == 1 and entries[0].fused, str(entries)
    for shape in ((6, 16), (2, 3, 16), (16,), (0, 16), (2, 2, 2, 16)):
        assert_same(plain, net, *shape)
    assert net.plan()[0].fused_calls == 5 and net.plan()[0].unfused_calls == 0


MODULES = [
    nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.LeakyReLU(0.3), nn.ELU(1.3), nn.SELU(),
    nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Mish(), nn.Sigmoid(), nn.Tanh(), nn.Hardswish(),
    nn.Hardsigmoid(), nn.Softplus(0.5, 3.0), ReLUSquared(),
]  # fmt: skip


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_every_activation_module_is_recognised(module: nn.Module) -> None:
    plain, net = pair([nn.Linear(16, 32), nn.LayerNorm(32), module])
    assert net.plan()[0].fused
    assert_same(plain, net)


def test_normalized_shape_of_several_dimensions() -> None:
    for modules in ([nn.LayerNorm((5, 16)), nn.ReLU()], [nn.Linear(16, 8), nn.LayerNorm((5, 8))]):
        plain, net = pair(modules)
        assert_same(plain, net, 3, 5, 16)
        assert net.plan()[0].fused_calls == 1


def test_maximal_runs() -> None:
    net = fused.Sequential(
        nn.Linear(8, 8), nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.1), nn.Dropout(0.1), nn.Tanh(),
        nn.Flatten(), nn.LayerNorm(8), nn.GELU(),
    )  # fmt: skip
    names = [entry.names for entry in net.plan()]
    assert names == [("0",), ("1", "2", "3"), ("4",), ("5",), ("6",), ("7", "8")]
    assert "linear → relu → dropout: fused" in str(net.plan())


# ---- the guard: each of these must fall back, visibly, and give nn.Sequential's result ----


class Adapter(nn.Module):
    """What LoRA does: wraps a Linear and adds to its output."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


class TaggedTensor(torch.Tensor):
    pass


def forward_hook(net: nn.Sequential) -> None:
    net[1].register_forward_hook(lambda module, args, output: output + 1)


def pre_hook(net: nn.Sequential) -> None:
    net[2].register_forward_pre_hook(lambda module, args: (args[0] * 3,))


def replaced_forward(net: nn.Sequential) -> None:
    original = net[0].forward
    net[0].forward = lambda x: original(x) - 1


def adapter(net: nn.Sequential) -> None:
    net[0] = Adapter(net[0])


def subclass(net: nn.Sequential) -> None:
    net[0].__class__ = Doubled


def parametrised(net: nn.Sequential) -> None:
    parametrizations.weight_norm(net[0])


def pruned(net: nn.Sequential) -> None:
    prune.l1_unstructured(net[0], "weight", 0.5)


def tensor_subclass(net: nn.Sequential) -> None:
    data = net[0].weight.detach().as_subclass(TaggedTensor)
    net[0].weight = nn.Parameter(data)


def quantised(net: nn.Sequential) -> None:
    net[0] = torch.ao.nn.quantized.dynamic.Linear.from_float(_with_qconfig(net[0]))


def _with_qconfig(linear: nn.Linear) -> nn.Linear:
    linear.qconfig = torch.ao.quantization.default_dynamic_qconfig
    return linear


def train_flags(net: nn.Sequential) -> None:
    net[3].p = 1.0
    net[3].eval()


DEEDS = [forward_hook, pre_hook, replaced_forward, adapter, subclass, parametrised, pruned]
DEEDS += [tensor_subclass, quantised, train_flags]


@pytest.mark.parametrize("early", [True, False], ids=["before the first call", "after a call"])
@pytest.mark.parametrize("deed", DEEDS, ids=lambda deed: deed.__name__)
def test_whatever_was_done_to_children(deed: object, early: bool) -> None:
    net = fused.Sequential(*layers())
    if not early:
        net(torch.randn(6, 16))
    deed(net)  # type: ignore[operator]
    assert_same(nn.Sequential(*net), net, tolerance=1e-4)
    entry = net.plan()[0]
    if deed not in (train_flags, adapter, quantised):
        assert not entry.fused or entry.unfused_calls == 1, entry
        assert entry.reason
    elif deed is train_flags:
        assert entry.fused_calls == (1 if early else 2)


def test_hook_is_undone() -> None:
    net = fused.Sequential(*layers())
    handle = net[1].register_forward_hook(lambda module, args, output: output + 1)
    x = torch.randn(6, 16)
    net(x)
    handle.remove()
    net(x)
    assert (net.plan()[0].fused_calls, net.plan()[0].unfused_calls) == (1, 1)


def test_global_hooks() -> None:
    net, seen = fused.Sequential(*layers()), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, o: seen.append(type(m)))
    try:
        net(torch.randn(6, 16))
    finally:
        handle.remove()
    assert nn.LayerNorm in seen


def test_backward_hooks_run() -> None:
    net, seen = fused.Sequential(*layers()), []
    net[1].register_full_backward_hook(lambda m, gi, go: seen.append(go[0].shape))
    net(torch.randn(6, 16)).sum().backward()
    assert seen == [torch.Size([6, 32])]


def test_mixed_dtypes_give_eagers_result_or_eagers_error() -> None:
    plain, net = pair([nn.Linear(16, 32).double(), nn.LayerNorm(32).double(), nn.ReLU()])
    with pytest.raises(RuntimeError, match="dtype"):
        plain(torch.randn(2, 16))
    with pytest.raises(RuntimeError, match="dtype"):
        net(torch.randn(2, 16))
    net.to(torch.bfloat16)
    net[1].float()
    x = torch.randn(4, 16, dtype=torch.bfloat16)
    assert net(x).dtype == plain(x).dtype == torch.bfloat16


def test_dtype_change_after_a_call() -> None:
    plain, net = pair(layers()[:3])
    assert_same(plain, net)
    net.double()
    x = torch.randn(6, 16, dtype=torch.float64)
    torch.testing.assert_close(net(x), plain(x))
    net.bfloat16()
    x = torch.randn(6, 16, dtype=torch.bfloat16)
    torch.testing.assert_close(net(x), plain(x), rtol=2e-2, atol=2e-2)


def test_wrong_shapes_raise_what_eager_raises() -> None:
    plain, net = pair(layers())
    for bad in (torch.randn(3, 17), torch.randint(5, (3, 16))):
        with pytest.raises(RuntimeError) as theirs:
            plain(bad)
        with pytest.raises(RuntimeError) as ours:
            net(bad)
        assert str(ours.value) == str(theirs.value)


def test_attributes_are_read_at_each_call() -> None:
    plain, net = pair([nn.Linear(16, 32), nn.LayerNorm(32), nn.LeakyReLU(0.1), nn.Dropout(0.5)])
    net.eval()
    assert_same(plain, net)
    net[2].negative_slope = 0.7
    net[1].eps = 0.5
    assert_same(plain, net)
    net[0].weight.data = torch.randn(32, 16)
    net[1].weight = nn.Parameter(torch.randn(32))
    assert_same(plain, net)
    net[0].bias = None
    assert_same(plain, net)
    net[3].train()
    net[3].p = 1.0
    assert (net(torch.randn(3, 16)) == 0).all()


def test_slicing_appending_inserting_and_adding() -> None:
    plain, net = pair(layers())
    assert type(net[:2]) is fused.Sequential
    assert_same(plain[:2], net[:2])
    net.append(nn.Tanh())
    plain.append(net[-1])
    assert_same(plain, net)
    assert len(net.plan()) == 2  # the last Linear and Tanh are a chain now
    net.insert(1, nn.Identity())
    plain.insert(1, nn.Identity())
    assert_same(plain, net)
    del net[1], plain[1]
    assert_same(plain, net)
    net[2] = nn.ReLU()
    plain[2] = net[2]
    assert_same(plain, net)


def test_deepcopy_pickle_and_state_dict() -> None:
    plain, net = pair(layers())
    x = torch.randn(6, 16)
    expected = net(x)
    assert torch.equal(copy.deepcopy(net)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(net))(x), expected)
    assert list(net.state_dict()) == list(plain.state_dict())
    other = fused.Sequential(*layers())
    other.load_state_dict(plain.state_dict())
    assert torch.equal(other(x), expected)
    buffer = io.BytesIO()
    torch.save(other.state_dict(), buffer)
    buffer.seek(0)
    back = nn.Sequential(*layers())
    back.load_state_dict(torch.load(buffer))
    torch.testing.assert_close(back(x), expected)


def test_meta_device() -> None:
    with torch.device("meta"):
        net = fused.Sequential(*layers())
    assert net(torch.empty(3, 16, device="meta")).shape == (3, 4)
    net = net.to_empty(device="cpu")
    for t in net.parameters():
        nn.init.normal_(t)
    assert_same(nn.Sequential(*net), net)


def test_iterating_over_children_works() -> None:
    net = fused.Sequential(*layers())
    x = expected = torch.randn(6, 16)
    for child in net:
        expected = child(expected)
    torch.testing.assert_close(net(x), expected)


def test_in_place_activation_first_in_its_chain_changes_its_input_as_in_eager() -> None:
    _, net = pair([nn.ReLU(inplace=True), nn.Dropout(0.0)])
    x = -torch.ones(3, 4)
    net(x)
    assert (x == 0).all()
    assert "in place" in net.plan()[0].reason


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_autocast_gives_eagers_dtypes(norm: type[nn.Module], dtype: torch.dtype) -> None:
    for modules in (
        [nn.Linear(16, 32), norm(32), nn.GELU()],
        [nn.Linear(16, 32), nn.ReLU()],
        [norm(16), nn.SiLU()],
    ):
        plain, net = pair(modules)
        x = torch.randn(6, 16)
        with torch.autocast("cpu", dtype):
            ours, theirs = net(x), plain(x)
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=3e-2, atol=3e-2)
        ours.float().sum().backward()
        assert all(t.grad is not None and t.grad.dtype == t.dtype for t in net.parameters())


def test_rms_norm_default_eps() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        plain, net = pair([nn.RMSNorm(16), nn.ReLU()])
        net.to(dtype)
        x = (torch.randn(6, 16) * 1e-3).to(dtype)
        torch.testing.assert_close(net(x), plain(x), rtol=2e-2, atol=1e-3)


# ---- the explicit blocks ----


def test_blocks_have_named_children_and_equal_plain_torch() -> None:
    block = fused.LinearNormAct(16, 32, norm="layer", activation="leaky_relu", negative_slope=0.3)
    assert [name for name, _ in block.named_children()] == ["linear", "norm", "act"]
    assert_same(nn.Sequential(*block), block)
    after = fused.NormAct(16, norm="rms", activation="relu_squared", dropout=0.2, affine=False)
    assert [name for name, _ in after.named_children()] == ["norm", "act", "dropout"]
    after.eval()
    assert_same(nn.Sequential(*after), after)
    mlp = fused.MLP(16, [32, 8], 3, norm="layer", activation="gelu", dropout=0.1).eval()
    plain = nn.Sequential(*[nn.Sequential(*child) if list(child.children()) else child
                            for child in mlp])  # fmt: skip
    assert_same(plain, mlp)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_residual_is_added_last(dtype: torch.dtype) -> None:
    block = fused.LinearNormAct(16, 16, norm="layer", activation="relu", dtype=dtype)
    x = torch.randn(2, 5, 16, dtype=dtype, requires_grad=True)
    y = block(x, x)
    torch.testing.assert_close(y, x + block(x), rtol=2e-2, atol=2e-2)
    y.float().sum().backward()
    assert x.grad is not None and block.plan()[0].fused_calls == 2
    block.norm.register_forward_hook(lambda m, a, o: o)
    torch.testing.assert_close(block(x, x), y, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    "make, error, text",
    [
        (lambda: fused.LinearNormAct(4, 4, norm="layr"), ValueError, "'layer', 'rms'"),
        (lambda: fused.LinearNormAct(4, 4, activation="gelo"), ValueError, "gelu_tanh"),
        (lambda: fused.NormAct(4, activation="relu", slope=1), TypeError, "no parameters"),
        (lambda: fused.MLP(4, [4], dropout=1.5), ValueError, "between 0 and 1"),
    ],
)
def test_wrong_arguments(make: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make()  # type: ignore[operator]
