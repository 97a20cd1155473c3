"""A gate of two tensors: the C++ kernels, the function, its derivatives, and who runs it."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, Inputs, run_operator
from gated_cases import GATED, GATES, make_gated_epilogue
from test_autograd import kept_storages
from test_row import BREAKPOINTS, SPECIAL
from test_row_memory import rows_that_stream
from test_small import WITHOUT_NORM
from tolerances import assert_close
from torch import Tensor

import fused
from fused import spec
from fused.backends import backend, ops
from fused.functional import dropout_mask, gate
from fused.run import by_torch, reference
from fused.spec import GATED_CODES

# One column, below, at and above a vector and a random block, odd, long, more rows than a thread's.
SHAPES = [(5, 1), (4, 3), (9, 17), (70, 64), (33, 65), (3, 1000), (2, 4097), (600, 96)]
SEED = torch.tensor([0x0123456789ABCDEF])


def three(rows: int, cols: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """dy, value and gate."""
    g = torch.Generator().manual_seed(rows + cols)
    return [(torch.randn(rows, cols, generator=g) * 2).to(dtype) for _ in range(3)]


def run(
    dy: Tensor, value: Tensor, gate: Tensor, name: str, threshold: int = 0, joined: bool = False
) -> dict[str, Tensor]:
    codes = SEED, GATED_CODES[name], threshold
    y = ops.gate_forward(value, gate, *codes)
    dvalue, dgate = ops.gate_backward(dy, value, gate, *codes, joined)
    return {"y": y, "dvalue": dvalue, "dgate": dgate}


def by_halves(
    dy: Tensor, value: Tensor, gate: Tensor, name: str, p: float = 0.0
) -> dict[str, Tensor]:
    """The gated activation of one tensor, which test_gated.py holds to the oracle."""
    inputs = Inputs(z=torch.cat([value, gate], 1), dy=dy.contiguous(), seed=SEED)
    found = run_operator(inputs, make_gated_epilogue(None, name, p))
    dvalue, dgate = found["dz"].chunk(2, 1)
    return {"y": found["y"], "dvalue": dvalue, "dgate": dgate}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, t in expected.items():
        torch.testing.assert_close(found[name], t, rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_the_halves_of_one_tensor(shape: tuple[int, int], name: str, dtype: torch.dtype) -> None:
    for p in (0.0, 0.3):
        given = three(*shape, dtype)
        threshold = make_gated_epilogue(None, name, p).threshold
        assert_equal(run(*given, name, threshold), by_halves(*given, name, p))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("name", GATED)
def test_breakpoints_infinities_and_nan(name: str) -> None:
    values = torch.tensor([*BREAKPOINTS, *SPECIAL, 1e38, -1e38, 1e-40])
    value, gate = (t.reshape(1, -1) for t in torch.meshgrid(values, values, indexing="ij"))
    given = torch.ones_like(value), value, gate
    assert_equal(run(*given, name), by_halves(*given, name))


@pytest.mark.usefixtures("cpp")
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("name", GATED)
def test_twice_eagers_error(name: str, dtype: torch.dtype) -> None:
    given = three(37, 200, dtype)
    found = run(*given, name, 6554)
    results = []
    for kind in (torch.float64, dtype):
        dy, *both = (t.to(kind) for t in given)
        both = [t.requires_grad_() for t in both]
        y = reference.gate(*both, make_gated_epilogue(None, name, 0.1), SEED)
        y.backward(dy)
        results.append((y.detach(), *(t.grad for t in both)))
    for (key, t), oracle, eager in zip(found.items(), *results, strict=True):
        assert_close(key, t, oracle, eager, dtype)


def apart(t: Tensor, gap: int, offset: int) -> Tensor:
    """t in rows that are further apart, in the middle of NaN."""
    rows, cols = t.shape
    flat = torch.full((offset + rows * (cols + gap) + 64,), math.nan, dtype=t.dtype)
    return flat.as_strided((rows, cols), (cols + gap, 1), offset).copy_(t)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_and_offsets_of_their_own(dtype: torch.dtype) -> None:
    for cols in (1, 15, 32, 100):
        dy, value, gate = three(6, cols, dtype)
        expected = run(dy, value, gate, "swiglu", 6554)
        moved = apart(dy, 5, 0), apart(value, 3, 1), apart(gate, 0, 7)
        assert_equal(run(*moved, "swiglu", 6554), expected)
        # One behind the other in each row, the gate first.
        halves = torch.cat([gate, value], 1)
        found = run(dy, halves[:, cols:], halves[:, :cols], "swiglu", 6554, joined=True)
        both = torch.cat([expected["dgate"], expected["dvalue"]], 1)
        assert found["dgate"].shape == (0, cols)
        assert_equal(found, {"y": expected["y"], "dvalue": both})


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("rows, cols", [(5, 33), (1, 1), (0, 8), (4, 0), (70, 32)])
def test_outputs_are_written_completely(rows: int, cols: int) -> None:
    backend.poison_outputs(True)
    try:
        for dtype in DTYPES:
            for joined in (False, True):
                for t in run(*three(rows, cols, dtype), "geglu", 6554, joined).values():
                    assert not t.isnan().any()
    finally:
        backend.poison_outputs(False)


@pytest.mark.slow
@pytest.mark.usefixtures("cpp")
def test_streaming_stores_give_the_same() -> None:
    rows = rows_that_stream(512, torch.bfloat16)
    given = [t.bfloat16() for t in three(rows, 512)]
    found, few = run(*given, "reglu"), run(*(t[:9] for t in given), "reglu")
    assert_equal({name: t[:9] for name, t in found.items()}, few)
    assert_equal(
        {name: t[-9:] for name, t in found.items()}, run(*(t[-9:] for t in given), "reglu")
    )


@pytest.mark.usefixtures("cpp")
def test_same_bits_at_any_thread_count() -> None:
    given = three(3000, 65)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(*given, "geglu", 6554))
    torch.set_num_threads(before)
    assert_equal(results[1], results[0])
    assert_equal(results[2], results[0])


@pytest.mark.usefixtures("cpp")
def test_what_the_operators_refuse() -> None:
    z, code = torch.zeros(3, 8), GATED_CODES["glu"]
    for call, message in (
        (lambda: ops.gate_forward(z, z[:, :4], None, code, 0), r"gate must be \(3, 8\)"),
        (lambda: ops.gate_forward(z[0], z[0], None, code, 0), r"value must be \(rows, cols\)"),
        (lambda: ops.gate_forward(z, z.double(), None, code, 0), "must have the dtype"),
        (lambda: ops.gate_forward(z, z, None, 3, 0), "unknown code of a gated activation 3"),
        (lambda: ops.gate_forward(z, z, None, code, 9), "needs a seed"),
        (lambda: ops.gate_backward(z[:2], z, z, None, code, 0, False), r"dy must be \(3, 8\)"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


@pytest.mark.usefixtures("cpp")
def test_opcheck() -> None:
    for rows, dtype, p in ((5, torch.float32, 0), (5, torch.bfloat16, 9000), (0, torch.float32, 9)):
        dy, *both = three(rows, 6, dtype)
        codes = (SEED if p else None, GATED_CODES["swiglu"], p)
        torch.library.opcheck(ops.gate_forward, (*both, *codes))
        for joined in (False, True):
            torch.library.opcheck(ops.gate_backward, (dy, *both, *codes, joined))


# ---- fused.functional.gate ----


def pair(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    value, gate = (torch.randn(shape, dtype=dtype).requires_grad_() for _ in range(2))
    return value, gate


@pytest.mark.parametrize("activation", ["sigmoid", "SiLU", "gelu", "gelu_tanh", "ReLU"])
@pytest.mark.parametrize("shape", [(7,), (5, 6), (2, 3, 9), (2, 0, 3), (4, 0), (2, 3, 4, 5)])
def test_values_and_gradients(backend: str, shape: tuple[int, ...], activation: str) -> None:
    value, other = pair(*shape)
    expected = value * GATES[spec.GATES[activation.lower()]](other)
    with fused.use_backend(backend):
        found = gate(value, other, activation)
        mine = torch.autograd.grad(found.sin().sum(), (value, other))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(mine, torch.autograd.grad(expected.sin().sum(), (value, other)))


def test_layouts_and_a_tensor_that_gates_itself(backend: str) -> None:
    value, other = pair(6, 10)
    with fused.use_backend(backend):
        for a, b in (
            (value.t(), other.t()),
            (value[:, ::2], other[:, 5:]),
            (value, value),
            (value[:1].expand(4, -1), other[2:]),
            other.chunk(2, -1),
        ):
            found, expected = gate(a, b), a * F.silu(b)
            torch.testing.assert_close(found, expected)
            mine, theirs = (
                torch.autograd.grad(t.sin().sum(), (value, other), allow_unused=True)
                for t in (found, expected)
            )
            torch.testing.assert_close(mine, theirs)


def test_only_where_a_gradient_is_needed(backend: str) -> None:
    with fused.use_backend(backend):
        for needed in range(2):
            both = [t.detach() for t in pair(4, 5)]
            both[needed].requires_grad_()
            gate(*both).sum().backward()
            expected = [t.detach().requires_grad_() for t in both]
            (expected[0] * F.silu(expected[1])).sum().backward()
            assert both[1 - needed].grad is None
            torch.testing.assert_close(both[needed].grad, expected[needed].grad)
        assert not gate(*(t.detach() for t in pair(4, 5))).requires_grad


def test_dropout(backend: str) -> None:
    value, other = pair(9, 40, dtype=torch.float32)
    with fused.use_backend(backend):
        y = gate(value, other, "sigmoid", p=0.3, seed=11)
        keep = dropout_mask(9, 40, 0.3, 11)
        assert torch.equal(y != 0, keep)
        scale = 65536 / (65536 - round(0.3 * 65536))
        torch.testing.assert_close(y, value * other.sigmoid() * keep * scale)
        y.sum().backward()
        assert torch.equal(value.grad != 0, keep) and torch.equal(other.grad != 0, keep)
        assert torch.equal(gate(value, other, p=0.3, training=False), gate(value, other))
        assert (gate(value, other, p=1.0) == 0).all()
        torch.manual_seed(3)
        first = gate(value, other, p=0.5)
        assert not torch.equal(first, gate(value, other, p=0.5))
        torch.manual_seed(3)
        assert torch.equal(first, gate(value, other, p=0.5))


def test_what_is_kept_for_backward(backend: str) -> None:
    if backend == "reference":
        pytest.skip("plain torch keeps the activation as well")
    value, other = pair(64, 32, dtype=torch.bfloat16)
    kept = kept_storages(lambda: gate(value, other, p=0.1))
    assert sorted(kept.values()) == [8, value.nbytes, value.nbytes]


@pytest.mark.parametrize("activation", ["silu", "gelu", "sigmoid"])
def test_gradcheck_and_gradgradcheck(activation: str) -> None:
    given = pair(3, 4)
    assert torch.autograd.gradcheck(partial(gate, activation=activation), given)
    assert torch.autograd.gradgradcheck(partial(gate, activation=activation, p=0.3, seed=5), given)
    value, other = given
    assert torch.autograd.gradgradcheck(lambda x: gate(x, x), (value,))
    assert torch.autograd.gradgradcheck(lambda x: gate(other.detach(), x), (value,))


def test_halves_with_the_gate_first_differentiate_twice() -> None:
    from fused.run.gate import gate as of_halves

    z, spec = pair(3, 8)[0], make_gated_epilogue(None, "swiglu")
    found = of_halves(spec, z)
    torch.testing.assert_close(found, z[:, 4:] * F.silu(z[:, :4]))
    assert torch.autograd.gradcheck(partial(of_halves, spec), (z,))
    assert torch.autograd.gradgradcheck(partial(of_halves, spec), (z,))


def test_transforms() -> None:
    value, other = pair(5, 6)
    tangents = tuple(t.detach().cos() for t in pair(5, 6))

    def plain(a: Tensor, b: Tensor) -> Tensor:
        return a * F.silu(b)

    both = value.detach(), other.detach()
    torch.testing.assert_close(
        torch.func.jvp(gate, both, tangents), torch.func.jvp(plain, both, tangents)
    )
    torch.testing.assert_close(torch.vmap(gate)(*both), plain(*both))
    torch.testing.assert_close(
        torch.func.grad(lambda a: gate(a, both[1]).sum())(both[0]), F.silu(both[1])
    )


def test_autocast() -> None:
    """As eager: no operator of these is cast, so that halves stay halves."""
    value, other = pair(4, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert gate(value, other).dtype == torch.bfloat16
        assert gate(value.float(), other.float()).dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["aot_eager", "inductor"])
def test_compile(engine: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(gate, backend=engine, fullgraph=True, dynamic=True)
    for rows in (3, 5):
        value, other = pair(2, rows, 8, dtype=torch.float32)
        found, expected = compiled(value, other), value * F.silu(other)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(
            torch.autograd.grad(found.sum(), (value, other)),
            torch.autograd.grad(expected.sum(), (value, other)),
        )
        assert torch.equal(
            compiled(value, other, p=0.5, seed=SEED), gate(value, other, p=0.5, seed=SEED)
        )


def test_without_a_kernel_plain_torch_serves_visibly(monkeypatch: pytest.MonkeyPatch) -> None:
    from fused.run import recording

    value = torch.zeros(2, device="meta")
    monkeypatch.setattr(recording, "choose", lambda *_: "cuda")
    monkeypatch.setattr(recording, "is_plain", lambda _: True)
    with pytest.warns(UserWarning, match="two tensors runs in plain torch.*CUDA C\\+\\+"):
        assert recording.composite(value, "a gate of two tensors runs")
    assert not recording.composite(value)


@pytest.mark.usefixtures("cpp")
def test_torchs_own_operators_serve_small_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    forward = ops.gate_forward
    monkeypatch.setattr(by_torch, "WITHOUT_NORM", WITHOUT_NORM)
    monkeypatch.setattr(ops, "gate_forward", lambda *given: calls.append(1) or forward(*given))
    for rows, p, kernel in ((4, 0.0, False), (4, 0.5, True), (400, 0.0, True)):
        calls.clear()
        value, other = pair(rows, 100)
        found = gate(value, other, p=p)
        assert bool(calls) == kernel
        if not p:
            torch.testing.assert_close(found, value * F.silu(other))


X = torch.zeros(3, 4)


@pytest.mark.parametrize(
    "call, kind, message",
    [
        (lambda: gate(X.long(), X), TypeError, "gate: value must be floating point, got int64"),
        (lambda: gate(X, X.long()), TypeError, "gate: gate must be floating point"),
        (lambda: gate(X, X[:2]), ValueError, r"gate: gate must be \(3, 4\), got \(2, 4\)"),
        (lambda: gate(X, X.double()), TypeError, "gate must have the dtype of value"),
        (lambda: gate(X, X.to("meta")), ValueError, "must be on one device"),
        (lambda: gate(X[0, 0], X[0, 0]), ValueError, "of one dimension or more"),
        (lambda: gate(X, X, "mish"), ValueError, "must be one of sigmoid, silu.* got 'mish'"),
        (lambda: gate(X, X, "swiglu"), ValueError, "must be one of sigmoid, silu"),
        (lambda: gate(X, X, None), ValueError, "must be one of sigmoid, silu"),
        (lambda: gate(X, X, "swish"), ValueError, "unknown activation 'swish'"),
        (lambda: gate(X, X, p=1.5), ValueError, "gate: dropout probability"),
        (lambda: gate(X, X, seed=0.5), TypeError, "gate: seed must be an int"),
    ],
)
def test_errors(call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()
