"""Streams that know their root where they begin. Whole steps are in test_step.py."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from curves import costs
from mlx.utils import tree_flatten
from reference import assert_close
from steps import decoder_for
from tiny_models import attached, make_tokenizer

from mlx_specstream import stream_generate
from mlx_specstream.config import StreamConfig
from mlx_specstream.decode.arrange import make_steering
from mlx_specstream.decode.tree import TreeShape
from mlx_specstream.errors import BadArgument
from mlx_specstream.measure.rows import measure_costs
from mlx_specstream.measure.simulate import guesses_along, replay
from mlx_specstream.model.checkpoint import fingerprint, load_streams, save_streams
from mlx_specstream.model.projections import embedding_of
from mlx_specstream.train.data import Example, make_batch
from mlx_specstream.train.loss import stream_losses
from mlx_specstream.train.passes import base_pass, following, stream_hidden

STREAMS = {"num_streams": 3, "msa_layers": 2, "lora_rank": 4, "root_rank": 7}
PROMPT = [5, 17, 3, 42, 8, 29, 11]


@pytest.mark.parametrize(
    ("name", "bits"), [("llama", 0), ("llama", 4), ("gemma2", 4), ("opt:350m", 0)]
)
def test_every_stream_reads_the_root_and_no_later_token(name, bits):
    seams, tokens = attached(name, bits=bits, **STREAMS), np.array([PROMPT])
    main, before = seams.model(mx.array(tokens), streams=True)
    assert before.shape == (1, 3, len(PROMPT) - 1, main.shape[-1])
    tokens[0, 5] = 30
    after = seams.model(mx.array(tokens), streams=True)[1]
    moved = np.abs(np.array(after - before)).max(axis=(0, 3))  # [g, hosts]
    assert (moved[:, :4] == 0).all(), "a stream read behind its root"
    assert (moved[:, 4] > 1e-3).all(), "token 5 is the root of host 4"


@pytest.mark.parametrize("name", ["llama", "opt:350m"])
def test_where_they_begin(name):
    """f(M + RMS(M) silu(e A + M C / RMS(M) + d) B) + P_j, in NumPy."""
    streams = (seams := attached(name, **STREAMS, init_rank=5)).streams
    streams.root.d = mx.random.normal(streams.root.d.shape)
    hidden = mx.random.normal((2, 4, streams.embeddings.shape[-1]))
    e = embedding_of(seams.model)(mx.array([[3, 9, 50, 2], [1, 40, 7, 8]]))
    got = np.array(streams.begin(hidden, e)).reshape(2, 3, 4, -1)
    h, e, w = np.array(hidden), np.array(e), {n: np.array(v[0]) for n, v in streams.root.items()}
    rms, size = (np.sqrt((x * x).mean(axis=-1, keepdims=True)) for x in (h, e))
    u = (e / size) @ w["a"] + (h / rms) @ w["c"] + w["d"]
    h = h + rms * (u / (1 + np.exp(-u))) @ w["b"]
    h = h + h @ np.array(streams.init.a) @ np.array(streams.init.b)
    assert_close(got, h[:, None] + np.array(streams.embeddings)[:, None], 1e-5)


@pytest.mark.parametrize("condition_rank", [0, 5])
def test_replay_is_what_decoding_does(condition_rank):
    seams = attached(**STREAMS, condition_rank=condition_rank)
    decoder = decoder_for(seams, PROMPT, "best:14", "deferred")
    answer, begun = [], []
    while len(answer) < 31:
        answer += decoder.step(31 - len(answer), ()).tokens
        begun.append(len(answer) - 1)
    guesses = guesses_along(seams, PROMPT, answer, 13)
    for real, host in zip(decoder.guessed[1:], begun, strict=False):
        assert_close(real.logprobs, guesses[host].logprobs, 1e-4)
    replayed = replay(guesses, answer, TreeShape("best", 14), 31, ())
    assert replayed.passes == len(begun) - 1 < 30


def test_training_runs_what_the_model_runs_and_teaches_the_root():
    seams = attached(**STREAMS)
    rng = np.random.default_rng(2)
    examples = [Example(rng.integers(1, 60, n).tolist(), 2) for n in (9, 7)]
    batch = make_batch(examples, [np.array([2, 4, 5]), np.array([3])], 3)
    tokens, hosts = mx.array(batch.tokens), mx.array(batch.hosts)
    hidden = stream_hidden(seams, *base_pass(seams, tokens), hosts, following(tokens, hosts))
    said = seams.head(hidden).reshape(2, 3, hosts.shape[1], -1)
    whole = seams.model(tokens[:1], streams=True)[1]
    assert_close(said[0], whole[0][:, hosts[0]], 1e-5)
    _, gradient = nn.value_and_grad(seams.streams, lambda b: stream_losses(seams, b)[0].sum())(
        batch
    )
    flat = dict(tree_flatten(gradient))
    assert all(mx.abs(flat[f"root.{x}"]).max().item() > 0 for x in "abcd")


def test_the_planner_runs_them_behind_a_pass_however_cheap_inline_may_be():
    seams, tokenizer = attached(**STREAMS), make_tokenizer()
    seams.kept["costs"] = costs(streams=0.3, inline=(0.01,) * 7)
    said = [r.token for r in stream_generate(seams.model, tokenizer, PROMPT, max_tokens=9)]
    plain = stream_generate(seams.model, tokenizer, PROMPT, max_tokens=9, use_streams=False)
    assert said == [r.token for r in plain]
    planner = make_steering(seams, True, False, None, None, None).planner
    assert planner.placement(3, 0) == "deferred"


def test_they_run_behind_their_pass_only():
    seams, tokenizer = attached(**STREAMS), make_tokenizer()
    tree = {"max_tokens": 4, "tree": "best:5"}
    with pytest.raises(BadArgument, match=r"'inline' needs .* root_rank 7, use 'deferred'"):
        next(stream_generate(seams.model, tokenizer, PROMPT, placement="inline", **tree))
    assert next(stream_generate(seams.model, tokenizer, PROMPT, placement="deferred", **tree))
    with pytest.raises(BadArgument, match="'root_rank' must be 0 with 'main_sees_streams', got 7"):
        StreamConfig(**STREAMS, main_sees_streams=True)
    measured = measure_costs(seams, rows=(1, 2, 5), contexts=(20,), repeats=1)
    assert measured.inline_ms is None
    assert len(measured.deferred_ms[0]) == 3


def test_kept_in_a_streams_folder_and_missing_in_older_ones(tmp_path):
    seams = attached(**STREAMS)
    save_streams(tmp_path / "s", seams.streams, fingerprint(seams.model), {})
    loaded, _ = load_streams(tmp_path / "s", seams.model)
    assert mx.array_equal(loaded.root.c, seams.streams.root.c)
    found = json.loads((tmp_path / "s/streams.json").read_text())["config"]
    del found["root_rank"]
    assert "root_rank" not in StreamConfig().to_json(), "older readers know no such key"
    assert StreamConfig.from_json(found).root_rank == 0
    del found["prune_rank"]
    with pytest.raises(BadArgument, match=r"missing \['prune_rank'\]"):
        StreamConfig.from_json(found)
