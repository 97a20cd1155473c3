"""What the benchmark refuses to measure."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench_cases import (
    WRONG,
    DropsAnew,
    P,
    WeighsGradient,
    make_all,
    make_cell,
    make_with_wrong_eager,
)
from torch import Tensor, nn

import fused

pytestmark = pytest.mark.usefixtures("bench_harness")


RIGHT = [
    {},
    {"dtype": "bfloat16"},
    {"norm": "rms", "activation": "silu", "dtype": "float16"},
    {"mode": "forward"},
    {"mode": "inference", "activation": "relu"},
    {"chain": "N-A", "p": 0.0},
    {"chain": "L-N-A-D", "K": 40, "norm": "rms"},
    {"chain": "L-A", "K": 40, "norm": "", "p": 0.0, "dtype": "bfloat16"},
    {"chain": "A-D", "norm": ""},
    {"activation": "glu"},
    {"chain": "L-N-A", "K": 40, "norm": "rms", "activation": "glu", "p": 0.0, "dtype": "bfloat16"},
]


@pytest.mark.parametrize("changes", RIGHT, ids=str)
def test_right_providers_pass(changes: dict[str, Any]) -> None:
    from bench.check import check

    cell = make_cell(**changes)
    chain, inputs, providers = make_all(cell)
    for name in ("eager", "fused"):
        assert 0 <= check(providers[name], cell, chain, inputs) < 0.1


@pytest.mark.slow
def test_the_compiler_passes() -> None:
    from bench.check import check

    cell = make_cell()
    chain, inputs, providers = make_all(cell)
    check(providers["compile"], cell, chain, inputs)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_provider_is_refused(name: str, tmp_path: Path) -> None:
    from bench import results
    from bench.harness import measure
    from bench.machine import this_machine
    from bench.providers import make_providers

    cell, machine, path = make_cell(), this_machine("cpu"), tmp_path / "norm.csv"
    right = measure(cell, machine, 0.0, lambda *given: make_providers(*given)[:2])
    assert right.refused == {}
    results.merge(path, right, machine)
    assert {r.provider for r in results.read(path)} == {"fused", "eager"}

    outcome = measure(cell, machine, 0.0, make_with_wrong_eager(name))
    assert list(outcome.refused) == ["eager"]
    assert WRONG[name][1] in outcome.refused["eager"]
    assert {r.provider for r in outcome.rows} == {"fused"}
    results.merge(path, outcome, machine)
    assert {r.provider for r in results.read(path)} == {"fused"}, "an earlier figure must go"


CHANNEL: dict[str, dict[str, Any]] = {
    "rows": {"norm": "batch", "activation": "relu"},
    "images": {"norm": "batch", "activation": "silu", "shape": "2×8×40×50"},
    "channels-last": {"norm": "instance", "shape": "3×8×5×6", "layout": "channels-last"},
    "groups": {"norm": "group", "shape": "2×32×5×6", "dtype": "bfloat16", "mode": "forward"},
    "block": {
        "suite": "blocks",
        "chain": "L-N-A-D",
        "norm": "batch",
        "activation": "silu",
        "K": 40,
    },
    "network": {"chain": "3 L-N-A-D", "K": 40},
    "network of batch norms": {"chain": "3 L-N-A-D", "norm": "batch", "K": 40},
}


def make_channel_cell(name: str) -> Any:
    changes = {"suite": "channel", **CHANNEL[name]}
    cell = make_cell(**changes)
    channels = cell.sizes[1]
    return replace(cell, M=math.prod(cell.sizes) // channels, N=channels)


@pytest.mark.parametrize("name", CHANNEL)
def test_right_channel_providers_pass(name: str) -> None:
    from bench.check_channel import check_channel

    cell = make_channel_cell(name)
    chain, inputs, providers = make_all(cell)
    for provider in ("fused", "eager"):
        check_channel(providers[provider], cell, chain, inputs)
    assert all(child.p == cell.p for child in chain if isinstance(child, nn.Dropout))
    assert all(child.p == P for child in chain if isinstance(child, nn.Dropout))


class ReturnsContiguous(torch.autograd.Function):
    """An identity whose gradient is contiguous."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> Tensor:
        return dx.contiguous()


def _tracks_nothing(chain: nn.Sequential, x: Tensor) -> Tensor:
    norm = chain[0]
    h = nn.functional.batch_norm(x, None, None, norm.weight, norm.bias, True, 0.0, norm.eps)
    return chain[1:](h)


# What only a norm over samples or positions can do wrong.
CHANNEL_WRONG: dict[str, tuple[Callable[[nn.Sequential, Tensor], Tensor], str]] = {
    "layout": (lambda chain, x: chain(x).contiguous(), "the output has strides"),
    "layout of dx": (
        lambda chain, x: fused.Sequential(*chain)(ReturnsContiguous.apply(x)),
        "the gradient of x has strides",
    ),
    "running statistics": (_tracks_nothing, "running_mean: relative error"),
}


@pytest.mark.parametrize("wrong", [*WRONG, *CHANNEL_WRONG])
def test_a_wrong_channel_provider_is_refused(wrong: str) -> None:
    from bench.check import CheckError
    from bench.check_channel import check_channel

    cell = make_channel_cell("channels-last" if wrong.startswith("layout") else "images")
    chain, inputs, providers = make_all(cell)
    call, message = (WRONG | CHANNEL_WRONG)[wrong]
    provider = replace(providers["fused"], forward=lambda given: call(chain, given.x))
    if wrong == "one row":  # here it is a sample, which nothing of is dropped
        message = "dropout keeps"
    with pytest.raises(CheckError, match=re.escape(message)):
        check_channel(provider, cell, chain, inputs)


SHAPES: dict[str, dict[str, Any]] = {
    "add & norm": {"chain": "D-S-N", "activation": ""},
    "without dropout": {"chain": "S-N", "norm": "rms", "activation": "", "p": 0.0},
    "bfloat16": {"chain": "D-S-N", "activation": "", "dtype": "bfloat16"},
    "forward": {"chain": "D-S-N", "activation": "", "mode": "forward"},
    "gate": {"chain": "G-D", "norm": "", "activation": "silu"},
    "shortcut": {"layout": "channels-last"},
    "shortcut, inference": {"mode": "inference"},
}


def make_shape_cell(name: str) -> Any:
    cell = make_cell(suite="shapes", **SHAPES[name])
    if "shortcut" not in name:
        return cell
    what = {"chain": "N-S-A", "norm": "batch", "activation": "relu", "shape": "2×8×40×50"}
    return replace(cell, **what, M=4000, N=8, p=0.0)


@pytest.mark.parametrize("name", SHAPES)
def test_right_shapes_pass(name: str) -> None:
    from bench.check_shapes import check_shapes

    cell = make_shape_cell(name)
    chain, inputs, providers = make_all(cell)
    assert [*providers] == ["fused", "eager", "compile", "add"]
    for provider in ("fused", "eager"):
        assert 0 <= check_shapes(providers[provider], cell, chain, inputs) < 0.1


# Of which chain the results are changed, how, and what is said.
SHAPES_WRONG: dict[str, tuple[str, Callable[..., Any], str]] = {
    "sum": ("without dropout", lambda y, h: (y, h * 1.01), "sum: relative error"),
    "norm of the sum": ("add & norm", lambda y, h: (y * 1.01, h), "output: relative error"),
    "gradient of sum": ("add & norm", lambda y, h: (y, WeighsGradient.apply(h)), "gradient of x"),
    "mask": ("gate", DropsAnew.apply, "dropout keeps 0.5"),
    "gradient": ("gate", WeighsGradient.apply, "gradient of x"),
    "nan": ("gate", lambda y: y * float("nan"), "the output is not finite"),
    "layout": ("shortcut", lambda y: y.contiguous(), "has strides"),
}


@pytest.mark.parametrize("wrong", SHAPES_WRONG)
def test_a_wrong_shape_is_refused(wrong: str) -> None:
    from bench.check import CheckError
    from bench.check_shapes import check_shapes

    name, change, message = SHAPES_WRONG[wrong]
    cell = make_shape_cell(name)
    chain, inputs, providers = make_all(cell)
    right = providers["fused"].forward

    def forward(given: Any) -> Any:
        found = right(given)
        return change(*found) if isinstance(found, tuple) else change(found)

    with pytest.raises(CheckError, match=re.escape(message)):
        check_shapes(replace(providers["fused"], forward=forward), cell, chain, inputs)


@pytest.mark.parametrize("missing", ["add & norm", "gate", "shortcut"])
def test_a_second_input_that_is_not_used_is_refused(missing: str) -> None:
    from bench.check import CheckError
    from bench.check_shapes import check_shapes

    cell = make_shape_cell(missing)
    chain, inputs, providers = make_all(cell)
    ours = providers["fused"]

    def forward(given: Any) -> Any:
        (other,) = given.more
        return ours.forward(replace(given, more=(other * 1.05,)))

    with pytest.raises(CheckError, match="output: relative error"):
        check_shapes(replace(ours, forward=forward), cell, chain, inputs)


def test_a_run_of_shapes_writes_rows(tmp_path: Path) -> None:
    from bench import results
    from bench.harness import measure
    from bench.machine import this_machine
    from bench.providers import make_providers

    def make(*given: Any) -> list[Any]:
        return [p for p in make_providers(*given) if p.name != "compile"]

    outcome = measure(make_shape_cell("add & norm"), this_machine("cpu"), 0.0, make)
    assert outcome.refused == {}
    path = tmp_path / "shapes.csv"
    results.merge(path, outcome, this_machine("cpu"))
    rows = {(r.provider, r.mode): r for r in results.read(path)}
    assert {*rows} == {("add", "backward")} | {
        (name, mode) for name in ("fused", "eager") for mode in ("training", "backward")
    }
    # Both keep the sum, statistics besides; eager also the mask, a byte an element.
    sum_bytes = 300 * 96 * 4
    kept = {name: rows[name, "training"].kept_bytes for name in ("fused", "eager")}
    assert sum_bytes < kept["fused"] < sum_bytes + 4000
    assert kept["eager"] > sum_bytes + 300 * 96


def test_nothing_is_timed_when_all_are_refused() -> None:
    from bench.harness import measure
    from bench.machine import this_machine

    wrong = make_with_wrong_eager("nan")
    outcome = measure(make_cell(), this_machine("cpu"), 0.0, lambda *given: wrong(*given)[1:])
    assert outcome.rows == []


def test_peers_are_measured_where_they_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.check import check
    from bench.peers import missing_peers

    def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return nn.functional.rms_norm(x, (x.shape[-1],), weight, eps)

    for library in ("liger_kernel", "quack", "flash_attn"):
        monkeypatch.setitem(sys.modules, library, None)  # as if it were not installed
    for name in [n for n in sys.modules if n.startswith(("liger_kernel.", "flash_attn."))]:
        monkeypatch.delitem(sys.modules, name)
    assert missing_peers() == ["liger", "quack", "flash-attn"]
    monkeypatch.setitem(sys.modules, "quack", SimpleNamespace(rmsnorm=rmsnorm))
    assert missing_peers() == ["liger", "flash-attn"]
    for norm in ("layer", "rms"):
        cell = make_cell(suite="peers", chain="N", norm=norm, activation="", p=0.0)
        chain, inputs, providers = make_all(cell)
        assert ("quack" in providers) == (norm == "rms")
        for provider in providers.values():
            if provider.checked and provider.name != "compile":
                check(provider, cell, chain, inputs)
