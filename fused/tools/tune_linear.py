"""`python -m fused tune linear`: one kernel for a Linear and what follows it, against the library.

For each width, dtype and norm: the library's GEMM and the pass over its result, and the one kernel
of kernels/gemm, forward in training. The batch decides nothing (gemm.py), so the kernel has to be
faster at a small and at a large one. What is faster goes to the table of kernels/tuning/tuned.py,
which `FUSED_GEMM=auto` reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import gemm, ops
from ..kernels.tuning import gemm as gemm_tuning
from ..spec import make_spec
from .clock import Measure, median_ratio, noise_floor
from .tune_cases import ACTIVATION, Call, P, short

ROWS = (1024, 32768)
NORMS = {"layer": "layer", "rms": "rms", "none": None, "batch": "batch"}
DTYPES = {short(dtype): dtype for dtype in gemm_tuning.DTYPES}
# Measured where none are given: N and K.
SIZES = ((64, 64), (128, 128), (256, 256), (512, 512), (256, 1024), (1024, 256), (1024, 1024))


@dataclass(frozen=True)
class LinearCase:
    """A Linear of K features to N, and the norm behind it."""

    cols: int
    inner: int
    dtype: torch.dtype
    norm: str | None

    def __str__(self) -> str:
        return f"linear {self.cols},{self.inner},{short(self.dtype)},{self.norm or 'none'}"

    @property
    def kind(self) -> gemm_tuning.Kind:
        return gemm_tuning.Kind(self.norm, self.dtype, gemm_tuning.precision(self.dtype))

    @property
    def key(self) -> str:
        return gemm_tuning.key_of(self.cols, self.inner, self.kind)


def parse(text: str) -> LinearCase:
    """N,K,DTYPE,NORM, for example 256,1024,bfloat16,layer.

    Raises:
        ValueError: it is not of this form.
    """
    parts = text.split(",")
    known = f"a dtype of {', '.join(DTYPES)} and a norm of {', '.join(NORMS)}"
    if len(parts) != 4 or parts[2] not in DTYPES or parts[3] not in NORMS:
        raise ValueError(f"expected N,K,DTYPE,NORM with {known}; got {text!r}")
    if not all(part.isdecimal() and int(part) for part in parts[:2]):
        raise ValueError(f"N and K must be positive numbers of features; got {text!r}")
    return LinearCase(int(parts[0]), int(parts[1]), DTYPES[parts[2]], NORMS[parts[3]])


def default_cases() -> Iterator[LinearCase]:
    """Small Linears first, for which a pass over the result weighs most."""
    for (cols, inner), dtype, norm in product(SIZES, DTYPES.values(), NORMS.values()):
        if dtype != torch.float16:  # as bfloat16
            yield LinearCase(cols, inner, dtype, norm)


def make_calls(case: LinearCase, rows: int, device: str) -> tuple[Call, Call]:
    """(library, one kernel) on the same random inputs; y, z and the statistics come back."""
    x = torch.randn(rows, case.inner, device=device, dtype=case.dtype)
    weight = torch.randn(case.cols, case.inner, device=device, dtype=case.dtype)
    weight /= case.inner**0.5
    bias = torch.zeros(case.cols, device=device, dtype=case.dtype)
    affine = (torch.ones_like(bias), torch.zeros_like(bias)) if case.norm else (None, None)
    seed = torch.tensor([1], device=device)
    spec = make_spec(case.norm, 1e-5 if case.norm else 0.0, ACTIVATION, P)
    if case.norm == "batch":
        scalars = spec._replace(groups=case.cols, channels_last=True).channel

        def library() -> list[Tensor]:
            z = F.linear(x, weight, bias)
            given = (z.view(1, *z.shape), *affine, None, None, seed)
            y, mean, variance, _ = ops.channel_forward(*given, *scalars)
            return [y.view(z.shape), z, mean, variance]

        given = (x, weight, bias, *affine, None, seed, True)
        return library, lambda: list(ops.linear_channel_forward(*given, *scalars))

    def library_row() -> list[Tensor]:
        z = F.linear(x, weight, bias)
        return [*ops.row_forward(z, None, *affine, None, seed, *spec.row), z]

    given = (x, weight, bias, *affine, None, seed, True)

    def kernel() -> list[Tensor]:
        y, z, found = ops.linear_row_forward(*given, *spec.row)
        return [y, found, z]

    return library_row, kernel


def is_served(case: LinearCase, device: str) -> bool:
    """Whether there is a kernel for it."""
    x = torch.empty(1, case.inner, device=device, dtype=case.dtype)
    weight = torch.empty(case.cols, case.inner, device=device, dtype=case.dtype)
    return gemm.has_kernel(x, weight, case.norm)


def gain_of(case: LinearCase, measure: Measure, device: str) -> float:
    """How many times faster the kernel is, at the batch where it is least so; 0 where it errs.

    A gain that the library's way seems to have over itself is none, and given as at most 1.
    """
    gains = []
    for rows in ROWS:
        library, kernel = make_calls(case, rows, device)
        try:
            found = kernel()
        except Exception:  # of the compiler: too many registers, too much shared memory
            return 0.0
        for a, b in zip(found, library(), strict=True):
            if not torch.allclose(a, b, 2e-2, 2e-2):
                return 0.0
        ours, again, theirs = measure([library, library, kernel])
        gain = median_ratio(ours, theirs)
        gains.append(gain if gain >= noise_floor(ours, again) else min(gain, 1.0))
    return min(gains)
