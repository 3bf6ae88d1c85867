"""planner: how many nodes the next pass verifies, and whether (and how many) streams run behind it.

Plain decoding is one of the plans. A draft's nodes say how likely they are to be accepted; how far
that is to be believed is learned from what was accepted. With that, the sizes are weighed by the
time they take against the tokens they bring, at the price that a token has now. Times are in plain
tokens: 1.0 is what one token of plain decoding takes. Pure and deterministic: no clock, no chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import BadArgument
from .costs import Costs
from .gammas import Gammas
from .sizes import shortlist
from .trust import TrustBySize

SIZES = (2, 3, 4, 5, 6, 8, 12, 16, 24, 32)
WORTH_A_CHANGE = 0.015  # of the tokens of a pass; a smaller gain keeps the size of the pass before

# What drafting may lose against plain decoding, in plain tokens, whatever happens: LOAN at once and
# SHARE of every token. Over 512 tokens that is 14.2, within the 15.8 that 0.97 of the speed leaves.
LOAN, SHARE = 4.0, 0.02
SAVINGS = 12.0  # plain tokens of earlier gains that may be lost again

MEMORY = 0.98  # what a checked draft still counts one draft later: some fifty drafts
RETURN = 0.99  # the same for copied drafts, per token: nothing else brings them back
CEILING = 0.95  # acceptance of the best streams thinkable: where they do not pay, none are run
DRAFTS = 16  # recent drafts that stand for the next one

# Tokens of plain decoding before streams are tried again: twice as many after each failure, at most
# LONG of them; but once streams have paid, for SETTLED passes in a row, they are worth waiting for, and
# it is at most SHORT. What it costs is bounded by SHARE.
FIRST_PAUSE, SHORT_PAUSE, LONG_PAUSE = 8, 20, 128
SETTLED = 8
LOOK = 0.1  # plain tokens that it takes to wait for a draft's probabilities and to weigh them
PROBE_TRUST = 0.7  # of a trial draft's probabilities, to choose how much of it to verify
CONTEXT_STEP = 64  # tokens: costs are read once for so many


@dataclass(frozen=True)
class Choice:
    """A step's plan.

    Args:
        nodes: rows of the pass, the root included; 1 is the root alone, and without streams a plain
            token. May be one more than the draft has: then the draft is padded, or fed as it is.
        streams: run streams behind the pass, to draft the next one.
        placement: ``"deferred"`` or ``"inline"``: where they run.
        gamma: only the first so many of them; None: all.
    """

    nodes: int
    streams: bool
    placement: str
    gamma: int | None = None


class Planner:
    """Chooses the size of every pass. One per model, kept from answer to answer.

    Before a pass ``choose``; after it ``observe``, with what was really done.

    Args:
        costs: of this machine and model.
        sizes: nodes that a pass may have besides 1. Of more than four, those that serve typical
            drafts best are used; none beyond the last measured row, where costs may jump.
        placements: the legal ones, ``"deferred"``, ``"inline"`` or both.
        streams: gamma, how deep streams draft; 0: there are none.
        copies: drafts may be copied from earlier text.

    Raises:
        BadArgument: no size, an unknown placement, or none whose costs are known.
    """

    def __init__(
        self,
        costs: Costs,
        *,
        sizes: tuple[int, ...] = SIZES,
        placements: tuple[str, ...] = ("deferred",),
        streams: int = 4,
        copies: bool = False,
    ):
        if not placements or not set(placements) <= {"deferred", "inline"}:
            raise BadArgument(f"[placements] must be deferred, inline or both; got {placements}.")
        known = tuple(p for p in placements if p == "deferred" or costs.inline_ms is not None)
        if streams and not known:
            raise BadArgument(
                "[placements] must hold one whose costs are known; got inline alone, without "
                "'inline_ms'. Measure it: mlx-specstream tune."
            )
        if any(type(n) is not int or n < 2 for n in sizes):
            raise BadArgument(f"[sizes] must be whole numbers >= 2; got {sizes}.")
        sizes = tuple(sorted({n for n in sizes if n <= costs.rows[-1]}))
        if not sizes:
            raise BadArgument(f"[sizes] must hold one of 2..{costs.rows[-1]}, the measured rows.")
        self.costs, self.placements, self.streams, self.copies = costs, known, streams, copies
        middle = costs.contexts[len(costs.contexts) // 2]
        rows, plain = np.array((1, *sizes)), costs.plain_at(middle)
        passes, behind = (
            costs.pass_at(rows, middle) / plain,
            self._streams_cost(rows, middle) / plain,
        )
        self.sizes = shortlist(sizes, passes, behind, streams, copies)
        self._rows = np.array((1, *self.sizes))
        self._place = {int(n): i for i, n in enumerate(self._rows)}
        self._tables: dict[tuple, tuple[np.ndarray, np.ndarray]] = {}
        sizes = self._rows.tolist()
        few = costs.gammas if streams and "deferred" in known else ()
        self._gammas = Gammas(tuple(n for n in few if n < streams), len(sizes))
        self._trust = {  # by from_streams
            True: TrustBySize(MEMORY, sizes),
            False: TrustBySize(RETURN, sizes),
        }
        self._drafts = np.zeros((0, len(self._rows)))  # promises of streams' recent drafts
        self._copied = self._drafts  # and of copied texts alone
        self._pause, self._wait = FIRST_PAUSE // 2, 0
        self._settled, self._longest = 0, LONG_PAUSE
        self._size = 0  # place in _rows of the last size used
        self._price = 1.0  # tokens per plain token's time
        self._balance = LOAN
        paying = [gamma for gamma in reversed(self._gammas.options) if self._can_pay(gamma)]
        self._state = "on" if paying else "never"  # on, off (pausing), trial, never
        begin = [gamma for gamma in paying if self._bears(gamma, costs.contexts[0])]
        self._gammas.usual = (begin or [None])[0]  # all, if there is enough to try them

    # -- before a pass

    def choose(
        self, probabilities: np.ndarray | None, context: int, from_streams: bool = True
    ) -> Choice:
        """The plan of the pass that comes now. Changes nothing.

        Args:
            probabilities: of the likeliest nodes below the root to be accepted, as the drafts say,
                float [k], descending; None or empty: nothing is drafted.
            context: tokens before the pass.
            from_streams: False for a draft of copied text alone.
        """
        streams = self.wants_streams(context)
        size = 0
        if probabilities is not None and len(probabilities):
            size = self._best_size(probabilities, context, from_streams, streams)
        return self._chosen(int(self._rows[size]), streams, context)

    def choose_unseen(self, context: int) -> Choice | None:
        """The plan of the pass that comes now, whatever the streams drafted. Changes nothing.

        Where one size would have been nearly the best for all recent drafts, looking at the next one
        costs more than it brings. None: look at it, and ``choose``.
        """
        if self._state != "on" or len(self._drafts) < DRAFTS or not self.wants_streams(context):
            return None
        cost = sum(self._with(self._gamma_for(context), context))
        value = self._believed(self._drafts, True) - self._price * cost  # [drafts, sizes + 1]
        usual = int(value.mean(axis=0).argmax())
        lost = float((value.max(axis=1) - value[:, usual]).mean())
        if not usual or lost > LOOK or cost[usual] - 1.0 > self._balance:
            return None
        return self._chosen(int(self._rows[usual]), True, context)

    def wants_streams(self, context: int) -> bool:
        """Should streams run behind the pass that comes now? Changes nothing."""
        if self._state not in ("on", "off") or (self._state == "off" and self._wait > 0):
            return False
        return self._bears(self._gammas.usual, context)

    def placement(self, nodes: int, context: int, gamma: int | None = None) -> str:
        """The cheaper legal placement of streams behind a pass."""
        at = [float(self.costs.streams_at(p, nodes, context, gamma)) for p in self.placements]
        return self.placements[int(np.argmin(at))] if at else "deferred"

    @property
    def fewer(self) -> tuple[int, ...]:
        """Numbers of streams that may draft instead of all."""
        return self._gammas.options[:-1]

    def compares(self, gamma: int) -> bool:
        """``observe`` wants to know what ``fewer`` streams would have promised of a draft of ``gamma``."""
        return gamma == self.streams and self._gammas.compares

    def _chosen(self, nodes: int, streams: bool, context: int) -> Choice:
        gamma = self._gamma_for(context) if streams else None
        return Choice(nodes, streams, self.placement(nodes, context, gamma), gamma)

    def _gamma_for(self, context: int) -> int | None:
        """Of the streams behind the pass that comes now."""
        usual = self._gammas.usual
        if usual is None:
            return None
        dearer = float(self._with(None, context)[1][0] - self._at(context)[1][0])
        if self._gammas.asks_all(dearer) or self._state == "off":  # a trial looks at everything
            return None if self._bears(None, context) else usual
        return usual

    def _bears(self, gamma: int | None, context: int) -> bool:
        """Is there enough of the loan for drafting, and for verifying the least of the draft?"""
        passes, streams = self._with(gamma, context)
        return bool(self._balance >= (passes[0] + streams[0] - 1.0) + (passes[1] - 1.0))

    # -- after a pass

    def observe(
        self,
        *,
        context: int,
        nodes: int,
        probabilities: np.ndarray | None,
        accepted: int,
        from_streams: bool = True,
        streams: bool = False,
        copied: np.ndarray | None = None,
        ranks: Sequence[int] | None = None,
        gamma: int | None = None,
        fewer: Sequence[np.ndarray] = (),
    ) -> None:
        """What a pass did; call it after every one, plain tokens too.

        Args:
            context: tokens before the pass.
            nodes: rows of the pass, the root included.
            probabilities: all that ``choose`` was given, verified or not.
            accepted: drafted tokens that were accepted.
            from_streams: as given to ``choose``.
            streams: streams ran behind the pass.
            copied: where copied text is part of a draft of streams, what its nodes alone promised,
                float [c], descending.
            ranks: places of the accepted nodes in ``probabilities``; None: the first ones.
            gamma: how many streams ran behind it; None: all.
            fewer: what the draft, one of all streams, would have promised with each of ``self.fewer``,
                as ``probabilities``; (): not compared.
        """
        spent = self.account(
            context=context, nodes=nodes, accepted=accepted, streams=streams, gamma=gamma
        )
        promises = np.zeros(0) if probabilities is None else np.asarray(probabilities, np.float64)
        from_streams = from_streams and self.streams > 0
        drafted = from_streams and len(promises) > 0
        if nodes > 1 and len(promises):
            trust = self._trust[from_streams]
            if from_streams:
                trust.fade()
            ranks = range(accepted) if ranks is None else ranks
            trust.add(nodes, self._sums(promises[: nodes - 1]), ranks)
            self._size = self._place.get(nodes, self._size)
        if drafted and len(fewer):
            self._compare([*fewer, promises], context)
        elif drafted:
            self._drafts = self._appended(self._drafts, self._sums(promises))
        passes, behind = self._at(context)
        if self.copies:
            alone = copied if from_streams else promises
            alone = self._sums(np.zeros(0) if alone is None else alone)
            self._copied = self._appended(self._copied, alone)
        self._steer(passes, behind, spent, accepted, streams, drafted)

    def account(
        self,
        *,
        context: int,
        nodes: int,
        accepted: int,
        streams: bool,
        gamma: int | None = None,
    ) -> float:
        """The part of ``observe`` for a pass whose draft nobody looked at.

        Returns:
            What the pass cost, in plain tokens.
        """
        spent, tokens = self._spent(nodes, streams, context, gamma), 1 + accepted
        if streams:
            self._gammas.ran()
        self._balance = min(SAVINGS, self._balance + SHARE * tokens + tokens - spent)
        self._wait -= tokens
        if self.copies:
            self._trust[False].fade(tokens)
        return spent

    def _steer(self, passes, behind, spent, accepted, streams: bool, drafted: bool) -> None:
        """Streams on, off for a pause, or on trial; and the price of time."""
        without = np.concatenate([[1.0], passes[1:]])  # the root alone is a plain token
        copies = _rate(self._believed(self._copied, False), without) if self.copies else 1.0
        if self._state != "on":
            self._price = copies
        if self._state == "trial" and not drafted:
            self._state = "off"  # the answer ended; try again
        elif self._state == "trial":
            self._drafts = self._drafts[-1:]  # the ones before the pause were of another text
            rate = _rate(self._believed(self._drafts, True), passes + behind)
            if rate <= copies and accepted > spent - 1.0 + behind[0]:  # not believed, but it paid
                self._trust[True].restart()
                rate = _rate(self._believed(self._drafts, True), passes + behind)
            if rate > copies:
                self._state, self._settled = "on", 0
            else:
                self._rest()
        elif self._state == "off" and streams:
            self._state = "trial"
        elif self._state == "on" and drafted:
            self._settled += 1
            self._price = _rate(self._believed(self._drafts, True), passes + behind)
            if self._settled >= SETTLED and self._balance > LOAN:
                self._pause, self._longest = FIRST_PAUSE // 2, SHORT_PAUSE
            if self._price <= copies:
                self._price = copies
                self._rest()

    def _compare(self, promises: list[np.ndarray], context: int) -> None:
        """A draft as it would have been with each gamma: take as many as are worth most lately."""
        gammas = self._gammas
        gammas.add(np.stack([self._sums(p) for p in promises]))
        if self._state == "trial":
            gammas.forget()
        speeds = []
        for option, gamma in enumerate(gammas.options):
            tokens = self._believed(gammas.of(option), True)
            speeds.append(_rate(tokens, sum(self._with(gamma, context))))
        if gammas.settle(speeds):
            self._drafts = gammas.of_usual
        else:
            self._drafts = self._appended(self._drafts, gammas.of_usual[-1])

    def _rest(self) -> None:
        self._state = "off"
        self._pause = self._wait = min(2 * self._pause, self._longest)

    # -- for reports

    @property
    def speculating(self) -> bool:
        """Streams are in use, not paused or on trial."""
        return self._state == "on"

    def expected_tokens(
        self, probabilities: np.ndarray, nodes: int, from_streams: bool = True
    ) -> float:
        """Tokens that a pass with so many nodes is expected to bring, after what was learned."""
        promised = float(np.sum(probabilities[: nodes - 1]))
        size = max(1, int(np.searchsorted(self._rows, nodes, side="right")) - 1)
        return 1.0 + min(nodes - 1, promised * self._trust[from_streams].ratios[size])

    def expected_speedup(
        self, probabilities: np.ndarray, nodes: int, context: int, from_streams: bool = True
    ) -> float:
        """Speed over plain decoding if every step were this one, streams included."""
        tokens = self.expected_tokens(probabilities, nodes, from_streams)
        return tokens / self._spent(nodes, from_streams and self.streams > 0, context, None)

    # -- parts

    def _best_size(self, probabilities, context: int, from_streams: bool, streams: bool) -> int:
        """Place in _rows of the size whose tokens are worth most beyond the time they take."""
        passes, behind = self._with(self._gamma_for(context), context)
        cost = passes + behind if streams else np.concatenate([[1.0], passes[1:]])
        ratios, price = self._trust[from_streams and self.streams > 0].ratios, self._price
        if self._state == "trial":
            ratios, price = np.maximum(ratios, PROBE_TRUST), 1.0
        tokens = 1.0 + np.minimum(ratios * self._sums(probabilities), self._rows - 1)
        value = tokens - price * cost
        value[1:][cost[1:] - 1.0 > self._balance] = -np.inf  # could lose more than is left
        best = int(value.argmax())
        keeps = value[best] - value[self._size] < WORTH_A_CHANGE * tokens[best]
        return self._size if keeps else best

    def _sums(self, probabilities) -> np.ndarray:
        """Promised tokens of the first n - 1 nodes for each size n of _rows, float64 [sizes + 1]."""
        sums = np.concatenate([[0.0], np.cumsum(probabilities, dtype=np.float64)])
        return sums[np.minimum(self._rows - 1, len(sums) - 1)]

    def _appended(self, recent: np.ndarray, sums: np.ndarray) -> np.ndarray:
        return np.concatenate([recent[1 - DRAFTS :], sums[None]])

    def _believed(self, recent: np.ndarray, from_streams: bool) -> np.ndarray:
        """Expected tokens of recent drafts at each size, float64 [drafts, sizes + 1]."""
        return 1.0 + np.minimum(recent * self._trust[from_streams].ratios, self._rows - 1)

    def _spent(self, nodes: int, streams: bool, context: int, gamma: int | None) -> float:
        """What a step cost, in plain tokens."""
        if nodes == 1 and not streams:
            return 1.0
        if (size := self._place.get(nodes)) is not None:
            passes, behind = self._with(gamma, context)
            return float(passes[size] + (behind[size] if streams else 0.0))
        cost = self.costs.pass_at(nodes, context)
        cost += self._streams_cost(nodes, context, gamma) if streams else 0.0
        return float(cost) / self.costs.plain_at(context)

    def _can_pay(self, gamma: int | None) -> bool:
        """Could so many streams be worth their cost if they were nearly always right?"""
        tokens = 1.0 + self._sums(CEILING ** np.arange(1, (gamma or self.streams) + 1))[None]
        return bool(self.streams) and any(
            _rate(tokens, sum(self._with(gamma, context))) > 1.0 for context in self.costs.contexts
        )

    def _at(self, context: int) -> tuple[np.ndarray, np.ndarray]:
        """Passes of each size of _rows and the usual streams behind them, in plain tokens."""
        return self._with(self._gammas.usual, context)

    def _with(self, gamma: int | None, context: int) -> tuple[np.ndarray, np.ndarray]:
        step = context // CONTEXT_STEP
        if (step, gamma) not in self._tables:
            at, plain = step * CONTEXT_STEP, self.costs.plain_at(step * CONTEXT_STEP)
            passes = self.costs.pass_at(self._rows, at) / plain
            behind = self._streams_cost(self._rows, at, gamma) / plain
            self._tables[step, gamma] = passes, behind
        return self._tables[step, gamma]

    def _streams_cost(self, nodes, context: int, gamma: int | None = None):
        """The cheaper placement, ms; 0 where there are no streams."""
        if not self.streams:
            return np.zeros(np.shape(nodes))[()]
        at = [self.costs.streams_at(p, nodes, context, gamma) for p in self.placements]
        return np.min(at, axis=0)


def _rate(tokens: np.ndarray, cost: np.ndarray) -> float:
    """Tokens per plain token's time if every draft is verified at its best size.

    Args:
        tokens: expected of each draft at each size, float [drafts, sizes + 1].
        cost: of a step of each size, in plain tokens, float [sizes + 1].
    """
    rate, draft = 1.0, np.arange(len(tokens))
    for _ in range(3 if len(tokens) else 0):  # Dinkelbach's method; two rounds do nearly always
        before, best = rate, np.argmax(tokens - rate * cost, axis=1)
        rate = float(tokens[draft, best].sum() / cost[best].sum())
        if abs(rate - before) < 1e-3:
            break
    return rate
