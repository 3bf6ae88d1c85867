"""What a conversion did to the answers: logits before and after, on a few prompts."""

from typing import NamedTuple

import mlx.core as mx
import numpy as np

PROMPTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Q: A train leaves at 9:40 and arrives at 12:05. How long does it take?\nA:",
    "Dear Sir or Madam, I am writing to you because the order that I received last week",
    "SELECT name, COUNT(*) FROM visits WHERE year = 2020 GROUP BY",
    "Once upon a time, in a small house by the sea, there lived an old man who",
)
MOST_TOKENS = 64  # of a prompt


class Change(NamedTuple):
    """How far two models are apart, over all positions of all prompts.

    Args:
        kl: mean of KL(before || after) of the next-token distributions, in nats.
        worst: the largest of them.
        agreement: share of positions where both rank the same token first.
        positions: how many.
    """

    kl: float
    worst: float
    agreement: float
    positions: int

    def __str__(self):
        return (
            f"KL(before || after) {self.kl:.3g} nats on average, at most {self.worst:.3g}; "
            f"same first choice at {self.agreement:.1%} of {self.positions} positions"
        )


def encoded(tokenizer, prompts=PROMPTS) -> list[list[int]]:
    """The prompts as token ids; one token at least (an unknown one is as good as any)."""
    return [tokenizer.encode(text)[:MOST_TOKENS] or [0] for text in prompts]


def logits_of(model, prompts: list[list[int]]) -> list[mx.array]:
    """Logits in float32 [L, V] for each prompt."""
    found = []
    for tokens in prompts:
        logits = model(mx.array([tokens]))[0].astype(mx.float32)
        mx.eval(logits)
        found.append(logits)
    return found


def compare(before: list[mx.array], after: list[mx.array]) -> Change:
    """The change from one list of logits to another of the same prompts."""
    kls, same = [], []
    for old, new in zip(before, after, strict=True):
        p, q = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (old, new))
        kls.append(np.array((mx.exp(p) * (p - q)).sum(axis=-1)))
        same.append(np.array(mx.argmax(p, axis=-1) == mx.argmax(q, axis=-1)))
    kl, agree = np.concatenate(kls), np.concatenate(same)
    return Change(float(kl.mean()), float(kl.max()), float(agree.mean()), kl.size)
