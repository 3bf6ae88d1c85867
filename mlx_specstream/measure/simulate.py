"""How many passes a tree would take, from one teacher-forced pass over the base's greedy text.

With the V1 mask and greedy decoding the streams of a position depend only on the text before it, not
on the tree that led there. So one pass over the finished text gives every stream's guesses at every
position, and any tree can be replayed on them: the result is exact, prompt by prompt.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..decode.choose import Greedy
from ..decode.draft import Guesses, draft, size_of
from ..decode.step import Said, guesses_of
from ..decode.tree import HostTree, TreeShape
from ..decode.verify import descend
from ..model.conditioning import below_root
from ..model.seams import Seams
from ..train.passes import base_pass, stream_hidden


@dataclass(frozen=True)
class Replay:
    """A replayed answer.

    Args:
        tokens: generated tokens (an end-of-sequence token included).
        accepted: how many drafted tokens each pass accepted.
        nodes: how many nodes each pass fed.
    """

    tokens: int
    accepted: list[int]
    nodes: list[int]

    @property
    def passes(self) -> int:
        return len(self.accepted)


def guesses_along(seams: Seams, prompt: list[int], answer: list[int], count: int) -> list[Guesses]:
    """What the streams guess at each host row, the last prompt token first (NumPy arrays).

    Entry i belongs to the host that predicts answer[i]; its stream j predicts answer[i + j].

    Args:
        count: guesses of each stream. A decoder asks for as many as its tree can use, and their
            probabilities depend on it a little (``guesses_from``).
    """
    return guesses_by_count(seams, prompt, answer, [count])[count]


def guesses_by_count(
    seams: Seams, prompt: list[int], answer: list[int], counts: Collection[int]
) -> dict[int, list[Guesses]]:
    """The same for several counts, with one run of the model."""
    tokens = mx.array([[*prompt, *answer]])
    cut_hidden, stores = base_pass(seams, tokens)
    hosts = mx.arange(len(prompt) - 1, len(prompt) - 1 + len(answer))[None]
    hidden = stream_hidden(seams, cut_hidden, stores, hosts, mx.array([answer]))
    n, found = len(answer), {count: [] for count in counts}
    for i, root in enumerate(answer):
        of_host = hidden[:, i::n]
        if seams.streams.config.condition_rank:
            of_host = below_root(seams, of_host, mx.array(root))
        said = Said(seams.draft_head(of_host)[0], of_host)
        for count in counts:
            most = min(count, seams.vocabulary_size)
            guesses = guesses_of(seams, said, Greedy(), most, 0)
            mx.eval(guesses)
            found[count].append(Guesses(*map(np.array, guesses)))
    return found


def replay(
    guesses: list[Guesses],
    answer: list[int],
    shape: TreeShape,
    max_tokens: int,
    stop: Collection[int],
) -> Replay:
    """Count the passes that ``shape`` takes for an answer, as the real decoder would.

    Args:
        guesses: of ``guesses_along``, with ``shape.candidates(V)`` tokens per stream; more are nearly
            the same.
        answer: the base's own greedy tokens, an end-of-sequence token included.
    """
    done, accepted, nodes = 1, [], []  # the first token comes from the prompt's own pass
    while done < min(len(answer), max_tokens) and answer[done - 1] not in stop:
        here = Guesses(*(mx.array(a) for a in guesses[done - 1]))
        size = size_of(here, None, shape)
        tree = draft(
            mx.array(answer[done - 1]), here, None, shape, min(size, shape.nodes(len(here.tokens)))
        )
        depth, said = np.array(tree.depth), answer[done:]
        _, tokens = descend(
            HostTree.of(tree),
            lambda node, depth=depth, said=said: said[depth[node]],
            limit=min(max_tokens, len(answer)) - done,
            stop=stop,
        )
        accepted.append(len(tokens) - 1)
        nodes.append(tree.size)
        done += len(tokens)
    return Replay(done, accepted, nodes)


def tokens_per_pass(replays: list[Replay]) -> float:
    """Sum over sum, as the whole project counts it."""
    return sum(r.tokens - 1 for r in replays) / max(1, sum(r.passes for r in replays))


def acceptance_by_depth(replays: list[Replay], depth: int) -> list[float]:
    """Share of passes that accepted at least 1, 2, .. ``depth`` drafted tokens."""
    passes = max(1, sum(r.passes for r in replays))
    return [sum(a >= d for r in replays for a in r.accepted) / passes for d in range(1, depth + 1)]
