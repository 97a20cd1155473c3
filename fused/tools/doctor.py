"""What this machine has, which backend serves each operation, and whether each gives right numbers.

Every operation × norm × mode × device × dtype that a device of this machine can run is tested
(selftest.py).
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import warnings
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..backends import backend
from .selftest import EAGER_FACTOR, MODES, OPERATIONS, ULPS, self_test

DEVICES = ("cpu", "cuda")
DTYPES = tuple(ULPS)


def _kernel_errors() -> tuple[type[Exception], ...]:
    """What loading, compiling or launching a kernel has been seen to raise."""
    found: list[type[Exception]] = [AttributeError, ImportError, LookupError, OSError]
    found += [RuntimeError, TypeError, ValueError, subprocess.SubprocessError]
    if "triton.errors" in sys.modules:
        found.append(sys.modules["triton.errors"].TritonError)
    return tuple(found)


@dataclass
class Result:
    """One operation on one device in one dtype.

    Attributes:
        why_not: each faster backend → why it does not serve this.
        passed: None where it was not tested, because the machine has no such device.
        detail: the largest error as a fraction of its limit, or what went wrong.
    """

    operation: str
    norm: str | None
    mode: str
    device: str
    dtype: str
    backend: str
    why_not: dict[str, str] = field(default_factory=dict)
    passed: bool | None = None
    detail: str = ""


# ---- the machine ----


def version_of(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _compiler() -> str | None:
    """The first line of the compiler's --version; None where there is none."""
    wanted = os.environ.get("CXX")
    for command in [shlex.split(wanted)] if wanted else [["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            done = subprocess.run(
                [*command, "--version"], capture_output=True, text=True, check=False
            )
            return (done.stdout or done.stderr).strip().partition("\n")[0] or command[0]
    return None


def cpu_model() -> str:
    """The CPU's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found = {key.strip(): value.strip() for key, _, value in (s.partition(":") for s in lines)}
    name = found.get("model name", platform.machine())
    if "cpu family" in found:
        name += f" (family {found['cpu family']}, model {found['model']})"
    return name


def _faster_isa() -> dict[str, str]:
    """Each instruction set beyond the active one → why it is not used."""
    active = backend.cpu_isa()
    reasons: dict[str, str] = {}
    for name in ("avx512", "avx2"):
        if active in (None, name):
            break
        try:
            backend.set_cpu_isa(name)
            reasons[name] = f"FUSED_CPU_ISA={os.environ.get('FUSED_CPU_ISA', active)} is set"
        except ValueError:
            reasons[name] = "this CPU or this build does not have it"
    if active is not None:
        backend.set_cpu_isa(active)
    return reasons


def machine() -> dict[str, Any]:
    """Versions and devices."""
    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            gpus.append(f"{properties.name} (sm_{properties.major}{properties.minor})")
    return {
        "fused": version_of("fused-lnad"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "compiler": _compiler(),
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "cpu_isa": backend.cpu_isa(),
        "faster_isa": _faster_isa(),
        "gpu": gpus,
        "environment": {k: v for k, v in os.environ.items() if k.startswith("FUSED_")},
    }


# ---- what serves each operation ----


def _why_not_faster(chosen: str, device: str, dtype: torch.dtype) -> dict[str, str]:
    """Each backend of this device that is faster than the chosen one → why it was not chosen."""
    if chosen != "reference":
        return {}
    candidates = [name for name, served in backend._DEVICE_OF.items() if served == device]
    return {
        name: backend.why_not(name, device, dtype)
        or f"backend {backend.requested()!r} is asked for (FUSED_BACKEND or use_backend)"
        for name in candidates
    }


def examine() -> list[Result]:
    """One result per operation, norm, mode, device and dtype; tested where the device exists."""
    results = []
    cases = [(o, n, m) for o, norms in OPERATIONS.items() for n in norms for m in MODES]
    for device in DEVICES:
        present = device == "cpu" or torch.cuda.is_available()
        for operation, norm, mode in cases:
            for dtype in DTYPES:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # `why_not` says the same
                    chosen = backend.choose(device, dtype)
                name = str(dtype).removeprefix("torch.")
                result = Result(operation, norm, mode, device, name, chosen)
                result.why_not = _why_not_faster(chosen, device, dtype)
                results.append(result)
                if not present:
                    result.detail = "not tested: the machine has no such device"
                    continue
                try:
                    worst = self_test(operation, norm, mode, dtype, device)
                    result.passed, result.detail = True, f"error {worst:.2f} of its limit"
                except _kernel_errors() as error:
                    first = str(error).strip().partition("\n")[0]
                    result.passed, result.detail = False, first or type(error).__name__
    return results


# ---- what is printed ----


def _print_machine(facts: dict[str, Any]) -> None:
    isa = facts["cpu_isa"] or f"no C++ kernels: {backend.why_not('cpp', 'cpu', torch.float32)}"
    for name, reason in facts["faster_isa"].items():
        isa += f"; not {name}: {reason}"
    lines = {
        "fused": facts["fused"],
        "python": facts["python"],
        "torch": facts["torch"],
        "triton": facts["triton"] or "not installed",
        "compiler": facts["compiler"] or "none found (g++ or clang++)",
        "cpu": f"{facts['cpu']}, {facts['threads']} threads",
        "C++ kernels": isa,
        "gpu": ", ".join(facts["gpu"]) or "none that torch sees",
    }
    lines |= facts["environment"]
    for name, value in lines.items():
        print(f"{name:<20}{value}")


def _print_results(results: list[Result], device: str) -> None:
    of_device = [r for r in results if r.device == device]
    tested = any(r.passed is not None for r in of_device)
    print(f"\n{device}" + ("" if tested else ": not tested, torch sees no such device"))
    if tested:
        dtypes = [str(d).removeprefix("torch.") for d in DTYPES]
        print(f"  {'operation':<38}" + "".join(f"{name:<18}" for name in dtypes).rstrip())
        rows: dict[str, list[str]] = {}
        for r in of_device:
            verdict = "ok" if r.passed else "WRONG"
            label = f"{r.operation}, {r.norm or 'no norm'}, {r.mode}"
            rows.setdefault(label, []).append(f"{r.backend} {verdict}")
        for label, cells in rows.items():
            print(f"  {label:<38}" + "".join(f"{cell:<18}" for cell in cells).rstrip())
    reasons: dict[str, list[str]] = {}
    for r in of_device:
        for name, reason in r.why_not.items():
            reasons.setdefault(f"not {name}: {reason}", []).append(r.dtype)
    for reason, found in reasons.items():
        print(f"  {', '.join(dict.fromkeys(found))}: {reason}")
    for r in of_device:
        if r.passed is False:
            where = f"{r.operation}, {r.norm or 'no norm'}, {r.mode}, {r.dtype}, {r.backend}"
            print(f"  WRONG {where}: {r.detail}")


def main(as_json: bool = False) -> int:
    """Prints the report; returns 0 when every self-test passed, else 1."""
    facts, results = machine(), examine()
    passed = all(r.passed is not False for r in results)
    if as_json:
        report = facts | {"operations": [asdict(r) for r in results], "passed": passed}
        json.dump(report, sys.stdout, indent=1)
        print()
        return 0 if passed else 1
    _print_machine(facts)
    for device in DEVICES:
        _print_results(results, device)
    tested = [r for r in results if r.passed is not None]
    right = sum(bool(r.passed) for r in tested)
    print(f"\n{right} of {len(tested)} self-tests passed (limit: {EAGER_FACTOR} × eager's error)")
    return 0 if passed else 1
