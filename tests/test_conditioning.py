"""Conditioned drafts: guesses that know the token before theirs. Whole steps are in test_step.py."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm import sample_utils
from reference import assert_close
from steps import decoder_for
from test_train_command import base, command, run  # noqa: F401
from tiny_models import CONFIGS, attached, make_model, make_streams, make_tokenizer, quantized

from mlx_specstream import make_sampler, stream_generate
from mlx_specstream.config import StreamConfig
from mlx_specstream.decode.draft import Guesses, Promises, conditioned, draft
from mlx_specstream.decode.tree import TreeShape
from mlx_specstream.errors import BadArgument
from mlx_specstream.measure.simulate import guesses_along, replay
from mlx_specstream.model.checkpoint import (
    fingerprint,
    load_streams,
    read_description,
    save_streams,
)
from mlx_specstream.model.conditioning import below_root, change_below
from mlx_specstream.model.projections import embedding_of
from mlx_specstream.model.seams import attach
from mlx_specstream.train.data import Example, make_batch
from mlx_specstream.train.loss import evaluate, given_text, stream_losses
from mlx_specstream.train.passes import base_pass, following, stream_hidden
from mlx_specstream.train.session import train_streams
from mlx_specstream.train.trainer import TrainConfig

STREAMS = {"num_streams": 3, "msa_layers": 2, "lora_rank": 4, "condition_rank": 5}
CONFIG = StreamConfig(**STREAMS)
BOTH = pytest.mark.parametrize("shared", [False, True], ids=["each", "shared"])
PROMPT = [5, 17, 3, 42, 8, 29, 11]
HEADS = ["cohere2", "gemma2", "gpt_oss", "llama", "qwen3"]  # scaled, capped, untied and tied heads


SAMPLERS = {
    "greedy": None,
    "drawn": make_sampler(0.8, top_p=0.9),
    "opaque": sample_utils.make_sampler(temp=0.8, min_p=0.05),
}


@BOTH
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("name", [n for n in HEADS if n in CONFIGS])
def test_change_is_that_of_the_whole_head(name, bits, shared):
    model, config = make_model(name), StreamConfig(**STREAMS, condition_shared=shared)
    seams = attach(quantized(model, bits) if bits else model, make_streams(model, config))
    g, K, E = 3, 4, embedding_of(model)(mx.array([0])).shape[-1]
    mx.random.seed(8)
    hidden = 2.5 * mx.random.normal((1, g, E))
    tokens = mx.array([[9, 2, 40, 33], [7, 61, 0, 9], [15, 3, 28, 50]], dtype=mx.int32)
    change = change_below(seams, hidden, tokens)
    assert change.shape == (g, K, K)
    assert not change[0].any()
    alone, ids = seams.head(hidden)[0], np.array(tokens)
    for j in (1, 2):
        for a in range(K):
            before = embedding_of(model)(tokens[j - 1, a].reshape(1, 1))
            told = seams.streams.condition(hidden[:, j : j + 1], before, first=j)
            want = (seams.head(told)[0, 0] - alone[j])[tokens[j]]
            assert_close(change[j, a], want, 2e-4, f"{name}, stream {j} below {ids[j - 1, a]}")


def test_a_correction_follows_the_scale_of_the_states():
    seams = attached(**STREAMS)
    E = embedding_of(seams.model)(mx.array([0])).shape[-1]
    mx.random.seed(3)
    hidden, before = mx.random.normal((3, 2, E)), mx.random.normal((3, 2, E))
    small, large = (seams.streams.condition(s * hidden, before) / s for s in (1.0, 40.0))
    assert_close(large, small, 1e-5)
    assert float(mx.abs(small - hidden).max()) > 0.1


def test_streams_that_were_not_trained_are_not_changed():
    model = make_model()
    mx.random.seed(0)
    fresh = type(make_streams(model, CONFIG))(CONFIG, 48, [{}, {}])
    hidden, before = mx.random.normal((3, 4, 48)), mx.random.normal((3, 4, 48))
    assert_close(fresh.condition(hidden, before), hidden, 1e-7)


def test_conditioned_log_probabilities():
    """With all V tokens guessed: exactly the softmax of the changed logits."""
    rng = np.random.default_rng(1)
    logits, change = rng.normal(size=(2, 6)), rng.normal(size=(2, 6, 6))
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    want = logits[:, None] + change
    want = want - np.log(np.exp(want).sum(axis=-1, keepdims=True))
    got = conditioned(*(mx.array(x.astype(np.float32)) for x in (logprobs, change)))
    assert_close(got, want, 1e-5)
    # Of some tokens: the rest keeps what it had.
    some = mx.array(logprobs[:, :3].astype(np.float32))
    got = np.exp(np.array(conditioned(some, mx.zeros((2, 3, 3)))))
    assert_close(got, np.exp(np.broadcast_to(logprobs[:, None, :3], (2, 3, 3))), 1e-5)


@pytest.mark.parametrize("size", [2, 5, 12])
def test_tree_and_its_probabilities_on_the_host(size):
    """What the planner weighs is what the tree holds, and a parent decides what its best child is."""
    rng = np.random.default_rng(size)
    tokens = np.stack([rng.permutation(30)[:7] for _ in range(4)]).astype(np.int32)
    scores = 2 * rng.normal(size=(4, 7, 7)).astype(np.float32)
    scores[0] = scores[0, :1]
    logprobs = scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True)) - 0.1
    shape = TreeShape("best", size)
    tree = draft(mx.array(1), Guesses(mx.array(tokens), mx.array(logprobs)), None, shape, size)
    place = [{int(t): i for i, t in enumerate(row)} for row in tokens]
    depth, parents, said = (np.array(x) for x in (tree.depth, tree.parents, tree.tokens))
    total, at = np.zeros(size), np.zeros(size, int)
    for node in range(1, size):
        level, parent = depth[node] - 1, parents[node]
        at[node] = place[level][int(said[node])]
        total[node] = total[parent] + logprobs[level, at[parent] if level else 0, at[node]]
        best = logprobs[level, at[parent] if level else 0].argmax()
        siblings = [at[n] for n in range(1, size) if parents[n] == parent]
        assert best in siblings, "a node was drafted before its likelier sibling"
    got = Promises.of(Guesses(tokens, logprobs), None, shape).probabilities[: size - 1]
    assert_close(got, np.sort(np.exp(total[1:]))[::-1], 1e-5)


@pytest.mark.parametrize("placement", ["deferred", "inline"])
@pytest.mark.parametrize("vocabulary", [None, [0, 3, 5, 8, 11, 17, 24, 29, 33, 42, 50, 58, 66]])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_text_is_that_of_plain_decoding(sampler, vocabulary, placement):
    seams, tokenizer = attached(**STREAMS), make_tokenizer(ends=False)
    if vocabulary is not None:
        seams.draft_vocabulary = np.array(vocabulary, np.int32)

    def text(**options):
        given = {"max_tokens": 23, "sampler": SAMPLERS[sampler], "seed": 6, **options}
        answer = stream_generate(seams.model, tokenizer, PROMPT, **given)
        return [r.token for r in answer]

    want = text(use_streams=False, copies=False)
    assert text(tree="best:9", placement=placement) == want
    assert text(tree="best:9", placement=placement, copies=False) == want
    assert text() == want


def test_replay_makes_the_passes_of_real_decoding():
    seams = attached(**STREAMS)
    decoder = decoder_for(seams, PROMPT, "best:14", "deferred")
    answer, begun = [], []
    while len(answer) < 31:
        answer += decoder.step(31 - len(answer), ()).tokens
        begun.append(len(answer) - 1)  # the host of the next guesses predicted this token
    guesses = guesses_along(seams, PROMPT, answer, 13)
    for real, host in zip(decoder.guessed[1:], begun, strict=False):
        assert_close(real.logprobs, guesses[host].logprobs, 1e-4)
    replayed = replay(guesses, answer, TreeShape("best", 14), 31, ())
    assert replayed.passes == len(begun) - 1 < 30


def batch_of(length=9):
    rng = np.random.default_rng(2)
    examples = [Example(rng.integers(1, 60, n).tolist(), 2) for n in (length, length - 2)]
    return make_batch(examples, [np.array([2, 4, 5]), np.array([3])], 3)


def test_training_says_what_decoding_says():
    """Teacher-forced states given the text are the decoder's, below the root and below guesses."""
    seams, batch = attached(**STREAMS), batch_of()
    tokens, hosts = mx.array(batch.tokens), mx.array(batch.hosts)
    hidden = stream_hidden(seams, *base_pass(seams, tokens), hosts, following(tokens, hosts))
    told = seams.head(given_text(seams, hidden, tokens, hosts))
    P = hosts.shape[1]
    for row, at in ((0, 0), (0, 2), (1, 0)):
        host = int(hosts[row, at])
        of_host, text = hidden[row : row + 1, at::P], batch.tokens[row]
        first = seams.head(below_root(seams, of_host, mx.array(text[host + 1])))[0, 0]
        assert_close(told[row, at], first, 1e-5, "below the root")
        guesses = mx.array(text[host + 2 : host + 5][:, None])
        if host + 4 < len(text):  # both in the text: the token before, and the target
            alone = seams.head(of_host)[0]
            want = told[row, 2 * P + at] - alone[2]
            change = change_below(seams, of_host, guesses)[2, 0, 0]
            assert_close(change, want[guesses[2, 0]], 1e-4, "below a guess")


def test_loss_teaches_the_correction_and_the_guesses_alone():
    seams, batch = attached(**STREAMS), batch_of()
    _, gradient = nn.value_and_grad(seams.streams, lambda b: stream_losses(seams, b)[0][1:].sum())(
        batch
    )
    flat = dict(tree_flatten(gradient))
    for name in ("condition.a", "condition.b", "condition.c", "condition.d"):
        size = mx.abs(flat[name]).reshape(3, -1).max(axis=1)
        assert (np.array(size) > 0).tolist() == [False, True, True], name
    # Half of the loss is what streams say alone: it is there without the correction.
    zero = [(n, mx.zeros_like(v)) for n, v in tree_flatten(seams.streams.parameters())
            if n == "condition.b"]  # fmt: skip
    told = stream_losses(seams, batch)[0]
    seams.streams.update(tree_unflatten(zero))
    alone = stream_losses(seams, batch)[0]
    evaluated = np.array(evaluate(seams, [batch], 4)["loss"])
    assert_close(alone, evaluated, 1e-5)
    assert np.abs(np.array(told - alone)).min() > 1e-3


def test_accuracy_counts_what_is_said_given_the_text():
    seams, batch = attached(**STREAMS), batch_of()
    before = evaluate(seams, [batch], 4)
    seams.streams.condition.b = 3 * seams.streams.condition.b
    assert evaluate(seams, [batch], 4)["loss"] != before["loss"]


def test_a_shared_map_is_one_of_each_with_the_same_values():
    """Streams of their own maps that all hold the shared one say the same, from any stream on."""
    one, own = attached(**STREAMS, condition_shared=True), attached(**STREAMS)
    told, each = one.streams.condition, own.streams.condition
    told.d = mx.random.normal(told.d.shape)
    assert (told.a.shape[0], told.b.shape[0], told.c.shape[0], told.d.shape[0]) == (1, 1, 1, 3)
    each.d = told.d
    for name in "abc":
        each[name] = mx.concatenate([told[name]] * 3)
    E = each.c.shape[1]
    hidden, before = mx.random.normal((2, 1, E)), mx.random.normal((2, 7, E))
    for first in (0, 1):
        assert_close(told(hidden, before, first), each(hidden, before, first), 1e-5)
    for j in range(3):  # every stream teaches it, and its own bias alone
        loss = lambda b, j=j: stream_losses(one, b)[0][j]  # noqa: E731
        _, gradient = nn.value_and_grad(one.streams, loss)(batch_of())
        found = gradient["condition"]
        assert all(mx.abs(found[name]).max() > 0 for name in "abc")
        assert np.array(mx.abs(found["d"]).max(axis=(1, 2)) > 0).tolist() == [
            k == j for k in range(3)
        ]


@BOTH
def test_a_single_stream_may_be_conditioned(shared):
    seams = attached(**STREAMS | {"num_streams": 1}, condition_shared=shared)
    assert seams.streams.condition.a.shape[0] == 1
    mx.random.seed(2)
    hidden = 2.5 * mx.random.normal((1, 1, seams.streams.condition.c.shape[1]))
    want = seams.streams.condition(hidden, embedding_of(seams.model)(mx.array([[17]])))
    assert_close(below_root(seams, hidden, mx.array(17)), want, 1e-6)
    assert not change_below(seams, hidden, mx.array([[4, 9]])).any()


@BOTH
def test_kept_in_a_streams_folder(tmp_path, shared):
    seams = attached(**STREAMS, condition_shared=shared)
    save_streams(tmp_path / "s", seams.streams, fingerprint(seams.model), {})
    loaded, note = load_streams(tmp_path / "s", seams.model)
    assert note is None
    assert (loaded.config.condition_rank, loaded.config.condition_shared) == (5, shared)
    known = json.loads((tmp_path / "s/streams.json").read_text())["config"]
    assert ("condition_shared" in known) == shared, "older readers know no such key"
    want = dict(tree_flatten(seams.streams.parameters()))
    got = dict(tree_flatten(loaded.parameters()))
    assert want.keys() == got.keys()
    assert all(mx.array_equal(got[name], want[name]) for name in want)


# --- beginning from other streams ---

DATA = '{"prompt": "a5 a6", "completion": " a7 a9 a11 a7 a9 a11"}\n' * 6
STILL = TrainConfig(iters=1, batch_size=2, hosts=3, learning_rate=1e-12)


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(DATA)
    return tmp_path / "data"


def test_begin_from_other_streams(data, tmp_path):
    notes, model = [], make_model()
    old = StreamConfig(num_streams=3, msa_layers=2, lora_rank=4)
    train_streams(model, make_tokenizer(), data, tmp_path / "old", old, STILL)
    about = train_streams(
        model, make_tokenizer(), data, tmp_path / "new", CONFIG, STILL,
        begin_from=tmp_path / "old", note=notes.append,
    )  # fmt: skip
    assert any("arrays begin as in" in line for line in notes)
    assert about["began_from"]["steps"] == 1
    before, after = (
        dict(tree_flatten(load_streams(tmp_path / name, model)[0].parameters()))
        for name in ("old", "new")
    )
    for name, value in before.items():
        assert float(mx.abs(after[name] - value).max()) < 1e-8, name
    assert set(after) - set(before) == {f"condition.{x}" for x in "abcd"}


def test_begin_from_streams_that_do_not_fit(data, tmp_path):
    model = make_model()
    other = StreamConfig(num_streams=2, msa_layers=2, lora_rank=3, value_rotation=0.1)
    train_streams(model, make_tokenizer(), data, tmp_path / "old", other, STILL)
    with pytest.raises(BadArgument, match=r"nothing of the streams in .* fits these"):
        train_streams(
            model, make_tokenizer(), data, tmp_path / "new",
            StreamConfig(num_streams=3, msa_layers=1, lora_rank=4), STILL,
            begin_from=tmp_path / "old",
        )  # fmt: skip
    assert not (tmp_path / "new" / "streams.json").exists()


# --- the command ---


def test_one_map_is_what_the_command_makes(base, data, tmp_path, capsys):  # noqa: F811
    def trained(name, *more):
        argv = command(base, data, tmp_path / name, "--iters", "1", *more)
        code, err = run(capsys, *argv)
        assert code == 0, err
        config = read_description(tmp_path / name)["config"]
        return config.condition_rank, config.condition_shared

    assert trained("new") == (3, True)
    assert trained("each", "--no-condition-shared") == (3, False)
    assert trained("none", "--condition-rank", "0") == (0, False)
    # Streams to begin from say how they share it; what they lack is new.
    for name, shared in (("new", True), ("each", False), ("none", True)):
        assert trained(f"from {name}", "--begin-from", tmp_path / name) == (3, shared)
    other = ["--begin-from", tmp_path / "each", "--condition-rank", "5"]  # no map of it fits
    assert trained("wider", *other) == (5, True)
    code, err = run(
        capsys,
        *command(base, data, tmp_path / "x", "--condition-rank", "0", "--condition-shared"),
    )
    assert code == 2
    assert "'condition_rank' must be >= 1 with 'condition_shared', got 0" in err
    assert not (tmp_path / "x").exists()
