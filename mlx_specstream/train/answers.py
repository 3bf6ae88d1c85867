"""Self-distillation: the base answers the prompts of the data itself, and its answers are the text.

Streams guess what the base will say, so its own text teaches them more than reference answers do.
Answers come from mlx-lm's batch generation and are kept in a file of the user's cache, so that a killed
run goes on where it stopped and the next run with the same base, prompts and settings finds them there.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import BatchGenerator
from mlx_lm.sample_utils import make_sampler

from ..errors import BadArgument, BadData
from ..model.support import ONE_MASK
from ..profile import cache_folder
from .data import Example, spread
from .estimate import duration
from .identity import identity

GROUP = 128  # answers that are written to the file at once
REPORT_EVERY = 15.0  # seconds


@dataclass(frozen=True)
class SelfDistill:
    """How the base answers.

    Args:
        cache: folder for the answers; None is ``answers_folder()``.
        temperature: 0 is greedy, what streams will mostly be used for.
        max_tokens: an answer that has not ended by then is cut there.
        batch_size: answers generated at once.
        seed: of the sampler.
    """

    cache: Path | None = None
    temperature: float = 0.0
    max_tokens: int = 256
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self):
        if not self.temperature >= 0:
            raise BadArgument(f"[self_distill] 'temperature' must be >= 0, got {self.temperature}.")
        for name in ("max_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise BadArgument(
                    f"[self_distill] '{name}' must be >= 1, got {getattr(self, name)}."
                )


def settings_of(how: SelfDistill) -> dict[str, float | int]:
    """What the answers depend on, besides model and prompts: greedy ones on no seed."""
    unused = {"cache"} if how.temperature else {"cache", "seed"}
    return {name: value for name, value in asdict(how).items() if name not in unused}


def answers_folder() -> Path:
    """Where answers lie unless told otherwise: not in a streams folder, which people share."""
    return cache_folder() / "answers"


def answered(
    model: nn.Module,
    tokenizer,
    examples: list[Example],
    how: SelfDistill,
    max_length: int,
    note: Callable[[str], None],
) -> list[Example]:
    """The prompts of ``examples``, each once if answers are greedy, with the base's own answers.

    Args:
        model: the plain base, without streams.
        max_length: tokens of prompt and answer together.

    Raises:
        BadData: no row has a prompt, or no answer is long enough to learn from.
    """
    prompts = _prompts(examples, how, max_length)
    note(f"self-distillation: {len(prompts)} prompts of {len(examples)} rows")
    folder = how.cache or answers_folder()
    return _learnable(prompts, answers(model, tokenizer, prompts, how, folder, max_length, note))


def try_answering(
    model: nn.Module,
    tokenizer,
    examples: list[Example],
    how: SelfDistill,
    max_length: int,
    note: Callable[[str], None],
) -> list[Example]:
    """As many examples as ``answered`` would make, of a few answers again and again; keeps nothing.

    What a run will take can be told from them.
    """
    prompts = _prompts(examples, how, max_length)
    some = [prompts[number] for number in spread(len(prompts), how.batch_size)]
    tic = time.perf_counter()
    made = _learnable(some, _generate(model, tokenizer, some, how, max_length, 0))
    seconds = (time.perf_counter() - tic) * len(prompts) / len(some)
    note(f"self-distillation: {len(prompts)} prompts to answer first, about {duration(seconds)}")
    return [made[number % len(made)] for number in range(len(prompts))]


def _prompts(examples: list[Example], how: SelfDistill, max_length: int) -> list[list[int]]:
    prompts = [e.tokens[: e.start] for e in examples if 0 < e.start < max_length - 1]
    if not prompts:
        raise BadData("[self_distill] no row has a prompt to answer.")
    if how.temperature:
        return prompts
    return list(map(list, dict.fromkeys(map(tuple, prompts))))


def _learnable(prompts: list[list[int]], texts: list[list[int]]) -> list[Example]:
    made = [Example([*p, *a], len(p)) for p, a in zip(prompts, texts, strict=True)]
    made = [e for e in made if len(e.hosts())]
    if not made:
        raise BadData("[self_distill] the base's answers have no two tokens to learn from.")
    return made


def answers(
    model: nn.Module,
    tokenizer,
    prompts: list[list[int]],
    how: SelfDistill,
    folder: Path,
    max_length: int,
    note: Callable[[str], None] = lambda line: None,
) -> list[list[int]]:
    """What the model says to each prompt, token ids with the token that ended it (if one did).

    Args:
        folder: holds ``answers-<key>.jsonl``; the key is of model, prompts and settings, so other
            answers in the same folder are never mistaken for these.
        max_length: tokens of prompt and answer together.
    """
    # Longest first: what does not fit into memory fails at once. Neighbours pad each other little.
    order = sorted(range(len(prompts)), key=lambda k: -len(prompts[k]))
    path = folder / f"answers-{_key(model, tokenizer, prompts, how, max_length)}.jsonl"
    known = _read(path, order)
    total, begin, told = len(prompts), time.perf_counter(), time.perf_counter()
    if known:
        note(f"{len(known)} of {total} answers are in {path}")
    new = 0
    for group in _groups(order, len(known)):
        some = [prompts[k] for k in group]
        made = _generate(model, tokenizer, some, how, max_length, group[0])
        _append(path, [_line(k, ids) for k, ids in zip(group, made, strict=True)])
        known.update(zip(group, made, strict=True))
        new += sum(map(len, made))
        now = time.perf_counter()
        if now - told > REPORT_EVERY or len(known) == total:
            told = now
            note(f"answered {len(known)} of {total} prompts, {new / (now - begin):.0f} tokens/s")
    return [known[k] for k in range(total)]


def _generate(model, tokenizer, prompts, how: SelfDistill, max_length, first) -> list[list[int]]:
    if how.temperature:
        mx.random.seed(
            how.seed * 1_000_003 + first
        )  # so that a group does not depend on the others
    at_once = 1 if getattr(model, "model_type", None) in ONE_MASK else how.batch_size
    generator = BatchGenerator(
        model,
        stop_tokens=[[token] for token in sorted(tokenizer.eos_token_ids)],
        sampler=make_sampler(temp=how.temperature),
        completion_batch_size=at_once,
        prefill_batch_size=max(1, at_once // 4),
    )
    try:
        limits = [min(how.max_tokens, max_length - len(p)) for p in prompts]
        numbers = generator.insert(prompts, limits)
        made = {number: [] for number in numbers}
        while responses := generator.next_generated():
            for response in responses:
                made[response.uid].append(response.token)
    finally:
        generator.close()
    return [made[number] for number in numbers]


def _key(model, tokenizer, prompts, how: SelfDistill, max_length: int) -> str:
    settings = settings_of(how)
    ends = sorted(tokenizer.eos_token_ids)
    made = hashlib.sha256(json.dumps([identity(model), settings, ends, max_length]).encode())
    for prompt in prompts:
        made.update(json.dumps(prompt).encode())
    return made.hexdigest()[:16]


def _groups(order: list[int], begin: int) -> Iterator[list[int]]:
    for at in range(begin, len(order), GROUP):
        yield order[at : at + GROUP]


def _line(number: int, ids: list[int]) -> str:
    return json.dumps({"prompt": number, "tokens": ids}) + "\n"


def _append(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # What a model said to somebody's prompts is nobody else's business.
    with open(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab") as file:
        file.write("".join(lines).encode())
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path, order: list[int]) -> dict[int, list[int]]:
    """The answers of the whole groups in the file; what a killed run left behind them is cut off."""
    if not path.is_file():
        return {}
    found, ends = {}, [0]
    with open(path, "rb") as file:
        for line, number in zip(file, order, strict=False):
            try:
                row = json.loads(line)
                whole = line.endswith(b"\n") and row["prompt"] == number
                ids = [int(token) for token in row["tokens"]]
            except (ValueError, KeyError, TypeError):
                break
            if not whole:
                break
            found[number] = ids
            ends.append(ends[-1] + len(line))
    count = len(found) if len(found) == len(order) else len(found) // GROUP * GROUP
    os.truncate(path, ends[count])
    return {number: found[number] for number in order[:count]}
