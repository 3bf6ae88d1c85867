"""Temperatures of the streams, and an early-exit head that is trained when the streams are finished."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from reference import assert_close
from test_train_command import base, command, data, record, run  # noqa: F401
from tiny_models import attached, make_model

from mlx_specstream.decode.choose import Greedy
from mlx_specstream.decode.step import Said, guesses_of
from mlx_specstream.errors import BadCheckpoint
from mlx_specstream.load import load
from mlx_specstream.model.checkpoint import (
    fingerprint,
    load_streams,
    read_description,
    save_streams,
)
from mlx_specstream.model.seams import attach, seams_of
from mlx_specstream.train.calibration import fit_temperatures
from mlx_specstream.train.data import Example, make_batch
from mlx_specstream.train.loss import given_text
from mlx_specstream.train.passes import run_batch

rng = np.random.default_rng(5)
EXAMPLES = [Example([*rng.integers(1, 60, 9 + k).tolist(), 0], 2) for k in range(5)]


def batches(num_streams=3):
    return [
        make_batch([e], [np.array(e.hosts()[: 4 + k])], num_streams) for k, e in enumerate(EXAMPLES)
    ]


def teacher_forced(seams):
    """Of every stream the logits [n, V] and the targets [n] of its hosts, float64."""
    found = [([], []) for _ in range(3)]
    for batch in batches():
        hosts, tokens = mx.array(batch.hosts), mx.array(batch.tokens)
        hidden = given_text(seams, run_batch(seams, batch).streams, tokens, hosts)
        logits = np.array(seams.head(hidden), np.float64)[0]
        P = batch.hosts.shape[1]
        for j in range(3):
            for p in range(P):
                if batch.targets[0, j, p] >= 0:
                    found[j][0].append(logits[j * P + p])
                    found[j][1].append(batch.targets[0, j, p])
    return [(np.array(x), np.array(y)) for x, y in found]


def nll(logits, targets, temperature):
    z = logits / temperature
    z = z - z.max(axis=-1, keepdims=True)
    return np.mean(np.log(np.exp(z).sum(axis=-1)) - z[np.arange(len(z)), targets])


@pytest.mark.parametrize("ranks", [{}, {"condition_rank": 5}, {"root_rank": 7}], ids=str)
def test_temperatures_are_the_best_of_a_fine_grid(ranks):
    """The streams guess the text (the head is turned toward it), too sure or not sure enough."""
    seams = attached(**ranks)
    seams.model.lm_head.weight = 0.1 * seams.model.lm_head.weight
    found, about = fit_temperatures(seams, batches())
    assert found.dtype == np.float32
    grid = np.exp(np.linspace(np.log(0.25), np.log(4), 1601))
    for j, (logits, targets) in enumerate(teacher_forced(seams)):
        losses = [nll(logits, targets, t) for t in grid]
        assert_close(np.log(found[j] + 1), np.log(grid[np.argmin(losses)] + 1), 2e-3, f"{j}")
        assert_close(np.array(about["loss"][j]), np.array(nll(logits, targets, 1.0)), 1e-5)
        assert_close(np.array(about["calibrated_loss"][j]), np.array(min(losses)), 1e-5)


def test_a_stretched_head_asks_for_the_stretch():
    """Logits three times as large want temperatures three times as high."""
    seams = attached()
    seams.model.lm_head.weight = 0.05 * seams.model.lm_head.weight
    once, _ = fit_temperatures(seams, batches())
    inside = (once > 0.26) & (once < 1.3)
    seams.model.lm_head.weight = 3 * seams.model.lm_head.weight
    thrice, _ = fit_temperatures(seams, batches())
    assert_close(thrice[inside], 3 * once[inside], 1e-3)


def test_kept_in_a_streams_folder(tmp_path):
    seams = attached()
    old = save(tmp_path / "old", seams)
    assert "calibration" not in json.loads((old / "streams.json").read_text())
    assert load_streams(old, seams.model)[0].temperatures is None
    seams.streams.temperatures = np.array([0.5, 1.25, 2.0], np.float32)
    new = save(tmp_path / "new", seams)
    assert load_streams(new, seams.model)[0].temperatures.tolist() == [0.5, 1.25, 2.0]
    text = (new / "streams.json").read_text()
    for wrong in ({}, [1], {"temperatures": [1, 2]}, {"temperatures": [1, 2, 0]},
                  {"temperatures": [1, 2, float("nan")]}, {"temperatures": "abc"}, None):  # fmt: skip
        description = {**json.loads(text), "calibration": wrong}
        (new / "streams.json").write_text(json.dumps(description))
        with pytest.raises(BadCheckpoint, match=r"streams\.json is damaged"):
            load_streams(new, seams.model)


def save(folder, seams):
    save_streams(folder, seams.streams, fingerprint(seams.model), {})
    return folder


def test_guesses_are_those_of_the_cooled_logits():
    seams = attached(num_streams=2)
    logits = mx.random.normal((2, 67)) * 4
    heat = np.array([0.5, 3.0], np.float32)
    plain = guesses_of(seams, Said(logits, None), Greedy(), 67, 0)
    seams.streams.temperatures = heat
    found = guesses_of(seams, Said(logits, None), Greedy(), 67, 0)
    assert found.tokens.tolist() == plain.tokens.tolist()  # ranks within a stream stay
    want = np.array(logits, np.float64) / heat[:, None]
    want = want - np.log(np.exp(want).sum(-1, keepdims=True))
    want = np.take_along_axis(want, np.array(found.tokens), axis=-1)
    assert_close(found.logprobs, want, 1e-5)


# --- the early exit, after the streams ---


@pytest.mark.parametrize("root", [[], ["--root-rank", "5"]], ids=str)
def test_a_pruning_head_is_trained_for_finished_streams(base, data, tmp_path, capsys, root):  # noqa: F811
    out, plain = tmp_path / "out", ["--iters", "6", "--eval-every", "3", *root]
    assert run(capsys, *command(base, data, out, *plain))[0] == 0
    before = mx.load(str(out / "streams.safetensors"))
    calibration = json.loads((out / "streams.json").read_text())["calibration"]
    argv = ["train", "--model", base, "--data", data, "--streams", out, "--only", "pruning"]
    argv += ["--learning-rate", "0.02", "--batch-size", "2", "--hosts", "4"]
    code, err = run(capsys, *argv, "--iters", "30", "--eval-every", "15")
    assert code == 0, err
    assert "1,024 of them trained" in err  # rank 8 of width 64, twice
    after = mx.load(str(out / "streams.safetensors"))
    assert set(after) - set(before) == {"early_exit.a", "early_exit.b"}
    for name, value in before.items():
        assert np.array_equal(np.array(value), np.array(after[name])), name
    description = read_description(out)
    assert description["config"].prune_rank == 8
    assert json.loads((out / "streams.json").read_text())["calibration"] == calibration
    history = record(out)["history"]
    assert history[-1]["exit_loss"][0] < 0.7 * history[0]["exit_loss"][0]
    assert history[-1]["loss"] == pytest.approx(history[0]["loss"])
    assert main_generates(capsys, base, out)
    # Elsewhere, and at another rank.
    code, err = run(
        capsys, *argv[:6], tmp_path / "other", *argv[7:], "--begin-from", out, "--prune-rank", "3",
        "--iters", "2", "--target", "distill",
    )  # fmt: skip
    assert code == 0, err
    assert read_description(tmp_path / "other")["config"].prune_rank == 3
    code, err = run(capsys, *argv, "--iters", "2", "--lora-rank", "7")
    assert code == 2
    assert "'lora_rank' cannot change with --only" in err


def main_generates(capsys, base, streams):  # noqa: F811
    """With the pruning that the head allows, the text of plain decoding."""
    from mlx_specstream import generate
    from mlx_specstream.decode.prune import PruneRule

    model, tokenizer = load(base, streams=streams)
    assert seams_of(model).streams.config.prune_rank
    options = {"max_tokens": 12, "tree": "best:8", "prune": PruneRule(keep=4)}
    want = generate(model, tokenizer, "a5 a6", max_tokens=12, use_streams=False)
    return generate(model, tokenizer, "a5 a6", **options) == want


def test_a_run_begins_with_the_shape_of_its_streams(base, data, tmp_path, capsys):  # noqa: F811
    """--begin-from without a shape keeps it, the draft vocabulary and all."""
    first, second = tmp_path / "first", tmp_path / "second"
    more = ["--iters", "2", "--draft-vocabulary", "9", "--lora-alpha", "3", "--root-rank", "5"]
    assert run(capsys, *command(base, data, first, *more))[0] == 0
    argv = ["train", "--model", base, "--data", data, "--streams", second, "--begin-from", first]
    argv += ["--iters", "1", "--learning-rate", "1e-12", "--batch-size", "2", "--no-rehearsal"]
    code, err = run(capsys, *argv)
    assert code == 0, err
    assert read_description(second)["config"] == read_description(first)["config"]
    model = make_model()
    one, two = (load_streams(folder, model)[0] for folder in (first, second))
    assert two.draft_vocabulary.tolist() == one.draft_vocabulary.tolist()
    attach(model, two)
    for (name, a), (_, b) in zip(
        tree_flatten(one.parameters()), tree_flatten(two.parameters()), strict=True
    ):
        assert_close(b, np.array(a), 1e-6, name) if np.array(a).any() else None
