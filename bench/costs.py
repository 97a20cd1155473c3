"""What a call and an element cost, behind docs/benchmarks.md's account of the losing cells.

    python -m bench.costs

Host: microseconds on 8 × 64 float32, one thread. Kernel: nanoseconds an element of 128 × 1024,
which stays in the second-level cache, one thread; the best of several repeats, less what one row
costs. Gates: how fast the kernel makes small chains, of which by_torch.py leaves some to torch.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import fused
from fused.backends import ops
from fused.run import by_torch, reference
from fused.run.autograd import RowFunction
from fused.spec import GATED_ACTIVATIONS, Spec, make_spec

REPEATS = 7
DTYPES = (torch.float32, torch.bfloat16)
NONE = (None, None, None)  # residual, mask, seed


def best_us(call: Callable[[], object], calls: int) -> float:
    """Microseconds of a call, the best of several means."""
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - start) / calls * 1e6)
    return best


def host_costs() -> None:
    """One operator, one autograd node, and torch's own operators in their place."""
    x, weight, shift = (torch.randn(s, requires_grad=True) for s in ((8, 64), (64,), (64,)))
    dy, inputs = torch.randn(8, 64), (x, weight, shift)
    spec = make_spec("layer", 1e-5, "relu")

    def node() -> Tensor:
        return RowFunction.apply(x, None, None, weight, shift, None, None, spec)

    def plain() -> Tensor:
        return by_torch.row(x, weight, shift, None, spec)

    print("host, 8 × 64 float32, LayerNorm + ReLU, µs")
    with torch.no_grad():
        operator = best_us(
            lambda: ops.row_forward(x, None, weight, shift, None, None, *spec.row), 2000
        )
        norm = best_us(lambda: torch.layer_norm(x, (64,), weight, shift, 1e-5), 2000)
    print(f"  row_forward {operator:.1f}, torch.layer_norm {norm:.1f}")
    for name, run in (("one node in Python", node), ("torch's operators", plain)):
        forward = best_us(run, 2000)
        both = best_us(lambda run=run: torch.autograd.grad(run(), inputs, dy), 1000)
        print(f"  {name}: forward {forward:.1f}, forward + backward {both:.1f}")


def element_ns(spec: Spec, dtype: torch.dtype) -> tuple[float, float]:
    """Nanoseconds an element, forward in place and backward."""
    z, dy = torch.randn(128, 1024).to(dtype), torch.randn(128, 1024).to(dtype)
    weight, shift, seed = torch.ones(1024), torch.zeros(1024), torch.tensor([1])
    _, statistics = ops.row_forward(z, None, weight, shift, None, seed, *spec.row)
    times, codes = [], spec.row
    for rows in (128, 1):
        a, b, s = z[:rows].clone(), dy[:rows], statistics[:, :rows].contiguous()
        forward = best_us(
            lambda a=a: ops.row_forward_(a, None, weight, shift, None, seed, *codes), 100
        )
        backward = best_us(
            lambda a=a, b=b, s=s: ops.row_backward(b, a, None, weight, shift, s, seed, 3, *codes),
            100,
        )
        times.append((forward, backward))
    (forward, backward), (forward_one, backward_one) = times
    elements = 127 * 1024
    return (forward - forward_one) * 1e3 / elements, (backward - backward_one) * 1e3 / elements


def kernel_costs() -> None:
    """The parts of a chain, by what each adds."""
    print("kernel, LayerNorm of 1024 features, ns an element: forward, backward")
    for dtype in DTYPES:
        for activation in (None, "relu", "gelu", "silu"):
            for p in (0.0, 0.1):
                forward, backward = element_ns(make_spec("layer", 1e-5, activation, p), dtype)
                name = str(dtype).removeprefix("torch.")
                print(f"  {name} {activation} p={p:g}: {forward:.2f}, {backward:.2f}")


def group_norm_ns(dtype: torch.dtype, activation: str) -> dict[str, float]:
    """Nanoseconds an element of the passes of a norm over channels-last images, and torch's."""
    z = torch.randn(2, 1024, 64).to(dtype)
    image = z.view(2, 32, 32, 64).permute(0, 3, 1, 2)
    weight, shift = torch.ones(64, dtype=dtype), torch.zeros(64, dtype=dtype)
    spec = make_spec("group", 1e-5, activation)
    codes = spec._replace(groups=32, channels_last=True).channel
    mean, variance, _ = ops.channel_statistics(z, None, *codes[:3])
    given = (mean, variance, weight, shift, *NONE)
    function = getattr(torch.nn.functional, activation)
    calls: dict[str, Callable[[], object]] = {
        "statistics": lambda: ops.channel_statistics(z, None, *codes[:3]),
        "apply": lambda: ops.channel_apply(z, *given, *codes),
        "forward": lambda: ops.channel_forward(z, weight, shift, *NONE, *codes),
        "torch": lambda: function(torch.group_norm(image, 32, weight, shift, 1e-5)),
    }
    return {name: best_us(call, 100) * 1e3 / z.numel() for name, call in calls.items()}


def channel_costs() -> None:
    """The passes of a norm over positions."""
    print("kernel, group norm of (2, 64, 32, 32) channels-last, 32 groups, ns an element, forward")
    for dtype in DTYPES:
        for activation in ("relu", "silu"):
            found = group_norm_ns(dtype, activation)
            text = ", ".join(f"{name} {value:.2f}" for name, value in found.items())
            print(f"  {str(dtype).removeprefix('torch.')} {activation}: {text}")


# Rows and features out of a small gated chain.
GATE_SIZES = ((8, 32), (64, 64), (128, 128), (512, 128), (1024, 256))


class _PlainGate(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, h: Tensor) -> Tensor:
        return reference.activate(h, self.name)


def _step(net: nn.Module, x: Tensor) -> Callable[[], object]:
    inputs = tuple(net.parameters())
    return lambda: torch.autograd.grad(net(x).sum(), inputs)


def gate_speed(name: str, norm: str | None, rows: int, features: int) -> float:
    """The kernel's speed over torch's own operators, forward and backward from 64 features."""
    block = fused.LinearNormAct(64, features, norm=norm, activation=name)
    plain = nn.Sequential(*block)
    plain[-1] = _PlainGate(name)
    x = torch.randn(rows, 64)
    ours, theirs = _step(block, x), _step(plain, x)
    calls = max(5, int(2e4 / best_us(theirs, 3)))
    ratios = []
    with fused.use_backend("cpp"):
        for _ in range(15):
            times = []
            for call in (theirs, ours):
                start = time.perf_counter()
                for _ in range(calls):
                    call()
                times.append(time.perf_counter() - start)
            ratios.append(times[0] / times[1])
    return statistics.median(ratios)


def gate_costs() -> None:
    """What by_torch.py's limits for gates rest on."""
    sizes = ", ".join(f"{rows} × {features}" for rows, features in GATE_SIZES)
    print(f"Linear → norm → gate, float32, speed of the kernel over torch's operators: {sizes}")
    for name in GATED_ACTIVATIONS:
        for norm in (None, "layer"):
            found = [f"{gate_speed(name, norm, *size):.2f}" for size in GATE_SIZES]
            print(f"  {name} {norm or 'no norm'}: {', '.join(found)}")


if __name__ == "__main__":
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    host_costs()
    kernel_costs()
    channel_costs()
    torch.set_num_threads(threads)
    gate_costs()
