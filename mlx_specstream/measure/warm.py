"""Have every kernel of decoding made, where MLX compiles them with a C++ compiler (Linux, CPU)."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ..decode.choose import Drawn, Greedy, TemperatureSampler, make_sampler
from ..decode.compiling import compiled_at_once, remember_kernels
from ..decode.costs import gammas_below
from ..decode.decoder import Decoder
from ..decode.plan import Fixed, Plan, placements
from ..decode.tree import TreeShape
from ..generate import stream_generate
from ..model.cache import make_prompt_cache
from ..model.seams import Seams, seams_of

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
        for gamma in gammas_of(seams):
            draft_with(seams, gamma, prompt)
    _forget(seams.kept)
    seams.kept.update(learned)
    remember_kernels(seams)


def gammas_of(seams: Seams) -> tuple[int | None, ...]:
    """Numbers of streams that a draft may come from; None: all of them."""
    config = seams.streams.config if seams.streams else None
    if config is None:
        return ()
    return None, *(() if config.main_sees_streams else gammas_below(config.num_streams))


def draft_with(seams: Seams, gamma: int | None, prompt: list[int]) -> None:
    """Some passes whose trees come from ``gamma`` streams and no text, greedy and drawn."""
    placement = placements(seams.streams.config)[0]
    plan = Fixed(Plan(TreeShape("best", 4), placement, gamma=gamma))
    for chooser in (Greedy(), Drawn(TemperatureSampler(0.7), 0)):
        stores = make_prompt_cache(seams.model)
        seams.model(mx.array([prompt[:-1]]), cache=stores)
        decoder = Decoder(seams, stores, prompt[-1:], chooser, plan)
        for _ in range(4):
            decoder.step(TOKENS, ())
        decoder.close()


def _forget(kept: dict) -> dict:
    """Take out what answers have taught: this text shall teach nothing."""
    taught = [key for key in kept if key == "copies" or key[0] == "planner"]
    return {key: kept.pop(key) for key in taught}
