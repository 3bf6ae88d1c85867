"""The planner: the arithmetic of one choice, and whole texts in a closed loop.

The closed loop (plan, draw what is accepted, observe) is that of benchmarks/mac_predictions.py. Its
texts are seeded and the same for every policy, so a difference is the policy's.
"""

import copy
import importlib.util
import json
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from curves import FLAT, ROWS, STEEP, costs

from mlx_specstream.decode.costs import Costs
from mlx_specstream.decode.planner import LOAN, SHARE, Choice, Planner
from mlx_specstream.errors import BadArgument

ROOT = Path(__file__).resolve().parents[1]


def _benchmark():
    spec = importlib.util.spec_from_file_location(
        "mac_predictions", ROOT / "benchmarks/mac_predictions.py"
    )
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


mac = _benchmark()
CURVES = {curve["name"]: curve for curve in mac.published_curves()}
NEWER = [name for name, curve in CURVES.items() if curve["generation"] == "M3-M5"]
OLDER = [name for name, curve in CURVES.items() if curve["generation"] == "M1-M2"]


def liar(says: float):
    """Guesses that look normal and are never right."""
    honest = mac.geometric(says)
    return mac.Guesses(honest.says, np.zeros_like(honest.says))


# --- one choice ---


def test_expectations_are_those_of_the_formula():
    planner = Planner(costs())
    promises = np.array([0.7, 0.5, 0.3, 0.2, 0.1])
    assert planner.expected_tokens(promises, 1) == 1.0
    assert planner.expected_tokens(promises, 4) == pytest.approx(1 + 0.7 + 0.5 + 0.3)
    assert planner.expected_speedup(promises, 4, 0) == pytest.approx(2.5 / (1.2 + 0.25))
    assert planner.expected_speedup(promises, 4, 0, from_streams=False) == pytest.approx(2.5 / 1.2)


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.35, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("passes", [FLAT, STEEP])
def test_the_size_worth_most_is_chosen(rate, passes):
    """With nothing learned: tokens less the time they take, over all sizes and plain decoding."""
    planner = Planner(costs(passes), sizes=(2, 4, 6, 8))
    promises = np.sort(rate ** np.arange(1, 5).repeat(2))[::-1]
    at = dict(zip(ROWS, passes, strict=True))
    worth = {n: 1 + promises[: n - 1].sum() - at[n] for n in (1, *planner.sizes)}
    choice = planner.choose(promises, 0)
    assert choice.streams
    assert choice.placement == "deferred"
    assert worth[choice.nodes] >= max(worth.values()) - 0.015 * (1 + promises.sum())


def test_without_a_draft_the_root_goes_alone():
    planner = Planner(costs())
    for nothing in (None, np.zeros(0)):
        assert planner.choose(nothing, 0) == Choice(1, True, "deferred")


def test_without_streams_only_copies_are_verified():
    planner = Planner(costs(), streams=0, placements=("deferred",), copies=True)
    assert not planner.wants_streams(0)
    choice = planner.choose(0.9 ** np.arange(1, 9), 0, from_streams=False)
    assert choice.nodes > 1
    assert not choice.streams


def test_the_cheaper_placement_is_taken():
    both = costs(streams=0.3, inline=(0.1, 0.2, 0.25, 0.35, 0.5, 0.7, 1.0))
    planner = Planner(both, placements=("deferred", "inline"))
    assert [planner.placement(n, 0) for n in (1, 3, 4, 8)] == ["inline"] * 2 + ["deferred"] * 2
    assert Planner(both, placements=("inline",)).placement(8, 0) == "inline"
    assert Planner(costs(), placements=("inline", "deferred")).placement(1, 0) == "deferred"


def test_costs_of_the_present_context_count():
    """Rows that are free behind a short context and dear behind a long one."""
    table = Costs(
        rows=(1, 6),
        contexts=(100, 1100),
        pass_ms=((10.0, 10.5), (20.0, 80.0)),
        deferred_ms=((0.5, 0.5), (0.5, 0.5)),
        inline_ms=None,
        plain_ms=(10.0, 20.0),
        measured=True,
    )
    planner = Planner(table, sizes=(2, 6))
    promises = 0.8 ** np.arange(1, 6)
    assert planner.choose(promises, 100).nodes == 6
    assert planner.choose(promises, 1100).nodes < 6


def test_choosing_changes_nothing():
    planner = Planner(replace(costs(), gammas=(1, 3), saved_ms=((1.0, 0.5),)))
    promises = np.array([0.7, 0.5, 0.3])
    for _ in range(20):
        planner.observe(
            context=0, nodes=4, probabilities=promises, accepted=2, streams=True,
            fewer=[promises[:1], promises] if planner.compares(4) else (),
        )  # fmt: skip
    apart = {"_tables": None, "_trust": None, "_gammas": None}
    before = copy.deepcopy([vars(planner) | apart, vars(planner._gammas)])
    assert len({planner.choose(promises, 0) for _ in range(5)}) == 1
    assert len({planner.choose_unseen(0) for _ in range(5)}) == 1
    assert planner.choose_unseen(0) is not None
    planner.compares(4)
    for was, now in zip(before, [vars(planner) | apart, vars(planner._gammas)], strict=True):
        for name, value in was.items():
            assert np.all(value == now[name]), name


def test_the_same_text_is_decoded_in_the_same_way():
    runs = [
        mac.closed_loop(Planner(costs()), costs(), lambda p: mac.geometric(0.6), 300, 3)
        for _ in range(2)
    ]
    assert runs[0] == runs[1]


def test_a_size_is_kept_for_a_small_gain():
    planner = Planner(costs(), sizes=(4, 5))
    short, long = np.array([0.8, 0.6, 0.4]), np.array([0.8, 0.6, 0.4, 0.3])

    def then(promises, nodes):
        copied = copy.deepcopy(planner)
        copied.observe(context=0, nodes=nodes, probabilities=short, accepted=1, streams=True)
        copied._price = 1.0
        return copied.choose(promises, 0).nodes

    assert planner.sizes == (4, 5)
    assert then(np.append(short, 0.06), 4) == 4  # 0.01 tokens more than its 0.05 would pay for
    assert then(np.append(short, 0.06), 5) == 5
    assert then(long, 4) == 5
    assert then(np.append(short, 0.001), 5) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sizes": ()}, "sizes"),
        ({"sizes": (1, 4)}, "sizes"),
        ({"sizes": (4.0,)}, "sizes"),
        ({"sizes": (9, 16)}, "2..8"),
        ({"placements": ()}, "placements"),
        ({"placements": ("above",)}, "placements"),
        ({"placements": ("inline",)}, "inline_ms"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(BadArgument, match=message):
        Planner(costs(), **arguments)


def test_few_sizes_are_used_and_none_beyond_the_measured_rows():
    for name, curve in CURVES.items():
        planner = Planner(mac.costs_of(curve), copies=True)
        assert 1 <= len(planner.sizes) <= 4, name
        assert planner.sizes[-1] <= max(curve["rows"][-1], curve.get("linear_to", 0))
    assert Planner(costs(), sizes=(3,)).sizes == (3,)


def test_streams_that_cannot_pay_are_never_run():
    dear = costs(tuple(1 + 0.9 * (n - 1) for n in ROWS), streams=1.0)
    run = mac.closed_loop(Planner(dear), dear, lambda p: mac.geometric(0.95), 200, 1)
    assert run.cost == run.tokens
    assert not any(step.streams for step in run.steps)


# --- whole texts ---


@pytest.mark.parametrize("streams", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("passes", [FLAT, STEEP])
@pytest.mark.parametrize("says", [0.5, 0.7, 0.9])
def test_random_drafts_are_never_slower(streams, passes, says):
    table, guesses = costs(passes, streams), liar(says)
    run = mac.closed_loop(Planner(table), table, lambda p: guesses, 512, 1)
    assert run.tokens == 512
    assert run.cost <= 512 / 0.97
    tried = sum(step.streams for step in run.steps)
    assert 2 <= tried <= 25  # it looks again, at growing distances


def test_a_trial_verifies_its_draft_however_often_trials_failed():
    table, guesses = costs(FLAT, 0.2), liar(0.7)
    run = mac.closed_loop(Planner(table), table, lambda p: guesses, 4096, 1)
    trials = [second for first, second in pairwise(run.steps) if first.streams and first.place > 99]
    assert len(trials) > 20
    assert all(step.nodes > 1 and not step.streams for step in trials)


DEAR = replace(costs(FLAT, 3.0), gammas=(1, 2), saved_ms=((28.0, 20.0),))


@pytest.mark.parametrize("table", [costs(STEEP, 1.0), costs(STEEP, 0.2), costs(FLAT, 1.0), DEAR])
def test_a_text_made_to_mislead_costs_no_more_than_the_loan(table):
    """Right whenever it is tried, wrong as soon as it is trusted."""
    planner = Planner(table)
    right, wrong = mac.Guesses(np.full((4, 1), 0.9), np.ones((4, 1))), liar(0.9)
    lost = []

    def text(place):
        return wrong if planner.speculating else right

    run = mac.closed_loop(planner, table, text, 2000, 5)
    done, spent = 0, 0.0
    for step in run.steps:
        done += 1 + step.accepted
        spent += mac._cost(table, Choice(step.nodes, step.streams, "deferred", step.gamma), 0)
        lost.append(spent - done - SHARE * done)
    assert max(lost) <= LOAN + 1e-6
    assert sum(step.streams for step in run.steps) > 10


@pytest.mark.parametrize("share", [0.5, 0.3])
def test_overconfident_drafts_are_seen_through(share):
    """Right as often as a fraction of what they say; where that still pays it is used."""
    says = mac.geometric(0.9).says
    guesses = mac.Guesses(says, says * share)
    for passes, streams in ((FLAT, 0.2), (STEEP, 0.5)):
        table = costs(passes, streams)
        planner = Planner(table)
        run = mac.closed_loop(planner, table, lambda p: guesses, 1024, 2)
        assert run.cost <= run.tokens / 0.97
    planner = Planner(costs(FLAT, 0.0))  # streams for nothing: always on, so it learns
    run = mac.closed_loop(planner, planner.costs, lambda p: guesses, 1024, 2)
    size = max(planner.sizes)
    promises = guesses.nodes[1][: size - 1]
    really = promises @ share ** (guesses.nodes[0][: size - 1] >= 0).sum(axis=1)
    expected = planner.expected_tokens(promises, size) - 1
    assert expected == pytest.approx(really, rel=0.35)
    assert expected < 0.7 * promises.sum()


@pytest.mark.parametrize("acceptance", [0.55, 0.7, 0.9])
@pytest.mark.parametrize("name", NEWER)
def test_good_drafts_lose_little_against_always_speculating(name, acceptance):
    table, guesses = mac.costs_of(CURVES[name]), mac.geometric(acceptance)
    texts = range(3)

    def speed(policy):
        runs = [mac.closed_loop(policy(), table, lambda p: guesses, 512, seed) for seed in texts]
        return sum(run.tokens for run in runs) / sum(run.cost for run in runs)

    best = max(speed(lambda n=n: mac.Always(n)) for n in (3, 4, 5, 6))
    assert speed(lambda: Planner(table)) >= 0.98 * best


@pytest.mark.parametrize("acceptance", [0.55, 0.7, 0.9])
@pytest.mark.parametrize("name", NEWER)
def test_three_to_six_rows_on_newer_macs(name, acceptance):
    table, guesses = mac.costs_of(CURVES[name]), mac.geometric(acceptance)
    planner = Planner(table, placements=("deferred", "inline"))
    run = mac.closed_loop(planner, table, lambda p: guesses, 512, 7)
    usual = sum(share for n, share in run.sizes().items() if 3 <= n <= 6)
    assert usual >= 0.9
    assert run.speedup > 1.1
    assert len(set(run.sizes()) - {1}) <= 4
    assert {planner.placement(n, 0) for n in range(3, 7)} == {"deferred"}


@pytest.mark.parametrize("acceptance", [0.55, 0.7, 0.9])
@pytest.mark.parametrize("name", OLDER)
def test_one_to_three_rows_on_older_macs(name, acceptance):
    table, guesses = mac.costs_of(CURVES[name]), mac.geometric(acceptance)
    planner = Planner(table, placements=("deferred", "inline"))
    run = mac.closed_loop(planner, table, lambda p: guesses, 512, 7)
    assert max(run.sizes()) <= 3
    assert run.cost <= run.tokens / 0.97
    assert {planner.placement(n, 0) for n in range(2, 7)} == {"deferred"}


@pytest.mark.parametrize("name", NEWER)
@pytest.mark.parametrize("sure", [True, False])
def test_it_comes_back_when_text_is_predictable_again(name, sure):
    """256 good tokens, 256 bad ones (said with confidence, or doubted), 256 good ones."""
    table, good = mac.costs_of(CURVES[name]), mac.geometric(0.8)
    bad = liar(0.8) if sure else mac.geometric(0.05, second=0.05)
    delays, paused = [], 0
    for seed in range(6):
        run = mac.closed_loop(
            Planner(table), table, lambda p: bad if 256 <= p < 512 else good, 768, seed
        )
        # On trial, streams run behind one pass; behind two in a row, they are in use again.
        both = pairwise([step for step in run.steps if step.place >= 512])
        back = [first.place for first, second in both if first.streams and second.streams]
        delays.append(back[0] - 512 if back else 256)
        paused += sum(not s.streams for s in run.steps if 256 <= s.place < 512)
        assert run.speedup > 1.1
    assert np.mean(delays) <= 30
    assert paused / 6 > 0.6 * 256


def test_drafts_of_changing_worth_beat_every_fixed_size():
    easy = np.random.default_rng(4).beta(2, 1, size=600) * 0.97
    table = mac.costs_of(CURVES["M4 Pro, one 4-bit matrix"])

    def text(place):
        return mac.geometric(float(easy[place]))

    def speed(policy):
        return np.mean([mac.closed_loop(policy(), table, text, 512, s).speedup for s in range(3)])

    sizes = (2, 3, 4, 5, 6, 8)
    assert speed(lambda: Planner(table)) > 1.01 * max(
        speed(lambda n=n: mac.Always(n)) for n in sizes
    )


@pytest.mark.parametrize("streams", [0, 4])
def test_copied_drafts_need_no_streams(streams):
    table = costs(FLAT, 0.6)
    good = mac.Guesses(np.full((7, 1), 0.9), np.full((7, 1), 0.9))
    bad = mac.Guesses(good.says, np.zeros((7, 1)))
    never = liar(0.5)

    def run(copied):
        planner = Planner(table, streams=streams, copies=True)
        return mac.closed_loop(planner, table, lambda p: never, 512, 6, copies=copied)

    assert run(lambda p: good).speedup > 2.0
    assert run(lambda p: bad).cost <= 512 / 0.97
    again = run(lambda p: bad if p < 256 else good)  # they cost nothing to find, so they come back
    assert again.speedup > 1.2


def test_streams_are_left_out_where_copies_do_as_well():
    table, chain = costs(FLAT, 0.6), 0.9 ** np.arange(1, 8)
    shares = []
    for copied in (chain, None):
        planner, streams, ran = Planner(table, copies=True), False, 0
        for _ in range(60):  # both drafts are as good as they say
            wants = planner.wants_streams(0)
            drafted = chain if streams or copied is not None else None
            planner.observe(
                context=0,
                nodes=1 if drafted is None else 8,
                probabilities=drafted,
                accepted=0 if drafted is None else 4,
                from_streams=streams,
                streams=wants,
                copied=copied if streams else None,
            )
            streams, ran = wants, ran + wants
        shares.append(ran / 60)
    assert shares[0] < 0.2  # the copies alone promise the same
    assert shares[1] > 0.9


def test_an_answer_that_ends_while_streams_are_on_trial():
    planner = Planner(costs(FLAT, 0.5))
    promises = np.array([0.8, 0.6])
    for _ in range(40):  # lies until streams pause, then plain tokens until they are tried again
        wants = planner.wants_streams(0)
        trying = wants and not planner.speculating
        drafted = promises if planner.speculating else None
        planner.observe(
            context=0, nodes=3 if wants else 1, probabilities=drafted, accepted=0, streams=wants
        )
        if trying:
            break
    assert trying
    assert not planner.wants_streams(0)  # its draft comes first
    planner.observe(context=0, nodes=1, probabilities=None, accepted=0)
    assert planner.wants_streams(0)  # but the answer ended, and the next one begins


# --- the published curves and what is said about them ---


def test_every_curve_names_its_source():
    assert len(CURVES) == 6
    for curve in CURVES.values():
        assert "#" in curve["source"]
        assert len(curve["rows"]) == len(curve["cost"]) >= 2
        assert mac.costs_of(curve).pass_at(1, 0) == pytest.approx(1.0, abs=0.1)


def test_predictions_are_labelled(tmp_path, monkeypatch, capsys):
    out = tmp_path / "sub" / "predictions.json"
    monkeypatch.setattr(mac, "ACCEPTANCES", (0.55, 0.9))
    argv = ["mac_predictions.py", "--tokens", "96", "--seeds", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", argv)
    mac.main()
    shown = " ".join(capsys.readouterr().out.split())
    assert "PREDICTIONS" in shown
    assert "never measured" in shown
    written = json.loads(out.read_text())
    assert written["kind"] == "prediction"
    assert "never measured" in written["about"]
    assert [c["curve"] for c in written["curves"]] == list(CURVES)
    for curve in written["curves"]:
        low, high = (p["predicted_speedup"] for p in curve["predictions"])
        assert 0.9 < low <= high + 0.05
