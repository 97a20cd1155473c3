"""python -m fused doctor [--json]
python -m fused fuse MODULE:CALLABLE
python -m fused explain MODULE:CALLABLE
python -m fused compare MODULE:CALLABLE [--inference] [--seconds S] [--plot FILE]
python -m fused tune [rows] [channels] [linear] [--linear N,K,DTYPE,NORM ...] [--out FILE]
"""

from __future__ import annotations

import argparse
import importlib
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from . import __version__
from .chain.convert import fuse_
from .tools import doctor, tune, tune_linear
from .tools.compare import compare
from .tools.explain import explain


def load(target: str) -> Any:
    """What "package.module:name" names: a model, or what the name returns when it is called.

    Raises:
        ValueError: the target cannot be imported or called.
    """
    module_name, _, name = target.partition(":")
    if not module_name or not name:
        raise ValueError(f"expected MODULE:CALLABLE, for example mymodel:build; got {target!r}")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot import {target!r}: {error}") from error
    # A class is called too, so an instance is the only module that is not.
    try:
        return found if isinstance(found, nn.Module) or not callable(found) else found()
    except TypeError as error:  # above all: it needs arguments
        raise ValueError(f"cannot call {target!r} without arguments: {error}") from error


def load_model(target: str) -> nn.Module:
    """The model behind a target that gives a model, or (model, inputs).

    Raises:
        ValueError: as of `load`, or it gives something else.
    """
    model = load(target)
    if isinstance(model, tuple) and len(model) == 2:
        model = model[0]
    if not isinstance(model, nn.Module):
        raise ValueError(f"{target!r} gives a {type(model).__name__}, not an nn.Module")
    return model


def load_model_and_inputs(target: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The model, positional and keyword inputs behind a target.

    Raises:
        ValueError: as of `load`, or it does not give (model, inputs).
    """
    found = load(target)
    if isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], nn.Module):
        model, inputs = found
        if isinstance(inputs, tuple):
            return model, inputs, {}
        if isinstance(inputs, Mapping):
            return model, (), dict(inputs)
    raise ValueError(
        f"{target!r} must give (model, inputs), where inputs is a tuple of tensors or a dict of"
        f" keyword arguments; it gives a {type(found).__name__}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without × shows ?
    parser = argparse.ArgumentParser(prog="python -m fused")
    parser.add_argument("--version", action="version", version=f"fused-lnad {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    told = "what serves each operation on this machine, tested; status 0 only when all tests pass"
    command = commands.add_parser("doctor", help=told, description=told)
    command.add_argument("--json", action="store_true", help="the same as one JSON object")
    told = "the chains of a model that fused.fuse_ would fuse, and why not the others"
    command = commands.add_parser("fuse", help=told, description=told)
    command.add_argument("target", metavar="MODULE:CALLABLE", help="what returns the model")
    told = "every norm, activation, dropout, residual and gate of a model: its chain, or why none"
    command = commands.add_parser("explain", help=told, description=told)
    gives = "what returns (model, inputs); inputs: a tuple, or a dict of keyword arguments"
    command.add_argument("target", metavar="MODULE:CALLABLE", help=gives)
    told = "the step time of a model in eager torch, fused and compiled, and what to use"
    command = commands.add_parser("compare", help=told, description=told)
    command.add_argument("target", metavar="MODULE:CALLABLE", help=gives)
    command.add_argument("--inference", action="store_true", help="measure no training")
    told = "how long to measure, without compilation (default: 20)"
    command.add_argument("--seconds", type=float, default=20.0, help=told)
    command.add_argument("--plot", type=Path, help="draw the result into this file, too")
    told = (
        "measures the tiles of the GPU kernels' rules against their neighbours, and Linears as one"
    )
    told += " kernel against the library's GEMM, for a table that the rules read"
    command = commands.add_parser("tune", help=told, description=told)
    families = ", ".join(tune.FAMILIES)
    command.add_argument("families", nargs="*", metavar="FAMILY", help=f"{families} (default: all)")
    command.add_argument(
        "--linear",
        nargs="+",
        default=[],
        metavar="N,K,DTYPE,NORM",
        help="the Linears to measure, for example 256,1024,bfloat16,layer",
    )
    command.add_argument("--out", type=Path, help="the table (default: where the rules read it)")
    told = "when to stop measuring; the table has what was measured until then (default: 600)"
    command.add_argument("--max-seconds", type=float, default=600.0, help=told)
    given = parser.parse_args(arguments)
    if given.command == "tune":
        unknown = set(given.families) - set(tune.FAMILIES)
        if unknown:
            parser.error(f"unknown {', '.join(sorted(unknown))}; known: {families}")
        try:
            linear = [tune_linear.parse(text) for text in given.linear]
        except ValueError as error:
            parser.error(f"--linear: {error}")
        return tune.main(given.out, given.max_seconds, given.families, linear)
    if given.command == "doctor":
        return doctor.main(as_json=given.json)
    try:
        if given.command == "fuse":
            print(fuse_(load_model(given.target), dry_run=True))
            return 0
        model, inputs, keywords = load_model_and_inputs(given.target)
    except ValueError as error:
        print(f"python -m fused {given.command}: {error}", file=sys.stderr)
        return 2
    if given.command == "explain":
        print(explain(model, *inputs, kwargs=keywords))
        return 0
    result = compare(
        model, *inputs, train=not given.inference, kwargs=keywords, seconds=given.seconds
    )
    print(result)
    if given.plot is not None:
        result.plot(given.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
