"""Writes docs/accuracy.md: the error of the C++ kernels as a fraction of eager's.

    .venv/bin/python tests/accuracy.py

Every norm × activation × dtype × shape class, dropout on; the oracle is the reference in float64.
A ratio of 1 is eager's own error; tests/test_row.py holds every case to 2 and a few ulp.
"""

from __future__ import annotations

from pathlib import Path

import torch
from cases import EVERY_ACTIVATION, NORMS, make_epilogue, make_inputs, run_operator, run_reference

from fused import backend

SHAPES = {"tiny (8, 64)": (8, 64), "odd (70, 1000)": (70, 1000), "long (4, 8192)": (4, 8192)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TARGET = Path(__file__).parent.parent / "docs/accuracy.md"


def case_ratios(
    shape: tuple[int, int], norm: str | None, activation: str | None, dtype: torch.dtype
) -> dict[str, float]:
    """Largest error of ours over the largest of eager's (at least half an ulp of the largest)."""
    inputs = make_inputs(*shape, dtype, norm)
    epilogue = make_epilogue(norm, activation, 0.1)
    found = run_operator(inputs, epilogue)
    oracle = run_reference(inputs, epilogue, torch.float64)
    eager = run_reference(inputs, epilogue, dtype)
    ratios = {}
    for name, result in found.items():
        floor = 0.5 * torch.finfo(dtype).eps * float(oracle[name].abs().max())
        theirs = max(float((eager[name].double() - oracle[name]).abs().max()), floor)
        ratios[name] = float((result.double() - oracle[name]).abs().max()) / theirs
    return ratios


def table(dtype: torch.dtype) -> list[str]:
    """Worst ratio over the activations, for each norm, shape class and output."""
    names = ("y", "dz", "dbias", "dnorm_weight", "dnorm_bias")
    lines = ["| norm | shape | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for norm in NORMS:
        for label, shape in SHAPES.items():
            worst = dict.fromkeys(names, (0.0, ""))
            for activation in EVERY_ACTIVATION:
                for name, ratio in case_ratios(shape, norm, activation, dtype).items():
                    worst[name] = max(worst[name], (ratio, str(activation)))
            cells = [f"{r:.2f} ({a})" if a else "–" for r, a in worst.values()]
            lines.append(f"| {norm} | {label} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
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
        lines += ["", f"## {str(dtype).removeprefix('torch.')}", "", *table(dtype)]
    lines += [
        "",
        "The polynomials of `csrc/cpu/math.h` are minimax fits of the relative error by Lawson's"
        " iteratively reweighted least squares on Chebyshev nodes; the bound stands beside each.",
        "Statistics are taken in two passes with a correction (Chan, Golub and LeVeque, 1983), each"
        " in float32 (float64 for float64).",
        "",
    ]
    TARGET.write_text("\n".join(lines))
    print(f"wrote {TARGET}")


if __name__ == "__main__":
    main()
