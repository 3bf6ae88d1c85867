"""Gradient checkpointing: a layer's inner activations are made again for the gradient, not kept."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from ..model.cache import FixedPrefix, LayerContext
from ..model.seams import Seams
from .learner import Learner


class Recompute:
    """Goes around every layer that a gradient passes through (``Seams.around``).

    Between two layers only their rows and K/V are kept. Everything that carries a gradient into a
    layer must be an argument of the checkpointed function: its rows, the K/V of earlier rows, and
    what is trained in it.
    """

    def __init__(self, seams: Seams, learner: Learner):
        self.seams = seams
        self.shared = bool(learner.main_lora)
        self.parts: dict[int, nn.Module] = {}  # per layer: what is trained in it
        for index in range(seams.num_layers - learner.reach(seams), seams.num_layers):
            part = nn.Module()
            if self.shared:
                part.layer = seams.model.layers[index]
            if index >= seams.cut and seams.streams.config.lora_rank:
                part.lora = seams.streams.lora[index - seams.cut]
            self.parts[index] = part

    def __call__(
        self, call: Callable[[mx.array], mx.array], x: mx.array, context: LayerContext, index: int
    ) -> mx.array:
        run, rows, store, seams = context.run, context.run.rows, context.store, self.seams
        # The frozen base's own rows carry no gradient.
        if index not in self.parts or (rows.stream_of is None and not self.shared):
            return call(x)
        part = self.parts[index]
        prefix = (store.keys, store.values) if isinstance(store, FixedPrefix) else ()

        def layer(trained, x, *prefix):
            part.update(trained)
            if prefix:
                context.store = FixedPrefix(*prefix)
            # The second time, this pass is no longer in force and may be at other rows.
            outer, now = seams.running, run.rows
            seams.running, run.rows = run, rows
            try:
                x = call(x)
            finally:
                seams.running, run.rows = outer, now
            return x, *context.fresh

        x, *fresh = mx.checkpoint(layer)(part.trainable_parameters(), x, *prefix)
        context.fresh = tuple(fresh)
        return x
