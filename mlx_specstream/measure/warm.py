"""Have every kernel of decoding made, where MLX compiles them with a C++ compiler (Linux, CPU)."""

from __future__ import annotations

import mlx.nn as nn

from ..decode.choose import make_sampler
from ..decode.compiling import compiled_at_once, remember_kernels
from ..generate import stream_generate
from ..model.seams import seams_of

TOKENS = 24
TREES = ("best:4", None)  # None: the planner's, which begins without streams now and then


def warm_up(model: nn.Module, tokenizer) -> None:
    """Decode a little, greedily and at a temperature, with all kinds of drafts that there are.

    From now on this process compiles passes, and so will later ones.

    Args:
        model: with the seams in (``attach``).
    """
    seams = seams_of(model)
    learned = _forget(seams.kept)
    prompt = [token for token in range(8) for _ in range(2)] * 3  # repeats itself: is copied
    with compiled_at_once(seams):
        for tree in TREES:
            for temp in (0.0, 0.7):
                for streams in (False, True) if seams.streams else (False,):
                    for _ in stream_generate(
                        model,
                        tokenizer,
                        prompt,
                        max_tokens=TOKENS,
                        tree=tree,
                        copies=True,
                        use_streams=streams,
                        sampler=make_sampler(temp),
                        seed=0,
                    ):
                        pass
    _forget(seams.kept)
    seams.kept.update(learned)
    remember_kernels(seams)


def _forget(kept: dict) -> dict:
    """Take out what answers have taught: this text shall teach nothing."""
    taught = [key for key in kept if key == "copies" or key[0] == "planner"]
    return {key: kept.pop(key) for key in taught}
