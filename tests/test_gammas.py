"""Fewer streams than there are: they say what they always say, and the planner asks as many as pay."""

from dataclasses import replace
from itertools import cycle

import mlx.core as mx
import numpy as np
import pytest
from curves import FLAT, ROWS, STEEP, costs
from reference import assert_close
from steps import Watched, decoder_for
from test_planner import mac
from test_sampling import compiled
from tiny_models import attached

from mlx_specstream.decode.choose import Drawn, Greedy, TemperatureSampler
from mlx_specstream.decode.costs import Costs, gammas_below, modelled_costs
from mlx_specstream.decode.draft import CopiedText, Guesses, Promises
from mlx_specstream.decode.gammas import AGAIN, COMPARED, SPARED, Gammas
from mlx_specstream.decode.plan import Fixed, Planned, make_plan
from mlx_specstream.decode.planner import Planner
from mlx_specstream.decode.tree import TreeShape
from mlx_specstream.errors import BadArgument
from mlx_specstream.measure.simulate import guesses_along
from mlx_specstream.model.cache import make_prompt_cache

PROMPT = [53, 56, 8, 26, 42, 33]
LENGTH = 29


class Changing(Fixed):
    """Another number of streams behind every pass."""

    def __init__(self, plan, gammas):
        super().__init__(plan)
        self.gammas, self.asked = cycle(gammas), []

    def next_pass(self, guesses, text, context):
        self.asked.append(next(self.gammas))
        return replace(super().next_pass(guesses, text, context), gamma=self.asked[-1])


def decoded(seams, gammas, chooser=None):
    """(answer, how many tokens of it each pass followed, streams asked behind it, guesses)."""
    plan = make_plan(seams.streams.config, "best:14", "deferred")
    stores = make_prompt_cache(seams.model)
    seams.model(mx.array([PROMPT[:-1]]), cache=stores)
    steering = Changing(plan, gammas)
    decoder = Watched(seams, stores, PROMPT[-1:], chooser or Greedy(), steering)
    answer, places = [], []
    while len(answer) < LENGTH:
        answer += decoder.step(LENGTH - len(answer), ()).tokens
        places.append(len(answer))
    return answer, places, steering.asked, decoder.guessed


def plain(seams, chooser=None):
    decoder, answer = decoder_for(seams, PROMPT, "chain", chooser=chooser), []
    while len(answer) < LENGTH:
        answer += decoder.step(1, ()).tokens[:1]
    return answer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"condition_rank": 5},
        {"condition_rank": 5, "root_rank": 6},
        {"condition_rank": 5, "condition_shared": True, "root_rank": 6},
        {"init_rank": 3, "stream_position": "t"},
        {"value_rotation": 0.3, "lora_rank": 0},
    ],
)
@pytest.mark.parametrize("compiling", [False, True])
def test_the_first_streams_say_what_they_say_beside_the_others(options, compiling):
    seams = attached(num_streams=4, **options)
    seams.streams.temperatures = np.array([0.8, 1.1, 1.3, 0.9], np.float32)
    if compiling:
        with compiled():
            answer, places, asked, guessed = decoded(seams, (2, None, 1, 3))
    else:
        answer, places, asked, guessed = decoded(seams, (2, None, 1, 3))
    assert answer == plain(seams)
    everyone = guesses_along(seams, PROMPT, answer, 13)
    checked = set()
    for place, gamma, found in zip(places, asked, guessed[1:], strict=False):
        want = everyone[place - 1]
        assert found.tokens.shape == (gamma or 4, 13)
        assert_close(found.logprobs, want.logprobs[:gamma], 1e-4)
        checked.add(gamma)
    assert checked == {2, None, 1, 3}


@pytest.mark.parametrize("root_rank", [0, 6])
def test_a_drawn_text_is_the_same_and_so_are_its_drafts(root_rank):
    seams, found = attached(num_streams=4, condition_rank=5, root_rank=root_rank), {}
    for gammas in ((3, 1), (None,)):
        chooser = Drawn(TemperatureSampler(0.9), 11)
        answer, places, _, guessed = decoded(seams, gammas, chooser)
        assert answer == plain(seams, Drawn(TemperatureSampler(0.9), 11))
        found[gammas] = dict(zip(places, guessed[1:], strict=False))
    few, everyone = found.values()
    both = set(few) & set(everyone)
    assert len(both) > 3
    for place in both:  # ranked with the same noise
        first = everyone[place].tokens[: len(few[place].tokens)]
        assert few[place].tokens[:, :6].tolist() == first[:, :6].tolist()


# --- costs ---


def some(saved=((3.0, 1.0), (5.0, 2.0)), gammas=(2, 4), deferred=(6.0, 8.0)) -> Costs:
    return Costs(
        rows=(1, 3, 7),
        contexts=(10, 30),
        pass_ms=((10.0, 12.0, 20.0), (14.0, 20.0, 44.0)),
        deferred_ms=((deferred[0],) * 3, (deferred[1],) * 3),
        inline_ms=((1.0, 2.0, 3.0),) * 2,
        plain_ms=(9.0, 11.0),
        measured=True,
        gammas=gammas,
        saved_ms=saved,
    )


def test_fewer_streams_cost_less():
    table = some()
    assert table.streams_at("deferred", 5, 10) == pytest.approx(6)
    assert table.streams_at("deferred", 5, 10, 2) == pytest.approx(3)
    assert table.streams_at("deferred", 5, 20, 4) == pytest.approx(7 - 1.5)
    assert table.streams_at("deferred", np.array([1, 7]), 30, 2) == pytest.approx([3, 3])
    assert some(saved=((9.0, 1.0),) * 2).streams_at("deferred", 1, 10, 2) == 0.0
    assert table.streams_at("deferred", 5, 70, 2) == pytest.approx(12 - 5)  # as behind 30 tokens
    assert table.streams_at("inline", 5, 10, 2) == np.inf  # inline they are a matter of all
    assert Costs.from_json(table.to_json()) == table
    old = {k: v for k, v in table.to_json().items() if k not in ("gammas", "saved_ms")}
    assert Costs.from_json(old) == some(gammas=(), saved=())


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"gammas": (4, 2)}, "gammas"),
        ({"gammas": (0, 2)}, "gammas"),
        ({"gammas": None}, "gammas"),
        ({"gammas": ()}, "saved_ms"),
        ({"gammas": (2,)}, "saved_ms"),
        ({"saved": ((1.0, 2.0),)}, "saved_ms"),
        ({"saved": ((1.0, float("nan")),) * 2}, "saved_ms"),
        ({"saved": None}, "saved_ms"),
    ],
)
def test_wrong_savings_are_refused(values, field):
    with pytest.raises(BadArgument, match=f"'{field}'"):
        some(**values)


def test_how_many_may_run():
    assert [gammas_below(n) for n in range(8)] == [
        (), (), (1,), (1, 2), (2, 3), (2, 4), (2, 4), (3, 5),
    ]  # fmt: skip


def test_modelled_savings_are_those_of_fewer_rows():
    def model(streams):
        return modelled_costs(
            ROWS, STEEP, layers=16, msa_layers=2, streams=streams, head_share=0.2, host=0, launch=0
        )

    table = model(6)
    assert table.gammas == (2, 4)
    for gamma in table.gammas:
        want = model(gamma).streams_at("deferred", 3, 0)
        assert table.streams_at("deferred", 3, 0, gamma) == pytest.approx(want)


# --- the choice ---


def steep(streams=1.2, saved=(0.8, 0.4)) -> Costs:
    """Streams that cost more than a plain token together, and much less if there are few."""
    table = costs(FLAT, streams)
    return replace(table, gammas=(2, 4), saved_ms=(tuple(10 * s for s in saved),))


def asked_in(run, first=0, last=10**9):
    """Share of the passes between two places behind which so many streams ran."""
    steps = [s for s in run.steps if s.streams and first <= s.place < last]
    return {g: sum(s.gamma == g for s in steps) / len(steps) for g in (2, 4, None)}


def test_hard_text_asks_few_streams_and_easy_text_all():
    hard, easy = mac.geometric(0.55, depth=6), mac.geometric(0.95, depth=6)
    table = steep()
    few = mac.closed_loop(Planner(table, streams=6), table, lambda p: hard, 512, 1)
    alls = mac.closed_loop(Planner(table, streams=6), table, lambda p: easy, 512, 1)
    assert asked_in(few, 100)[2] > 0.8
    assert asked_in(alls, 100)[None] == 1.0
    without = replace(table, gammas=(), saved_ms=())
    both = [
        np.mean([mac.closed_loop(Planner(t, streams=6), t, lambda p: hard, 512, s).speedup
                 for s in range(4)])
        for t in (table, without)
    ]  # fmt: skip
    assert both[0] > 1.05 * both[1]


def test_all_are_asked_again_when_text_becomes_easy():
    hard, easy = mac.geometric(0.55, depth=6), mac.geometric(0.95, depth=6)
    table = steep()
    run = mac.closed_loop(
        Planner(table, streams=6), table, lambda p: hard if p < 400 else easy, 1600, 3
    )
    assert asked_in(run, 100, 400)[2] > 0.8
    assert asked_in(run, 1200)[None] > 0.9


def test_streams_that_pay_only_if_they_are_few_are_run():
    table, easy = steep(streams=9.0, saved=(8.6, 4.0)), mac.geometric(0.9, depth=6)
    alone = replace(table, gammas=(), saved_ms=())
    run = mac.closed_loop(Planner(alone, streams=6), alone, lambda p: easy, 300, 1)
    assert run.cost == run.tokens
    run = mac.closed_loop(Planner(table, streams=6), table, lambda p: easy, 300, 1)
    assert run.steps[0].gamma == 2  # the loan bears no more
    assert run.speedup > 1.5
    assert asked_in(run)[2] > 0.9


def test_what_ran_is_what_is_charged():
    table, hard = steep(), mac.geometric(0.55, depth=6)
    planner = Planner(table, streams=6)
    charged, account = [], planner.account
    planner.account = lambda **done: charged.append(account(**done)) or charged[-1]
    run = mac.closed_loop(planner, table, lambda p: hard, 400, 1)
    assert {step.gamma for step in run.steps if step.streams} == {2, None}
    assert sum(charged) == pytest.approx(run.cost)


def test_a_trial_looks_at_all_streams_if_the_loan_bears_them():
    """Two streams were usual, then none were right; now text comes where all of them pay."""
    hard, easy = mac.geometric(0.55, depth=6), mac.geometric(0.95, depth=6)
    table, never = steep(), mac.Guesses(hard.says, np.zeros_like(hard.says))
    run = mac.closed_loop(
        Planner(table, streams=6),
        table,
        lambda p: hard if p < 300 else never if p < 700 else easy,
        1600,
        3,
    )
    assert asked_in(run, 100, 300)[2] > 0.8
    asked = [step.gamma for step in run.steps if 350 <= step.place < 700 and step.streams]
    assert {2, None} <= {*asked}
    assert asked_in(run, 1100)[None] > 0.9


def test_where_streams_are_inline_all_of_them_run():
    table = replace(steep(), inline_ms=((0.1,) * len(ROWS),))
    planner = Planner(table, streams=6, placements=("inline",))
    assert planner.fewer == ()
    assert not planner.compares(6)
    assert Planner(table, streams=4).fewer == (2,)  # of those that were measured, fewer than all


def test_when_drafts_are_compared():
    gammas, due = Gammas((2, 4), 3), []
    for _ in range(COMPARED + 3 * SPARED):
        gammas.ran()
        due.append(gammas.compares)
        if gammas.compares:
            gammas.add(np.ones((3, 3)))
    assert all(due[:COMPARED])
    assert due[COMPARED:] == [*[False] * (SPARED - 1), True] * 3
    assert not gammas.settle([1.015, 1.0, 1.0])
    assert gammas.usual is None
    assert gammas.settle([1.1, 1.0, 1.0])
    assert gammas.usual == 2
    for _ in range(2):
        asked = 0
        while not gammas.asks_all(0.1):
            gammas.ran()
            asked += 1
        assert asked == AGAIN
        assert not gammas.asks_all(1.0)  # the dearer, the seldomer
        gammas.ran()  # the answer may end before there is a draft: then all are asked again
        assert gammas.asks_all(0.1)
        assert gammas.compares
        gammas.add(np.ones((3, 3)))
    gammas.forget()
    assert gammas.of(1).shape == (1, 3)
    for _ in range(2 * SPARED):
        alone = Gammas((), 3)
        alone.ran()
        assert not alone.compares


def test_planned_passes_say_what_fewer_streams_would_have_promised():
    rng = np.random.default_rng(2)
    logprobs = np.log(rng.dirichlet(np.ones(9), size=6)).astype(np.float32)
    order = np.argsort(-logprobs, axis=1)
    tokens = np.stack([rng.permutation(40)[:9] for _ in range(6)]).astype(np.int32)
    guesses = Guesses(mx.array(tokens), mx.array(np.take_along_axis(logprobs, order, axis=1)))
    text = CopiedText.of([int(tokens[0, 0]), 41, 42], [-0.1, -0.2, -0.3], 8)
    planner = Planner(steep(streams=0.1, saved=(0.08, 0.04)), streams=6, sizes=(2, 5, 8))
    steering, seen = Planned(planner), []
    observe = planner.observe
    planner.observe = lambda **done: (seen.append(done), observe(**done))
    first = steering.next_pass(None, None, 5)
    assert first.streams
    steering.observe(first, 5, [])
    assert planner.compares(6)
    short = Guesses(guesses.tokens[:2], guesses.logprobs[:2])
    assert steering.next_pass(short, text, 6).compared is None  # says nothing of the others
    plan = steering.next_pass(guesses, text, 6)
    steering.observe(plan, 6, [])
    largest = TreeShape("best", 8)
    for gamma, found in zip((2, 4), seen[-1]["fewer"], strict=True):
        short = Guesses(guesses.tokens[:gamma], guesses.logprobs[:gamma])
        assert_close(found, Promises.of(short, text, largest).probabilities, 1e-6)
    assert len(planner._gammas.of(0)) == 1
