"""Which token the main stream says at a node: its argmax, or a draw that depends on (seed, place).

Greedy choices and draws at a temperature are made for all nodes of a tree at once, in array code.
Other samplers, and all logits processors, are mlx-lm's own objects or the caller's: opaque
functions, called once per generated token, in order and with the full history of the path, just as
in plain decoding.

*Coupled drafts*: a draw is the argmax of log-probability / T plus Gumbel noise of (seed, place), so
it is as good as known where the noise is. The drafts of a place are ranked with the noise that the
target's draw there will use: where the two distributions agree, so do the choices. The law of the
output does not change, since only the target's own draw decides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from mlx_lm import sample_utils

from .draft import Guesses, conditioned, guesses_from

Sampler = Callable[[mx.array], mx.array]
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]
# How sure a draft is that an opaque sampler, called with the same noise, repeats itself.
REPEATS = 0.6
# How far a stream's uncertainty is the target's own (which the noise then decides) and not just what
# the stream does not know about a target that is sure of itself. In between serves both; measured.
SHARED = 0.5


@dataclass(frozen=True)
class TemperatureSampler:
    """A sampler like that of ``mlx_lm.sample_utils.make_sampler``, whose parts can be looked at.

    Args:
        temp: temperature, > 0.
        top_p, min_p, top_k: mlx-lm's filters, in mlx-lm's order; 0 is off, and so is a ``top_k`` that
            keeps all.
    """

    temp: float
    top_p: float = 0.0
    min_p: float = 0.0
    top_k: int = 0

    def scores(self, logprobs: mx.array) -> mx.array:
        """Filtered log-probabilities over the temperature; [..., V] -> [..., V]."""
        if 0 < self.top_p < 1:
            logprobs = sample_utils.apply_top_p(logprobs, self.top_p)
        if self.min_p:
            logprobs = sample_utils.apply_min_p(logprobs, self.min_p)
        if 0 < self.top_k < logprobs.shape[-1]:
            logprobs = sample_utils.apply_top_k(logprobs, self.top_k)
        return logprobs * (1.0 / self.temp)

    def __call__(self, logprobs: mx.array) -> mx.array:
        """logprobs [..., V] -> token [...]; draws from ``mx.random``.

        ``mx.random.categorical`` has the same law, but does not say which noise it draws with.
        """
        return mx.argmax(self.scores(logprobs) + mx.random.gumbel(logprobs.shape), axis=-1)


def make_sampler(
    temp: float = 0.0,
    top_p: float = 0.0,
    min_p: float = 0.0,
    min_tokens_to_keep: int = 1,
    top_k: int = 0,
    **xtc,
) -> Sampler:
    """``mlx_lm.sample_utils.make_sampler`` in a form that lets drafts be coupled to the draws.

    With ``min_tokens_to_keep`` above 1 or XTC it is mlx-lm's own. Any sampler works: of mlx-lm's
    own the first guess of each stream is coupled, of others none, because a draft would call them
    when plain decoding does not.

    Args:
        temp, top_p, min_p, min_tokens_to_keep, top_k, xtc: as there.
    """
    if temp == 0:
        return sample_utils.greedy_sampler
    if xtc.get("xtc_probability") or (min_p and min_tokens_to_keep > 1):
        return sample_utils.make_sampler(
            temp, top_p, min_p, min_tokens_to_keep=min_tokens_to_keep, top_k=top_k, **xtc
        )
    return TemperatureSampler(temp, top_p, min_p, top_k)


class SeededSampler:
    """A sampler whose draw number ``place`` depends on (seed, place) and the logits alone.

    So streams on and off give the same text. The caller's ``mx.random`` state is put back after
    every draw.
    """

    def __init__(self, sampler: Sampler, seed: int):
        self.sampler, self.seed, self.place = sampler, seed, 0

    def __call__(self, logprobs: mx.array) -> mx.array:
        """logprobs [1, V] -> token [1]; each call is the next place."""
        self.place += 1
        return self.draw(logprobs, self.place - 1)

    def draw(self, logprobs: mx.array, place: int) -> mx.array:
        """The token that this sampler says at ``place``, whatever was drawn before."""
        high, low = mx.random.state[0].tolist()
        mx.random.seed(_mix(self.seed, place))
        try:
            return self.sampler(logprobs)
        finally:
            mx.random.seed(high << 32 | low)  # the key that mx.random.seed makes is its two halves


def fresh_seed() -> int:
    """A seed drawn from the caller's ``mx.random``."""
    return mx.random.randint(0, 2**31 - 1).item()


def is_greedy(sampler: Sampler | None) -> bool:
    return sampler is None or sampler is sample_utils.greedy_sampler


def is_stateless(sampler: Sampler) -> bool:
    """Whether calls do not depend on earlier ones: sure of mlx-lm's samplers and ours alone."""
    mlx_lms = getattr(sampler, "__module__", None) == sample_utils.__name__
    return mlx_lms or isinstance(sampler, TemperatureSampler)


class Greedy:
    """The argmax at every node, without a host read; may run inside a compiled pass."""

    def scores(self, logits: mx.array, depth: mx.array, place: int, deepest: int) -> mx.array:
        """What the argmax is taken of, [n, V]."""
        if logits.dtype == mx.float32:
            return logits
        # mlx-lm takes the argmax of log-probabilities: in 16 bits rounding makes ties of some.
        return logprobs_of(logits)

    def guesses(self, logits, count: int, place: int, vocabulary=None, change=None) -> Guesses:
        """The streams' guesses for the tokens number ``place``, ``place + 1``, ..

        Args:
            logits: of the streams [g, V].
            vocabulary: as of ``guesses_from``.
            change: what the guess before adds to logits, tokens [g, K] -> [g, K, K]; None: nothing.
        """
        found = guesses_from(logits, count, vocabulary)
        return (
            found
            if change is None
            else Guesses(found.tokens, conditioned(found.logprobs, change(found.tokens)))
        )


class Drawn:
    """Draws at a temperature for all nodes at once.

    Args:
        coupled: rank drafts with the noise of the target's own draws.
    """

    def __init__(self, sampler: TemperatureSampler, seed: int, coupled: bool = True):
        self.sampler, self.seed, self.coupled = sampler, seed, coupled
        self._noise: dict[int, mx.array] = {}

    def scores(self, logits: mx.array, depth: mx.array, place: int, deepest: int) -> mx.array:
        """Perturbed scores [n, V] of nodes at depth [n], at most ``deepest``, below a root.

        The choice at the root is the answer's token number ``place``.
        """
        noise = mx.concatenate(
            [self.noise(place + d, logits.shape[-1]) for d in range(deepest + 1)]
        )
        return self.sampler.scores(logprobs_of(logits)) + noise[depth]

    def guesses(self, logits, count: int, place: int, vocabulary=None, change=None) -> Guesses:
        if not self.coupled:
            return Greedy().guesses(logits, count, place, vocabulary, change)
        rows = [self.noise(place + j, self._width) for j in range(logits.shape[0])]
        noise = mx.concatenate(rows)
        if vocabulary is not None:
            noise = noise[:, vocabulary]
        p = mx.softmax(self.sampler.scores(logprobs_of(logits)).astype(mx.float32), axis=-1)
        drawn = guesses_from(mx.log(drawn_given_noise(p, noise)), count, vocabulary, normal=True)
        if change is None:
            return drawn
        tokens = drawn.tokens
        at = tokens if vocabulary is None else mx.argmax(vocabulary == tokens[..., None], axis=-1)
        p, noise = (mx.take_along_axis(x, at, axis=-1) for x in (p, noise))
        p = mx.exp(conditioned(mx.log(p), change(tokens) / self.sampler.temp))
        return Guesses(tokens, mx.log(drawn_given_noise(p, noise[:, None])))

    def noise(self, place: int, width: int) -> mx.array:
        """The Gumbel noise that ``SeededSampler`` draws with at ``place``, float32 [1, V]."""
        self._width = width
        if place not in self._noise:
            mixed = _mix(self.seed, place)
            key = mx.array([mixed >> 32, mixed & 0xFFFFFFFF], dtype=mx.uint32)
            self._noise[place] = mx.random.gumbel((1, width), key=mx.random.split(key)[1])
            for old in [p for p in self._noise if p < place - 64]:
                del self._noise[old]
        return self._noise[place]


class Opaque:
    """Processors and sampler at one node after the other, on the host.

    Args:
        history: all tokens up to the root of the first tree; grows by the tokens chosen.
        coupled: let drafts begin with what the sampler would draw from them, if it is of a kind
            that may be called for a draft.
    """

    def __init__(
        self,
        sampler: Sampler,
        processors: list[LogitsProcessor],
        history: list[int],
        coupled: bool = True,
    ):
        self.sampler, self.processors, self.history = sampler, processors, list(history)
        seeded = isinstance(sampler, SeededSampler)
        self.coupled = coupled and seeded and is_stateless(sampler.sampler)

    def begin(self, logits: mx.array) -> None:
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

    def guesses(self, logits, count: int, place: int, vocabulary=None, change=None) -> Guesses:
        if not self.coupled or vocabulary is not None:
            return Greedy().guesses(logits, count, place, vocabulary, change)
        plain = guesses_from(logits, count, vocabulary)
        # The sampler's own word at each place, if the stream were the target, comes first.
        rows = logprobs_of(logits)
        first = [
            self.sampler.draw(rows[j][None], place + j).astype(mx.int32)
            for j in range(rows.shape[0])
        ]
        first = mx.stack([token.reshape(()) for token in first])[:, None]  # [g, 1]
        behind = np.log1p(-REPEATS)
        others = mx.where(plain.tokens == first, -mx.inf, plain.logprobs + behind)
        order = mx.argsort(-others, axis=-1)[:, : count - 1]
        tokens = mx.concatenate([first, mx.take_along_axis(plain.tokens, order, axis=-1)], axis=1)
        logprobs = mx.concatenate(
            [
                mx.full(first.shape, float(np.log(REPEATS))),
                mx.take_along_axis(others, order, axis=-1),
            ],
            axis=1,
        )
        if change is not None:
            logprobs = conditioned(logprobs, change(tokens))
        return Guesses(tokens, logprobs)


def drawn_given_noise(p: mx.array, noise: mx.array) -> mx.array:
    """P(a token is the target's draw | its own Gumbel noise), [..., V].

    If the target has probability p where the stream has, the token with noise g wins over the others,
    whose best perturbed score is Gumbel around log(1 - p), with probability exp(-e^-g (1 - p) / p). If
    the target is sure and only the stream is not, the noise says nothing and it is p.
    """
    wins = mx.exp(-mx.exp(-noise) * (1 - p) / mx.maximum(p, 1e-20))
    return (1 - SHARED) * p + SHARED * wins


def logprobs_of(logits: mx.array) -> mx.array:
    """[..., V] -> [..., V]"""
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _mix(seed: int, place: int) -> int:
    """A 64-bit hash of (seed, place): the splitmix64 finaliser."""
    z = (seed + 0x9E3779B97F4A7C15 * (place + 1)) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)
