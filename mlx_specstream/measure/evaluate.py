"""eval: the prompts of a data file decoded with and without streams, and how good the guesses are.

The decoding itself is timed and counted by ``bench.py``, its sums are ``summary.py``'s; trees that were
not decoded are replayed by ``simulate.py``.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

import mlx.nn as nn
import numpy as np

from ..decode.record import Record
from ..decode.tree import TreeShape
from ..generate import GenerationResponse, stream_generate
from ..model.seams import Seams
from ..train.data import Example, make_batch
from ..train.loss import evaluate
from .bench import FORMAT, Mode, answers_of, decode, differences, row_of
from .machine import about_machine
from .quality import score
from .questions import Question
from .simulate import acceptance_by_depth, guesses_by_count, replay, tokens_per_pass
from .summary import summarise

PLAIN, PLANNED = "plain", "planned"  # keys of ways
TOP_K = 8  # guesses of a stream among which the right one may be
REPLAYED = ("chain", "best:8", "best:16", "best:32")
WARM_UP = 2  # prompts that are decoded once more, first and untimed
LOGITS = 1 << 25  # of streams held at once (128 MB in fp32)


def make_ways(
    model: nn.Module,
    tokenizer,
    keywords: dict[str, Any],
    trees: list[str | None],
    streams: bool,
) -> list[Mode]:
    """Plain decoding first; then, with streams, each tree, else copied drafts if they are asked for.

    Args:
        keywords: of ``stream_generate``, for all ways; ``seed`` is mixed with the prompt, so that
            each prompt has draws of its own and all ways the same ones.
        trees: None is the planner.
    """

    def ours(**how):
        def answer(prompt: list[int], record: Record | None) -> Iterator[GenerationResponse]:
            given = {**keywords, **how, "seed": keywords["seed"] + zlib.crc32(str(prompt).encode())}
            return stream_generate(model, tokenizer, prompt, record=record, **given)

        return answer

    without = {"use_streams": False, "tree": None, "placement": None, "prune": None}
    ways = [Mode(PLAIN, PLAIN, ours(**without, copies=False))]
    copies = keywords["copies"]
    if not streams:
        return [*ways, Mode("copies", "copies", ours(**without), True)] if copies else ways
    for tree in trees:
        key = tree or (PLANNED if keywords["prune"] is None else "pruned")
        # The planner copies unless told not to, a fixed tree only if told to.
        if copies is not None and copies != (key == PLANNED):
            key += " + copies" if copies else ", no copies"
        ways.append(Mode(key, key, ours(tree=tree), True))
    return ways


def accuracy(seams: Seams, examples: list[Example]) -> dict[str, Any]:
    """How often each stream's first guess, or one of its first ``TOP_K``, is the token of the text.

    Teacher-forced at every position of the answers, behind the text before it.

    Returns:
        ``loss``, ``top1``, ``topk``: a figure per stream; ``positions``: hosts that were asked.
    """
    g = seams.streams.config.num_streams
    most = max(1, LOGITS // (g * seams.vocabulary_size))
    batches, positions = [], 0
    for example in examples:
        hosts = np.array(example.hosts())
        positions += len(hosts)
        parts = [hosts[at : at + most] for at in range(0, len(hosts), most)]
        batches += [make_batch([example], [part], g) for part in parts]
    return {**evaluate(seams, batches, TOP_K), "positions": positions}


def replayed(
    seams: Seams,
    prompts: list[list[int]],
    answers: list[list[int]],
    trees: Collection[str],
    stop: Collection[int],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, dict[str, Any]]:
    """Passes that each tree takes for the base's own greedy answers: exact, without decoding.

    Returns:
        tree -> ``tokens_per_pass``, ``acceptance`` by depth (a share per stream), ``nodes_per_pass``.
    """
    shapes = {tree: TreeShape.parse(tree) for tree in trees}
    counts = {tree: shape.candidates(seams.vocabulary_size) for tree, shape in shapes.items()}
    runs = {tree: [] for tree in trees}
    for n, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), 1):
        guesses = guesses_by_count(seams, prompt, answer, set(counts.values()))
        for tree, shape in shapes.items():
            runs[tree].append(replay(guesses[counts[tree]], answer, shape, len(answer), stop))
        progress(n, len(prompts))
    g = seams.streams.config.num_streams
    return {
        tree: {
            "tokens_per_pass": tokens_per_pass(found),
            "acceptance": acceptance_by_depth(found, g),
            "nodes_per_pass": sum(sum(r.nodes) for r in found)
            / max(1, sum(r.passes for r in found)),
        }
        for tree, found in runs.items()
    }


class Evaluation:
    """One run, filled as it goes: what an interrupted one has answered is whole.

    Args:
        ways: of ``make_ways``.
        questions: prompts and their answers in the data.
        tokenizer: mlx-lm's.
        metrics: of ``quality.py``.
    """

    def __init__(self, ways: list[Mode], questions: list[Question], tokenizer, metrics: list[str]):
        self.ways, self.questions = ways, questions
        self.tokenizer, self.metrics = tokenizer, metrics
        self.answered = 0  # prompts that every way has answered
        self.rows: list[dict[str, Any]] = []
        self.said: dict[tuple[str, int], list[list[int]]] = {}  # (way, prompt) -> [tokens]
        self.accuracy: dict[str, dict[str, Any]] = {}  # by the text that was forced
        self.replayed: dict[str, dict[str, Any]] = {}  # by tree

    def decode(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Every prompt in every way, the order of the ways turning from prompt to prompt.

        Args:
            progress: called with (prompts done, in all).
        """
        self.warm_up()
        while self.answered < len(self.questions):
            self.decode_next()
            progress(self.answered, len(self.questions))

    def warm_up(self, prompts: int | None = None) -> None:
        """Decode the first prompts untimed: a pass is traced when its sizes come up again and again."""
        for question in self.questions[: WARM_UP if prompts is None else prompts]:
            for way in self.ways:
                decode(way, question.prompt.tokens, Record() if way.drafts else None)

    def decode_next(self) -> None:
        """The next prompt, in every way."""
        index, rows = self.answered, []
        turn = index % len(self.ways)
        for way in [*self.ways[turn:], *self.ways[:turn]]:
            record = Record() if way.drafts else None
            answer = decode(way, self.questions[index].prompt.tokens, record)
            self.said[way.key, index] = [answer.tokens]
            rows.append(row_of(way, index, 1, answer, record))
        self.rows += rows
        self.answered = index + 1

    def check_guesses(self, seams: Seams, text: str) -> None:
        """Accuracy of the streams in ``text``: that of the ``"data"`` or the ``"own answers"``."""
        if text == "data":
            examples = [q.example for q in self.questions]
        else:
            examples = [
                Example([*q.prompt.tokens, *answer], len(q.prompt.tokens))
                for q, answer in zip(self.questions, self.answers(PLAIN), strict=False)
            ]
        self.accuracy[text] = accuracy(seams, examples)

    def replay(self, seams: Seams, trees: list[str], progress: Callable[[int, int], None]) -> None:
        """Trees that need not be decoded; for greedy answers, and streams that the base does not see."""
        prompts = [q.prompt.tokens for q in self.questions[: self.answered]]
        stop = self.tokenizer.eos_token_ids
        self.replayed = replayed(seams, prompts, self.answers(PLAIN), trees, stop, progress)

    def answers(self, way: str) -> list[list[int]]:
        """Token ids of the answers so far, an end-of-sequence token included."""
        return [self.said[way, n][0] for n in range(self.answered)]

    def texts(self, way: str) -> list[str]:
        """The same as text."""
        stop = self.tokenizer.eos_token_ids
        answers = ([t for t in answer if t not in stop] for answer in self.answers(way))
        return [self.tokenizer.decode(answer).strip() for answer in answers]

    def results(
        self, arguments: dict[str, Any], model: dict[str, Any], notes: list[str]
    ) -> dict[str, Any]:
        """Raw and summed up, in the form of ``bench.collect``; numbers and hashes, no text."""
        questions = self.questions[: self.answered]
        prompts, references = [q.prompt for q in questions], [q.references for q in questions]
        stop = self.tokenizer.eos_token_ids
        if cut := sum(answer[-1] not in stop for answer in self.answers(PLAIN)):
            notes = [*notes, f"{cut} of {len(prompts)} plain answers were cut at max_tokens"]
        found = {
            "format": FORMAT,
            "made": time.strftime("%Y-%m-%d %H:%M"),
            "machine": about_machine(),
            "arguments": arguments,
            "model": model,
            "notes": notes,
            "modes": [{"key": w.key, "title": w.title, "drafts": w.drafts} for w in self.ways],
            "prompts": [
                {
                    "kind": q.prompt.kind,
                    "number": q.prompt.number,
                    "tokens": len(q.prompt.tokens),
                    "full": q.prompt.full,
                    "references": len(q.references),
                }
                for q in questions
            ],
            "runs": self.rows,
            "split": [],
            "answers": answers_of(self.ways, prompts, self.said),
            "differences": differences(self.ways, prompts, self.said),
            "accuracy": self.accuracy,
            "top_k": TOP_K,
            "replayed": self.replayed,
            "metrics": self.metrics,
            "quality": {
                w.key: score(self.metrics, self.texts(w.key), references) for w in self.ways
            },
        }
        return {**found, "summary": summarise(found)}
