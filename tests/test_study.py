"""The study's scripts: heads as a baseline, runs that can be killed, tables and curves."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from reference import assert_close
from tiny_models import make_model, make_tokenizer

STUDY = Path(__file__).resolve().parents[1] / "benchmarks/paper"
sys.path.append(str(STUDY))

import headline  # noqa: E402
import medusa  # noqa: E402
import study  # noqa: E402
import train_all  # noqa: E402
from train_all import LOSSLESS  # noqa: E402

from mlx_specstream.config import StreamConfig  # noqa: E402
from mlx_specstream.decode.costs import Costs  # noqa: E402
from mlx_specstream.generate import stream_generate  # noqa: E402
from mlx_specstream.measure.evaluate import replayed  # noqa: E402
from mlx_specstream.model.streams import Streams  # noqa: E402
from mlx_specstream.train.config import TrainConfig  # noqa: E402
from mlx_specstream.train.data import Example  # noqa: E402
from mlx_specstream.train.trainer import Trainer  # noqa: E402

spec = importlib.util.spec_from_file_location("study_curves", STUDY / "curves.py")
curves = importlib.util.module_from_spec(spec)  # tests/ has a file of this name, too
spec.loader.exec_module(curves)
PROMPT = [5, 9, 13, 2, 7]


def with_heads(shared_head: bool, number: int = 3, spread: float = 0.4):
    """A small model whose heads are all different."""
    model = make_model()
    heads = medusa.Heads(model, number, shared_head)
    mx.random.seed(4)
    heads.update(
        {n: v + spread * mx.random.normal(v.shape) for n, v in tree_flatten(heads.parameters())}
    )
    return medusa.MedusaSeams(model, heads)


@pytest.mark.parametrize("shared_head", [False, True])
def test_heads_compute_what_the_paper_says(shared_head):
    seams = with_heads(shared_head)
    model, heads = seams.model, seams.streams
    last = np.array(model.model(mx.array([PROMPT]))[0], np.float64)  # behind the final norm
    want = []
    for j in range(3):
        inside = last @ np.array(heads.w[j], np.float64) + np.array(heads.b[j], np.float64)
        x = last + inside / (1 + np.exp(-inside))
        matrix = medusa.head_matrix(model).T if shared_head else heads.u[j]
        want.append(x @ np.array(matrix, np.float64))
    hidden, stores = medusa_pass(seams)
    run = seams.run_streams(hidden, mx.arange(5)[None], mx.array([PROMPT]), stores)
    got = seams.head(run.last_hidden)[0].reshape(3, 5, -1)
    assert_close(got, np.stack(want), 1e-5)


def medusa_pass(seams):
    from mlx_specstream.train.passes import base_pass

    return base_pass(seams, mx.array([PROMPT]))


@pytest.mark.parametrize("shared_head", [False, True])
def test_heads_draft_for_the_decoder_and_the_replay_alike(shared_head):
    tokenizer = make_tokenizer(ends=False)
    plain = stream_generate(make_model(), tokenizer, PROMPT, max_tokens=24)
    answer = [r.token for r in plain]
    assert len(answer) == 24
    seams = with_heads(
        shared_head, spread=0.01
    )  # says the next token once more, which is right at times
    got = list(stream_generate(seams.model, tokenizer, PROMPT, max_tokens=24, tree="best:9"))
    assert [r.token for r in got] == answer
    found = replayed(seams, [PROMPT], [answer], ["best:9"], tokenizer.eos_token_ids)
    assert 6 < got[-1].passes < 18  # some guesses are right, some are not
    assert found["best:9"]["tokens_per_pass"] == pytest.approx(23 / got[-1].passes)


def test_heads_learn_and_the_base_does_not(tmp_path):
    seams = medusa.MedusaSeams(make_model(), medusa.Heads(make_model(), 2, False))
    before = {n: np.array(v) for n, v in tree_flatten(seams.model.parameters())}
    rows = [Example([3 + (n + 5 * k) % 20 for k in range(12)], 3) for n in range(8)]
    trainer = Trainer(seams, TrainConfig(iters=30, learning_rate=0.02, hosts=6), tmp_path)
    losses = []
    trainer.run(rows, rows[:2], lambda p: losses.append(sum(p.losses)))
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    for name, value in tree_flatten(seams.model.parameters()):
        assert np.array_equal(np.array(value), before[name]), name


def test_a_run_is_made_once_and_goes_on_after_a_kill(tmp_path):
    script = tmp_path / "fake.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nout = Path(sys.argv[1])\n"
        "kept = out / 'checkpoint.safetensors'\n"
        "(out / 'log').open('a').write(' '.join(sys.argv[2:]) + ';')\n"
        "sys.exit(kept.write_text('') and 0 or 9) if not kept.exists() else None\n"
        "(out / 'made').write_text('')\n"
    )
    run = study.Run(
        tmp_path / "run", [sys.executable, str(script), str(tmp_path / "run")], "made", 1
    )
    with pytest.raises(SystemExit, match=r"train\.log"):  # killed after its checkpoint
        study.finish([run])
    for _ in range(2):
        study.finish([run])
    assert (tmp_path / "run/log").read_text() == ";--resume;"
    other = study.Run(run.folder, [*run.command, "--seed", "1"], "made", 1)
    with pytest.raises(SystemExit, match="another command"):
        study.finish([other])
    (run.folder / study.COMMAND).unlink()  # nobody knows what made it
    with pytest.raises(SystemExit, match="another command"):
        study.finish([run])
    lost = study.Run(tmp_path / "x", run.command, "made", 1, needs=[tmp_path / "nothing"])
    with pytest.raises(SystemExit, match="nothing is missing"):
        study.finish([lost])


@pytest.mark.parametrize(("row", "most"), [("small", 50_000), ("best", 1_000_000)])
def test_rows_are_as_small_as_they_say(row, most):
    shapes = {**dict.fromkeys(("q_proj", "o_proj"), (384, 384)), "down_proj": (1024, 384)}
    shapes |= dict.fromkeys(("k_proj", "v_proj"), (384, 128))
    shapes |= dict.fromkeys(("gate_proj", "up_proj"), (384, 1024))
    config = StreamConfig(**LOSSLESS[row])
    streams = Streams(config, 384, [shapes] * config.msa_layers)
    assert most / 2 < sum(v.size for _, v in tree_flatten(streams.parameters())) <= most


@pytest.mark.parametrize(
    ("row", "about"),
    [("best", "train.json"), ("medusa", "medusa.json"), ("draft-model", "training.json")],
)
def test_other_seeds_make_as_many_steps_as_a_finished_one(
    tmp_path, monkeypatch, capsys, row, about
):
    def dry(*options):
        command = ["--work", str(tmp_path), "--base", "m", "--tasks", "e2e", "--rows", row]
        monkeypatch.setattr(sys, "argv", ["train_all.py", *command, *options, "--dry-run"])
        train_all.main()
        return capsys.readouterr().out

    first = train_all.folder_of(row, "e2e", tmp_path.resolve(), 3)
    with pytest.raises(SystemExit, match=r"3 .* is not finished"):
        dry("--seeds", "4", "--steps-of", "3")
    first.mkdir(parents=True)
    (first / about).write_text(json.dumps({"steps": 12, "finished": False}))  # killed, say
    with pytest.raises(SystemExit, match=r"3 .* is not finished"):
        dry("--seeds", "4", "--steps-of", "3")
    with pytest.raises(SystemExit):  # it would be trained once more
        dry("--seeds", "3", "4", "--steps-of", "3")
    (first / about).write_text(json.dumps({"steps": 123}))
    shown = dry("--seeds", "4", "5", "--steps-of", "3")
    assert shown.startswith("2 runs\n")
    assert shown.count("--iters 123") == 2
    assert "--minutes" not in shown
    assert "--minutes 7.0" in dry("--seeds", "4", "--minutes", "7")
    with pytest.raises(SystemExit):
        dry("--minutes", "7", "--steps-of", "3")


def test_flags():
    flags = study.as_flags(lora_rank=4, lora_targets=["q", "v"], shared=True, none=None, off=False)
    assert flags == ["--lora-rank", "4", "--lora-targets", "q", "v", "--shared"]
    assert len(curves.points()) > 30
    assert curves.point_of({"num_streams": 4}) == "default"


def way(speed, tokens, same=9):
    return {"speedup": {"median": speed}, "tokens_per_pass": tokens, "identical": same, "of": 10}


def test_the_headline_table():
    quality = {
        "plain": {"exact": 41.0},
        "a, planned": {"exact": 42.0},
        "a, best:32": {"exact": 43.0},
    }
    summary = {"plain": way(1.0, 1.0), "a, planned": way(1.6, 2.5), "a, best:32": way(1.4, 3.1)}
    draft = {"draft-model, 2": way(0.9, 1.9), "draft-model, 3": way(0.8, 2.2)}
    group = {
        "parameters": {"a": 47120, "draft-model": 900000},
        "summary": {"own": {**summary, **draft}},
        "quality": {**quality, **{w: {"exact": 41.0} for w in draft}},
    }
    other = {**group, "summary": {"own": {**summary, "a, planned": way(1.8, 2.5), **draft}}}
    lines = headline.table("t", [{"groups": {"lossless": g}} for g in (group, other)]).splitlines()
    assert len(lines) == 5
    assert lines[3] == "| a | 47,120 | 3.10 | 2.50 | 1.70x (1.60x-1.80x) | 42.0 | 90% |"
    assert lines[4].startswith("| draft-model | 900,000 | 2.20 | 1.90 | 0.90x |")


def test_this_machine_is_timed_once_for_streams_of_one_shape(tmp_path, monkeypatch):
    monkeypatch.setattr(curves, "load_stock", lambda path: (make_model("llama"), None))
    monkeypatch.setattr(curves, "COSTS", {"rows": (1, 3), "contexts": (6,), "repeats": 1})
    known = {"geometry": "known", "config": None}
    new = {"geometry": "g2", "config": {"num_streams": 2, "msa_layers": 1, "lora_rank": 3}}
    found = {"costs": {"known": 5}, "tasks": {"e2e": {"a": known, "b": new}, "sqlctx": {"c": new}}}
    study.save_json(tmp_path / curves.RESULT, found)
    curves.time_machine(SimpleNamespace(base=tmp_path, results=tmp_path))
    after = study.read_json(tmp_path / curves.RESULT)
    assert after["tasks"] == found["tasks"]
    assert after["costs"].pop("known") == 5
    assert list(after["costs"]) == ["g2"]
    assert Costs.from_json(after["costs"]["g2"]).rows == (1, 3)
    assert after["timed on"]["mlx"]


def test_passes_of_all_geometries_are_one_measurement():
    """A slow moment, here that of c, changes nothing: streams count in plain tokens of their moment."""
    timed = {
        name: Costs((1, 9), (5,), ((p, 3 * p),), ((d, d + 1),), None, (plain,), True).to_json()
        for name, plain, p, d in (
            ("a", 8.0, 10.0, 4.0),
            ("b", 8.0, 9.0, 2.0),
            ("c", 16.0, 20.0, 6.0),
        )
    }
    found = curves.pooled(timed)
    assert {(c.plain_ms, c.pass_ms) for c in found.values()} == {((8.0,), ((10.0, 30.0),))}
    deferred = {name: c.deferred_ms for name, c in found.items()}
    assert deferred == {"a": ((4.0, 5.0),), "b": ((2.0, 3.0),), "c": ((3.0, 3.5),)}


def test_predicted_speeds_and_pages(tmp_path):
    costs = Costs((1, 9), (0,), ((10.0, 26.0),), ((4.0, 4.0),), None, (8.0,), True)
    trees = {
        tree: {"tokens_per_pass": 3.0, "nodes_per_pass": 5.0}
        for tree in (*curves.TREES, *curves.CARTESIAN.values())
    }
    point = {
        **{"trees": trees, "geometry": "g", "parameters": 7, "steps": 5, "prompts": 2},
        "config": {"msa_layers": 1, "num_streams": 4},
    }
    # a pass of five nodes takes 18 ms, streams 4 more, a plain token 8
    assert curves.speeds(point, costs, 0)["chain"] == pytest.approx(3.0 * 8 / 22)
    rows = dict.fromkeys(curves.points(), point)
    rows["prune_rank=8"] = {**point, "pruned": {"best:32": {"all": 3.0, "8": 2.5}}}
    found = {"costs": {"g": costs.to_json()}, "tasks": {"e2e": rows, "sqlctx": {"default": point}}}
    collected = curves.collect(found)
    there = collected["e2e"]["gamma"][2]["predicted"]["this machine"]
    assert there["tokens_per_second"] == pytest.approx(3.0 * 1000 / 22)
    curves.plot(collected, tmp_path)
    page = (tmp_path / "curves.md").read_text()
    pictures = list((tmp_path / "curves").glob("*.svg"))
    assert len(pictures) == page.count("](curves/") == len(collected["e2e"])
    for picture in pictures:  # as a browser reads it
        root = ElementTree.fromstring(picture.read_text())
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert next(iter(root)).tag.endswith("style")
    assert "| e2e | all | 3.00 |" in page
    assert "| e2e | 8 | 2.50 |" in page
