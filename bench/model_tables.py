"""The suite of models as markdown and as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from . import results
from .models import MODELS, OURS, PARTS, PROVIDERS, ModelRow
from .tables import ABSENT, LOSING, caption, group_by, select, table

COMMAND = "Measured by `python -m bench models`, written by `python -m bench report`"
BASELINES = ("eager", "compile")
ABOUT = (
    'How many times faster `backend="fused"` and `backend="fused_eager"` are than eager PyTorch'
    f" / than `torch.compile` alone; {LOSING} marks less than 1. One training step, or one call in"
    " evaluation mode; dropout is the model's own or none. A first call has empty caches on disk,"
    " in a process that has compiled another model; providers come in the order of the columns, and"
    " what the process keeps in memory helps the later ones."
)


def over(rows: Sequence[ModelRow], ours: str, baseline: str) -> float | None:
    """A baseline's time over ours in one case; None where either has none."""
    for r in select(rows, provider=baseline):  # type: ignore[arg-type]
        ratio = getattr(r, f"over_{ours}")
        return float(ratio) if ratio != "" else None
    return None


def over_better(rows: Sequence[ModelRow], ours: str) -> float | None:
    """The better of eager and torch.compile over ours."""
    found = [over(rows, ours, baseline) for baseline in BASELINES]
    return min((ratio for ratio in found if ratio is not None), default=None)


def cases(
    rows: Sequence[ModelRow], names: Iterable[str] = MODELS
) -> dict[tuple[str, float, str, int], list[ModelRow]]:
    """The rows of each model, dropout, mode and thread count, in the order of the models."""
    found: dict[tuple[str, float, str, int], list[ModelRow]] = {}
    for name in names:
        for r in rows:
            if r.model == name:
                found.setdefault((name, r.dropout, r.mode, r.threads), []).append(r)
    return found


def means(rows: Sequence[ModelRow]) -> str:
    """A line per mode, thread count and backend: the geometric mean over the better baseline."""
    lines = []
    kinds = (("training", True), ("training", False), ("inference", False))
    for (mode, with_own), threads, ours in product(kinds, sorted({r.threads for r in rows}), OURS):
        found = {}
        for (name, dropout, of_mode, of_threads), own in cases(rows).items():
            wanted = MODELS[name][1] if with_own else 0.0
            if (of_mode, of_threads, dropout) == (mode, threads, wanted):
                ratio = over_better(own, ours)
                if ratio is not None:
                    found[name] = ratio
        if not found:
            continue
        what = mode if mode == "inference" else f"{mode}, {'own' if with_own else 'no'} dropout"
        lost = [f"{name} ({ratio:.2f})" for name, ratio in found.items() if ratio < 1]
        mean = f"{statistics.geometric_mean(found.values()):.2f}"
        lines.append([what, str(threads), f"`{ours}`", str(len(found)), mean,
                      f"{min(found.values()):.2f}", ", ".join(lost) or "none"])  # fmt: skip
    header = ["", "threads", "backend", "models", "geometric mean", "lowest", f"below 1 {LOSING}"]
    about = "Over the better of eager and `torch.compile`, model by model:"
    return f"{about}\n\n{table(header, lines)}"


def _ratio_text(own: Sequence[ModelRow], ours: str) -> str:
    found = [over(own, ours, baseline) for baseline in BASELINES]
    if found == [None, None]:
        return ABSENT
    text = " / ".join(ABSENT if ratio is None else f"{ratio:.2f}" for ratio in found)
    return f"{text} {LOSING}" if any(ratio is not None and ratio < 1 for ratio in found) else text


def every_case(rows: Sequence[ModelRow], names: Iterable[str]) -> str:
    """A line per model, dropout, mode and thread count."""
    lines = []
    for (name, dropout, mode, threads), own in cases(rows, names).items():
        line = [name, mode, f"{dropout:g}" if dropout else "none", str(threads)]
        timed = {r.provider: r for r in own if not r.refused}
        for provider in PROVIDERS:
            line.append(f"{timed[provider].median_ms:.1f}" if provider in timed else ABSENT)
        line += [_ratio_text(own, ours) for ours in OURS]
        firsts = [timed[p].first_s if p in timed else ABSENT for p in list(PROVIDERS)[1:]]
        lines.append([*line, " / ".join(map(str, firsts))])
    header = ["model", "", "dropout", "threads", *(f"{provider}, ms" for provider in PROVIDERS)]
    header += [*(f"`{ours}` over eager / compile" for ours in OURS)]
    header += [f"first call, s: {' / '.join(list(PROVIDERS)[1:])}"]
    refused = [
        f"- {r.model}, {r.mode}, dropout {r.dropout:g}, `{r.provider}`: {r.refused}"
        for own in cases(rows, names).values()
        for r in own
        if r.refused
    ]
    parts = [table(header, lines)]
    if refused:
        parts.append("Refused, by the check or with an error:\n\n" + "\n".join(refused))
    return "\n\n".join(parts)


def draw(rows: Sequence[ModelRow], path: Path, about: str) -> None:
    """Heat maps of the speed-up: a line per model and dropout, a panel per mode and threads."""
    import numpy as np

    from .pictures import DPI, grid, heat_map, plt

    found = cases(rows)
    panels = sorted({(mode, threads) for _, _, mode, threads in found}, key=lambda p: (p[1], p[0]))
    lines = list(dict.fromkeys((name, dropout) for name, dropout, _, _ in found))
    columns = list(product(OURS, BASELINES))
    labels = [f"{ours} over {baseline}" for ours, baseline in columns]
    size = (2 + 3.4 * len(panels), 2.2 + 0.33 * len(lines))
    figure, axes = plt.subplots(
        1, len(panels), figsize=size, layout="constrained", sharey=True, squeeze=False
    )
    for panel, (mode, threads) in zip(axes[0], panels, strict=True):
        values = np.full((len(lines), len(columns)), np.nan)
        for i, (name, dropout) in enumerate(lines):
            for j, (ours, baseline) in enumerate(columns):
                ratio = over(found.get((name, dropout, mode, threads), []), ours, baseline)
                values[i, j] = np.nan if ratio is None else ratio
        names = [f"{name}, p={dropout:g}" if dropout else name for name, dropout in lines]
        grid(panel, f"{mode}, {threads} thread{'s' * (threads > 1)}", names, labels)
        heat_map(panel, values)
    title = "Whole models: how many times faster; framed in red: slower"
    lines_of_caption = about.replace("; ", "\n", 1)  # one panel alone is narrow
    figure.suptitle(f"{title}\n{lines_of_caption}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def report(folder: Path, root: Path) -> str:
    """The text of docs/benchmarks.md of the latest machine, with its picture; "" without rows."""
    rows: list[Any] = results.read(folder / "models.csv", ModelRow)
    groups = group_by(rows, "device", "machine", "isa")
    if not groups:
        return ""
    link, about = "images/models.png", caption(groups[0])
    draw(groups[0], root / "docs" / link, about)
    picture = f"![models: speed-up by model, losing cells in red]({link})"
    parts = [f"{COMMAND}.", f"{about}.", ABOUT, means(groups[0]), picture]
    parts.append(every_case(groups[0], MODELS))
    if cases(groups[0], PARTS):
        parts += ["Norms, dropout and short chains by themselves (`--models parts`):"]
        parts.append(every_case(groups[0], PARTS))
    return "\n\n".join(parts)
