"""Training rows as mlx-lm reads them, and batches of them.

A folder holds ``train.jsonl`` and ``valid.jsonl`` (each may end in ``.gz``). Rows are
``{"prompt", "completion"}``, ``{"messages": [...]}`` or ``{"text"}``. Streams learn on the completion
only: from the last prompt token onward, never before.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..encode import encode_text
from ..errors import BadData
from .report import DataReport


@dataclass(frozen=True)
class Example:
    """Token ids of prompt and completion, and where the completion begins (0: all of it)."""

    tokens: list[int]
    start: int

    def hosts(self) -> range:
        """Rows with streams that have something to predict.

        Row i predicts token i + 1 and its stream j predicts token i + 1 + j:

            tokens   x0 x1 | x2 x3 x4        start = 2, x4 ends the sequence
            hosts       1    2               stream 1 of row 1 predicts x3, of row 2 x4
        """
        return range(max(self.start - 1, 0), len(self.tokens) - 2)

    def rows(self) -> range:
        """Rows at which the main stream says the completion: the hosts, and the last but one."""
        return range(max(self.start - 1, 0), len(self.tokens) - 1)


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences and the host rows to train on.

    Shapes: tokens int32 [B, L]; hosts int32 [B, P]; targets int32 [B, g, P], -1 where there is none
    (past the end of the sequence, or padding of hosts); labels int32 [B, L], what the main stream is
    to say at each row of a completion, -1 elsewhere.

    Args:
        examples: their indices in the data.
        num_tokens: how many there are, padding not counted.
        cut_hidden: M^{N-Ns} [B, L, E], where it is known already.
    """

    tokens: np.ndarray
    hosts: np.ndarray
    targets: np.ndarray
    labels: np.ndarray
    examples: tuple[int, ...] = ()
    num_tokens: int = 0
    cut_hidden: mx.array | None = None


def read_examples(
    folder: Path, split: str, tokenizer, max_length: int, answers: bool = True
) -> tuple[list[Example], DataReport]:
    """The examples of a split, and what was cut or left out.

    Args:
        answers: False reads prompts alone: rows need no answer, and one that is there is left away.

    Raises:
        BadData: no such file, rows that cannot be read (the first one with file and line, and how many
            there are), or no usable row.
    """
    path = split_file(folder, split)
    report = DataReport(path.name, max_length)

    def found() -> Iterator[Example]:
        for number, row in read_rows(path):
            try:
                yield to_example(row, tokenizer, f"{path}:{number}", answers)
            except BadData as error:
                report.rows += 1
                report.unreadable += 1
                report.first_unreadable = report.first_unreadable or str(error)

    examples = usable(found(), report) if answers else askable(found(), report)
    if report.unreadable:
        more = report.unreadable - 1
        others = f" {more} more of {report.rows} rows cannot be read." if more else ""
        raise BadData(report.first_unreadable + others)
    if not examples:
        what = "at least two completion tokens to learn from" if answers else "a prompt to answer"
        raise BadData(f"[data] {path} has no row with {what}.")
    return examples, report


def usable(found: Iterable[Example], report: DataReport) -> list[Example]:
    """The examples that there is something to learn from, cut to ``report.max_length`` tokens."""
    examples, seen, most = [], set(), report.max_length
    for example in found:
        tokens, start = example.tokens, example.start
        report.rows += 1
        report.longest = max(report.longest, len(tokens))
        if len(tokens) - start < 2:  # end of sequence alone
            report.empty += 1
            continue
        if not len(example.hosts()):
            report.short += 1
            continue
        if len(tokens) > most:
            example = Example(tokens[:most], start)
            if not len(example.hosts()):
                report.no_room += 1
                continue
            report.cut += 1
        name = digest([example])
        report.duplicates += name in seen
        seen.add(name)
        report.tokens += len(example.tokens)
        examples.append(example)
    report.used = len(examples)
    return examples


def askable(found: Iterable[Example], report: DataReport) -> list[Example]:
    """The examples, prompts alone, that leave room for an answer in ``report.max_length`` tokens."""
    examples = []
    for example in found:
        report.rows += 1
        report.longest = max(report.longest, len(example.tokens))
        if not example.tokens:
            report.no_prompt += 1
        elif example.start >= report.max_length - 1:
            report.no_room += 1
        else:
            report.tokens += len(example.tokens)
            examples.append(example)
    report.used = len(examples)
    return examples


def spread(number: int, count: int) -> list[int]:
    """``count`` of the rows 0 .. number - 1, evenly apart: files are often sorted by task."""
    count = min(count, number)
    return [(2 * i + 1) * number // (2 * count) for i in range(count)]


def in_both(train: list[Example], valid: list[Example]) -> int:
    """How many of ``valid`` are in ``train``, too."""
    known = {digest([example]) for example in train}
    return sum(digest([example]) in known for example in valid)


def has_split(folder: Path, split: str) -> bool:
    return any((folder / f"{split}.jsonl{end}").is_file() for end in ("", ".gz"))


def split_file(folder: Path, split: str) -> Path:
    """The file of a split; raises BadData if there is none."""
    for path in (folder / f"{split}.jsonl", folder / f"{split}.jsonl.gz"):
        if path.is_file():
            return path
    raise BadData(f"[data] {folder} must hold {split}.jsonl or {split}.jsonl.gz; there is neither.")


def data_file(data: Path, split: str) -> Path:
    """``data`` itself, or the file of a split if it is a folder; raises BadData."""
    if data.is_file():
        return data
    if not data.is_dir():
        raise BadData(f"[data] {data} is neither a file nor a folder.")
    return split_file(data, split)


def to_example(row: dict, tokenizer, at: str, answer: bool = True) -> Example:
    """The example that a row is; ``at`` names the row (file:line) in the BadData of one that is none.

    Args:
        answer: False makes its prompt alone, with nothing behind it.
    """
    try:
        return _example(row, tokenizer) if answer else _prompt(row, tokenizer)
    except Exception as error:  # a chat template may raise anything
        rule = (
            '"prompt" and "completion", "messages" or "text"'
            if answer
            else '"prompt" or "messages"'
        )
        raise BadData(f"[data] {at}: a row must have {rule}: {error!r}.") from None


def read_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """(line number, row) of a jsonl file, which may be gzipped; raises BadData with file and line."""
    opened = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opened(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, json.loads(line)
    except (ValueError, EOFError, OSError) as error:
        # A decoding error strikes while the next line is read.
        at = number if isinstance(error, json.JSONDecodeError) else number + 1
        raise BadData(f"[data] {path}:{at}: not a row of JSON in UTF-8: {error}.") from None


def _example(row: dict, tokenizer) -> Example:
    if "prompt" in row and "completion" in row:
        if not all(isinstance(row[k], str) for k in ("prompt", "completion")):
            raise ValueError("prompt and completion must be strings")
        if not tokenizer.has_chat_template:
            prompt = encode_text(tokenizer, row["prompt"])
            rest = tokenizer.encode(row["completion"], add_special_tokens=False)
            return Example([*prompt, *rest, *_end(tokenizer)], len(prompt))
        messages = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
        return _chat(messages, row.get("tools"), tokenizer)
    if "messages" in row:
        return _chat(row["messages"], row.get("tools"), tokenizer)
    if not isinstance(row["text"], str):
        raise ValueError("text must be a string")
    tokens = encode_text(tokenizer, row["text"])
    if tokens[-1:] != _end(tokenizer):
        tokens += _end(tokenizer)
    return Example(tokens, 0)


def _prompt(row: dict, tokenizer) -> Example:
    """What a row asks; nothing, if it is mere text."""
    if "prompt" not in row and "messages" not in row and "text" in row:
        return Example([], 0)
    if "prompt" in row and not isinstance(row["prompt"], str):
        raise ValueError("prompt must be a string")
    if "prompt" in row and not tokenizer.has_chat_template:
        tokens = encode_text(tokenizer, row["prompt"])
        return Example(tokens, len(tokens))
    if "prompt" in row:
        messages = [{"role": "user", "content": row["prompt"]}]
    else:
        messages = row["messages"]
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
    tokens = _templated(messages, row.get("tools"), tokenizer, add_generation_prompt=True)
    return Example(tokens, len(tokens))


def _end(tokenizer) -> list[int]:
    """The end-of-sequence token, if the tokenizer has one."""
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _chat(messages: list[dict], tools, tokenizer) -> Example:
    """The last assistant message is the completion; what a template adds after its end is cut."""
    tokens = _templated(messages, tools, tokenizer)
    if messages[-1]["role"] != "assistant":
        raise ValueError("the last message must be the assistant's")
    start = len(_templated(messages[:-1], tools, tokenizer, add_generation_prompt=True))
    for end in range(start, len(tokens)):
        if tokens[end] in tokenizer.eos_token_ids:
            return Example(tokens[: end + 1], start)
    return Example(tokens, start)


def _templated(messages: list[dict], tools, tokenizer, **how) -> list[int]:
    if not tokenizer.has_chat_template:
        raise ValueError(
            "there is no chat template, or --ignore-chat-template, so rows must have prompt/completion or text"
        )
    if not all(isinstance(m.get("content"), str | list) or m.get("tool_calls") for m in messages):
        raise ValueError("every message must have a content or tool_calls")
    return tokenizer.apply_chat_template(messages, tools=tools, return_dict=False, **how)


def batches(
    examples: list[Example], *, size: int, hosts: int, num_streams: int, seed: int, first: int = 0
) -> Iterator[Batch]:
    """Endless batches. Which examples and hosts batch i holds depends on (seed, i) alone.

    Sequences of a batch have similar lengths, so that little of it is padding.

    Args:
        hosts: P, host rows drawn per sequence (short completions repeat none and are padded).
        first: index of the first batch, to go on where an earlier run stopped.
    """
    per_epoch = max(1, len(examples) // size)
    index, epoch, order = first, -1, []
    while True:
        if index // per_epoch != epoch:
            epoch = index // per_epoch
            order = _epoch_order(examples, size, np.random.default_rng([seed, epoch]))
        rng = np.random.default_rng([seed, epoch, index])
        numbers = order[index % per_epoch]
        chosen = [examples[k] for k in numbers]
        picked = []
        for example in chosen:
            rows = np.array(example.hosts())
            picked.append(np.sort(rng.permutation(rows)[:hosts]))
        yield make_batch(chosen, picked, num_streams, tuple(map(int, numbers)))
        index += 1


def _epoch_order(examples: list[Example], size: int, rng) -> list[np.ndarray]:
    shuffled = rng.permutation(len(examples))
    pool, groups = 32 * size, []
    for at in range(0, len(shuffled), pool):
        part = shuffled[at : at + pool]
        part = part[np.argsort([len(examples[k].tokens) for k in part], kind="stable")]
        groups += [part[i : i + size] for i in range(0, len(part), size)]
    full = [g for g in groups if len(g) == size] or groups
    return [full[k] for k in rng.permutation(len(full))]


def make_batch(
    examples: list[Example],
    hosts: list[np.ndarray],
    num_streams: int,
    numbers: tuple[int, ...] = (),
) -> Batch:
    """Pad examples and their chosen host rows into one batch; ``numbers``: indices of the examples."""
    B, L = len(examples), max(len(e.tokens) for e in examples)
    P = max(len(h) for h in hosts)
    tokens = np.zeros((B, L), np.int32)
    rows = np.zeros((B, P), np.int32)
    targets = np.full((B, num_streams, P), -1, np.int32)
    labels = np.full((B, L), -1, np.int32)
    for b, (example, chosen) in enumerate(zip(examples, hosts, strict=True)):
        ids = np.array(example.tokens, np.int32)
        tokens[b, : len(ids)] = ids
        rows[b, : len(chosen)] = chosen
        said = np.array(example.rows())
        labels[b, said] = ids[said + 1]
        for j in range(1, num_streams + 1):
            at = chosen + 1 + j
            inside = at < len(ids)
            targets[b, j - 1, : len(chosen)][inside] = ids[at[inside]]
    return Batch(tokens, rows, targets, labels, numbers, sum(len(e.tokens) for e in examples))


def digest(*splits: list[Example]) -> str:
    """A short name of exactly these examples in this order."""
    made = hashlib.sha256()
    for split in splits:
        made.update(f"{len(split)} rows".encode())
        for example in split:
            made.update(np.array([example.start, *example.tokens], np.int64).tobytes())
            made.update(b";")
    return made.hexdigest()[:16]
