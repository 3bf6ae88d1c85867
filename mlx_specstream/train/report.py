"""What is in the training data, and what of it cannot be used: counted, and said before a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

THINGS = {  # field -> how a reader is told
    "empty": "with nothing to learn (empty completions)",
    "short": "of a single token",
    "no_prompt": "without a prompt to answer",
    "no_room": "whose prompt leaves no room for an answer",
    "unreadable": "that are no rows",
    "others": "of another model",
}


@dataclass
class DataReport:
    """Counts of one file.

    Args:
        name: of the file. rows: lines that are not blank.
        used: examples; tokens: in them; longest: tokens of the longest row as it came.
        empty, short, no_prompt, no_room, unreadable: left out, each for its reason.
        cut: used, but cut to ``max_length`` tokens.
        duplicates: used, though the very same row came before.
        trained_on: rows of the validation file that are also trained on.
        shared: training rows left out, because their prompt is one of the validation file.
        others: of another model, left out (a log of answers).
        first_unreadable: what is wrong with the first of them.
    """

    name: str
    max_length: int
    rows: int = 0
    used: int = 0
    tokens: int = 0
    longest: int = 0
    empty: int = 0
    short: int = 0
    no_prompt: int = 0
    no_room: int = 0
    unreadable: int = 0
    cut: int = 0
    duplicates: int = 0
    trained_on: int = 0
    shared: int = 0
    others: int = 0
    first_unreadable: str = ""

    def lines(self) -> list[str]:
        """For a person: one line for what is used, one for each kind of trouble there is."""
        found = [
            f"{self.name}: {self.rows:,} rows, {self.used:,} used ({self.tokens:,} tokens, the longest "
            f"row {self.longest:,})"
        ]
        out = {name: getattr(self, name) for name in THINGS}
        found += [f"  left out: {n:,} {THINGS[name]}" for name, n in out.items() if n]
        if self.cut:
            found.append(f"  cut to {self.max_length:,} tokens (--max-seq-length): {self.cut:,}")
        if self.duplicates:
            found.append(f"  duplicates, which count twice: {self.duplicates:,}")
        if self.trained_on:
            found.append(
                f"  also in the training rows, so validation flatters: {self.trained_on:,}"
            )
        if self.shared:
            found.append(
                f"  training rows left out, whose prompts are held out here: {self.shared:,}"
            )
        return found

    def to_json(self) -> dict[str, Any]:
        """The counts, no text of the data."""
        found = asdict(self)
        found.pop("first_unreadable")
        return found
