"""The ways to decode that the study compares, as modes of ``measure/bench.py``."""

from __future__ import annotations

from mlx_lm.generate import stream_generate as stock_stream_generate

from mlx_specstream.generate import stream_generate
from mlx_specstream.measure.bench import Mode
from mlx_specstream.measure.evaluate import PLAIN as BASELINE  # what an Evaluation compares with

__all__ = ["BASELINE", "ours", "stock"]


def stock(key: str, model, tokenizer, max_tokens: int, **how) -> Mode:
    """mlx-lm's own loop, on a model to which nothing was ever attached."""

    def answer(prompt, record):
        return stock_stream_generate(model, tokenizer, prompt, max_tokens=max_tokens, **how)

    return Mode(key, f"mlx-lm, {key}", answer)


def ours(key: str, model, tokenizer, max_tokens: int, **how) -> Mode:
    """Our decoder; a record is filled."""

    def answer(prompt, record):
        return stream_generate(
            model, tokenizer, prompt, max_tokens=max_tokens, record=record, **how
        )

    return Mode(key, key, answer, drafts=True)
