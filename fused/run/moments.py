"""Count, mean and sum of squared deviations of data that comes in parts.

Two parts merge by the pairwise formula of Chan, Golub and LeVeque, "Algorithms for computing the
sample variance: analysis and recommendations", The American Statistician 37 (1983), which never
subtracts two large sums.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """How many values, their mean, and m2, the sum of their squared deviations from it.

    All three are floating point and broadcast together; all are zero where there is no value.
    """

    number: Tensor
    mean: Tensor
    m2: Tensor


def merge_moments(a: Moments, b: Moments) -> Moments:
    """The moments of two parts together."""
    number = a.number + b.number
    share = b.number / number.clamp(min=1)
    delta = b.mean - a.mean
    m2 = a.m2 + b.m2 + delta.square() * a.number * share
    return Moments(number, a.mean + delta * share, m2)


def column_moments(x: Tensor, present: Tensor) -> Moments:
    """The moments of each column.

    Args:
        x: (rows, ...), floating point.
        present: bool, of x's shape; values where it is false are left out.

    Returns:
        number, mean, m2, of shape (...) and x's dtype.
    """
    number = present.sum(0).to(x.dtype)
    mean = torch.where(present, x, 0).sum(0) / number.clamp(min=1)
    return Moments(number, mean, torch.where(present, x - mean, 0).square().sum(0))


def is_constant(moments: Moments) -> Tensor:
    """Where the values cannot be told from a constant, which is scikit-learn's rule.

        variance ≤ n·ε·variance + (n·mean·ε)²

    with ε that of the dtype: the bound that the paper gives for the error of a two-pass variance.
    False where there is no value.
    """
    number, mean, m2 = moments
    eps = torch.finfo(m2.dtype).eps
    variance = m2 / number
    return variance <= number * eps * variance + (number * mean * eps).square()


def gather(operation: str, own: Tensor, process_group: Any) -> Tensor:
    """The tensor of every process of the group, (processes, *own.shape), in the order of ranks.

    Raises:
        RuntimeError: there is no process group.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            f"{operation}: no process group; call torch.distributed.init_process_group first"
        )
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(parts, own, group=process_group)
    return torch.stack(parts)
