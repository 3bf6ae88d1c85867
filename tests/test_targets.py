"""What streams learn from: the text, the model's own distributions over it, the base's own answers."""

import dataclasses
import json
import os

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from reference import assert_close
from test_shared_training import SHARED, a_batch, gradients, tuned
from tiny_models import attached, make_model, make_tokenizer

from mlx_specstream.config import StreamConfig
from mlx_specstream.errors import BadArgument, BadData
from mlx_specstream.model.seams import seams_of
from mlx_specstream.train import answers as made
from mlx_specstream.train import loss as losses_of
from mlx_specstream.train.answers import SelfDistill, answered, answers
from mlx_specstream.train.config import TrainConfig
from mlx_specstream.train.data import Example
from mlx_specstream.train.loss import stream_losses
from mlx_specstream.train.session import train_streams

STREAMS = {"num_streams": 3, "msa_layers": 2, "lora_rank": 4}


# --- distillation ---


def softmax(logits):
    p = np.exp(np.array(logits, np.float64) - np.array(logits).max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def direct_divergences(seams, batch, main, streams):
    """KL(main row t + j || stream j of row t), one target after the other, [g]."""
    B, g, _ = batch.targets.shape
    sums, counts = np.zeros(g), np.zeros(g)
    for b in range(B):
        for j in range(1, g + 1):
            for host, target in zip(batch.hosts[b], batch.targets[b, j - 1], strict=True):
                if target >= 0:
                    p, q = softmax(main[b, host + j]), softmax(streams[b, j - 1, host])
                    sums[j - 1] += (p * np.log(p / q)).sum()
                    counts[j - 1] += 1
    return sums / counts


@pytest.mark.parametrize("chunk", [1 << 24, 5 * 67 * 3])
@pytest.mark.parametrize("name", ["llama", "cohere2", "qwen3_moe"])
def test_distillation_equals_a_direct_computation(name, chunk, monkeypatch):
    monkeypatch.setattr(losses_of, "HEAD_ELEMENTS", chunk)
    seams, batch = attached(name), a_batch()
    main, streams = seams.logits(mx.array(batch.tokens))
    want = direct_divergences(seams, batch, main, streams)
    assert_close(stream_losses(seams, batch, "distill").streams, want, 1e-5)
    assert (want > 1e-3).all()


def test_a_stream_that_says_what_the_main_stream_says_has_no_loss(monkeypatch):
    """Its own row as teacher: nothing to learn, and no gradient at all."""
    seams, batch = attached(**STREAMS), a_batch()
    monkeypatch.setattr(losses_of, "_main_at", lambda hidden, hosts, ahead: hidden.streams)
    found = stream_losses(seams, batch, "distill").streams
    assert np.abs(np.array(found)).max() < 1e-5
    monkeypatch.undo()
    assert np.array(stream_losses(seams, batch, "distill").streams).min() > 0.1


@pytest.mark.parametrize("mask", ["V1", "P"])
def test_the_teacher_gets_no_gradient(mask):
    """In shared mode the same weights make teacher and student; the loss moves the student alone."""
    seams, lora = tuned(mask)
    batch = a_batch()
    teacher = losses_of._main_at(
        losses_of.run_batch(seams, batch), mx.array(batch.hosts), range(1, 4)
    )
    wanted = mx.softmax(seams.head(teacher), axis=-1)

    def cross_entropy(parameters):
        lora[9].update(parameters)
        q = seams.head(losses_of.run_batch(seams, batch).streams)
        valid = mx.array(batch.targets.reshape(3, -1) >= 0)
        losses = -(wanted * (q - mx.logsumexp(q, -1, keepdims=True))).sum(-1) * valid
        counts = valid.reshape(3, 3, -1).sum(axis=(0, 2))
        return (losses.reshape(3, 3, -1).sum(axis=(0, 2)) / counts).sum()

    def distilled(parameters):
        lora[9].update(parameters)
        return stream_losses(seams, batch, "distill").streams.sum()

    start = lora[9].trainable_parameters()
    want = mx.grad(cross_entropy)(start)
    lora[9].update(start)
    got = mx.grad(distilled)(start)
    for name in ("lora_a", "lora_b"):
        assert np.abs(np.array(want[name])).max() > 1e-3
        assert_close(got[name], want[name], 1e-4, name)


def test_conditioned_streams_and_the_early_exit_are_distilled_too():
    """Half alone, half given the token before; the exit learns what its own row says in the end."""
    seams, batch = attached(**STREAMS, condition_rank=3, prune_rank=2), a_batch()
    tokens, hosts = mx.array(batch.tokens), mx.array(batch.hosts)
    main, alone = seams.logits(tokens)
    states = losses_of.run_batch(seams, batch)
    told = losses_of.given_text(seams, states.streams, tokens, hosts)
    told = np.array(seams.head(told)).reshape(3, 3, hosts.shape[1], -1)
    given = np.array(alone)
    for b in range(3):  # where a host is, what its streams say given the text
        given[b][:, batch.hosts[b]] = told[b]
    parts = [direct_divergences(seams, batch, main, said) for said in (alone, given)]
    want = np.array([parts[1][0], *(0.5 * (parts[0] + parts[1]))[1:]])
    got = stream_losses(seams, batch, "distill")
    assert_close(got.streams, want, 1e-5)
    exits = np.array(seams.head(seams.streams.exit_hidden(states.cut)))
    divergences = []
    for b, host, target in zip(
        np.repeat(range(3), hosts.shape[1]),
        batch.hosts.ravel(),
        batch.targets[:, 0].ravel(),
        strict=True,
    ):
        if target >= 0:
            p, q = softmax(main[b, int(host)]), softmax(exits[b, int(host)])
            divergences.append((p * np.log(p / q)).sum())
    assert_close(got.early_exit, np.mean(divergences), 1e-5)
    found = gradients(seams, [], dataclasses.replace(SHARED, fine_tune=None, target="distill"))
    for name, value in found.items():
        assert np.array(value).any(), f"no gradient reaches {name}"


def test_unknown_targets_are_refused():
    with pytest.raises(BadArgument, match="'target' must be one of hard, distill; got 'soft'"):
        TrainConfig(target="soft")
    for alphas in ((), (0.1, 0.0), (float("nan"),)):
        with pytest.raises(BadArgument, match="'alphas' must be > 0"):
            TrainConfig(alphas=alphas)


# --- the base's own answers ---

PROMPTS = [
    [5, 17, 3],
    [8, 29, 11, 9, 7],
    [44, 2, 40, 6, 21, 13],
    [5, 17],
    [7, 7, 7, 7],
    [30, 1, 50],
]
HOW = SelfDistill(max_tokens=7, batch_size=3)


def test_answers_are_greedy_generation(tmp_path):
    model, tokenizer = make_model(), make_tokenizer()
    found = answers(model, tokenizer, PROMPTS, HOW, tmp_path, 11)
    ended = 0
    for prompt, ids in zip(PROMPTS, found, strict=True):
        limit = min(7, 11 - len(prompt))
        want = [r.token for r in mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=limit)]
        assert ids == want
        ended += ids[-1] == tokenizer.eos_token_id
        assert len(ids) == limit or ids[-1] == tokenizer.eos_token_id
    (file,) = tmp_path.iterdir()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {row["prompt"]: row["tokens"] for row in rows} == dict(enumerate(found))
    assert set(rows[0]) == {"prompt", "tokens"}
    assert file.stat().st_mode & 0o777 == 0o600


def test_an_answer_ends_with_the_token_that_ended_it(tmp_path):
    model, tokenizer = make_model(), make_tokenizer()
    free = answers(model, tokenizer, PROMPTS, HOW, tmp_path, 99)
    tokenizer.add_eos_token(f"a{free[1][2]}")
    cut = answers(model, tokenizer, PROMPTS, HOW, tmp_path, 99)
    assert cut[1] == free[1][: free[1].index(free[1][2]) + 1]
    assert len(list(tmp_path.iterdir())) == 2  # these are other answers


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_answers_go_on_where_a_killed_run_stopped(temperature, tmp_path, monkeypatch):
    """Whatever a kill leaves of the file: whole groups are kept, the rest is made again, all is the same."""
    monkeypatch.setattr(made, "GROUP", 2)
    model, tokenizer = make_model(), make_tokenizer()
    how = dataclasses.replace(HOW, temperature=temperature)
    whole = answers(model, tokenizer, PROMPTS, how, tmp_path, 99)
    (file,) = tmp_path.iterdir()
    text = file.read_bytes()
    ends = [0, *(i + 1 for i, c in enumerate(text) if c == 10)]
    calls, real = [], made._generate
    monkeypatch.setattr(made, "_generate", lambda *a: calls.append(1) or real(*a))
    for kept, groups in (
        (text, 0),
        (text[: ends[4]], 1),
        (text[: ends[5]], 1),
        (text[: ends[4] - 1], 2),
        (text[: ends[2] + 9], 2),
        (text[: ends[2]] + b'{"prompt": 9}\n' + text[ends[3] :], 2),
        (b"\xff\x00damaged", 3),
        (b"", 3),
    ):
        file.write_bytes(kept)
        calls.clear()
        assert answers(model, tokenizer, PROMPTS, how, tmp_path, 99) == whole
        assert (len(calls), file.read_bytes()) == (groups, text)


def test_other_answers_are_never_mistaken_for_these(tmp_path):
    model, tokenizer = make_model(), make_tokenizer()
    for other in (
        (model, PROMPTS, HOW, 99),
        (make_model(seed=3), PROMPTS, HOW, 99),
        (model, PROMPTS[:-1], HOW, 99),
        (model, PROMPTS, dataclasses.replace(HOW, max_tokens=6), 99),
        (model, PROMPTS, dataclasses.replace(HOW, temperature=0.5, seed=1), 99),
    ):
        before = set(tmp_path.iterdir())
        answers(other[0], tokenizer, *other[1:3], tmp_path, other[3])
        assert len(set(tmp_path.iterdir()) - before) == 1


def test_examples_of_answers(tmp_path):
    """Each prompt once; prompts that leave no room and rows without a prompt are left out."""
    model, tokenizer = make_model(), make_tokenizer()
    rows = [Example([*p, 60, 61, 0], len(p)) for p in (PROMPTS[0], PROMPTS[1], PROMPTS[0])]
    rows += [Example([1, 2, 3, 4], 0), Example(list(range(2, 22)), 19)]
    notes = []
    how = dataclasses.replace(HOW, cache=tmp_path)
    found = answered(model, tokenizer, rows, how, 20, notes.append)
    assert [e.tokens[: e.start] for e in found] == PROMPTS[:2]
    assert [e.tokens[e.start :] for e in found] == answers(
        model, tokenizer, PROMPTS[:2], HOW, tmp_path, 20
    )
    assert "self-distillation: 2 prompts of 5 rows" in notes
    drawn = dataclasses.replace(HOW, temperature=2.0, cache=tmp_path / "cache")
    found = answered(model, tokenizer, rows, drawn, 20, notes.append)
    assert [e.tokens[: e.start] for e in found] == [*PROMPTS[:2], PROMPTS[0]]
    assert found[0] != found[2]
    assert len(list((tmp_path / "cache").iterdir())) == 1
    with pytest.raises(BadData, match="no row has a prompt"):
        answered(model, tokenizer, rows[3:4], how, 20, notes.append)
    for wrong in ({"temperature": -1.0}, {"max_tokens": 0}, {"batch_size": 0}):
        with pytest.raises(BadArgument, match=f"'{next(iter(wrong))}'"):
            SelfDistill(**wrong)


def test_a_run_on_its_own_answers_and_its_resumption(tmp_path, monkeypatch):
    """Killed between two groups of answers or between two steps: the same weights in the end."""
    monkeypatch.setenv("MLX_SPECSTREAM_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"prompt": f"a{i} a{i + 9} a3", "completion": "a7 a8 a9"} for i in range(5, 13)]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = TrainConfig(iters=6, batch_size=2, hosts=3, target="distill", seed=2, save_every=2)

    def run(name, **options):
        model, notes = make_model(), []
        train_streams(
            model, make_tokenizer(), data, tmp_path / name, StreamConfig(**STREAMS), config,
            self_distill=HOW, note=notes.append, **options,
        )  # fmt: skip
        return dict(tree_flatten(seams_of(model).streams.parameters())), notes

    whole, _ = run("whole")

    def stop(progress):
        if progress.iteration == 3:
            os.kill(os.getpid(), 2)

    with pytest.raises(KeyboardInterrupt):
        run("parts", report=stop)
    parts, notes = run("parts", resume=True)
    assert any("answers are in" in line for line in notes)
    assert "resumed at step 3" in notes
    for name, value in whole.items():
        assert np.array_equal(np.array(value), np.array(parts[name])), name
    description = json.loads((tmp_path / "parts" / "streams.json").read_text())
    assert description["training"]["self_distilled"] is True
