"""The prompts of ``bench``: four kinds written for it (prompts.json), and the user's own from a file."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from ..encode import encode_text
from ..errors import BadArgument, BadData

KINDS = ("prose", "code", "json-sql", "long")
OWN = "own"  # the kind of prompts from the user's file
OWN_MOST = 20  # of the user's prompts, if not told otherwise
ROTATION = 3  # sections by which each long prompt starts later than the one before
JOINT = "\n\n"


@dataclass(frozen=True)
class Prompt:
    """A prompt as it is fed.

    Args:
        kind: one of KINDS or OWN.
        number: its place in its kind, from 0.
        tokens: token ids.
        full: tokens before it was cut to the model's context.
    """

    kind: str
    number: int
    tokens: list[int]
    full: int


class Encoder:
    """Prompts to token ids that fit.

    Args:
        tokenizer: mlx-lm's.
        chat: messages and their tools (or None) -> token ids of the chat template; None feeds prompts
            as they are.
        room: most tokens of a prompt; None: no limit.
    """

    def __init__(
        self,
        tokenizer,
        chat: Callable[[list[dict], list | None], list[int]] | None,
        room: int | None,
    ):
        self.tokenizer, self.chat, self.room = tokenizer, chat, room

    def text(self, text: str) -> list[int]:
        return encode_text(self.tokenizer, text)

    def user(self, text: str, tools: list | None = None) -> list[int]:
        if self.chat is None:
            return self.text(text)
        return self.chat([{"role": "user", "content": text}], tools)

    def fits(self, tokens: list[int]) -> bool:
        return self.room is None or len(tokens) <= self.room

    def prompt(self, kind: str, number: int, tokens: list[int], full: int | None = None) -> Prompt:
        """Cut what is too long at its beginning; its first token, which may mark one, stays."""
        full = len(tokens) if full is None else full
        if not self.fits(tokens):
            tokens = [tokens[0], *tokens[len(tokens) - self.room + 1 :]]
        return Prompt(kind, number, tokens, full)


def bundled(kinds: list[str], encoder: Encoder, most: int | None = None) -> list[Prompt]:
    """Our own prompts, at most so many of each kind."""
    data = json.loads((files(__package__) / "prompts.json").read_text(encoding="utf-8"))
    found = []
    for kind in kinds:
        if kind not in KINDS:
            raise BadArgument(f"[kinds] must be of {', '.join(KINDS)}; got '{kind}'.")
        if kind == "long":
            found += [
                long_prompt(data["long"]["sections"], task, number, encoder)
                for number, task in enumerate(data["long"]["tasks"][:most])
            ]
        else:
            texts = data["kinds"][kind][:most]
            found += [encoder.prompt(kind, n, encoder.user(t)) for n, t in enumerate(texts)]
    return found


def long_prompt(sections: list[str], task: str, number: int, encoder: Encoder) -> Prompt:
    """A handbook and a task about it: over 2,000 tokens with any common tokenizer.

    All sections once, so nothing repeats; each prompt begins with another one, so no two share a
    beginning. Where the context is small, sections are left out from the end.
    """
    at = number * ROTATION % len(sections)
    rotated = [*sections[at:], *sections[:at]]

    def tokens(count: int) -> list[int]:
        return encoder.user(JOINT.join([*rotated[:count], "---", task]))

    full = tokens(len(rotated))
    count, fed = len(rotated), full
    while count and not encoder.fits(fed):
        count -= 1
        fed = tokens(count)
    return encoder.prompt("long", number, fed, len(full))


def from_file(path: Path, encoder: Encoder, most: int | None = None) -> tuple[list[Prompt], int]:
    """The user's prompts, spread evenly over the file if there are more than ``most``.

    Rows: ``prompt`` (a user's message, or plain text without a chat template), ``messages`` (what
    comes before the last answer), both with their ``tools`` if there are any, or ``text`` (fed as it is).

    Returns:
        (prompts, rows in the file)

    Raises:
        BadData: an unreadable or empty file, or a row with none of these; names file and line.
    """
    rows = list(_rows(path))
    if not rows:
        raise BadData(f"[data] {path} holds no row.")
    count = min(len(rows), OWN_MOST if most is None else most)
    found = []
    for n in range(count):
        number, row = rows[n * len(rows) // count]
        try:
            tokens = _row_tokens(row, encoder)
        except Exception as error:  # a chat template may raise anything
            line = " ".join(str(error).split())[:300]
            raise BadData(f"[data] {path}:{number}: {line}") from None
        found.append(encoder.prompt(OWN, n, tokens))
    return found, len(rows)


def _row_tokens(row, encoder: Encoder) -> list[int]:
    row = row if isinstance(row, dict) else {}
    if isinstance(row.get("prompt"), str) and row["prompt"]:
        return encoder.user(row["prompt"], row.get("tools"))
    if isinstance(row.get("text"), str) and row["text"]:
        return encoder.text(row["text"])
    messages = row.get("messages")
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ValueError(
            'a row must have "prompt", "messages" or "text", and it must not be empty.'
        )
    while messages and messages[-1].get("role") == "assistant":
        messages = messages[:-1]
    if not messages:
        raise ValueError("messages must hold one before the last answer.")
    if encoder.chat is None:
        raise ValueError("messages need a model with a chat template.")
    return encoder.chat(messages, row.get("tools"))


def _rows(path: Path) -> Iterator[tuple[int, object]]:
    """(line number, row) of a jsonl file, which may be gzipped."""
    opened = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opened(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, json.loads(line)
    except (ValueError, EOFError) as error:
        at = number if isinstance(error, json.JSONDecodeError) else number + 1
        raise BadData(f"[data] {path}:{at}: not a row of JSON in UTF-8: {error}.") from None
