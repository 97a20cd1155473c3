"""Writes docs/accuracy.md: the error of the C++ kernels as a fraction of eager's.

    .venv/bin/python tests/accuracy.py

Every norm × activation × dtype × shape class, dropout on; the oracle is the reference in float64.
A ratio of 1 is eager's own error; tests/test_row.py, tests/test_gated.py and tests/test_channel.py
hold every case to 2 and a few ulp.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import channel_cases
import torch
from cases import EVERY_ACTIVATION, NORMS, make_epilogue, make_inputs, run_operator, run_reference
from gated_cases import GATED, make_gated_epilogue, make_gated_inputs

import fused
from fused.backends import backend
from fused.run import reference

SHAPES = {"tiny (8, 64)": (8, 64), "odd (70, 1000)": (70, 1000), "long (4, 8192)": (4, 8192)}
# Samples, channels, positions.
CHANNEL_SHAPES = {"tiny (4, 8, 4)": (4, 8, 4), "odd (5, 30, 99)": (5, 30, 99)}
CHANNEL_SHAPES["long (2, 6, 20000)"] = (2, 6, 20000)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LINEAR_NOTE = (
    "x (64, 128), 256 features, no dropout; activations without a kink, where the rounding of z"
    " would decide on which side an element falls, in eager as here."
)
SMOOTH = (None, "gelu", "gelu_tanh", "silu", "mish", "sigmoid", "tanh", "softplus")
TARGET = Path(__file__).parent.parent / "docs/accuracy.md"


def case_ratios(
    shape: tuple[int, int], norm: str | None, activation: str | None, dtype: torch.dtype
) -> dict[str, float]:
    """Largest error of ours over the largest of eager's (at least half an ulp of the largest)."""
    if activation in GATED:
        inputs = make_gated_inputs(*shape, dtype, norm)
        epilogue = make_gated_epilogue(norm, activation, 0.1)
    else:
        inputs = make_inputs(*shape, dtype, norm)
        epilogue = make_epilogue(norm, activation, 0.1)
    return ratios_of(
        run_operator(inputs, epilogue),
        run_reference(inputs, epilogue, torch.float64),
        run_reference(inputs, epilogue, dtype),
        dtype,
    )


def ratios_of(
    found: dict[str, torch.Tensor],
    oracle: dict[str, torch.Tensor],
    eager: dict[str, torch.Tensor],
    dtype: torch.dtype,
) -> dict[str, float]:
    """Largest error of ours over the largest of eager's (at least half an ulp of the largest)."""
    ratios = {}
    for name, result in found.items():
        floor = 0.5 * torch.finfo(dtype).eps * float(oracle[name].abs().max())
        theirs = max(float((eager[name].double() - oracle[name]).abs().max()), floor)
        ratios[name] = float((result.double() - oracle[name]).abs().max()) / theirs
    return ratios


def table(dtype: torch.dtype, activations: Sequence[str | None]) -> list[str]:
    """Worst ratio over the activations, for each norm, shape class and output."""
    names = ("y", "dz", "dbias", "dnorm_weight", "dnorm_bias")
    lines = ["| norm | shape | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for norm in NORMS:
        for label, shape in SHAPES.items():
            worst = dict.fromkeys(names, (0.0, ""))
            for activation in activations:
                for name, ratio in case_ratios(shape, norm, activation, dtype).items():
                    worst[name] = max(worst[name], (ratio, str(activation)))
            cells = [f"{r:.2f} ({a})" if a else "–" for r, a in worst.values()]
            lines.append(f"| {norm} | {label} | " + " | ".join(cells) + " |")
    return lines


def channel_ratios(
    shape: tuple[int, int, int],
    norm: str,
    activation: str | None,
    dtype: torch.dtype,
    channels_last: bool,
) -> dict[str, float]:
    """`case_ratios` of a norm over samples or positions."""
    inputs = channel_cases.make_inputs(*shape, dtype, norm, channels_last)
    epilogue = channel_cases.make_epilogue(norm, activation, 0.1, shape[1], 2, channels_last)
    found = channel_cases.run_operator(inputs, epilogue)
    found.pop("dbias", None)  # cancels to nothing
    oracle = channel_cases.run_reference(inputs, epilogue, torch.float64)
    eager = channel_cases.run_reference(inputs, epilogue, dtype)
    return ratios_of(found, oracle, eager, dtype)


def channel_table(dtype: torch.dtype) -> list[str]:
    """Worst ratio over the activations, for each norm, layout, shape class and output."""
    names = ("y", "dz", "dnorm_weight", "dnorm_bias")
    lines = ["| norm | layout | shape | " + " | ".join(names) + " |", "|---" * 7 + "|"]
    for norm in ("batch", "group", "instance"):
        for last in (False, True):
            for label, shape in CHANNEL_SHAPES.items():
                worst = dict.fromkeys(names, (0.0, ""))
                for activation in EVERY_ACTIVATION:
                    found = channel_ratios(shape, norm, activation, dtype, last)
                    for name, ratio in found.items():
                        worst[name] = max(worst[name], (ratio, str(activation)))
                cells = [f"{r:.2f} ({a})" for r, a in worst.values()]
                layout = "channels last" if last else "channels first"
                lines.append(f"| {norm} | {layout} | {label} | " + " | ".join(cells) + " |")
    return lines


def linear_ratios(norm: str | None, activation: str | None, dtype: torch.dtype) -> dict[str, float]:
    """The same for a whole block, x (64, 128) → (64, 256), without dropout."""
    parameters = [torch.randn(s).to(dtype) for s in ((64, 128), (256, 128), (256,))]
    dy = torch.randn(64, 256).to(dtype)

    def run(of: torch.dtype, plain: bool) -> list[torch.Tensor]:
        x, weight, bias = (t.to(of).requires_grad_() for t in parameters)
        if plain:
            epilogue = make_epilogue(norm, activation, 0.0)
            y = reference.row(torch.nn.functional.linear(x, weight, bias), epilogue)
        else:
            with fused.use_backend("cpp"):  # not torch's operators, which serve small inputs
                y = fused.functional.linear_norm_act(
                    x, weight, bias, norm=norm, eps=1e-5, activation=activation
                )
        return [y.detach(), *torch.autograd.grad(y, [x, weight, bias], dy.to(of))]

    oracle, eager, ours = run(torch.float64, True), run(dtype, True), run(dtype, False)
    ratios = {}
    for name, o, e, f in zip(("y", "dx", "dweight", "dbias"), oracle, eager, ours, strict=True):
        floor = 0.5 * torch.finfo(dtype).eps * float(o.abs().max())
        theirs = max(float((e.double() - o).abs().max()), floor)
        ratios[name] = float((f.double() - o).abs().max()) / theirs
    return ratios


def linear_table() -> list[str]:
    """Worst ratio over the smooth activations, for each norm and dtype.

    At a kink the rounding of z decides on which side an element falls, in eager as here.
    """
    names = ("y", "dx", "dweight", "dbias")
    lines = ["| norm | dtype | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for norm in NORMS:
        for dtype in DTYPES:
            worst = dict.fromkeys(names, (0.0, ""))
            for activation in SMOOTH:
                for name, ratio in linear_ratios(norm, activation, dtype).items():
                    worst[name] = max(worst[name], (ratio, str(activation)))
            cells = [f"{r:.2f} ({a})" for r, a in worst.values()]
            short = str(dtype).removeprefix("torch.")
            lines.append(f"| {norm} | {short} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    torch.manual_seed(0)
    lines = [
        "# Accuracy",
        "",
        "Largest error against float64 as a fraction of eager's in the same dtype, worst activation"
        " in brackets, dropout 0.1. Below 1: more accurate than eager; the tests allow 2 and a few"
        f" ulp. Made by `python tests/accuracy.py`; C++ kernels, {backend.cpu_isa()},"
        f" torch {torch.__version__}.",
    ]
    for dtype in DTYPES:
        print(f"{dtype} ...", flush=True)
        short = str(dtype).removeprefix("torch.")
        lines += ["", f"## {short}", "", *table(dtype, EVERY_ACTIVATION)]
        lines += ["", f"### {short}, gated activations; the shape is y's", "", *table(dtype, GATED)]
        lines += ["", f"### {short}, samples × channels × positions", "", *channel_table(dtype)]
    print("linear ...", flush=True)
    lines += ["", "## The whole block, Linear in front", "", LINEAR_NOTE, "", *linear_table()]
    lines += [
        "",
        "The polynomials of `csrc/cpu/math.h` are minimax fits by Lawson's iteratively reweighted"
        " least squares (`python tests/fits.py`); the bound stands beside each.",
        "Statistics are taken in two passes with a correction (Chan, Golub and LeVeque, 1983), each"
        " in float32 (float64 for float64).",
        "",
    ]
    TARGET.write_text("\n".join(lines))
    print(f"wrote {TARGET}")


if __name__ == "__main__":
    main()
