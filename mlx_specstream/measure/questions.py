"""The rows of a data file as questions: a prompt to decode, and what the data says behind it."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from ..errors import BadArgument, BadData
from ..train.data import Example, has_split, read_rows, to_example
from ..train.data import data_file as any_data_file
from .prompts import OWN, Prompt

PLACE = "{}"  # of the prompt in --prompt-form


@dataclass(frozen=True)
class Question:
    """A prompt and its answers in the data.

    Args:
        prompt: token ids as they are fed; ``number`` is the line of its first row, from 0.
        references: what the rows with this prompt say behind it, each text once; none for plain text,
            whose first half is the prompt.
        example: its first row for teacher forcing.
    """

    prompt: Prompt
    references: list[str]
    example: Example


def data_file(data: Path, split: str) -> Path:
    """``train.data.data_file``, whose BadData names the splits that there are."""
    if data.is_dir() and not has_split(data, split):
        names = sorted({p.name.split(".jsonl")[0] for p in data.glob("*.jsonl*")})
        fix = f"choose another --split: {', '.join(names)}" if names else "add one"
        raise BadData(f"[data] {data} has no {split}.jsonl or {split}.jsonl.gz; {fix}.")
    return any_data_file(data, split)


def read_questions(
    path: Path, tokenizer, *, limit: int, seed: int, form: str = PLACE
) -> tuple[list[Question], list[str]]:
    """Questions in the order of the file, rows with one prompt merged, and notes for the user.

    Args:
        limit: at most so many prompts, drawn with ``seed``; -1: all.
        form: what the model expects around a prompt, ``{}`` for the prompt itself; for rows with
            ``prompt`` and ``completion``.

    Raises:
        BadArgument: a form without ``{}``.
        BadData: an unreadable row (with file and line), or no row with an answer.
    """
    if PLACE not in form:
        raise BadArgument(f"[prompt_form] must hold {PLACE}, where the prompt goes; got '{form}'.")
    groups: dict[str, list[tuple[int, dict, str | None]]] = {}
    empty = 0
    for number, row in read_rows(path):
        try:
            if "prompt" in row and "completion" in row:
                row = {**row, "prompt": form.replace(PLACE, row["prompt"])}
            prompt, answer = _parts(row)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            to_example(row, tokenizer, f"{path}:{number}")  # says what a row must be
            raise BadData(f"[data] {path}:{number}: the row has no text: {error!r}.") from None
        if not prompt or answer == "":
            empty += 1
            continue
        groups.setdefault(prompt, []).append((number, row, answer))
    notes = [f"left out, as prompt or answer is empty: {empty} rows"] if empty else []
    chosen = list(groups.values())
    if 0 <= limit < len(chosen):
        places = sorted(random.Random(seed).sample(range(len(chosen)), limit))
        chosen = [chosen[place] for place in places]
        notes.append(f"{limit} of {len(groups)} prompts, drawn with seed {seed}")
    questions = [_question(group, path, tokenizer) for group in chosen]
    questions = [q for q in questions if q is not None]
    if not questions:
        raise BadData(f"[data] {path} has no row with a prompt and an answer.")
    count = sum(len(q.references) for q in questions)
    if count > len(questions):
        notes.append(f"rows with one prompt were merged: {count} references")
    return questions, notes


def _parts(row: dict) -> tuple[str, str | None]:
    """(what rows of one prompt share, the answer); plain text has no answer."""
    if "prompt" in row and "completion" in row:
        prompt, tools = row["prompt"], row.get("tools")
        shared = json.dumps([prompt, tools]) if prompt and tools else prompt
        return shared, row["completion"].strip()
    if "messages" in row:
        *before, last = row["messages"]
        return json.dumps([before, row.get("tools")]), _text_of(last.get("content") or "").strip()
    return row["text"].strip(), None


def _text_of(content: str | list) -> str:
    """A message's content, which may come in parts."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part.get("type", "text") == "text")


def _question(group, path: Path, tokenizer) -> Question | None:
    """None for a text that is too short to be halved, or an empty prompt."""
    number, row, answer = group[0]
    example = to_example(row, tokenizer, f"{path}:{number}")
    end = len(example.tokens) // 2 if answer is None else example.start
    if end == 0:
        return None
    answers = (said for *_, said in group if said is not None)
    prompt = Prompt(OWN, number - 1, example.tokens[:end], end)
    return Question(prompt, list(dict.fromkeys(answers)), example)
