"""What may have been done to the children of a fused.Sequential: it falls back, and says why."""

from __future__ import annotations

import gc
import itertools
import threading
import weakref

import pytest
import torch
from sequentials import assert_same, layers, pair
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import fused


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
    assert_same(nn.Sequential(*net), net, within=1e-4)
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


def outcome_or_error(net: nn.Module, x: torch.Tensor, cast: torch.dtype | None) -> object:
    try:
        with torch.autocast("cpu", cast, enabled=cast is not None):
            return net(x)
    except (RuntimeError, ValueError, TypeError) as error:
        return type(error), str(error)


HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize("cast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, None])
def test_mixed_dtypes_give_eagers_result_or_eagers_error(
    norm: type[nn.Module] | None, cast: torch.dtype | None
) -> None:
    """Every mix of dtypes of input, Linear, norm weight and norm bias; with and without Linear."""
    dtypes = (HALF, SINGLE, DOUBLE)
    for first in (*dtypes, None):
        for given, weight, bias in itertools.product(dtypes, repeat=3):
            modules: list[nn.Module] = [nn.SiLU()]
            if norm is not None:
                modules.insert(0, norm(8))
                for (name, t), dtype in zip(
                    list(modules[0].named_parameters()), (weight, bias), strict=False
                ):
                    modules[0].register_parameter(name, nn.Parameter(t.to(dtype)))
            elif (weight, bias) != (SINGLE, SINGLE):
                continue
            if first is not None:
                modules.insert(0, nn.Linear(8, 8).to(first))
            plain, net = pair(modules)
            x = torch.randn(3, 8).to(given)
            for _ in range(2):
                theirs, ours = outcome_or_error(plain, x, cast), outcome_or_error(net, x, cast)
                if isinstance(theirs, torch.Tensor):
                    assert isinstance(ours, torch.Tensor), (first, given, weight, bias, ours)
                    torch.testing.assert_close(ours, theirs, rtol=3e-2, atol=3e-2)
                else:
                    assert ours == theirs, (first, given, weight, bias)


def test_dtype_change_after_a_call() -> None:
    plain, net = pair(layers()[:3])
    assert_same(plain, net)
    net.double()
    x = torch.randn(6, 16, dtype=torch.float64)
    torch.testing.assert_close(net(x), plain(x))
    net.bfloat16()
    x = torch.randn(6, 16, dtype=torch.bfloat16)
    torch.testing.assert_close(net(x), plain(x), rtol=2e-2, atol=2e-2)


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


def test_in_place_activation_first_in_its_chain_changes_its_input_as_in_eager() -> None:
    _, net = pair([nn.ReLU(inplace=True), nn.Dropout(0.0)])
    x = -torch.ones(3, 4)
    net(x)
    assert (x == 0).all()
    assert "in place" in net.plan()[0].reason


def test_in_place_that_is_set_after_a_call() -> None:
    net = fused.Sequential(nn.ReLU(), nn.Dropout(0.5))
    x = -torch.ones(3, 4)
    net(x)
    net[0].inplace = True
    net(x)
    assert (x == 0).all()


def test_a_forward_that_is_replaced_on_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, net = pair(layers())
    assert_same(plain, net)
    forward = nn.LayerNorm.forward
    monkeypatch.setattr(nn.LayerNorm, "forward", lambda self, x: forward(self, x) + 1)
    assert_same(plain, net)
    assert net.plan()[0].reason == "child '1': the forward of LayerNorm was replaced"
    monkeypatch.undo()
    assert_same(plain, net)
    assert net.plan()[0].reason == ""


@pytest.mark.parametrize(
    "module, name, value",
    [
        (nn.ReLU6(), "max_val", 2.0),
        (nn.ReLU6(), "min_val", -1.0),
        (nn.LeakyReLU(0.1), "negative_slope", float("nan")),
        (nn.GELU(), "approximate", "tanh"),
    ],
)
def test_attributes_that_make_another_activation(
    module: nn.Module, name: str, value: object
) -> None:
    plain, net = pair([nn.Linear(16, 32), module])
    assert_same(plain, net)
    setattr(module, name, value)
    x = torch.randn(6, 16) * 9
    for _ in range(2):
        torch.testing.assert_close(net(x), plain(x), equal_nan=True)
    assert net.plan()[0].fused == (name == "approximate")


ODD = {
    "nested": lambda: torch.nested.nested_tensor([torch.randn(2, 16), torch.randn(3, 16)]),
    "jagged": lambda: torch.nested.nested_tensor(
        [torch.randn(2, 16), torch.randn(3, 16)], layout=torch.jagged
    ),
    "sparse": lambda: torch.randn(6, 16).to_sparse(),
    "csr": lambda: torch.randn(6, 16).to_sparse_csr(),
    "mkldnn": lambda: torch.randn(6, 16).to_mkldnn(),
}


@pytest.mark.parametrize("early", [True, False], ids=["before a call", "after a call"])
@pytest.mark.parametrize("kind", ODD)
@pytest.mark.filterwarnings("ignore:Sparse", "ignore:The PyTorch API of nested")
def test_inputs_that_are_not_strided(kind: str, early: bool) -> None:
    plain, net = pair([nn.ReLU(), nn.Dropout(0.0)])
    if not early:
        net(torch.randn(6, 16))
    x = ODD[kind]()
    theirs, ours = outcome_or_error(plain, x, None), outcome_or_error(net, x, None)
    if isinstance(theirs, torch.Tensor):
        assert isinstance(ours, torch.Tensor)
        assert (ours.layout, ours.is_nested) == (theirs.layout, theirs.is_nested)
    else:
        assert ours == theirs
    assert net.plan()[0].reason.startswith("the input is")


def test_sparse_weight() -> None:
    plain, net = pair([nn.Linear(16, 32), nn.LayerNorm(32)])
    net[0].weight = nn.Parameter(net[0].weight.detach().to_sparse())
    assert not net.plan()[0].fused and "sparse_coo" in net.plan()[0].reason
    x = torch.randn(6, 16)
    assert outcome_or_error(net, x, None) == outcome_or_error(plain, x, None)


def test_parameters_of_another_shape_raise_what_eager_raises() -> None:
    for child, name in ((0, "bias"), (1, "weight"), (1, "bias")):
        plain, net = pair([nn.Linear(16, 32), nn.LayerNorm(32), nn.ReLU()])
        setattr(net[child], name, nn.Parameter(torch.ones(7)))
        x = torch.randn(3, 16)
        assert outcome_or_error(net, x, None) == outcome_or_error(plain, x, None)


def test_children_that_change_their_class() -> None:
    net = fused.Sequential(nn.LazyLinear(32), nn.LayerNorm(32), nn.ReLU())
    net(torch.randn(3, 16))
    assert_same(nn.Sequential(*net), net)
    assert [entry.names for entry in net.plan()] == [("0", "1", "2")]
    parametrizations.weight_norm(net[0])
    assert_same(nn.Sequential(*net), net, within=1e-4)
    assert [entry.names for entry in net.plan()] == [("0",), ("1", "2")]
    parametrize.remove_parametrizations(net[0], "weight")
    assert_same(nn.Sequential(*net), net)
    assert [entry.names for entry in net.plan()] == [("0", "1", "2")]


def test_threads_that_call_one_chain() -> None:
    """Inputs of two dtypes through a chain without parameters: each thread gets its own result."""
    net = fused.Sequential(nn.Tanh(), nn.Dropout(0.0)).eval()
    block = fused.NormAct(64, norm="layer", activation="relu", affine=False)
    wrong: list[str] = []

    def call(dtype: torch.dtype) -> None:
        x = torch.randn(4, 64, dtype=dtype)
        expected = nn.Sequential(*block)(x)
        for _ in range(300):
            if block(x).dtype != dtype or not torch.equal(net(x), torch.tanh(x)):
                wrong.append(str(dtype))
            if not torch.allclose(block(x), expected, atol=1e-5):
                wrong.append(str(dtype))

    threads = [threading.Thread(target=call, args=(dtype,)) for dtype in (SINGLE, DOUBLE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_a_chain_remembers_is_one_tuple() -> None:
    """Another thread may read it at any moment, so it must be replaced at once."""
    net = fused.Sequential(nn.Linear(16, 32), nn.LayerNorm(32))
    chain = net._current_steps()[0]
    assert chain.passed is None
    net(torch.randn(3, 16))
    first = chain.passed
    net(torch.randn(3, 16, dtype=torch.float64).float())
    assert chain.passed is first and isinstance(first, tuple)


def test_parameters_of_a_functional_call_are_let_go() -> None:
    net = fused.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.ReLU())
    x = torch.randn(3, 16)
    weight = torch.randn(32, 16)
    expected = torch.relu(nn.functional.layer_norm(x @ weight.t() + net[0].bias, (32,)))
    fast = {"0.weight": nn.Parameter(weight)}
    torch.testing.assert_close(torch.func.functional_call(net, fast, (x,)), expected)
    watched = weakref.ref(fast.pop("0.weight"))
    gc.collect()
    assert watched() is None
    assert_same(nn.Sequential(*net), net)


def test_other_parameters_at_the_same_address() -> None:
    """What `.data =` leaves where it was: the short guard knows tensors by their address."""
    net = fused.Sequential(nn.Linear(16, 64), nn.LayerNorm(64), nn.ReLU())
    plain = nn.Sequential(*net)
    x = torch.randn(4, 16)
    for _ in range(2):
        net(x)
    norm = net[1]
    own = norm.weight.data
    norm.weight.data = own[:1].expand(64)
    assert norm.weight.data_ptr() == own.data_ptr()
    torch.testing.assert_close(net(x), plain(x))
    assert "not contiguous" in net.plan()[0].reason
    norm.weight.data = own
    net(x)
    norm.normalized_shape = (63,)
    with pytest.raises(RuntimeError, match="normalized_shape"):
        net(x)


def test_statistics_that_are_taken_away() -> None:
    """Without them evaluation takes those of the batch, and one row has none."""
    chain = fused.Sequential(nn.BatchNorm1d(8), nn.ReLU()).eval()
    x = torch.randn(1, 8)
    chain(x)
    chain[0].running_mean = chain[0].running_var = None
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        chain(x)


def test_the_plan_before_the_first_call() -> None:
    def plan(*modules: nn.Module) -> str:
        return str(fused.Sequential(*modules).plan())

    net = fused.Sequential(*layers())
    tensor_subclass(net)
    assert "not fused: Linear: its weight is a TaggedTensor" in str(net.plan())
    assert "LayerNorm: it has float64, its input float32" in plan(
        nn.Linear(4, 4), nn.LayerNorm(4).double()
    )
    mixed = nn.LayerNorm(4).bfloat16()
    mixed.bias = nn.Parameter(mixed.bias.detach().float())
    assert "bfloat16 and float32" in plan(mixed, nn.ReLU())
    assert "layer → relu: fused" in plan(nn.LayerNorm(4), nn.ReLU())
