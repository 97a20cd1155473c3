"""What only a machine with a GPU can show, the most important first.

    bench/gpu_pass.sh first            at most 8.5 minutes, the installation included
    bench/gpu_pass.sh second           everything else, at most 10 minutes
    bench/gpu_pass.sh second tune      these steps alone
    bench/gpu_pass.sh first --plan     the steps and their limits

Each step is stopped at its limit, leaves what it found in --out before the next begins, and does
not stop the others when it fails. Works offline: C++ kernels that were built before (fused/*.so)
are used and not built again, CUDA C++ is built last and for this GPU alone, peers that are unpacked
in .cache/peers are found. `python -m bench report --out DIR` makes tables and pictures of the CSV
files. On a machine without a GPU every step says that there is none, and the status is 0.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Step(NamedTuple):
    """Seconds are the limit. The command is bash's, with $PY, $OUT and $JOBS (of this machine)."""

    name: str
    seconds: int
    command: str


def _bench(suite: str, seconds: int, options: str = "") -> str:
    """Of a suite: cells are measured up to `seconds`, those that decide or with --rest the rest."""
    return (
        f'"$PY" -m bench {suite} --device cuda --seconds 0.4 --max-seconds {seconds} --out "$OUT"'
        f" {options or '--quick'}"
    )


# In processes side by side: most of the time is compilation, on the host. Without the checkout on
# sys.path, where the folder kernels/ could be taken for the package of that name.
def _tests(name: str, paths: str, chosen: str) -> str:
    common = f"-v -m '{chosen}' -p no:cacheprovider {paths}"
    return f"""
export PYTHONSAFEPATH=1 OMP_NUM_THREADS=1
if "$PY" -c 'import xdist' 2>/dev/null; then
  exec "$PY" -m pytest {common} -n "$JOBS" --dist worksteal --junitxml "$OUT/{name}.xml"
fi
status=0 parts=()
for ((i = 0; i < JOBS; i++)); do
  FUSED_TEST_SHARD=$i/$JOBS "$PY" -m pytest {common} --junitxml "$OUT/{name}-$i.xml" &
  parts+=($!)
done
for part in "${{parts[@]}}"; do
  wait "$part" || {{ s=$?; [ $s -eq 5 ] || status=1; }}  # 5: the part has no tests
done
exit $status
"""


# One test of each kind of kernel; the tool slows kernels a hundredfold, and some virtual machines
# do not let it near the GPU.
def _sanitize(tool: str) -> str:
    return f"""
if ! command -v compute-sanitizer >/dev/null; then
  echo "compute-sanitizer is not on PATH; {tool} is left out"; exit 0
fi
"$PY" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {{
  echo "torch sees no CUDA device; {tool} is left out"; exit 0
}}
PYTHONSAFEPATH=1 compute-sanitizer --tool {tool} --target-processes all --error-exitcode 9 \
  "$PY" -m pytest -q -x -p no:cacheprovider tests/triton/test_row_gpu.py::test_same_bits_twice \
  tests/triton/test_channel_gpu.py::test_parts_of_batch_norm 2>&1 | tee "$OUT/{tool}.log"
status=${{PIPESTATUS[0]}}
if grep -qi "device not supported" "$OUT/{tool}.log"; then
  echo "compute-sanitizer does not support this device; {tool} is left out"; exit 0
fi
exit "$status"
"""


_INSTALL = """
"$PY" -c 'import fused.kernels.tuning.tuned' 2>/dev/null ||
  FUSED_NO_EXT=1 "$PY" -m pip install --quiet --no-build-isolation --no-deps -e .
"$PY" -m bench.machine --out "$OUT/machine.json"
"""
# setup.py has both libraries; only this one is built.
_BUILD_CUDA = """
export TORCH_CUDA_ARCH_LIST
TORCH_CUDA_ARCH_LIST=$("$PY" -c '
import torch
if torch.cuda.is_available():
    print("{}.{}".format(*torch.cuda.get_device_capability()))')
if [ -z "$TORCH_CUDA_ARCH_LIST" ]; then
  echo "torch sees no CUDA device; the CUDA C++ kernels are not built"; exit 0
fi
[ -e fused/_cuda.abi3.so ] || "$PY" -c '
import runpy, sys
from pathlib import Path
sys.argv = ["setup.py", "--quiet", "--name"]
setup = runpy.run_path("setup.py")
reason = setup["why_not_cuda"]()
if reason:
    sys.exit(reason)
setup["build_cuda_kernels"](Path("fused/_cuda.abi3.so"))' || exit 1
FUSED_BACKEND=cuda "$PY" -m bench.smoke row channel gated --out "$OUT/smoke-cuda.jsonl"
"""
_LINEARS = "256,256 128,64 1024,1024 256,1024"  # N,K: a pass weighs most behind the smallest
_GEMM = '"$PY" -m fused tune linear --out "$OUT/tuning-linear.json" --max-seconds 28 --linear ' + (
    " ".join(f"{size},bfloat16,{norm}" for size in _LINEARS.split() for norm in ("layer", "batch"))
)
_LATENCY = (
    '"$PY" -m bench.latency layer batch --device cuda >"$OUT/latency.md"; s=$?;'
    ' cat "$OUT/latency.md"; exit $s'
)
_OTHERS = "tests --ignore tests/cuda"
FIRST = (
    Step("install", 40, _INSTALL),
    Step("smoke", 60, '"$PY" -m bench.smoke --out "$OUT/smoke.jsonl"'),
    Step("tests", 150, _tests("tests", _OTHERS, "gpu and not full")),
    Step("rows", 62, _bench("rows", 45)),
    Step("blocks", 52, _bench("blocks", 36)),
    Step("images", 48, _bench("images", 32)),
    Step("gemm", 36, _GEMM),
    Step("peers", 22, _bench("peers", 12)),
    Step("cuda", 40, _BUILD_CUDA),
)
SECOND = (
    Step("install", 40, _INSTALL),
    Step("tune", 90, '"$PY" -m fused tune --out "$OUT/tuning.json" --max-seconds 75'),
    Step("rows", 70, _bench("rows", 58, "--rest")),
    Step("blocks", 70, _bench("blocks", 56, "--rest --max-autotune")),
    Step("images", 50, _bench("images", 38, "--rest")),
    Step("peers", 30, _bench("peers", 20, "--rest")),
    Step("tests", 80, _tests("tests-rest", _OTHERS, "gpu and full")),
    Step("latency", 30, _LATENCY),
    Step("cuda", 40, _BUILD_CUDA),
    Step("cuda-tests", 30, _tests("cuda-tests", "tests/cuda/test_cuda_gpu.py", "gpu and not full")),
    Step("memcheck", 35, _sanitize("memcheck")),
    Step("racecheck", 35, _sanitize("racecheck")),
)
PASSES = {"first": FIRST, "second": SECOND}
GRACE = 2  # of a step's seconds, between asking its processes to end and ending them


def run(step: Step, out: Path) -> tuple[int, float]:
    """Runs a step within its limit; returns its status, 124 where it was stopped, and seconds."""
    peers = str(ROOT / ".cache" / "peers")
    environment = os.environ | {
        "PY": sys.executable,
        "OUT": str(out),
        "JOBS": str(min(16, os.cpu_count() or 1)),
        "PYTHONPATH": ":".join(filter(None, (peers, os.environ.get("PYTHONPATH")))),
        "PYTHONUNBUFFERED": "1",
    }
    started, status = time.monotonic(), 124
    with (out / f"{step.name}.log").open("w") as log:
        process = subprocess.Popen(
            ["bash", "-c", step.command],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        status = process.wait(step.seconds - GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    finally:
        with suppress(ProcessLookupError):  # also what bash has left behind
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return status, time.monotonic() - started


def pack(out: Path, path: Path) -> None:
    """Puts what has been found so far into one archive, which is whole at any time."""
    partial = path.with_suffix(".partial")
    with tarfile.open(partial, "w:gz") as archive:
        archive.add(out, out.name)
    partial.replace(path)


def plan(steps: Sequence[Step]) -> str:
    """The steps and their limits."""
    lines = [f"{step.seconds:4} s  {step.name}" for step in steps]
    return "\n".join([*lines, f"{sum(step.seconds for step in steps):4} s  at most"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 where a step fails; 0 where there is no GPU and nothing could."""
    parser = argparse.ArgumentParser(
        prog="bench/gpu_pass.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("pass_name", metavar="first|second", choices=tuple(PASSES))
    parser.add_argument("steps", nargs="*", metavar="STEP", help="these alone (default: all)")
    parser.add_argument("--out", type=Path, default=ROOT / ".cache" / "gpu")
    parser.add_argument("--pack", type=Path, help="after each step, all of --out in this .tar.gz")
    parser.add_argument("--plan", action="store_true", help="print the steps and their limits")
    given = parser.parse_intermixed_args(arguments)
    steps = PASSES[given.pass_name]
    unknown = sorted(set(given.steps) - {step.name for step in steps})
    if unknown:
        known = ", ".join(step.name for step in steps)
        parser.error(f"unknown step {', '.join(unknown)}; known: {known}")
    steps = tuple(step for step in steps if not given.steps or step.name in given.steps)
    if given.plan:
        print(plan(steps))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the step's processes too
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    failed = []
    for step in steps:
        print(f"==== {step.name}, at most {step.seconds} s", flush=True)
        status, seconds = run(step, out)
        sys.stdout.write("".join(tail(out / f"{step.name}.log")))
        said = {0: "done", 124: "STOPPED at its limit"}.get(status, f"FAILED with status {status}")
        print(f"==== {step.name}: {said}, {seconds:.0f} s", flush=True)
        with (out / "steps.jsonl").open("a") as file:
            line = {"pass": given.pass_name, "step": step.name, "status": status}
            file.write(json.dumps(line | {"seconds": round(seconds, 1)}) + "\n")
        if given.pack:
            pack(out, given.pack)
        if status:
            failed.append(step.name)
    if has_gpu(out) is False:
        print("gpu_pass: torch sees no CUDA device here, so nothing was measured or tested.")
    print(f"gpu_pass {given.pass_name}: {'failed: ' + ', '.join(failed) if failed else 'done'}")
    return int(bool(failed))


def tail(path: Path, lines: int = 40) -> list[str]:
    """The end of a log, without the tests that passed."""
    with path.open(errors="replace") as file:
        return [line for line in file if " PASSED" not in line][-lines:]


def has_gpu(out: Path) -> bool | None:
    """What the step `install` has found, now or before; None where it has not run."""
    path = out / "machine.json"
    return json.loads(path.read_text())["device"] == "cuda" if path.exists() else None


if __name__ == "__main__":
    sys.exit(main())
