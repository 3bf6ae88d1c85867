"""draft: the guesses of the accepted node's streams become a token tree."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .tree import Tree, TreeShape, best_first_tree, cartesian_tree, root_only


@dataclass(frozen=True)
class Guesses:
    """The likeliest tokens of each stream, most probable first.

    Shapes: tokens int32 [g, K]; logprobs float32 [g, K].
    """

    tokens: np.ndarray
    logprobs: np.ndarray


def guesses_from(logits: mx.array, count: int) -> Guesses:
    """The ``count`` likeliest tokens of each stream; logits [g, V]. Reads from the device."""
    logits = logits.astype(mx.float32)
    top = mx.argpartition(logits, kth=-count, axis=-1)[:, -count:]
    logprobs = mx.take_along_axis(logits, top, axis=-1) - mx.logsumexp(
        logits, axis=-1, keepdims=True
    )
    mx.eval(top, logprobs)
    top, logprobs = np.array(top), np.array(logprobs)
    # Ties go to the lower token id, so that a draft does not depend on the partition's order.
    order = np.lexsort((top, -logprobs), axis=-1)
    return Guesses(
        np.take_along_axis(top, order, axis=-1).astype(np.int32),
        np.take_along_axis(logprobs, order, axis=-1),
    )


def draft(root: int, guesses: Guesses | None, shape: TreeShape, max_depth: int) -> Tree:
    """A tree below ``root``; depth d holds guesses of stream d.

    Args:
        guesses: None (nothing known yet) gives the root alone.
        max_depth: deepest node wanted: a path cannot be longer than the tokens still asked for.
    """
    if guesses is None or max_depth < 1:
        return root_only(root)
    tokens, logprobs = guesses.tokens[:max_depth], guesses.logprobs[:max_depth]
    if shape.kind == "best":
        return best_first_tree(root, tokens, logprobs, shape.size)
    return cartesian_tree(root, tokens[:, : shape.size])
