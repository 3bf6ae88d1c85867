"""One step of Speculative Streaming: draft -> pass -> verify -> commit -> streams."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..model.rows import Rows, tree_rows
from ..model.seams import Pass, Seams
from .choose import Greedy, Sampled
from .draft import Guesses, draft, guesses_from
from .plan import Plan
from .prune import edge_logprobs, nodes_to_keep
from .verify import Accepted, accept


@dataclass(frozen=True)
class StepResult:
    """What a step decided.

    Args:
        tokens: the chosen tokens; the last one is the new root and has no K/V yet.
        logprobs: log-probabilities [V] that each token was chosen from (lazy).
        guesses: the streams' guesses below the new root; None at the end of the text.
        nodes: how many nodes were drafted (rows of the lower layers).
    """

    tokens: list[int]
    logprobs: list[mx.array]
    guesses: Guesses | None
    nodes: int


def step(
    seams: Seams,
    stores: list,
    *,
    root: int,
    guesses: Guesses | None,
    plan: Plan,
    chooser: Greedy | Sampled,
    limit: int,
    stop: Collection[int],
) -> StepResult:
    """Verify a draft below ``root`` and begin the next one. Batch size 1.

    Args:
        stores: one mlx-lm ``KVCache`` per layer; holds everything before ``root``.
        guesses: what the streams said about the tokens after ``root``.
        chooser: names the main stream's token at a node.
        limit: how many more tokens are wanted (>= 1).
        stop: end-of-sequence tokens.
    """
    tree = draft(root, guesses, plan.tree, max_depth=limit - 1)
    inline = plan.placement == "inline"
    kept = np.arange(tree.size)

    def at_cut(hidden: mx.array, rows: Rows) -> tuple[mx.array, Rows]:
        nonlocal kept
        if plan.prune is not None:
            exit_logits = seams.head(seams.streams.exit_hidden(hidden))[0]
            kept = nodes_to_keep(tree, edge_logprobs(tree, exit_logits), plan.prune)
            hidden, rows = hidden[:, mx.array(kept)], rows.take(mx.array(kept))
        run.cut_hidden = hidden
        return seams.add_streams(hidden, rows) if inline else (hidden, rows)

    start = stores[0].offset
    run = Pass(tree_rows(start, tree.depth, tree.ancestors), at_cut=at_cut, takes_main=True)
    logits = seams.forward(run, mx.array(tree.tokens)[None], stores)[0]  # [m, V]

    verified = tree.take(kept)
    chooser.begin(logits, verified)
    accepted = accept(verified, chooser.token, limit=limit, stop=stop)
    logprobs = [chooser.logprobs(node) for node in accepted.path]
    _commit(seams, run, accepted, kept)

    ended = len(accepted.tokens) == limit or accepted.tokens[-1] in stop
    guesses = None
    if not ended:
        count = plan.tree.candidates(seams.vocabulary_size)
        last = accepted.path[-1]
        hidden = (
            _inline_streams(run, last)
            if inline
            else _deferred_streams(seams, run.cut_hidden[:, last : last + 1], stores)
        )
        guesses = guesses_from(seams.head(hidden)[0], count)
    return StepResult(accepted.tokens, logprobs, guesses, tree.size)


def _commit(seams: Seams, run: Pass, accepted: Accepted, kept: np.ndarray) -> None:
    """Keep the K/V of the accepted path: lower layers hold all nodes, MSA layers the kept ones."""
    lower = [int(kept[node]) for node in accepted.path]
    for index, context in enumerate(run.contexts):
        context.commit(accepted.path if index >= seams.cut else lower)


def _inline_streams(run: Pass, node: int) -> mx.array:
    """The last hidden states of a node's streams, from the pass just made [1, g, E]."""
    m = run.rows.main
    return run.last_hidden[:, m + node :: m]  # rows lie stream-major behind the m main rows


def _deferred_streams(seams: Seams, host: mx.array, stores: list) -> mx.array:
    """Run the streams of the last committed node alone; host M^{N-Ns} [1, 1, E] -> [1, g, E].

    They are an ordinary causal chunk behind the accepted node, and leave no K/V behind.
    """
    run = seams.run_streams(host, mx.array([[stores[-1].offset - 1]]), stores)
    for context in run.contexts[seams.cut :]:
        context.drop()
    return run.last_hidden
