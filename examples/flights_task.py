"""Late or not, as a task of training.py: batches of flights, the loss, and the AUC."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from flights_data import Flights
from torch import Tensor

EVALUATION_BATCH = 8192


class LateFlights:
    """Predicts which flights arrive late; judged by loss and AUC on days held out."""

    def __init__(self, flights: Flights) -> None:
        self.rows = len(flights.train)
        self._flights = flights

    def batch(self, rows: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        table = self._flights.train
        return (table.categorical[rows], table.numeric[rows]), table.late[rows]

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(output, target)

    def evaluate(self, model: Callable[..., Tensor]) -> dict[str, float]:
        table = self._flights.valid
        parts = []
        for first in range(0, len(table), EVALUATION_BATCH):
            rows = slice(first, first + EVALUATION_BATCH)
            parts.append(model(table.categorical[rows], table.numeric[rows]).float())
        logits = torch.cat(parts)
        loss = self.loss(logits, table.late).item()
        return {"valid_loss": loss, "valid_auc": area_under_curve(logits, table.late)}


def area_under_curve(scores: Tensor, labels: Tensor) -> float:
    """The probability that a positive scores above a negative, ties counted as one half.

    The rank statistic of Mann and Whitney: AUC = (R − P(P + 1)/2) / (P · N), with P positives,
    N negatives and R the sum of the positives' ranks.

    Args:
        scores: (n,).
        labels: (n,), 1 for positives and 0 for negatives.

    Returns:
        The AUC; nan when a class is absent.
    """
    _, place, count = scores.double().unique(return_inverse=True, return_counts=True)
    mean_rank = count.cumsum(0) - (count - 1) / 2  # of each distinct score
    positive = labels > 0.5
    positives = int(positive.sum())
    negatives = len(labels) - positives
    if positives == 0 or negatives == 0:
        return float("nan")
    rank_sum = mean_rank.double()[place[positive]].sum().item()
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)
