"""The coefficients of csrc/cpu/math.h: run `python tests/fits.py` to make them again.

Each is a minimax fit by Lawson's iteration: weighted least squares whose weights grow where the
error is large. A rational function P / Q is made linear by multiplying with the Q of the step
before. The printed error is that of the fit, before rounding to float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

Function = Callable[[np.ndarray], np.ndarray]
POINTS, STEPS = 2000, 400
DENSITY_AT_ZERO = 1 / math.sqrt(2 * math.pi)


@dataclass(frozen=True)
class Fit:
    """P (and Q, with Q(0) = 1) in powers of s, lowest first, and the largest weighted error."""

    numerator: np.ndarray
    denominator: np.ndarray
    error: float


def fit(function: Function, weight: Function, end: float, degrees: tuple[int, int]) -> Fit:
    """The P / Q of the given degrees nearest to a function on [0, end]."""
    s = end * (1 - np.cos(np.linspace(0, np.pi, POINTS))) / 2
    n, m = degrees
    value, scale = function(s), weight(s)
    powers_p = np.vander(s / end, n + 1, increasing=True)
    powers_q = np.vander(s / end, m + 1, increasing=True)[:, 1:]
    q, lawson = np.ones(POINTS), np.full(POINTS, 1 / POINTS)
    best = Fit(np.zeros(n + 1), np.ones(1), math.inf)
    for _ in range(STEPS):
        rows = np.sqrt(lawson) * scale / np.abs(q)
        matrix = np.hstack([powers_p, -value[:, None] * powers_q]) * rows[:, None]
        length = np.linalg.norm(matrix, axis=0)
        found = np.linalg.lstsq(matrix / length, value * rows, rcond=None)[0] / length
        q = powers_q @ found[n + 1 :] + 1
        error = np.abs(scale * (value - powers_p @ found[: n + 1] / q))
        if q.min() > 0 and error.max() < best.error:
            numerator = found[: n + 1] / end ** np.arange(n + 1)
            denominator = np.append(1.0, found[n + 1 :]) / end ** np.arange(m + 1)
            best = Fit(numerator, denominator, float(error.max()))
        lawson = lawson * error
        lawson /= lawson.sum()
    return best


def normal_slope(s: np.ndarray) -> np.ndarray:
    """(Φ(h) − 1/2) / h with s = h²."""
    h = np.sqrt(s)
    cdf = torch.special.ndtr(torch.from_numpy(h)).numpy()
    return np.where(h < 1e-4, DENSITY_AT_ZERO * (1 - s / 6), (cdf - 0.5) / np.maximum(h, 1e-30))


def gelu_slope(s: np.ndarray) -> np.ndarray:
    """(d/dh h·Φ(h) − 1/2) / h with s = h²."""
    return normal_slope(s) + DENSITY_AT_ZERO * np.exp(-s / 2)


def show(name: str, found: Fit) -> None:
    """Prints a fit as C++ arrays."""
    print(f"{name}: error {found.error:.1e}")
    for part, values in (("P", found.numerator), ("Q", found.denominator)):
        print(f"  {part} = {{{', '.join(f'{value:.9e}f' for value in values)}}};")


def main() -> None:
    """Prints every fit."""
    # The weights: h·(Φ − 1/2) and the derivative itself are what must be right to 1e-7.
    show("normal_cdf", fit(normal_slope, lambda s: np.maximum(s, 0.05), 5.2**2, (5, 5)))
    show("gelu_gradient", fit(gelu_slope, lambda s: np.maximum(np.sqrt(s), 0.3), 6.0**2, (6, 7)))
    # exp(r) on |r| ≤ ln 2 / 2, as a function of r shifted to begin at 0, is not what Horner's rule
    # wants; so the polynomial in r itself, by the same iteration.
    show_exponential()


def show_exponential() -> None:
    """(exp(r) − 1 − r) / r² on |r| ≤ ln 2 / 2, relative to exp(r)."""
    r = math.log(2) / 2 * np.cos(np.linspace(0, np.pi, POINTS))
    r = r[np.abs(r) > 1e-6]
    value, scale = (np.expm1(r) - r) / r**2, r**2 / np.exp(r)
    powers = np.vander(r, 5, increasing=True)
    lawson, best, error_of_best = np.full(len(r), 1 / len(r)), np.zeros(5), math.inf
    for _ in range(STEPS):
        rows = np.sqrt(lawson) * scale
        found = np.linalg.lstsq(powers * rows[:, None], value * rows, rcond=None)[0]
        error = np.abs(scale * (value - powers @ found))
        if error.max() < error_of_best:
            best, error_of_best = found, float(error.max())
        lawson = lawson * error
        lawson /= lawson.sum()
    show("exp", Fit(best, np.ones(1), error_of_best))


if __name__ == "__main__":
    main()
