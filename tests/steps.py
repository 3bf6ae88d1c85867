"""A decoder whose guesses and sizes can be looked at, step by step."""

import mlx.core as mx

from mlx_specstream.decode.choose import Greedy
from mlx_specstream.decode.decoder import Decoder
from mlx_specstream.decode.plan import Fixed, make_plan
from mlx_specstream.model.cache import make_prompt_cache


class Watched(Decoder):
    """Keeps what the streams guessed before each pass and how many nodes it had."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.guessed, self.nodes = [], []

    def _launch(self, *args):
        super()._launch(*args)
        self.guessed.append(self._guesses)
        self.nodes.append(self._flight.plan.nodes)


def decoder_for(seams, prompt, tree, placement=None, prune=None, chooser=None, **options):
    """A decoder behind ``prompt``; its first step is the prompt's own pass."""
    stores = make_prompt_cache(seams.model)
    seams.model(mx.array([prompt[:-1]]), cache=stores)
    plan = make_plan(seams.streams.config, tree, placement, prune)
    return Watched(seams, stores, prompt[-1:], chooser or Greedy(), Fixed(plan), **options)
