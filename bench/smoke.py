"""python -m bench.smoke: a kernel of each family, forward and backward, against the reference.

The shortest answer to whether the kernels work on this GPU. Each family has a process of its own,
all of them side by side: most of the time is compilation, and a kernel that faults leaves the
others alone. Dropout masks are compared bit for bit. Each finding is a line of JSON in --out,
written before the next kernel is launched.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Operation, norm and dtype of the doctor's tests, in training; in the order of what tells most.
FAMILIES: dict[str, tuple[tuple[str, str | None, str], ...]] = {
    "row": (
        ("norm_act", "layer", "bfloat16"),
        ("norm_act", "layer", "float32"),
        ("norm_act", "rms", "bfloat16"),
    ),
    "channel": (
        ("norm_act", "batch", "bfloat16"),
        ("linear_norm_act", "group", "float32"),
        ("norm_act", "instance", "bfloat16"),
    ),
    "gated": (
        ("linear_norm_gate", "rms", "bfloat16"),
        ("linear_norm_gate", "layer", "float32"),
    ),
    "gemm": (
        ("linear_norm_act", "layer", "bfloat16"),
        ("linear_norm_act", "rms", "float32"),
        ("linear_norm_act", "batch", "bfloat16"),
    ),
}
LIMIT = 55.0  # seconds of a family's process


def use_the_fused_gemm() -> None:
    """Makes this process run Linears as one kernel, at sizes that those kernels can read."""
    from fused.backends import gemm
    from fused.tools import selftest

    gemm.mode, gemm.enabled = "fused", True
    selftest.FEATURES_IN, selftest.FEATURES = 64, 128


def has_gemm(norm: str | None, dtype_name: str, device: str) -> bool:
    """Whether a kernel runs such a Linear together with what follows it."""
    import torch

    from fused.tools import selftest, tune_linear

    sizes = (selftest.FEATURES, selftest.FEATURES_IN)
    case = tune_linear.LinearCase(*sizes, getattr(torch, dtype_name), norm)
    return tune_linear.is_served(case, device)


def check(operation: str, norm: str | None, dtype_name: str, device: str) -> dict[str, Any]:
    """Runs one self-test; what went wrong stands under "failed"."""
    import torch

    from fused.backends import backend
    from fused.tools import selftest

    dtype = getattr(torch, dtype_name)
    started = time.perf_counter()
    found = {"operation": operation, "norm": norm, "dtype": dtype_name}
    found |= {"backend": backend.choose(device, dtype), "failed": ""}
    if found["backend"] == "reference":
        return found | {"failed": backend.reason(device, dtype)}
    try:
        error = selftest.self_test(operation, norm, "training", dtype, device)
        if device == "cuda":
            torch.cuda.synchronize()
        found["share_of_limit"] = round(error, 4)
    # Everything: Triton raises its own exceptions, the compiler's, the driver's and torch's.
    except Exception as error:
        found["failed"] = str(error).strip().partition("\n")[0] or type(error).__name__
    return found | {"seconds": round(time.perf_counter() - started, 2)}


def run_family(family: str, device: str, out: Path) -> int:
    """Runs the checks of a family in this process; returns 1 where one fails."""
    if family == "gemm":
        use_the_fused_gemm()
    failed = False
    for operation, norm, dtype in FAMILIES[family]:
        if family == "gemm" and not has_gemm(norm, dtype, device):
            found = {"norm": norm, "dtype": dtype, "failed": "no kernel serves it"}
        else:
            found = check(operation, norm, dtype, device)
        line = json.dumps({"family": family} | found)
        with out.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)
        failed |= found["failed"] != ""
    return int(failed)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 where a kernel fails, 0 also where there is no GPU to run any."""
    import torch

    parser = argparse.ArgumentParser(prog="python -m bench.smoke", description=__doc__)
    parser.add_argument("families", nargs="*", help=f"of {', '.join(FAMILIES)} (default: all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path(".cache/gpu/smoke.jsonl"))
    parser.add_argument("--here", action="store_true", help="in this process")
    given = parser.parse_args(arguments)
    unknown = sorted(set(given.families) - set(FAMILIES))
    if unknown:
        parser.error(f"unknown family {', '.join(unknown)}; known: {', '.join(FAMILIES)}")
    if given.device == "cuda" and not torch.cuda.is_available():
        print("smoke: torch sees no CUDA device, so no kernel was run")
        return 0
    families = given.families or [f for f in FAMILIES if given.device == "cuda" or f != "gemm"]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    if given.here:
        return max(run_family(family, given.device, given.out) for family in families)
    given.out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "bench.smoke", "--here", "--device", given.device]
    command += ["--out", str(given.out)]
    processes = {family: subprocess.Popen([*command, family]) for family in families}
    end, failed = time.monotonic() + LIMIT, []
    for family, process in processes.items():
        try:
            status = process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            status = -9
        if status:
            failed.append(f"{family} (status {status})")
    print(f"smoke: {'FAILED: ' + ', '.join(failed) if failed else 'all families are right'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
