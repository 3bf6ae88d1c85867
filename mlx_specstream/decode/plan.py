"""plan: what the next pass looks like: a plan that the caller fixed, or the planner's choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..config import StreamConfig
from ..errors import BadArgument
from .draft import CopiedText, Guesses, Promises, size_of
from .planner import Planner
from .prune import PruneRule
from .tree import MAX_NODES, TreeShape

PLACEMENTS = ("inline", "deferred")
MOST_GUESSES = 8  # of each stream, however large the tree: the others are hardly ever in it
LOOK_BACK = 4  # of the passes whose draft nobody looked at, one in so many is weighed afterwards


@dataclass(frozen=True)
class Plan:
    """How every step drafts and verifies.

    Args:
        tree: shape of the draft.
        placement: ``"inline"`` (streams ride along with every kept node, as in the paper) or
            ``"deferred"`` (after verification the accepted node's streams run alone).
        prune: early-exit pruning before the MSA layers, or None.
        gamma: only the first so many streams draft (deferred ones); None: all.
    """

    tree: TreeShape
    placement: str
    prune: PruneRule | None = None
    gamma: int | None = None


@dataclass(frozen=True)
class NextPass:
    """One pass.

    Args:
        tree: which nodes there may be.
        nodes: how many there are, the root included.
        inline: streams ride along with them.
        streams: streams are to draft the pass after it.
        prune: early-exit pruning, or None.
        gamma: only the first so many streams (deferred ones); None: all.
        promises: how likely each candidate node was thought to be accepted.
        from_streams: the draft came from streams (and copies, perhaps), not from copies alone.
        copied: what the copied text's nodes alone promised.
        unseen: the draft, where it was planned without a look at its probabilities.
        compared: the draft, where the planner compares it with those of fewer streams.
    """

    tree: TreeShape
    nodes: int
    inline: bool
    streams: bool
    prune: PruneRule | None = None
    gamma: int | None = None
    promises: Promises | None = None
    from_streams: bool = False
    copied: np.ndarray | None = None
    unseen: tuple[Guesses, CopiedText | None] | None = None
    compared: tuple[Guesses, CopiedText | None] | None = None


class Steering(Protocol):
    """What a decoder asks between two passes."""

    def candidates(self, vocabulary: int) -> int:
        """How many guesses of each stream are wanted."""

    def next_pass(self, guesses: Guesses | None, text: CopiedText | None, context: int) -> NextPass:
        """The pass that verifies this draft; with neither, the root alone."""

    def observe(self, plan: NextPass, context: int, accepted: list[int]) -> None:
        """Which drafted tokens a pass accepted."""


class Fixed:
    """Every pass as the caller's plan says.

    Args:
        plan: the plan; its streams run behind every pass.
        streams: False for a model without streams.
    """

    def __init__(self, plan: Plan, streams: bool = True):
        self.plan, self.streams = plan, streams

    def candidates(self, vocabulary: int) -> int:
        return self.plan.tree.candidates(vocabulary)

    def next_pass(self, guesses, text, context: int) -> NextPass:
        tree = self.plan.tree
        nodes = size_of(guesses, text, tree)
        if tree.kind == "best":
            nodes = min(nodes, tree.size)
        inline = self.plan.placement == "inline" and self.streams
        return NextPass(tree, nodes, inline, self.streams, self.plan.prune, self.plan.gamma)

    def observe(self, plan: NextPass, context: int, accepted: list[int]) -> None:
        pass


class Planned:
    """Every pass as the planner thinks best: best-first trees of changing size, or none.

    Args:
        planner: knows the costs and learns how good drafts are.
        inline: streams ride along with every pass, also where none drafts: the main stream sees them.
    """

    def __init__(self, planner: Planner, inline: bool = False):
        self.planner, self.inline = planner, inline
        self._unseen = 0  # passes whose draft was verified without a look

    def candidates(self, vocabulary: int) -> int:
        return min(self._largest.size - 1, MOST_GUESSES, vocabulary)

    def next_pass(self, guesses, text, context: int) -> NextPass:
        drafted = guesses is not None
        compares = drafted and self.planner.compares(guesses.tokens.shape[0])
        choice = self.planner.choose_unseen(context) if drafted and not compares else None
        unseen = promises = copied = None
        if choice is not None:
            unseen = guesses, text
        else:
            if drafted or text is not None:
                promises, copied = self._promises(guesses, text)
            said = None if promises is None else promises.probabilities
            choice = self.planner.choose(said, context, from_streams=drafted)
        nodes = min(choice.nodes, size_of(guesses, text, self._largest))
        return NextPass(
            TreeShape("best", max(2, nodes)),
            nodes,
            self.inline or (choice.placement == "inline" and choice.streams),
            choice.streams,
            gamma=choice.gamma,
            promises=promises,
            from_streams=drafted,
            copied=copied,
            unseen=unseen,
            compared=(guesses, text) if compares else None,
        )

    def observe(self, plan: NextPass, context: int, accepted: list[int]) -> None:
        promises, copied = plan.promises, plan.copied
        if plan.unseen is not None:
            self._unseen += 1
            if self._unseen % LOOK_BACK:
                self.planner.account(
                    context=context,
                    nodes=plan.nodes,
                    accepted=len(accepted),
                    streams=plan.streams,
                    gamma=plan.gamma,
                )
                return
            promises, copied = self._promises(*plan.unseen)
        self.planner.observe(
            context=context,
            nodes=plan.nodes,
            probabilities=None if promises is None else promises.probabilities,
            accepted=len(accepted),
            from_streams=plan.from_streams,
            streams=plan.streams,
            copied=copied,
            ranks=None if promises is None else promises.ranks(accepted),
            gamma=plan.gamma,
            fewer=() if plan.compared is None else self._with_fewer(*plan.compared),
        )

    def _with_fewer(self, guesses: Guesses, text: CopiedText | None) -> list[np.ndarray]:
        """What the draft would have promised with fewer streams."""
        first = [np.array(a) for a in guesses]
        drafts = [Guesses(*(a[:gamma] for a in first)) for gamma in self.planner.fewer]
        return [Promises.of(d, text, self._largest).probabilities for d in drafts]

    @property
    def _largest(self) -> TreeShape:
        return TreeShape("best", max(self.planner.sizes))

    def _promises(self, guesses, text) -> tuple[Promises, np.ndarray | None]:
        """What a draft's nodes promise, and what its copied text's nodes alone do."""
        copied = None
        if text is not None:
            logprobs, tokens = np.array(text.logprobs[0]), np.array(text.tokens)
            copied = np.exp(np.cumsum(logprobs))[tokens >= 0]
        return Promises.of(guesses, text, self._largest), copied


def make_plan(
    config: StreamConfig,
    tree: str,
    placement: str | None = None,
    prune: PruneRule | None = None,
) -> Plan:
    """The plan a caller asked for.

    Raises:
        BadArgument: an unknown tree or placement, or one that these streams cannot do.
    """
    placement = placement or placements(config)[0]
    if placement not in PLACEMENTS:
        raise BadArgument(f"[placement] must be one of {', '.join(PLACEMENTS)}; got '{placement}'.")
    if placement not in placements(config):
        if placement == "inline":
            raise BadArgument(
                "[placement] 'inline' needs streams that begin before their root is chosen; these "
                f"were trained with root_rank {config.root_rank}, use 'deferred'."
            )
        raise BadArgument(
            "[placement] 'deferred' needs streams that the main stream does not see; these were "
            "trained with main_sees_streams, use 'inline'."
        )
    if prune is not None and not config.prune_rank:
        raise BadArgument(
            "[prune] these streams have no early-exit head (prune_rank 0); train them with "
            "--prune-rank 8 or do not prune."
        )
    shape = TreeShape.parse(tree)
    nodes = shape.nodes(config.num_streams)
    if nodes > MAX_NODES:
        raise BadArgument(
            f"[tree] '{tree}' has {nodes} nodes with {config.num_streams} streams, more than "
            f"{MAX_NODES}; use a smaller one."
        )
    return Plan(shape, placement, prune)


def placements(config: StreamConfig) -> tuple[str, ...]:
    """Where the streams of ``config`` may run, the cheaper one on most machines first."""
    if config.main_sees_streams:
        return ("inline",)
    return ("deferred",) if config.root_rank else ("deferred", "inline")
