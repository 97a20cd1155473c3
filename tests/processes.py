"""Programs in processes of their own, with a package in which something is missing or broken."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import fused

PACKAGE = Path(fused.__file__).parent
EXTENSION = PACKAGE / "_C.abi3.so"

PROBE = """
import json, sys, warnings
{prelude}
import torch
from torch import nn
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fused

    device = {device!r}
    torch.manual_seed(0)
    error = 0.0
    for dtype, norm in ((torch.float32, nn.LayerNorm(48)), (torch.float32, nn.RMSNorm(48)),
                        (torch.bfloat16, nn.LayerNorm(48))):
        plain = nn.Sequential(nn.Linear(32, 48), norm, nn.GELU()).double().to(device)
        model = fused.Sequential(nn.Linear(32, 48), type(norm)(48), nn.GELU()).to(device)
        model.load_state_dict(plain.state_dict())
        model.to(dtype)
        plain.load_state_dict(model.state_dict())
        x = torch.randn(7, 32, device=device, dtype=dtype, requires_grad=True)
        x64 = x.detach().double().requires_grad_()
        for _ in range(3):
            y, y64 = model(x), plain(x64)
        y.backward(torch.ones_like(y))
        y64.backward(torch.ones_like(y64))
        pairs = [(y, y64), (x.grad, x64.grad)]
        pairs += [(p.grad, q.grad) for p, q in zip(model.parameters(), plain.parameters())]
        ulp = torch.finfo(dtype).eps
        for got, want in pairs:
            worst = (got.double() - want).abs().max() / want.abs().max()
            error = max(error, float(worst) / ulp)

    z = torch.randn(9, 40, device=device)
    seed = torch.tensor([1234567], device=device)
    dropped = fused.functional.norm_act(z, norm="layer", activation="relu", p=0.25, seed=seed)
    keep = fused.functional.dropout_mask(9, 40, 0.25, seed)
    want = torch.relu(nn.functional.layer_norm(z, (40,))) * keep / 0.75
    torch.testing.assert_close(dropped, want)
{after}
    print(json.dumps({{
        "ulps": error,
        "package": fused.__file__,
        "isa": fused.backends.backend.cpu_isa(),
        "triton": "triton" in sys.modules and sys.modules["triton"] is not None,
        "warnings": [str(w.message) for w in caught if "fused" in str(w.message)],
    }}))
"""


# Importing torch takes ten times as long as the rest of a probe: a process that has imported it,
# and nothing else, becomes each of them by a fork, and ends without taking torch down again.
FORKS = """
import gc, json, os, signal, sys, torch
gc.freeze()
for line in sys.stdin:
    child = os.fork()
    if not child:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
code, environment, *files = json.loads(line)
for stream, file in enumerate(files, 1):
    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream)
os.environ.clear()
os.environ.update(environment)
sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
signal.alarm(300)
status = 0
try:
    exec(code, {"__name__": "__main__"})
except SystemExit as ended:
    status = ended.code or 0
except BaseException:
    sys.excepthook(*sys.exc_info())
    status = 1
sys.stdout.flush()
os._exit(status)
"""


@cache
def forks() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, "-c", FORKS],
        env=os.environ | {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(server.communicate)  # ends its loop
    return server


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the code in a process that has imported torch, and not fused."""
    given, server = os.environ | environment, forks()
    assert server.stdin and server.stdout
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        print(json.dumps([code, given, *map(str, files)]), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(code, status, *(f.read_text() for f in files))


def start_processes(work: Callable[..., None], count: int, *arguments: object) -> None:
    """Runs work(rank, *arguments), a function of a test file, in several processes side by side."""
    done = run_python(
        f"import sys; sys.path[:0] = {sys.path}\n"
        f"from {work.__module__} import {work.__name__} as work\n"
        "from torch.multiprocessing import start_processes\n"
        f"start_processes(work, {arguments}, {count}, start_method='fork')"
    )
    assert done.returncode == 0, done.stderr


def probe(prelude: str = "", after: str = "", device: str = "cpu", **environment: str) -> Any:
    """Runs the probe and checks its numbers; returns its report."""
    indented = "\n".join(f"    {line}" for line in after.splitlines())
    code = PROBE.format(prelude=prelude, after=indented, device=device)
    done = run_python(code, **environment)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["ulps"] < 64, report  # relative to the largest element; a wrong formula is 1e5
    return report


needs_extension = pytest.mark.skipif(not EXTENSION.exists(), reason="the extension is not built")


def assert_one_warning_per_dtype(report: Any, reason: str) -> None:
    assert report["isa"] is None
    assert len(report["warnings"]) == 2, report["warnings"]
    for dtype, warning in zip(("float32", "bfloat16"), report["warnings"], strict=True):
        assert warning.startswith(f"fused: cpu {dtype} runs in plain torch")
        assert reason in warning
        assert "\n" not in warning
