"""Which token the main stream says at a node: its argmax, or a draw that depends on (seed, place).

Samplers and logits processors are mlx-lm's own objects. They are called once per generated token,
in order and with the full history of the path, just as in plain decoding.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np
from mlx_lm.sample_utils import greedy_sampler

from .tree import Tree

Sampler = Callable[[mx.array], mx.array]
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]


class SeededSampler:
    """A sampler whose draw number ``place`` depends on (seed, place) and the logits alone.

    So streams on and off give the same text. The caller's ``mx.random`` state is put back after
    every draw.
    """

    def __init__(self, sampler: Sampler, seed: int):
        self.sampler, self.seed, self.place = sampler, seed, 0

    def __call__(self, logprobs: mx.array) -> mx.array:
        """logprobs [1, V] -> token [1]; each call is the next place."""
        high, low = mx.random.state[0].tolist()
        mx.random.seed(_mix(self.seed, self.place))
        self.place += 1
        try:
            return self.sampler(logprobs)
        finally:
            mx.random.seed(high << 32 | low)  # the key that mx.random.seed makes is its two halves


def fresh_seed() -> int:
    """A seed drawn from the caller's ``mx.random``."""
    return mx.random.randint(0, 2**31 - 1).item()


def is_greedy(sampler: Sampler | None) -> bool:
    return sampler is None or sampler is greedy_sampler


class Greedy:
    """The argmax of every node, read from the device at once."""

    def begin(self, logits: mx.array, tree: Tree) -> None:
        self._logits = scores = logits
        if logits.dtype != mx.float32:
            # mlx-lm takes the argmax of log-probabilities: in 16 bits rounding makes ties of some.
            scores = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        self._tokens = np.array(mx.argmax(scores, axis=-1))

    def token(self, node: int) -> int:
        return int(self._tokens[node])

    def logprobs(self, node: int) -> mx.array:
        """Log-probabilities [V] at a node; lazy, so they cost only whoever reads them."""
        logits = self._logits[node]
        return logits - mx.logsumexp(logits)


class Sampled:
    """Processors and sampler at one node after the other.

    Args:
        history: all tokens before the root of the first tree; grows by the tokens chosen.
    """

    def __init__(self, sampler: Sampler, processors: list[LogitsProcessor], history: list[int]):
        self.sampler, self.processors, self.history = sampler, processors, history

    def begin(self, logits: mx.array, tree: Tree) -> None:
        self._logits, self._logprobs = logits, {}

    def token(self, node: int) -> int:
        row = self._logits[node][None]  # [1, V]
        if self.processors:
            tokens = mx.array(self.history)
            for processor in self.processors:
                row = processor(tokens, row)
        row = row - mx.logsumexp(row, axis=-1, keepdims=True)
        token = self.sampler(row).item()
        self._logprobs[node] = row[0]
        self.history.append(token)
        return token

    def logprobs(self, node: int) -> mx.array:
        """Log-probabilities [V] that the token at a node of the path was drawn from."""
        return self._logprobs[node]


def _mix(seed: int, place: int) -> int:
    """A 64-bit hash of (seed, place): the splitmix64 finaliser."""
    z = (seed + 0x9E3779B97F4A7C15 * (place + 1)) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)
