"""fused.Sequential gives what nn.Sequential gives, whatever was done to its children."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from sequentials import assert_close, assert_same, layers, outcome, pair
from torch import nn

import fused
from fused.chain.guard import ReLUSquared

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


SHAPES = ((6, 16), (2, 3, 16), (16,), (0, 16), (2, 2, 2, 16))


@pytest.mark.parametrize("chain", CHAINS)
def test_every_subset_of_the_chain(chain: str) -> None:
    plain, net = pair(CHAINS[chain])
    entries = net.plan()
    assert len(entries) == 1 and entries[0].fused, str(entries)
    for shape in SHAPES:
        assert_same(plain, net, *shape)
    assert net.plan()[0].fused_calls == 5 and net.plan()[0].unfused_calls == 0


@pytest.mark.parametrize("chain", [chain for chain in CHAINS if "D" in chain])
def test_dropout_is_the_references_under_the_same_seed(chain: str) -> None:
    net = fused.Sequential(*copy.deepcopy(CHAINS[chain]))
    net[-1].p = 0.4
    for shape in (*SHAPES, (6, 16)):
        x = torch.randn(shape)
        torch.manual_seed(5)
        found = outcome(net, x)
        torch.manual_seed(5)
        with fused.use_backend("reference"):
            expected = outcome(net, x)
        assert_close(found, expected, 1e-5)
        assert torch.equal(found[0] == 0, expected[0] == 0)
        assert x.numel() < 16 or (found[0] == 0).any()


def test_the_reference_is_named_where_it_is_asked_for() -> None:
    plain, net = pair(layers())
    with fused.use_backend("reference"):
        assert_same(plain, net)
        assert net.plan()[0].reason == "backend 'reference' is asked for"
        assert not net.plan()[0].fused
    assert_same(plain, net)
    entry = net.plan()[0]
    assert (entry.fused, entry.reason) == (True, "")
    assert (entry.fused_calls, entry.unfused_calls) == (1, 1)
    net[1].register_forward_hook(lambda module, args, output: output + 1)
    with fused.use_backend("reference"):
        assert_same(plain, net)


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


def test_wrong_shapes_raise_what_eager_raises() -> None:
    plain, net = pair(layers())
    for bad in (torch.randn(3, 17), torch.randint(5, (3, 16))):
        with pytest.raises(RuntimeError) as theirs:
            plain(bad)
        with pytest.raises(RuntimeError) as ours:
            net(bad)
        assert str(ours.value) == str(theirs.value)


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


def permuted(*shape: int, order: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape).permute(order)


LAYOUTS = {
    "channels last": lambda: torch.randn(2, 8, 3, 5).to(memory_format=torch.channels_last),
    "transposed": lambda: permuted(5, 7, order=(1, 0)),
    "permuted": lambda: permuted(2, 3, 4, 5, order=(2, 0, 3, 1)),
    "gaps at the end of rows": lambda: torch.randn(6, 20)[:, :16],
    "every second": lambda: torch.randn(6, 32)[:, ::2],
    "transposed with gaps": lambda: torch.randn(9, 20)[:, :16].transpose(0, 1),
    "expanded": lambda: torch.randn(1, 16).expand(6, 16),
    "no rows": lambda: torch.randn(2, 0, 3, 5).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_activation_and_dropout_keep_the_layout(layout: str) -> None:
    net = fused.Sequential(nn.SiLU(), nn.Dropout(0.5))
    x = LAYOUTS[layout]().requires_grad_()
    plain = nn.Sequential(*net)(x)
    for _ in range(2):
        y = net(x)
        assert y.stride() == plain.stride()
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        assert dx.stride() == torch.autograd.grad(plain, x, torch.ones_like(y), True)[0].stride()
        kept = y != 0
        torch.testing.assert_close(y[kept], 2 * nn.functional.silu(x)[kept])


def test_the_mask_is_laid_in_memory_order() -> None:
    net = fused.Sequential(nn.Sigmoid(), nn.Dropout(0.5))
    x = torch.randn(2, 8, 3, 5).to(memory_format=torch.channels_last)
    torch.manual_seed(3)
    y = net(x)
    torch.manual_seed(3)
    assert torch.equal(y.permute(0, 2, 3, 1), net(x.permute(0, 2, 3, 1)))


def test_no_features() -> None:
    for modules, shape in (
        ([nn.Linear(0, 8), nn.LayerNorm(8), nn.ReLU()], (2, 3, 0)),
        ([nn.Linear(8, 0), nn.ReLU()], (2, 3, 8)),
        ([nn.ReLU(), nn.Dropout(0.5)], (2, 3, 0)),
        ([nn.ReLU(), nn.Dropout(0.5)], (2, 0, 3)),
    ):
        plain, net = pair(modules)
        assert_same(plain, net, *shape)


def test_sums_and_multiples_are_fused_too() -> None:
    net = fused.Sequential(nn.Linear(4, 4), nn.ReLU())
    for made in (net + nn.Sequential(nn.Tanh()), net * 2, 2 * net):
        assert type(made) is fused.Sequential
    assert [type(child) for child in net * 2] == [nn.Linear, nn.ReLU] * 2
    net += nn.Sequential(nn.Linear(4, 2))
    net.extend([nn.Tanh()])
    assert type(net) is fused.Sequential
    assert [entry.fused for entry in net.plan()] == [True, True]
    assert_same(nn.Sequential(*net), net, 3, 4)
    assert type(net.pop(slice(2, 4))) is fused.Sequential and len(net) == 2
