"""What rows cost: timed steps become a table, and ``tune`` stores it where the planner looks."""

import gc
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from test_cli import fails, run
from tiny_models import COMMON as SIZES
from tiny_models import CONFIGS, attached, make_model, make_streams, make_tokenizer, quantized

from mlx_specstream.cli.main import main
from mlx_specstream.config import StreamConfig
from mlx_specstream.decode.arrange import make_steering
from mlx_specstream.decode.costs import Costs
from mlx_specstream.decode.costs_here import costs_for, costs_key, default_costs_of
from mlx_specstream.load import load
from mlx_specstream.measure import rows as measuring
from mlx_specstream.measure.rows import check_sizes, measure_costs
from mlx_specstream.model.checkpoint import fingerprint, save_streams
from mlx_specstream.model.seams import attach, seams_of
from mlx_specstream.profile import FOLDER, profile_path, save_profile

SMALL = ["--rows", "1", "2", "--contexts", "7", "20", "--repeats", "1"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(FOLDER, str(tmp_path / "profiles"))
    return tmp_path / "profiles"


# --- whole steps of the real loop ---


class Watch:
    """The rows of every pass that chooses a token and whether streams ran, per context."""

    def __init__(self, monkeypatch):
        self.passes, self.streams = [], 0
        whole, streams = measuring._Probe._launch, measuring._Probe._redraft

        def launch(probe, *args):
            whole(probe, *args)
            tree = probe._flight.verified.tree
            self.passes.append((probe.script, probe.place, tree.size))

        def redraft(probe, flight, accepted, path, wanted):
            self.streams += wanted
            return streams(probe, flight, accepted, path, wanted)

        monkeypatch.setattr(measuring._Probe, "_launch", launch)
        monkeypatch.setattr(measuring._Probe, "_redraft", redraft)


MODELS = {
    "streams": lambda: attached(),
    "one stream": lambda: attached(num_streams=1),
    "streams that the main stream sees": lambda: attached(main_sees_streams=True),
    "streams told their root": lambda: attached(root_rank=7),
    "no streams": lambda: attach(make_model()),
}


@pytest.mark.parametrize("kind", MODELS)
def test_costs_of_a_tiny_model(kind, monkeypatch):
    seams, watch, calls = MODELS[kind](), Watch(monkeypatch), []
    rows, contexts = (1, 3, 20 if kind == "one stream" else 8), (5, 30)
    costs = measure_costs(
        seams, rows=rows, contexts=contexts, repeats=1, progress=lambda *done: calls.append(done)
    )
    assert (costs.rows, costs.contexts, costs.measured) == (rows, contexts, True)
    assert calls == [(n, 4) for n in range(1, 5)]
    assert Costs.from_json(json.loads(json.dumps(costs.to_json()))) == costs
    for table in (
        costs.pass_ms,
        costs.deferred_ms,
        *([costs.inline_ms] if costs.inline_ms else []),
    ):
        assert [len(line) for line in table] == [3, 3]
        assert all(list(line) == sorted(line) for line in table), "more rows never cost less"
    assert costs.plain_ms == tuple(line[0] for line in costs.pass_ms)
    for script, place, size in watch.passes:
        assert size == (script.nodes if place else 1), "another number of rows than was asked for"
    scripts = {(script.streams, script.inline) for script, _, _ in watch.passes}
    if kind == "no streams":
        assert scripts == {(False, False)}
        assert watch.streams == 0
        assert costs.deferred_ms == ((0.0,) * 3,) * 2
        assert costs.inline_ms is None
        return
    assert watch.streams
    if seams.streams.config.main_sees_streams:
        assert scripts == {(False, False), (True, True)}
        assert costs.deferred_ms == costs.inline_ms
    elif seams.streams.config.root_rank:
        assert scripts == {(False, False), (True, False)}
        assert costs.inline_ms is None
    else:
        assert scripts == {(False, False), (True, False), (True, True)}
        assert all(len(set(line)) == 1 for line in costs.deferred_ms)  # of one node, always


def test_what_was_measured_can_be_planned_with(monkeypatch):
    seams = attached()
    costs = measure_costs(seams, rows=(1, 2, 4), contexts=(6,), repeats=1, inline=False)
    assert costs.inline_ms is None
    monkeypatch.setattr("mlx_specstream.decode.arrange.costs_for", lambda _: costs)
    planner = make_steering(seams, True, False, None, None, None).planner
    assert planner.costs is costs
    assert max(planner.sizes) <= 4


# --- from times to a table, with a clock of our own ---


def table_of(monkeypatch, milliseconds, seams, **options):
    """Costs when a step takes ``milliseconds(script, context, number of the step)``."""
    clock = SimpleNamespace(now=5.0)

    class Probe:
        def __init__(self, seams, stores, script):
            self.script, self.context, self.steps = script, stores[0].offset, 0

        def step(self, limit, stop):
            clock.now += 1e-3 * milliseconds(self.script, self.context, self.steps)
            self.steps += 1

    monkeypatch.setattr(measuring, "_Probe", Probe)
    monkeypatch.setattr(measuring, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return measure_costs(seams, **options)


def exactly(script, context, number):
    base = 10 + script.nodes + context / 10
    fewer = 3 - (script.gamma or 3)
    return base + script.streams * (4 + script.inline * script.nodes / 2 - fewer)


def approximately(table):
    return [pytest.approx(line) for line in table]


def test_streams_cost_what_they_add(monkeypatch):
    costs = table_of(
        monkeypatch, exactly, attached(), rows=(1, 2, 16, 24, 48), contexts=(20, 60), repeats=2
    )
    assert list(costs.pass_ms) == approximately([(13, 14, 28, 36, 60), (17, 18, 32, 40, 64)])
    assert list(costs.deferred_ms) == approximately([(4,) * 5] * 2)
    assert costs.gammas == (1, 2)
    assert list(costs.saved_ms) == approximately([(2, 1)] * 2)
    # Beyond 16 nodes inline streams are not timed: they go on at the last price per row.
    assert list(costs.inline_ms) == approximately([(4.5, 5, 12, 18, 36)] * 2)
    assert costs.plain_ms == pytest.approx((13, 17))


def test_slow_moments_and_noise_do_not_count(monkeypatch):
    """The first two steps behind the context, the first round, and every fourth moment."""
    seen = Counter()

    def noisy(script, context, number):
        seen[script] += 1
        slow = number < 2 or seen[script] <= 5 or seen[script] % 4 == 0
        return exactly(script, context, number) + (500 if slow else 0)

    costs = table_of(monkeypatch, noisy, attached(), rows=(1, 2, 8), contexts=(20,), repeats=6)
    assert list(costs.pass_ms) == approximately([(13, 14, 20)])
    assert list(costs.deferred_ms) == approximately([(4, 4, 4)])
    assert list(costs.inline_ms) == approximately([(4.5, 5, 8)])
    assert list(costs.saved_ms) == approximately([(2, 1)])


def test_more_rows_never_cost_less(monkeypatch):
    def odd(script, context, number):
        fewer = {None: 0, 1: -2, 2: 3}[script.gamma]  # one stream seems dearer than two
        return {1: 30, 2: 20, 4: 40, 8: 35}[script.nodes] - script.streams * script.nodes - fewer

    costs = table_of(monkeypatch, odd, attached(), rows=(1, 2, 4, 8), contexts=(9,), repeats=1)
    assert list(costs.pass_ms) == approximately([(30, 30, 40, 40)])
    assert list(costs.deferred_ms) == approximately([(0,) * 4])  # streams cannot gain time
    assert list(costs.inline_ms) == approximately([(0,) * 4])
    assert list(costs.saved_ms) == approximately([(3, 3)])  # fewer streams are never dearer


@pytest.mark.parametrize(
    ("name", "sizes", "least", "words"),
    [
        ("rows", [2, 4], 1, "hold 1 and a larger number; got 2 4"),
        ("rows", [1], 1, "hold 1 and a larger number; got 1"),
        ("rows", [-3, 1], 1, "got -3 1"),
        ("contexts", [64, 0], 1, "be at least 1; got 0 64"),
    ],
)
def test_bad_sizes(name, sizes, least, words):
    with pytest.raises(measuring.BadArgument) as caught:
        check_sizes(name, sizes, least)
    assert str(caught.value).startswith(f"[{name}] must ")
    assert words in str(caught.value)


def test_sizes_are_put_in_order():
    assert check_sizes("rows", [8, 1, 3, 8], 1) == (1, 3, 8)
    assert check_sizes("contexts", [512, 64], 1) == (64, 512)


# --- the command ---


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """The folder of a tiny model, with streams in it."""
    folder, model = tmp_path_factory.mktemp("saved") / "tiny-model", make_model()
    make_tokenizer()._tokenizer.save_pretrained(folder)
    config = {**SIZES, **CONFIGS["llama"], "model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    streams = make_streams(model, StreamConfig(num_streams=3, msa_layers=2, lora_rank=4))
    save_streams(folder / "streams", streams, fingerprint(model), {})
    return folder


def tuned(capsys, *more):
    code, out, err = run(capsys, "tune", *more, *SMALL)
    assert code == 0, err
    # No terminal, so no bar; lines say that it goes on.
    assert "rounds over all sizes: 1 of 4, " in err
    assert "rounds over all sizes: 4 of 4, " in err
    return out


def test_tune_stores_what_generate_uses(capsys, folder, tmp_path, tiny):
    seams = seams_of(load(tiny)[0])
    assert costs_for(seams) == default_costs_of(seams)
    assert not costs_for(seams).measured
    file = tmp_path / "numbers.json"
    out = tuned(capsys, "--model", tiny, "--json", file)

    (path,) = folder.iterdir()
    assert path == profile_path(costs_key(seams))
    assert f"stored in {path}" in out
    costs = costs_for(seams)
    assert costs.measured
    assert (costs.rows, costs.contexts) == ((1, 2), (7, 20))
    assert costs.inline_ms is not None
    assert f"{costs.pass_ms[1][1]:.1f}" in out
    assert "2 rows" in out

    written = json.loads(file.read_text())
    assert set(written) == {"machine", "model", "costs"}
    assert written["model"] == "tiny-model"
    assert Costs.from_json(written["costs"]) == costs
    assert {"cpu", "cores", "device", "blas", "mlx", "mlx-lm"} <= set(written["machine"])

    # The planner of this model, in another process of the user's, would find it.
    model, _ = load(tiny)
    assert make_steering(seams_of(model), True, True, None, None, None).planner.costs == costs
    argv = ["generate", "--model", tiny, "-p", "a5 a17 a3", "-m", "9", "--quiet"]
    code, said, _ = run(capsys, *argv)
    assert code == 0
    assert said == run(capsys, *argv, "--no-streams")[1]


def test_contexts_are_those_that_the_model_reads(capsys, tiny):
    config = json.loads((tiny / "config.json").read_text())
    for longest, expected in ((513, (64, 512)), (512, (64,)), (9, (64,))):
        config["max_position_embeddings"] = longest
        (tiny / "config.json").write_text(json.dumps(config))
        code, _, err = run(capsys, "tune", "--model", tiny, "--rows", "1", "2", "--repeats", "1")
        assert code == 0, err
        assert costs_for(seams_of(load(tiny)[0])).contexts == expected


def test_the_model_alone_has_a_profile_of_its_own(capsys, folder, tiny):
    tuned(capsys, "--model", tiny, "--no-streams")
    alone = attach(load(tiny, streams=False)[0])
    assert costs_for(alone).measured
    assert costs_for(alone).inline_ms is None
    assert not costs_for(seams_of(load(tiny)[0])).measured
    assert len(list(folder.iterdir())) == 1


def test_a_damaged_profile_is_ignored(folder):
    seams = attached()
    key = costs_key(seams)
    costs = measure_costs(seams, rows=(1, 2), contexts=(6,), repeats=1)
    path = save_profile(key, {"costs": costs.to_json()})
    assert costs_for(seams) == costs
    whole = path.read_text()
    data = json.loads(whole)
    broken = [
        whole[:-30],
        "",
        json.dumps({**data, "profile": {}}),
        json.dumps({**data, "profile": {"costs": {**costs.to_json(), "rows": [2, 1]}}}),
        json.dumps({**data, "key": {**key, "machine": "another"}}),
    ]
    for text in broken:
        path.write_text(text)
        assert costs_for(seams) == default_costs_of(seams), text[:60]
    path.write_text(whole)
    assert costs_for(seams) == costs


def test_the_key_tells_apart_what_differs_in_speed(monkeypatch):
    def half():
        seams = attach(make_model())
        seams.model.set_dtype(mx.float16)
        return seams

    makes = [
        lambda: attach(make_model()),
        lambda: attach(make_model("qwen3")),
        lambda: attach(make_model(num_hidden_layers=4)),
        lambda: attach(quantized(make_model())),
        half,
        attached,
        lambda: attached(num_streams=2),
        lambda: attached(main_sees_streams=True),
    ]
    keys = [costs_key(make()) for make in makes]
    assert len({profile_path(key) for key in keys}) == len(makes)
    assert costs_key(attach(make_model(seed=7))) == keys[0]  # another fine-tune is as fast
    monkeypatch.setattr("mlx_specstream.decode.costs_here.os.cpu_count", lambda: 77)
    assert costs_key(makes[0]()) != keys[0]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--rows", "2", "4"], "[rows] must hold 1 and a larger number; got 2 4"),
        (["--rows", "1"], "[rows] must hold 1 and a larger number; got 1"),
        (["--rows", "0", "1", "3"], "[rows] must hold 1 and a larger number"),
        (["--contexts", "0", "9"], "[contexts] must be at least 1; got 0 9"),
        (["--repeats", "0"], "[repeats] must be >= 1, got 0"),
        (["--repeats", "-2"], "got -2"),
        (["--streams", "no/such/folder"], "no/such/folder"),
    ],
)
def test_tune_refuses_in_one_line(capsys, folder, tiny, argv, words):
    assert words in fails(capsys, "tune", "--model", tiny, *argv)
    assert not folder.exists()


def test_numbers_must_be_numbers(capsys, tiny):
    with pytest.raises(SystemExit) as caught:
        main(["tune", "--model", str(tiny), "--rows", "one"])
    assert caught.value.code == 2
    assert "invalid int value: 'one'" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_one_line(capsys, folder, tiny):
    folder.write_text("a file")
    code, _, err = run(capsys, "tune", "--model", tiny, "--no-streams", *SMALL)
    assert code == 2
    assert next(line for line in err.splitlines() if "error:" in line).count(FOLDER) == 1
    assert "Traceback" not in err


def test_memory_does_not_grow_with_the_sizes_that_are_timed():
    """A K/V copy of the context is 400 rows x 5 layers x 2 x 2 heads x 24 x 4 bytes = 0.77 MB."""
    peaks = []
    for rows in ((1, 2), (1, 2), tuple(range(1, 13))):
        gc.collect()
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        measure_costs(attach(make_model()), rows=rows, contexts=(400,), repeats=1)
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[2] < peaks[1] + 1_500_000
