"""bench: the same prompts decoded in several ways in one run, interleaved prompt by prompt.

Everything here is raw: seconds, tokens, passes. What follows from them is ``summary.py``'s.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generation_stream
from mlx_lm.generate import stream_generate as stock_stream_generate

from ..decode.record import Record
from ..errors import BadArgument
from ..generate import stream_generate
from .bandwidth import best_of, read_bandwidth, vendor_peak, weight_bytes
from .machine import about_machine
from .prompts import OWN, Prompt
from .summary import summarise

FORMAT = 1  # of the results; raised when a reader of old ones would misread new ones
BASELINE = "mlx-lm"
PARTS = ("base_s", "streams_s", "draft_s", "host_s")  # of PassRecord


@dataclass(frozen=True)
class Mode:
    """One way to decode.

    Args:
        key: short name, unique.
        title: for people.
        answer: (prompt's token ids, record) -> responses with ``token`` and ``from_draft``.
        drafts: passes are not tokens, and a record is filled.
    """

    key: str
    title: str
    answer: Callable[[list[int], Record | None], Iterator[Any]]
    drafts: bool = False


@dataclass(frozen=True)
class Answer:
    """An answer and its times.

    Args:
        tokens: an end-of-sequence token included.
        seconds: from the prompt to the last token.
        first_s: from the prompt to the first token.
        passes: forwards after the prompt's own.
    """

    tokens: list[int]
    seconds: float
    first_s: float
    passes: int


def make_modes(
    stock: nn.Module,
    model: nn.Module,
    tokenizer,
    *,
    max_tokens: int,
    streams: bool,
    copies: bool = True,
    draft_model: nn.Module | None = None,
    num_draft_tokens: int | None = None,
    keywords: dict[str, Any] | None = None,
) -> list[Mode]:
    """The ways that can be compared, the baseline first.

    Args:
        stock: a model of its own for mlx-lm, on which nothing was ever attached.
        model: ours.
        streams: ``model`` has streams.
        copies: ``model`` can decode trees, so that copied drafts work without streams too.
        draft_model, num_draft_tokens: for mlx-lm's own speculative decoding.
        keywords: more arguments of ``stream_generate`` (tree, placement) where streams draft.
    """

    def ours(**how):
        return lambda prompt, record: stream_generate(
            model, tokenizer, prompt, max_tokens=max_tokens, record=record, **how
        )

    def theirs(**how):
        return lambda prompt, record: stock_stream_generate(
            stock, tokenizer, prompt, max_tokens=max_tokens, **how
        )

    extra = keywords or {}
    found = [
        Mode(BASELINE, "mlx-lm", theirs()),
        Mode("plain", "plain loop", ours(use_streams=False, copies=False)),
    ]
    if streams:
        found.append(
            Mode("streams", "streams", ours(use_streams=True, copies=False, **extra), True)
        )
    if copies:
        found.append(Mode("copies", "copies", ours(use_streams=False, copies=True), True))
    if streams:
        both = ours(use_streams=True, copies=True, **extra)
        found.append(Mode("both", "streams + copies", both, True))
    if draft_model is not None:
        how: dict[str, Any] = {"draft_model": draft_model}
        if num_draft_tokens is not None:
            how["num_draft_tokens"] = num_draft_tokens
        found.append(Mode("mlx-lm-draft", "mlx-lm + draft model", theirs(**how)))
    return found


def decode(mode: Mode, prompt: list[int], record: Record | None = None) -> Answer:
    """Decode one prompt in one way, timed."""
    tokens, drafted, first_s = [], 0, 0.0
    response = None
    mx.synchronize(generation_stream)  # what the answer before had queued ahead is not ours
    tic = time.perf_counter()
    try:
        for response in mode.answer(prompt, record):
            if not tokens:
                first_s = time.perf_counter() - tic
            tokens.append(response.token)
            drafted += response.from_draft
    except (ValueError, RuntimeError) as error:  # mlx-lm's refusals of a draft model among them
        line = " ".join(str(error).split())[:300]
        raise BadArgument(f"[decode] {mode.title} cannot decode this: {line}") from error
    seconds = time.perf_counter() - tic
    passes = getattr(response, "passes", None)
    if passes is None:  # mlx-lm's: a pass ends with a token that is not of the draft, or the answer
        passes = len(tokens) - drafted - 1 + response.from_draft
    return Answer([int(t) for t in tokens], seconds, first_s, passes)


def run(
    modes: list[Mode],
    prompts: list[Prompt],
    repeats: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Decode every prompt in every way, a warm-up and ``repeats`` times, then once to look inside.

    The order of the ways turns from prompt to prompt, so that none always follows the same one.

    Args:
        progress: called with (answers done, answers in all).

    Returns:
        ``runs``: one row per timed answer; ``split``: one per answer that was looked into;
        ``answers``: token ids per mode and prompt (of the user's own prompts a hash alone);
        ``differences``: where a mode's tokens leave the baseline's.
    """
    looked = [mode for mode in modes if mode.drafts]
    total = len(prompts) * (len(modes) * (1 + repeats) + len(looked))
    done, rows, said = 0, [], {}
    for repeat in range(repeats + 1):  # the first warms up
        for index, prompt in enumerate(prompts):
            turn = (repeat + index) % len(modes)
            for mode in [*modes[turn:], *modes[:turn]]:
                record = Record() if mode.drafts else None
                answer = decode(mode, prompt.tokens, record)
                done += 1
                progress(done, total)
                if repeat:
                    rows.append(row_of(mode, index, repeat, answer, record))
                    said.setdefault((mode.key, index), []).append(answer.tokens)
    split = []
    for index, prompt in enumerate(prompts):
        for mode in looked:
            record = Record(split=True)
            decode(mode, prompt.tokens, record)
            done += 1
            progress(done, total)
            sums = record.totals()
            seen = {name: float(sums[name]) for name in PARTS}
            passes = int(sums["passes"])
            split.append({"mode": mode.key, "prompt": index, "passes": passes, **seen})
    return {
        "runs": rows,
        "split": split,
        "answers": answers_of(modes, prompts, said),
        "differences": differences(modes, prompts, said),
    }


def row_of(mode: Mode, index: int, repeat: int, answer: Answer, record: Record | None) -> dict:
    """An answer as a row of the results: numbers only."""
    row = {
        "mode": mode.key,
        "prompt": index,
        "repeat": repeat,
        "seconds": answer.seconds,
        "first_s": answer.first_s,
        "tokens": len(answer.tokens),
        "passes": answer.passes,
    }
    if record is not None:
        sums = record.totals()
        row |= {
            "accepted": [int(p.accepted) for p in record.passes if not p.recheck],
            "copied": int(sums["copied"]),
            "nodes": int(sums["nodes"]),
            "rechecks": int(sums["recheck"]),
            "with_streams": int(sums["streams"]),
        }
    return row


def answers_of(modes, prompts: list[Prompt], said) -> dict[str, list]:
    """The last answer of each mode to each prompt; of the user's own prompts a hash of its tokens."""

    def shown(index: int, tokens: list[int]):
        if prompts[index].kind != OWN:
            return tokens
        return hashlib.sha256(str(tokens).encode()).hexdigest()  # ids could be read back as text

    return {
        mode.key: [shown(i, said[mode.key, i][-1]) for i in range(len(prompts))] for mode in modes
    }


def differences(modes: list[Mode], prompts: list[Prompt], said) -> list[dict[str, Any]]:
    """The first difference of each mode and prompt from the baseline, over all repeats."""
    baseline, found = modes[0], []
    for index, prompt in enumerate(prompts):
        expected = said[baseline.key, index][-1]
        for mode in modes:
            others = [_parting(expected, tokens) for tokens in said[mode.key, index]]
            parted = [at for at in others if at is not None]
            if not parted:
                continue
            at = min(parted)
            tokens = said[mode.key, index][others.index(at)]
            gap = None
            if at < min(len(expected), len(tokens)):
                gap = _logit_gap(baseline, prompt.tokens, at, expected[at], tokens[at])
            found.append(
                {
                    "mode": mode.key,
                    "prompt": index,
                    "position": at,
                    "repeats": len(parted),
                    "logit_gap": gap,
                }
            )
    return found


def _parting(a: list[int], b: list[int]) -> int | None:
    """Where two lists part; None if they are equal."""
    for at, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return at
    return None if len(a) == len(b) else min(len(a), len(b))


def _logit_gap(baseline: Mode, prompt: list[int], at: int, token: int, other: int) -> float | None:
    """How far the baseline's own logits at position ``at`` put its token above the other one."""
    for n, response in enumerate(baseline.answer(prompt, None)):
        if n == at:
            if response.token != token:  # the baseline itself does not repeat its answer
                return None
            logprobs = response.logprobs.reshape(-1).astype(mx.float32)
            return float(logprobs[token] - logprobs[other])
    return None


def about_model(name: str, stock: nn.Module, seams, context: int | None) -> dict[str, Any]:
    """What a result says about the model; ``seams`` is None for a model without streams."""
    config = seams.streams.config if seams is not None and seams.streams is not None else None
    return {
        "name": name,
        "type": getattr(stock, "model_type", ""),
        "layers": len(stock.layers),
        "context": context,
        "weight_bytes": weight_bytes(stock),
        "streams": asdict(config) if config is not None else None,
    }


def collect(
    modes: list[Mode],
    prompts: list[Prompt],
    repeats: int,
    *,
    arguments: dict[str, Any],
    model: dict[str, Any],
    tune: dict[str, Any] | None = None,
    notes: list[str] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Everything of one run, raw and summed up: what ``--json`` writes and the reports read."""
    machine = about_machine()
    bandwidth = read_bandwidth()
    raw = run(modes, prompts, repeats, progress)
    bandwidth = best_of(bandwidth, read_bandwidth())  # other work may have slowed one of them
    results = {
        "format": FORMAT,
        "made": time.strftime("%Y-%m-%d %H:%M"),
        "machine": machine,
        "arguments": arguments,
        "model": model,
        "bandwidth": {
            **bandwidth,
            "vendor_peak_gb_s": vendor_peak(f"{machine['cpu']} {machine['device_name']}"),
        },
        "notes": notes or [],
        "modes": [{"key": m.key, "title": m.title, "drafts": m.drafts} for m in modes],
        "prompts": [
            {"kind": p.kind, "number": p.number, "tokens": len(p.tokens), "full": p.full}
            for p in prompts
        ],
        **raw,
        "tune": tune,
    }
    return {**results, "summary": summarise(results)}
