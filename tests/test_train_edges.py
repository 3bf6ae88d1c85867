"""Training at its edges: runs that end where they stopped, slow steps, one mask per batch, odd splits."""

import dataclasses
import math
from types import SimpleNamespace

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from reference import assert_close
from test_cli import fails
from test_eval import folder, results_of, write  # noqa: F401
from test_shared_runs import save_base
from test_targets import HOW, PROMPTS
from test_train_command import check_same
from test_training import write as write_split
from tiny_models import COMMON, attached, make_model, make_tokenizer

from mlx_specstream.config import StreamConfig
from mlx_specstream.errors import BadArgument, BadCheckpoint
from mlx_specstream.model.checkpoint import fingerprint, save_streams
from mlx_specstream.train import trainer as trainer_of
from mlx_specstream.train.answers import answers, settings_of
from mlx_specstream.train.config import FineTune, TrainConfig
from mlx_specstream.train.data import Example
from mlx_specstream.train.health import Health
from mlx_specstream.train.initial import begin_from
from mlx_specstream.train.presets import APART
from mlx_specstream.train.session import held_out, train_streams
from mlx_specstream.train.shared import Destination
from mlx_specstream.train.trainer import CHECKPOINT, Trainer

ROWS = [{"prompt": f"a{n} a9 a3", "completion": f" a7 a{n} a11 a7 a9 a11 a7"} for n in range(5, 17)]
CONFIG = TrainConfig(iters=6, batch_size=2, hosts=3, eval_every=50, save_every=3)
BASE = {**COMMON, "model_type": "llama", "tie_word_embeddings": False}
SHARED = dataclasses.replace(CONFIG, fine_tune=FineTune(3, 3.0))


@pytest.fixture
def rows(tmp_path):
    return write_split(tmp_path / "rows", "train.jsonl", ROWS)


def run(rows, out, config, until=None, root_rank=0, model=None, **options):
    """What a run says of itself; ``until``: it is interrupted behind that step."""

    def report(progress):
        if progress.iteration == until:
            raise KeyboardInterrupt

    ranks = {"lora_rank": 3, "root_rank": root_rank}
    shape, model = StreamConfig(num_streams=2, msa_layers=2, **ranks), model or make_model()
    if config.fine_tune:
        options["fused"] = Destination(out / "model", save_base(model, out.parent / "base"), BASE)
    return train_streams(
        model, make_tokenizer(), rows, out, shape, config, report=report, **options
    )


# --- runs that go on ---


@pytest.mark.parametrize("config", [CONFIG, SHARED])
def test_a_run_may_end_where_it_was_stopped(config, rows, tmp_path):
    """Nobody had validated that step."""
    with pytest.raises(KeyboardInterrupt):
        run(rows, tmp_path / "out", config, until=3)
    about = run(rows, tmp_path / "out", dataclasses.replace(config, iters=3), resume=True)
    assert (about["steps"], about["taken"]) == (3, 3)
    assert about["validation"]["iteration"] == 3


def test_values_of_an_earlier_patience_are_not_taken(rows, tmp_path):
    patient = dataclasses.replace(SHARED, patience=3, eval_every=1)
    with pytest.raises(KeyboardInterrupt):
        run(rows, tmp_path / "out", patient, until=3)
    often = dataclasses.replace(SHARED, eval_every=1)
    about = run(rows, tmp_path / "out", often, resume=True)
    assert about["taken"] == 6
    run(rows, tmp_path / "whole", often)
    check_same(tmp_path / "out", tmp_path / "whole")


def test_patience_cannot_begin_where_no_values_were_kept(rows, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(rows, tmp_path / "out", dataclasses.replace(SHARED, eval_every=1), until=3)
    patient = dataclasses.replace(SHARED, eval_every=1, patience=2)
    with pytest.raises(BadCheckpoint, match="was made without --patience"):
        run(rows, tmp_path / "out", patient, resume=True)
    with pytest.raises(KeyboardInterrupt):  # lossless runs always keep them
        run(rows, tmp_path / "lossless", dataclasses.replace(CONFIG, eval_every=1), until=3)
    patient = dataclasses.replace(CONFIG, eval_every=1, patience=9)
    assert run(rows, tmp_path / "lossless", patient, resume=True)["steps"] == 6


@pytest.mark.parametrize("ranks", [(4, 0), (0, 4)], ids=str)
def test_a_run_goes_on_with_the_root_it_began_with(ranks, rows, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(rows, tmp_path / "out", CONFIG, until=3, root_rank=ranks[0])
    line = f"was made with root_rank = {ranks[0]}, not {ranks[1]}"
    with pytest.raises(BadCheckpoint, match=line):
        run(rows, tmp_path / "out", CONFIG, resume=True, root_rank=ranks[1])
    assert run(rows, tmp_path / "out", CONFIG, resume=True, root_rank=ranks[0])["steps"] == 6


def test_a_resumed_run_knows_how_good_it_was(rows, tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        run(rows, tmp_path / "out", dataclasses.replace(CONFIG, iters=18), until=15)
    least = []
    real = Health.check_progress

    def look(self, iteration, loss):
        least.append(self.least)
        real(self, iteration, loss)

    monkeypatch.setattr(Health, "check_progress", look)
    run(rows, tmp_path / "out", dataclasses.replace(CONFIG, iters=18), resume=True)
    assert all(map(math.isfinite, least))


def test_slow_steps_are_saved_by_the_clock(rows, tmp_path, monkeypatch):
    slow = dataclasses.replace(CONFIG, save_every=100)
    for after, saved in ((300.0, False), (0.0, True)):
        monkeypatch.setattr(trainer_of, "SAVE_AFTER", after)
        out = tmp_path / str(saved)
        with pytest.raises(KeyboardInterrupt):
            run(rows, out, slow, until=2)
        assert (out / CHECKPOINT).exists() == saved


def test_advice_names_what_was_saved():
    health = Health(1e-3)
    assert "--resume" not in health.advice()
    health.saved = 4000
    assert "--resume --iters 4000" in health.advice()


def test_a_run_goes_on_with_its_own_adapters_and_draft_vocabulary(rows, tmp_path):
    """They are in no fingerprint, and a forgotten option would change what is trained."""

    def adapted(value):
        model = make_model()
        linear_to_lora_layers(model, 2, {"rank": 2, "scale": 2.0, "dropout": 0.0})
        for layer in model.layers[-2:]:
            layer.self_attn.q_proj.lora_b = mx.full(layer.self_attn.q_proj.lora_b.shape, value)
            layer.self_attn.q_proj.lora_a = mx.ones_like(layer.self_attn.q_proj.lora_a)
        return model

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(rows, out, CONFIG, until=4, model=adapted(0.1), draft_vocabulary=6)
    for options, says in (
        ({"draft_vocabulary": 6}, "with other adapters"),
        ({"model": adapted(0.2), "draft_vocabulary": 6}, "with other adapters"),
        ({"model": adapted(0.1)}, "of another --draft-vocabulary"),
        ({"model": adapted(0.1), "draft_vocabulary": 4}, "of another --draft-vocabulary"),
    ):
        with pytest.raises(BadCheckpoint, match=says):
            run(rows, out, CONFIG, resume=True, **options)
    about = run(rows, out, CONFIG, resume=True, model=adapted(0.1), draft_vocabulary=6)
    assert about["steps"] == CONFIG.iters


def test_a_dry_run_of_a_resumed_self_distillation(rows, tmp_path):
    """Its rows are those of before, not a few answers again and again."""
    how = dataclasses.replace(HOW, cache=tmp_path / "answers")
    with pytest.raises(KeyboardInterrupt):
        run(rows, tmp_path / "out", CONFIG, until=3, self_distill=how)
    notes = []
    options = {"self_distill": how, "dry_run": True, "resume": True, "note": notes.append}
    run(rows, tmp_path / "out", CONFIG, **options)
    assert "resumed at step 3" in notes
    other = write_split(tmp_path / "other", "train.jsonl", ROWS[1:])
    with pytest.raises(BadCheckpoint, match="of other data"):
        run(other, tmp_path / "out", CONFIG, **options)


def test_a_dry_run_says_what_the_cache_will_take(rows, tmp_path):
    notes, cache = [], tmp_path / "not/there/yet"
    run(rows, tmp_path / "out", CONFIG, cache_hidden=cache, dry_run=True, note=notes.append)
    (line,) = [line for line in notes if "hidden states of" in line]
    assert line.endswith("not made yet: steps are timed without")
    assert not (tmp_path / "not").exists()
    run(rows, tmp_path / "out", CONFIG, cache_hidden=cache)
    notes.clear()
    run(rows, tmp_path / "out", CONFIG, cache_hidden=cache, dry_run=True, note=notes.append)
    assert not [line for line in notes if "hidden states of" in line]


# --- streams that begin as others ---


@pytest.mark.parametrize(("old", "new"), [(2, 3), (3, 1)])
def test_lora_goes_to_its_layer_at_its_strength(old, new, tmp_path):
    theirs = attached(msa_layers=old, root_rank=5, condition_rank=4)
    save_streams(tmp_path, theirs.streams, fingerprint(theirs.model), {})
    seams = attached(msa_layers=new, root_rank=5, condition_rank=4, lora_alpha=2.0)
    before = dict(tree_flatten(seams.streams.parameters()))
    before |= {"root.c": mx.random.normal(before["root.c"].shape)}
    seams.streams.root.c = before["root.c"]
    begin_from(tmp_path, seams)
    streams = seams.streams
    assert mx.array_equal(streams.condition.c, theirs.streams.condition.c)
    assert mx.array_equal(streams.root.c, before["root.c"]), "it reads another layer's states"
    for layer in range(new):
        same = layer + old - new
        mine, lora = streams.lora[layer]["q_proj"], theirs.streams.lora
        if same < 0:
            assert mx.array_equal(mine.a, before[f"lora.{layer}.q_proj.a"])
            continue
        update = lambda s, pair: s.config.lora_scale * (pair.a @ pair.b)  # noqa: E731
        want = update(theirs.streams, lora[same]["q_proj"])
        assert_close(update(streams, mine), np.array(want), 1e-5)


@pytest.mark.parametrize("streams", [2, 3, 5])
@pytest.mark.parametrize("new", [True, False], ids=["to one map", "to a map each"])
@pytest.mark.parametrize("old", [True, False], ids=["one map", "a map each"])
def test_the_correction_by_the_token_before_goes_on_whole_or_not_at_all(
    old, new, streams, tmp_path
):
    theirs = attached(condition_rank=4, condition_shared=old)  # of three streams
    theirs.streams.condition.d = mx.random.normal((3, 1, 4))
    save_streams(tmp_path, theirs.streams, fingerprint(theirs.model), {})
    seams = attached(condition_rank=4, condition_shared=new, num_streams=streams)
    for name in "abc":
        seams.streams.condition[name] = mx.random.normal(seams.streams.condition[name].shape)
    fresh = dict(tree_flatten(seams.streams.condition.parameters()))
    begin_from(tmp_path, seams)
    told, before = seams.streams.condition, theirs.streams.condition
    if not old and (new or streams != 3):
        assert all(mx.array_equal(told[name], fresh[name]) for name in "abcd")
        return
    E = before.c.shape[1]
    mx.random.seed(4)
    hidden, token = mx.random.normal((streams, 2, E)), mx.random.normal((streams, 2, E))
    both = min(3, streams)
    assert_close(told(hidden, token)[:both], np.array(before(hidden[:both], token[:both])), 1e-5)
    assert all(mx.array_equal(d, before.d[2]) for d in told.d[3:])


# --- answers ---


@pytest.mark.parametrize("batch_size", [2, 3])  # two K/V heads, too
def test_one_mask_per_batch_is_one_prompt_at_a_time(batch_size, tmp_path):
    model, tokenizer = make_model("gemma2"), make_tokenizer()
    how = dataclasses.replace(HOW, batch_size=batch_size)
    found = answers(model, tokenizer, PROMPTS, how, tmp_path, 11)
    for prompt, ids in zip(PROMPTS, found, strict=True):
        limit = min(7, 11 - len(prompt))
        said = mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=limit)
        assert ids == [r.token for r in said]


def test_greedy_answers_are_the_same_for_every_seed():
    other = dataclasses.replace(HOW, seed=5)
    assert settings_of(other) == settings_of(HOW)
    drawn = dataclasses.replace(HOW, temperature=0.5)
    assert settings_of(dataclasses.replace(other, temperature=0.5)) != settings_of(drawn)


# --- what is held out ---


def test_texts_that_are_alike_are_on_one_side():
    texts = [Example([5 + n % 20, 7, 8, 0], 0) for n in range(60)]
    train, valid = held_out(texts)
    assert len(valid) == 3
    assert not {tuple(e.tokens) for e in valid} & {tuple(e.tokens) for e in train}
    same = [Example([5, 9, n % 10, 8, 0], 2) for n in range(200)]  # one prompt, few answers
    train, valid = held_out(same)
    assert valid
    assert not {tuple(e.tokens) for e in valid} & {tuple(e.tokens) for e in train}


def test_a_prompt_with_most_of_the_rows_is_not_held_out():
    once, often = Example([5, 6, 7, 8], 2), [Example([9, 10, n, 8], 2) for n in range(60)]
    for rows in ([once, *often], [*often, once]):
        train, valid = held_out(rows)
        assert valid == [once]
        assert len(train) == 60


# --- eval ---


def test_rows_without_an_answer_have_no_quality(capsys, folder, tmp_path):  # noqa: F811
    prose = [{"prompt": "a5 a6", "completion": "a7 a8."}, {"text": "a5 a6 a7"}]
    rows = write(tmp_path / "p.jsonl", prose)
    results = results_of(folder, rows, tmp_path, "--no-streams")
    assert results["metrics"] == []
    assert "no quality: 1 of 2 rows have no answer to compare with" in capsys.readouterr().out


# --- the command ---


def test_undo_trains_nothing(capsys, tmp_path):
    line = fails(capsys, "train", "--model", tmp_path, "--undo", "--from-log", tmp_path / "log")
    assert "[undo]" in line
    line = fails(capsys, "train", "--model", tmp_path, "--undo", "--dry-run")
    assert "leave 'dry_run' out" in line


@pytest.mark.parametrize(
    ("more", "name"),
    [
        (["--num-layers", "3"], "num_layers"),
        (["--dequantize"], "dequantize"),
        (["--preset", "best"], "preset"),
        (["--self-distill-temperature", "1"], "self_distill_temperature"),
        (["--ignore-chat-template"], "ignore_chat_template"),
    ],
)
def test_a_log_takes_no_options_that_it_would_ignore(capsys, tmp_path, more, name):
    line = fails(capsys, "train", "--model", tmp_path, "--from-log", tmp_path / "log", *more)
    assert f"[{name}] has no place beside --from-log" in line


def test_steps_or_minutes(capsys, tmp_path):
    run = ["train", "--model", tmp_path, "--data", tmp_path, "--streams", tmp_path / "s"]
    line = fails(capsys, *run, "--iters", "3", "--minutes", "1")
    assert "--iters steps or --minutes of time, not both" in line
    with pytest.raises(BadArgument, match="without 'minutes'"):
        TrainConfig(eval_every=None)


def test_a_run_by_the_clock_validates_by_the_clock():
    """As many validations as asked for, whatever a step takes, with some steps between two."""
    config = TrainConfig(minutes=1.0, eval_every=None, validations=4)
    run = SimpleNamespace(config=config, history=[{"iteration": 0}])

    def when(seconds: float) -> list[int]:
        """Steps of so many seconds behind which there is one, until the minute is over."""
        run.history, run.validated, found = run.history[:1], 0.0, []
        for run.iteration in range(1, int(60 / seconds) + 1):
            run.seconds = run.iteration * seconds
            if Trainer.validation_is_due.fget(run):
                found.append(run.iteration)
                run.history.append({"iteration": run.iteration})
                run.validated = run.seconds
        return found

    assert when(0.1) == [150, 300, 450, 600]
    assert when(0.5) == [30, 60, 90, 120]
    assert when(2.0) == [APART]


def test_a_model_cannot_be_fused_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "model"):
        with pytest.raises(BadArgument, match=r"'fused_path' .* cannot be written"):
            Destination(path, tmp_path, {})
    Destination(tmp_path / "new" / "model", tmp_path, {})
