"""A head for drafts alone: logits of a frequent part of the vocabulary.

A draft may be wrong, the output never is; so streams need not score tokens that a task hardly ever
uses. Where the vocabulary is large and the rest is small, the head is most of what streams cost.
The stock code runs as it is (final norm, soft-cap, logit scale, LoRA) with the rows of some tokens
in place of its own arrays, and only for the moment of the call.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import BadArgument, UnsupportedModel
from .projections import embedding_of, hidden_size, weight_shape

LEAF = ("weight", "scales", "biases", "bias")  # of a Linear or Embedding, quantised or not
Place = tuple[nn.Module, str, int]  # owner, name, and the axis of an array that counts tokens


class DraftHead:
    """Norm and head of a model over ``tokens`` alone.

    The rows are a copy, in the precision of the head: F / V of its memory.

    Args:
        model: the stock model.
        head: its norm and head, hidden [B, r, E] -> logits [B, r, V].
        tokens: the draft vocabulary, int32 [F]; see ``broken_rule``.

    Raises:
        BadArgument: ``tokens`` break a rule.
        UnsupportedModel: the module that makes the logits was not found.
    """

    def __init__(self, model: nn.Module, head: Callable[[mx.array], mx.array], tokens: mx.array):
        size = weight_shape(embedding_of(model))[0]
        why = broken_rule(tokens, size)
        if why:
            raise BadArgument(f"[draft_vocabulary] {why}.")
        self.tokens, self._head = tokens, head
        self._places = _find(model, head)
        self._take()

    def __call__(self, hidden: mx.array) -> mx.array:
        """hidden [B, r, E] -> logits [B, r, F]"""
        here = zip(self._places, self._sources, strict=True)
        if any(owner[name] is not source() for (owner, name, _), source in here):
            self._take()  # weights that were replaced (a new dtype, say)
        with _in_place(self._places, self._rows):
            logits = self._head(hidden)
        if logits.shape[-1] != self.tokens.size:
            raise BadArgument(
                "[draft_vocabulary] the model's head was replaced; attach the streams again."
            )
        return logits

    def _take(self) -> None:
        """Copy the rows; evaluated at once, so that a trace that begins here holds no gather."""
        arrays = [owner[name] for owner, name, _ in self._places]
        self._sources = [weakref.ref(array) for array in arrays]
        self._rows = [
            mx.take(array, self.tokens, axis=axis)
            for array, (_, _, axis) in zip(arrays, self._places, strict=True)
        ]
        mx.eval(self._rows)


class SomeRows:
    """Norm and head of a model over a few tokens that change from call to call.

    Args:
        model, head: as of ``DraftHead``.

    Raises:
        UnsupportedModel: the module that makes the logits was not found.
    """

    def __init__(self, model: nn.Module, head: Callable[[mx.array], mx.array]):
        self._head = head
        self._places = _find(model, head)

    def __call__(self, hidden: mx.array, tokens: mx.array) -> mx.array:
        """hidden [B, r, E], tokens int32 [n] -> logits [B, r, n]"""
        rows = [mx.take(owner[name], tokens, axis=axis) for owner, name, axis in self._places]
        with _in_place(self._places, rows):
            return self._head(hidden)


def broken_rule(tokens: mx.array, vocabulary_size: int) -> str | None:
    """Which rule of a draft vocabulary ``tokens`` break: int32 [F], ascending, within V."""
    if tokens.dtype != mx.int32 or tokens.ndim != 1 or not tokens.size:
        kind = str(tokens.dtype).rpartition(".")[2]
        return f"must be int32 [F] with F >= 1, got {kind} {list(tokens.shape)}"
    ids = np.array(tokens).astype(np.int64)
    if (np.diff(ids) <= 0).any():
        return "must be ascending and hold each token once"
    if ids[0] < 0 or ids[-1] >= vocabulary_size:
        return f"must hold tokens from 0 to {vocabulary_size - 1}, got {ids[0]} to {ids[-1]}"
    return None


def _find(model: nn.Module, head) -> list[Place]:
    """The arrays behind the logits, found by trial: with two rows of them there are two logits.

    Nothing is computed: the shapes of a lazy forward are enough. So this needs to know of no
    architecture whether it ties its embedding, and under which name it keeps its head.
    """
    layers = {id(m) for layer in model.layers for _, m in layer.named_modules()}
    vocabulary_size = weight_shape(embedding_of(model))[0]
    hidden = mx.zeros((1, 1, hidden_size(model)))
    for _, module in model.named_modules():
        places = [] if id(module) in layers else _places(module)
        if not places or any(owner[n].shape[axis] < vocabulary_size for owner, n, axis in places):
            continue
        two = [mx.take(owner[n], mx.arange(2), axis=axis) for owner, n, axis in places]
        try:
            with _in_place(places, two):
                found = head(hidden).shape[-1] == 2
        except Exception:  # whatever a forward does with shapes that do not fit
            found = False
        if found:
            return places
    kind = getattr(model, "model_type", type(model).__name__)
    raise UnsupportedModel(
        f"[streams] the head of model_type '{kind}' was not found; do without a draft vocabulary "
        "(mlx-specstream draft-vocabulary --size 0 takes it out of a streams folder) and without "
        "conditioned drafts (train with --condition-rank 0)."
    )


def _places(module: nn.Module) -> list[Place]:
    """Every array of a possible head that has one entry per token."""
    places, leaf = [], module
    if "lora_b" in module:  # mlx-lm's LoRA and DoRA around the stock module
        linear = "linear" in module
        leaf = module.get("linear" if linear else "embedding", {})
        places.append((module, "lora_b", 1) if linear else (module, "lora_a", 0))
        if "m" in module:
            places.append((module, "m", 0))
    if "weight" not in leaf or leaf["weight"].ndim != 2:
        return []
    return places + [(leaf, name, 0) for name in LEAF if leaf.get(name) is not None]


@contextmanager
def _in_place(places: list[Place], arrays: list[mx.array]) -> Iterator[None]:
    """``arrays`` instead of the modules' own, which are put back whatever happens."""
    before = [owner[name] for owner, name, _ in places]
    try:
        for (owner, name, _), array in zip(places, arrays, strict=True):
            owner[name] = array
        yield
    finally:
        for (owner, name, _), array in zip(places, before, strict=True):
            owner[name] = array
