"""What the options of ``generate`` mean to a decoder: who chooses tokens, who plans passes."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.sample_utils import greedy_sampler

from ..errors import BadArgument
from ..model.seams import Seams, attach
from ..model.support import check_supported
from .choose import (
    Drawn,
    Greedy,
    Opaque,
    SeededSampler,
    TemperatureSampler,
    fresh_seed,
    is_greedy,
)
from .copy import Calibration, Copier
from .costs import Costs
from .costs_here import costs_for
from .plan import Fixed, Plan, Planned, Steering, make_plan, placements
from .planner import Planner
from .prune import PruneRule
from .tree import TreeShape

USUAL = 8  # nodes
CLEARLY = 0.05  # of a plain token: less than that is lost in the noise of a measurement


def seeded(sampler, seed):
    if is_greedy(sampler):
        return sampler
    return SeededSampler(sampler, fresh_seed() if seed is None else seed)


def make_chooser(sampler, seed, coupled, processors, tokens: mx.array) -> Greedy | Drawn | Opaque:
    if is_greedy(sampler) and not processors:
        return Greedy()
    if isinstance(sampler, TemperatureSampler) and not processors:
        return Drawn(sampler, fresh_seed() if seed is None else seed, coupled)
    sampler = seeded(sampler, seed) or greedy_sampler
    return Opaque(sampler, processors or [], tokens.tolist(), coupled)


def make_steering(
    seams: Seams,
    with_streams: bool,
    copies: bool,
    tree: str | None,
    placement: str | None,
    prune: PruneRule | None,
) -> Steering:
    """The caller's plan, or the planner of this model, which remembers from answer to answer."""
    config = seams.streams.config if with_streams else None
    if not with_streams:
        if placement is not None or prune is not None:
            name = "placement" if placement is not None else "prune"
            raise BadArgument(f"[{name}] needs streams; load some, or do not set it.")
        if tree is not None:
            return Fixed(Plan(TreeShape.parse(tree), "deferred"), streams=False)
    elif tree is not None or prune is not None:
        return Fixed(make_plan(config, tree or "best:8", placement, prune))
    if placement is not None:
        make_plan(config, "chain", placement)  # refuses what these streams cannot do
    key = "planner", placement, with_streams, copies
    if key not in seams.kept:
        costs = costs_for(seams)
        if config is not None and placement is None:
            placement = _cheaper_placement(costs, placements(config))
        seams.kept[key] = Planner(
            costs,
            placements=(placement or "deferred",),
            streams=config.num_streams if config else 0,
            copies=copies,
        )
    return Planned(seams.kept[key], inline=with_streams and config.main_sees_streams)


def _cheaper_placement(costs: Costs, legal: tuple[str, ...]) -> str:
    """Where the streams of a tree of usual size cost less; one for all passes: there are few traces.

    The first legal one, unless another is clearly cheaper.
    """
    context = costs.contexts[len(costs.contexts) // 2]
    first, *others = legal
    least = costs.streams_at(first, USUAL, context) - CLEARLY * costs.plain_at(context)
    return next((p for p in others if costs.streams_at(p, USUAL, context) < least), first)


def make_copier(seams: Seams, tokenizer, tokens: list[int]) -> Copier:
    """Finds drafts in ``tokens`` and what follows; what it learns stays for the next answer."""
    calibration = seams.kept.setdefault("copies", Calibration())
    return Copier(tokenizer, tokens, calibration=calibration)


def seams_for_copies(model: nn.Module, seams: Seams | None) -> Seams:
    """Copied drafts need tree decoding alone: the seams without streams."""
    if seams is None:
        check_supported(model)
        seams = attach(model)
    return seams
