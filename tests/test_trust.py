"""What the planner believes of drafts, and when it does not even look at them."""

from dataclasses import replace
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from curves import FLAT, ROWS, costs

from mlx_specstream.decode.draft import Guesses
from mlx_specstream.decode.plan import LOOK_BACK, Planned
from mlx_specstream.decode.planner import Planner
from mlx_specstream.decode.trust import Trust, TrustBySize


def test_trust_follows_a_change_of_text():
    trust = Trust(0.98)
    ratios = []
    for accepted in [1.5] * 60 + [0.0] * 12 + [1.5] * 60:
        trust.fade()
        trust.add(1.5, accepted)
        ratios.append(trust.ratio)
    assert ratios[0] == ratios[59] == 1.0
    assert ratios[61] > 0.9  # two bad drafts are bad luck
    assert ratios[71] < 0.4  # twelve are another text
    assert all(a > b for a, b in pairwise(ratios[59:72]))  # and never raise it
    assert ratios[-1] > 0.8


def test_large_trees_are_not_believed_for_what_small_ones_keep():
    """The three likeliest nodes keep what they promise, the others promise as much and keep nothing."""
    trust, sums = TrustBySize(0.98, (1, 4, 8, 16)), np.array([0.0, 1.5, 3.0, 4.0])
    for number in range(60):
        trust.fade()
        trust.add(8, sums, [0, 2] if number % 2 else [1])
    one, small, middle, large = trust.ratios
    assert one == 1.0
    assert small == pytest.approx(1.0, abs=0.02)
    assert middle == pytest.approx(0.53, abs=0.03)  # and what is believed before there is evidence
    assert large == pytest.approx(middle), "never tried: as good as the next smaller one"
    trust.add(16, sums, [9])
    assert trust.ratios[3] != pytest.approx(trust.ratios[2])
    trust.add(3, sums, [1])  # fewer than the smallest
    assert trust.ratios[1] < small


def test_a_planner_learns_which_nodes_are_worth_their_time():
    promises = np.array([0.8, 0.5, 0.3, 0.3, 0.3, 0.3, 0.3])
    chosen = []
    for ranks in ([0, 1], [0, 5]):  # what is accepted is among the likeliest, or is not
        planner = Planner(costs(), sizes=(3, 8))
        for _ in range(30):
            planner.observe(
                context=0, nodes=8, probabilities=promises, accepted=2, streams=True, ranks=ranks
            )
        chosen.append(planner.choose(promises, 0).nodes)
    assert chosen == [3, 8]


def taught(promises, rounds, sizes=(4, 8)):
    """A planner that has seen ``rounds`` drafts which kept what they promised."""
    planner = Planner(costs(), sizes=sizes)
    for n in range(rounds):
        draft = promises[n % len(promises)]
        choice = planner.choose(draft, 0)
        kept = round(float(draft[: choice.nodes - 1].sum()))
        planner.observe(
            context=0,
            nodes=choice.nodes,
            probabilities=draft,
            accepted=kept,
            streams=choice.streams,
        )
    return planner


STEADY = [0.97 ** np.arange(1, 9)]
MOODY = [0.97 ** np.arange(1, 9), 0.05 ** np.arange(1, 9)]


def test_drafts_that_are_all_alike_need_no_look():
    planner = taught(STEADY, 40)
    assert planner.choose_unseen(0) == planner.choose(STEADY[0], 0)
    assert taught(STEADY, 15).choose_unseen(0) is None, "before there is a habit"


def test_drafts_of_changing_worth_are_looked_at(monkeypatch):
    planner = taught(MOODY, 40)
    assert planner.speculating
    assert planner.choose_unseen(0) is None
    monkeypatch.setattr("mlx_specstream.decode.planner.LOOK", 9.0)
    assert planner.choose_unseen(0).nodes > 1


def test_nothing_is_drafted_unseen_beyond_the_balance():
    planner = taught(STEADY, 40)
    passes = planner.choose_unseen(0).nodes
    assert passes > 1
    planner._balance = FLAT[ROWS.index(passes)] + 0.25 - 1.0 - 0.01
    assert planner.choose_unseen(0) is None


def test_what_was_planned_unseen_is_learned_all_the_same(monkeypatch):
    """Probabilities are read behind the pass; they and the outcome count as if seen before it."""
    monkeypatch.setattr("mlx_specstream.decode.plan.LOOK_BACK", 1)
    rng = np.random.default_rng(4)
    guesses = Guesses(
        mx.array(rng.permutation(40).reshape(4, 10).astype(np.int32)),
        mx.array(np.sort(np.log(rng.dirichlet(np.full(10, 0.1), 4) + 1e-6))[:, ::-1].copy()),
    )
    after = []
    for unseen in (True, False):
        planner = taught(STEADY, 40)
        steering = Planned(planner)
        if not unseen:
            planner.choose_unseen = lambda context: None
        plan = steering.next_pass(guesses, None, 0)
        assert (plan.unseen is not None) == unseen
        assert (plan.promises is None) == unseen
        steering.observe(replace(plan, nodes=8), 0, guesses.tokens[:2, 0].tolist())
        after.append((planner._drafts, planner._trust[True].ratios, planner._balance))
    assert all(np.array_equal(a, b) for a, b in zip(*after, strict=True))


def test_of_passes_without_a_look_some_are_learned_from():
    """All of them are paid for."""
    guesses = Guesses(
        mx.array(np.arange(20).reshape(4, 5).astype(np.int32)),
        mx.array(np.log(np.tile([0.9, 0.04, 0.03, 0.02, 0.01], (4, 1)))),
    )
    planner = taught(STEADY, 40)
    steering, balance, seen = Planned(planner), [], []
    for _ in range(2 * LOOK_BACK):
        before = planner._trust[True].ratios
        plan = steering.next_pass(guesses, None, 0)
        assert plan.unseen is not None
        planner._balance = 6.0
        steering.observe(plan, 0, guesses.tokens[:2, 0].tolist())
        balance.append(planner._balance)
        seen.append(not np.array_equal(before, planner._trust[True].ratios))
    assert sum(seen) == 2
    assert len(set(balance)) == 1
    assert balance[0] != 6.0
