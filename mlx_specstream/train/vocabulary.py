"""Which tokens a draft vocabulary holds: the frequent ones of a task's answers."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from ..errors import BadArgument
from .data import Example


def completion_counts(examples: list[Example], vocabulary_size: int) -> np.ndarray:
    """How often each token stands in the completions, int64 [V]."""
    counts = np.zeros(vocabulary_size, np.int64)
    for example in examples:
        tokens = np.array(example.tokens[example.start :], np.int64)
        np.add.at(counts, tokens[tokens < vocabulary_size], 1)
    return counts


def choose_draft_vocabulary(
    counts: np.ndarray, size: int, always: Collection[int] = ()
) -> np.ndarray:
    """The ``size`` most frequent tokens and those in ``always``, ascending, int32 [F].

    A token that was never seen is not taken to fill up; of equally frequent ones the lower goes
    first. So F <= size + len(always).

    Args:
        counts: [V]
        always: tokens that every answer may need (end of sequence); those outside V are left out.

    Raises:
        BadArgument: ``size`` below 1, or nothing to choose from.
    """
    if size < 1:
        raise BadArgument(f"[draft_vocabulary] the size must be >= 1, got {size}.")
    order = np.argsort(-counts, kind="stable")[:size]
    always = [token for token in always if 0 <= token < len(counts)]
    chosen = np.union1d(order[counts[order] > 0], np.array(always, np.int64))
    if not chosen.size:
        raise BadArgument("[draft_vocabulary] there is no token to choose from.")
    return chosen.astype(np.int32)


def from_examples(
    examples: list[Example], size: int, always: Collection[int], vocabulary_size: int
) -> tuple[np.ndarray, str]:
    """A draft vocabulary of the completions of ``examples``, and a line that says what it covers."""
    counts = completion_counts(examples, vocabulary_size)
    tokens = choose_draft_vocabulary(counts, size, always)
    share = counts[tokens].sum() / max(1, counts.sum())
    return tokens, (
        f"draft vocabulary: {len(tokens)} of {vocabulary_size} tokens, {share:.2%} of "
        f"{counts.sum()} in the completions"
    )
