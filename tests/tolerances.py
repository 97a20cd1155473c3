"""The one tolerance rule: error against float64 at most twice eager's in the same dtype.

    |result − oracle| ≤ 2 · max|eager − oracle| + FLOOR ulp

where an ulp is the dtype's epsilon times the magnitude that the result was computed from: the
largest oracle value, or for gradients that cancel (a row of one element) the terms themselves.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

FLOOR = 4.0


def ratio_to_eager(
    result: Tensor, oracle: Tensor, eager: Tensor, dtype: torch.dtype, magnitude: float = 0.0
) -> float:
    """The error as a fraction of what the rule allows; ≤ 1 passes, NaN in odd places gives inf."""
    result, eager = result.double(), eager.double()
    finite = oracle.isfinite() & eager.isfinite()
    # NaN must stay NaN unless only eager lost the value; a finite value must stay finite.
    lost = ~finite & oracle.isnan() & ~result.isnan()
    spoiled = (~result.isfinite() & finite) | (result.isnan() & ~eager.isnan() & ~oracle.isnan())
    if bool((lost | spoiled).any()):
        return float("inf")
    if not finite.any():
        return 0.0
    scale = max(float(oracle[finite].abs().max()), magnitude)
    ours = float((result - oracle)[finite].abs().max())
    theirs = float((eager - oracle)[finite].abs().max())
    allowed = 2 * theirs + FLOOR * torch.finfo(dtype).eps * scale
    # Below the smallest normal number an ulp no longer shrinks with the value.
    allowed += FLOOR * torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    return ours / allowed


def assert_close(
    name: str,
    result: Tensor,
    oracle: Tensor,
    eager: Tensor,
    dtype: torch.dtype,
    magnitude: float = 0.0,
) -> None:
    """Raises with the worst place when the rule is broken."""
    ratio = ratio_to_eager(result, oracle, eager, dtype, magnitude)
    if ratio <= 1:
        return
    error = (result.double() - oracle).abs().nan_to_num(nan=float("inf"))
    worst = int(error.argmax()) if error.numel() else 0
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), oracle.shape))
    raise AssertionError(
        f"{name}: {ratio:.2f} times the allowed error; worst at {place}: "
        f"got {float(result[place])!r}, oracle {float(oracle[place])!r}, "
        f"eager {float(eager[place])!r}"
    )


def decades(z: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Where z is of one sign and one power of ten, each with its name.

    A function of each element is compared by them where its values are of all magnitudes: scaled by
    the largest of all, the rule would allow any error near zero.
    """
    powers = z.double().abs().log10().floor()
    for sign, of_sign in (("+", z > 0), ("-", z < 0)):
        for power in powers[of_sign].unique().tolist():
            yield f"{sign}1e{power:.0f}", of_sign & (powers == power)
