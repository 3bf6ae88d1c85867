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
from .trust import TrustBySize

SIZES = (2, 3, 4, 5, 6, 8, 12, 16, 24, 32)
MOST_SIZES = 3  # besides the root alone: a pass is compiled once per size
WORTH_A_SIZE = 0.003  # tokens a pass, averaged over typical drafts; less is not worth another size
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
        self.sizes = self._shortlist(sizes)
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
        self._state = "on" if self._can_pay() else "never"  # on, off (pausing), trial, never
        self._pause, self._wait = FIRST_PAUSE // 2, 0
        self._settled, self._longest = 0, LONG_PAUSE
        self._size = 0  # place in _rows of the last size used
        self._price = 1.0  # tokens per plain token's time
        self._balance = LOAN

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
        if self.compares:
            return None
        passes, behind = self._at(context)
        cost = passes + behind
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
        passes, streams = self._at(context)
        # The loan must last for drafting and for verifying the least of the draft.
        return bool(self._balance >= (passes[0] + streams[0] - 1.0) + (passes[1] - 1.0))

    def placement(self, nodes: int, context: int, gamma: int | None = None) -> str:
        """The cheaper legal placement of streams behind a pass."""
        at = [float(self.costs.streams_at(p, nodes, context, gamma)) for p in self.placements]
        return self.placements[int(np.argmin(at))] if at else "deferred"

    @property
    def fewer(self) -> tuple[int, ...]:
        """Numbers of streams that may draft instead of all."""
        return self._gammas.options[:-1]

    @property
    def compares(self) -> bool:
        """``observe`` wants to know of the draft at hand what ``fewer`` streams would have promised."""
        return self._gammas.compares

    def _chosen(self, nodes: int, streams: bool, context: int) -> Choice:
        gamma = self._gammas.now if streams else None
        return Choice(nodes, streams, self.placement(nodes, context, gamma), gamma)

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
            fewer: what the draft would have promised with each of ``self.fewer`` streams, as
                ``probabilities``; (): not compared.
        """
        spent = self.account(context=context, nodes=nodes, accepted=accepted, streams=streams)
        passes, behind = self._at(context)
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
        if drafted:
            self._drafts = self._appended(self._drafts, promises)
        if drafted and len(fewer):
            self._gammas.add(np.stack([self._sums(p) for p in (*fewer, promises)]))
            passes, behind = self._settle_gamma(context)
        if self.copies:
            alone = copied if from_streams else promises
            self._copied = self._appended(self._copied, np.zeros(0) if alone is None else alone)
        self._steer(passes, behind, spent, accepted, streams, drafted)

    def account(self, *, context: int, nodes: int, accepted: int, streams: bool) -> float:
        """The part of ``observe`` for a pass whose draft nobody looked at.

        Returns:
            What the pass cost, in plain tokens.
        """
        spent, tokens = self._spent(nodes, streams, context), 1 + accepted
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

    def _settle_gamma(self, context: int) -> tuple[np.ndarray, np.ndarray]:
        """As many streams as are worth most for recent drafts; what ``_at`` says from then on."""
        speeds = []
        for option, gamma in enumerate(self._gammas.options):
            tokens = self._believed(self._gammas.of(option), True)
            speeds.append(_rate(tokens, sum(self._with(gamma, context))))
        if self._gammas.settle(speeds):
            self._drafts = self._gammas.of(self._gammas.options.index(self._gammas.usual))
        return self._at(context)

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
        return tokens / self._spent(nodes, from_streams and self.streams > 0, context)

    # -- parts

    def _best_size(self, probabilities, context: int, from_streams: bool, streams: bool) -> int:
        """Place in _rows of the size whose tokens are worth most beyond the time they take."""
        passes, behind = self._at(context)
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

    def _appended(self, recent: np.ndarray, probabilities) -> np.ndarray:
        return np.concatenate([recent[1 - DRAFTS :], self._sums(probabilities)[None]])

    def _believed(self, recent: np.ndarray, from_streams: bool) -> np.ndarray:
        """Expected tokens of recent drafts at each size, float64 [drafts, sizes + 1]."""
        return 1.0 + np.minimum(recent * self._trust[from_streams].ratios, self._rows - 1)

    def _spent(self, nodes: int, streams: bool, context: int) -> float:
        """What a step cost, in plain tokens."""
        if nodes == 1 and not streams:
            return 1.0
        gamma = self._gammas.now
        if (size := self._place.get(nodes)) is not None:
            passes, behind = self._with(gamma, context)
            return float(passes[size] + (behind[size] if streams else 0.0))
        cost = self.costs.pass_at(nodes, context)
        cost += self._streams_cost(nodes, context, gamma) if streams else 0.0
        return float(cost) / self.costs.plain_at(context)

    def _can_pay(self) -> bool:
        """Could streams be worth their cost if they were nearly always right?"""
        depth = np.arange(1, self.streams + 1)
        promises = CEILING**depth
        return bool(self.streams) and any(
            _rate(1.0 + self._sums(promises[:gamma])[None], sum(self._with(gamma, context))) > 1.0
            for context in self.costs.contexts
            for gamma in self._gammas.options
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

    def _shortlist(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """At most MOST_SIZES of ``sizes``: those that lose least over a range of typical drafts."""
        if len(sizes) <= MOST_SIZES:
            return sizes
        middle = self.costs.contexts[len(self.costs.contexts) // 2]
        rows, plain = np.array((1, *sizes)), self.costs.plain_at(middle)
        passes = self.costs.pass_at(rows, middle) / plain
        behind = self._streams_cost(rows, middle) / plain
        worth = []  # tokens less the price of their time, [draft and price, sizes + 1]
        for rate in (0.3, 0.45, 0.6, 0.7, 0.8, 0.9, 0.97):
            drafts = [(_tree_promises(rate, self.streams), behind)] if self.streams else []
            if self.copies or not drafts:
                drafts.append((rate ** np.arange(1, rows[-1]), 0.0))
            for promises, more in drafts:
                sums = np.concatenate([[0.0], np.cumsum(promises)])
                tokens = 1.0 + sums[np.minimum(rows - 1, len(sums) - 1)]
                worth += [tokens - price * (passes + more) for price in (1.0, 1.4, 1.8)]
        worth = np.stack(worth)
        taken = [0]
        while len(taken) <= MOST_SIZES:
            best = [worth[:, [*taken, i]].max(axis=1).mean() for i in range(len(rows))]
            if len(taken) > 1 and max(best) - worth[:, taken].max(axis=1).mean() < WORTH_A_SIZE:
                break
            taken.append(int(np.argmax(best[1:])) + 1)
        return tuple(sorted({sizes[i - 1] for i in taken[1:]}))


def _tree_promises(rate: float, depth: int) -> np.ndarray:
    """Nodes of a tree whose streams give their first guess ``rate``, the next half of the rest ..."""
    guesses = np.array([rate, (1 - rate) / 2, (1 - rate) / 4])
    level, found = np.ones(1), []
    for _ in range(depth):
        level = np.sort(np.outer(level, guesses).reshape(-1))[::-1][:64]
        found.append(level)
    return np.sort(np.concatenate(found))[::-1]


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
