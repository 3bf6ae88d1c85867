"""The draft vocabulary: its head, how it is chosen and stored, and decoding with it."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear
from reference import assert_close
from steps import decoder_for
from tiny_models import CONFIGS, attached, make_model, make_streams, make_tokenizer, quantized

from mlx_specstream import make_sampler, stream_generate
from mlx_specstream.cli.main import main
from mlx_specstream.config import StreamConfig
from mlx_specstream.errors import BadArgument, BadCheckpoint, UnsupportedModel
from mlx_specstream.model.checkpoint import (
    DESCRIPTION,
    WEIGHTS,
    fingerprint,
    load_streams,
    save_draft_vocabulary,
    save_streams,
)
from mlx_specstream.model.projections import embedding_of, hidden_size
from mlx_specstream.model.seams import attach, seams_of
from mlx_specstream.train.data import Example
from mlx_specstream.train.session import train_streams
from mlx_specstream.train.trainer import TrainConfig
from mlx_specstream.train.vocabulary import choose_draft_vocabulary, completion_counts

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "examples/models/e2e-sql-14m-4bit"
STREAMS = ROOT / "examples/streams/e2e-sql-14m"
CONFIG = StreamConfig(num_streams=3, msa_layers=2, lora_rank=4)
IDS = np.array([0, 2, 13, 14, 40, 58, 66], np.int32)  # F = 7 of V = 67
PROMPT = [53, 56, 8, 26, 42, 33]


def arrays(model):
    return dict(tree_flatten(model.parameters()))


def check_columns(model, tolerance=2e-6):
    """Logits [2, 3, F] of the draft head against the whole head's; the stock model stays."""
    seams = attach(model)
    mx.random.seed(8)
    hidden = mx.random.normal((2, 3, hidden_size(model)))
    before, whole = arrays(model), np.array(seams.head(hidden))
    seams.draft_vocabulary = IDS
    got = seams.draft_head(hidden)
    assert got.shape == (2, 3, 7)
    assert_close(got, whole[..., IDS], tolerance, "columns")
    after = arrays(model)
    assert after.keys() == before.keys()
    assert [n for n in before if after[n] is not before[n]] == []
    assert np.array_equal(np.array(seams.head(hidden)), whole)
    seams.draft_vocabulary = None
    assert seams.draft_head(hidden).shape == (2, 3, 67)


# --- the head ---


@pytest.mark.parametrize("name", CONFIGS)
def test_it_gives_columns_of_the_whole_head(name):
    check_columns(make_model(name))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "cohere", "phi", "gpt_oss"])
def test_rows_of_quantized_heads(name):
    check_columns(quantized(make_model(name)))


def test_rows_of_a_head_without_quantization_biases():
    model = make_model("qwen3")
    nn.quantize(model, mode="mxfp4")
    assert embedding_of(model).get("biases") is None
    check_columns(model)


@pytest.mark.parametrize("four_bits", [False, True])
@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
def test_inside_a_wrapper_of_mlx_lm(kind, four_bits):
    model = quantized(make_model("phi"), bits=8) if four_bits else make_model("phi")
    model.lm_head = kind.from_base(model.lm_head, r=5)
    model.lm_head.lora_b = 0.1 * mx.random.normal(model.lm_head.lora_b.shape)
    model.eval()
    check_columns(model)


def test_a_tied_embedding_inside_a_wrapper_of_mlx_lm():
    model = make_model("qwen3")
    model.model.embed_tokens = LoRAEmbedding.from_base(model.model.embed_tokens, r=5)
    model.model.embed_tokens.lora_b = 0.1 * mx.random.normal((5, 64))
    model.eval()
    check_columns(model)


def test_the_stock_model_is_whole_after_an_exception():
    for name in ("llama", "qwen3"):
        model = make_model(name)
        seams = attach(model)
        seams.draft_vocabulary = IDS
        before = arrays(model)
        with pytest.raises(ValueError, match="same size"):
            seams.draft_head(mx.zeros((1, 2, 65)))
        after = arrays(model)
        assert [n for n in before if after[n] is not before[n]] == []


def test_it_can_be_traced():
    seams = attach(make_model())
    seams.draft_vocabulary = IDS
    hidden = mx.random.normal((1, 3, 64))
    before, want = arrays(seams.model), np.array(seams.draft_head(hidden))
    mx.enable_compile()
    try:
        traced = mx.compile(seams.draft_head)
        assert_close(traced(hidden), want, 1e-6)
        assert_close(traced(2 * hidden), np.array(seams.draft_head(2 * hidden)), 1e-6)
    finally:
        mx.disable_compile()
    assert all(after is before[name] for name, after in arrays(seams.model).items())


def test_it_follows_weights_that_are_replaced():
    seams = attach(make_model())
    seams.draft_vocabulary = IDS
    hidden = mx.random.normal((1, 3, 64))
    first = np.array(seams.draft_head(hidden))
    seams.model.lm_head.weight = -2 * seams.model.lm_head.weight
    assert_close(seams.draft_head(hidden), -2 * first, 1e-6)
    seams.model.lm_head = nn.Linear(64, 67)
    with pytest.raises(BadArgument, match="attach the streams again"):
        seams.draft_head(hidden)


def test_a_head_that_is_not_found():
    model, plain = make_model(), make_model()
    stock = type(model)

    class Odd(stock):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs) + mx.zeros((67,))

    model.__class__ = Odd
    streams = make_streams(plain, CONFIG)
    attach(model, streams)  # nobody asked for a draft vocabulary
    streams.draft_vocabulary = IDS
    with pytest.raises(
        UnsupportedModel, match="head of model_type 'llama' was not found"
    ) as caught:
        attach(model, streams)
    assert "\n" not in str(caught.value)
    assert seams_of(model) is None
    assert type(model) is Odd
    assert attach(plain, streams).draft_head(mx.zeros((1, 2, 64))).shape == (1, 2, 7)


BROKEN = [
    (np.array([1, 2], np.int64), r"int32 \[F\] with F >= 1, got int64 \[2\]"),
    (np.array([1.0, 2.0], np.float32), "got float32"),
    (np.array([[1, 2, 3]], np.int32), r"got int32 \[1, 3\]"),
    (np.array([], np.int32), r"got int32 \[0\]"),
    (np.array([4, 3], np.int32), "ascending"),
    (np.array([3, 3], np.int32), "each token once"),
    (np.array([-1, 3], np.int32), "from 0 to 66, got -1 to 3"),
    (np.array([3, 67], np.int32), "from 0 to 66, got 3 to 67"),
]


@pytest.mark.parametrize(("tokens", "says"), BROKEN)
def test_broken_vocabularies(tmp_path, tokens, says):
    model = make_model()
    seams = attach(model)
    seams.draft_vocabulary = IDS
    with pytest.raises(BadArgument, match=says):
        seams.draft_vocabulary = tokens
    assert seams.draft_vocabulary.tolist() == IDS.tolist()
    save_streams(tmp_path, make_streams(model, CONFIG), fingerprint(model), {})
    save_draft_vocabulary(tmp_path, tokens)
    with pytest.raises(BadCheckpoint, match=says) as caught:
        load_streams(tmp_path, model)
    assert f"{tmp_path / WEIGHTS}: draft_vocabulary must" in str(caught.value)
    assert "\n" not in str(caught.value)


# --- decoding ---


@pytest.mark.parametrize("placement", ["deferred", "inline"])
@pytest.mark.parametrize("tree", ["chain", "cartesian:4", "best:16"])
def test_drafts_hold_only_these_tokens(tree, placement):
    for ids in (IDS, IDS[1:4]):  # one of them smaller than the tree would like
        seams = attached()
        seams.draft_vocabulary = ids
        decoder, said = decoder_for(seams, PROMPT, tree, placement), []
        while len(said) < 6:
            said += decoder.step(6 - len(said), ()).tokens
        guessed = [g.tokens for g in decoder.guessed if g is not None]
        assert len(guessed) > 2
        assert {t for g in guessed for t in np.array(g).ravel().tolist()} <= set(ids.tolist())


def answer(model, **options):
    said = list(stream_generate(model, make_tokenizer(), PROMPT, max_tokens=14, **options))
    return [r.token for r in said], said[-1].passes


@pytest.mark.parametrize("sampling", [{}, {"sampler": make_sampler(temp=1.0), "seed": 5}])
@pytest.mark.parametrize("tree", ["best:16", "cartesian:2", None])
def test_the_text_is_the_same(tree, sampling):
    seams = attached("qwen3")  # a tied head
    plain, _ = answer(seams.model, use_streams=False, **sampling)
    _, passes = answer(seams.model, tree="best:70", **sampling)
    for ids in (IDS, np.arange(67, dtype=np.int32)):
        seams.draft_vocabulary = ids
        assert seams.kept == {}  # no trace with the rows of before
        assert answer(seams.model, tree=tree, **sampling)[0] == plain
    # With every token in the draft vocabulary nothing changes, neither text nor passes.
    assert answer(seams.model, tree="best:70", **sampling) == (plain, passes)
    assert passes < 13


# --- the streams folder ---


@pytest.fixture
def folder(tmp_path):
    model = make_model()
    streams = make_streams(model, CONFIG)
    streams.draft_vocabulary = IDS
    save_streams(tmp_path / "s", streams, fingerprint(model), {"steps": 5})
    return tmp_path / "s"


def test_round_trip(folder):
    model = make_model()
    loaded, _ = load_streams(folder, model)
    assert loaded.draft_vocabulary.dtype == np.int32
    assert loaded.draft_vocabulary.tolist() == IDS.tolist()
    assert "draft_vocabulary" not in arrays(loaded)  # no parameter: nothing would train it
    seams = attach(model, loaded)
    assert seams.draft_vocabulary.dtype == mx.int32
    assert seams.draft_vocabulary.tolist() == IDS.tolist()
    assert seams.draft_head(mx.zeros((1, 2, 64))).shape == (1, 2, 7)
    assert attach(model, make_streams(model, CONFIG)).draft_vocabulary is None
    assert attach(model).draft_vocabulary is None


def test_changing_it_changes_nothing_else(folder):
    (folder / "notes.txt").write_text("mine")
    weights, about = mx.load(str(folder / WEIGHTS), return_metadata=True)
    weights = {name: np.array(value) for name, value in weights.items()}
    description = (folder / DESCRIPTION).read_bytes()
    for tokens in (np.array([1, 5, 66], np.int32), None):
        save_draft_vocabulary(folder, tokens)
        got, metadata = mx.load(str(folder / WEIGHTS), return_metadata=True)
        assert metadata == about
        ids = got.pop("draft_vocabulary", None)
        assert (None if ids is None else ids.tolist()) == (None if tokens is None else [1, 5, 66])
        assert got.keys() == weights.keys() - {"draft_vocabulary"}
        for name, value in got.items():
            assert np.array_equal(np.array(value), weights[name]), name
        assert (folder / DESCRIPTION).read_bytes() == description
        assert sorted(p.name for p in folder.iterdir()) == ["notes.txt", DESCRIPTION, WEIGHTS]
    assert load_streams(folder, make_model())[0].draft_vocabulary is None


# --- choosing ---


def test_the_most_frequent_tokens_are_chosen():
    counts = np.array([0, 5, 2, 9, 2, 0, 2])
    for size, always, want in (
        (1, (), [3]),
        (2, (), [1, 3]),
        (3, (), [1, 2, 3]),  # of equally frequent ones the lower
        (2, {5}, [1, 3, 5]),
        (2, {3}, [1, 3]),
        (2, {7, -1}, [1, 3]),  # no tokens of this model
        (6, (), [1, 2, 3, 4, 6]),  # what was never seen does not fill up
    ):
        got = choose_draft_vocabulary(counts, size, always)
        assert (got.dtype, got.tolist()) == (np.int32, want)
    with pytest.raises(BadArgument, match="size must be >= 1, got 0"):
        choose_draft_vocabulary(counts, 0, {3})
    with pytest.raises(BadArgument, match="no token to choose from"):
        choose_draft_vocabulary(np.zeros(7), 3)


def test_only_completions_are_counted():
    examples = [Example([3, 3, 5, 6, 0], 2), Example([6, 5, 5, 90], 0)]
    assert completion_counts(examples, 8).tolist() == [1, 0, 0, 0, 0, 3, 2, 0]


ROWS = [{"prompt": "a5 a6 a8", "completion": " a7 a9 a8 a7 a9 a8 a7 a5"}] * 6


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    return tmp_path / "data"


def test_training_chooses_one_and_still_uses_the_whole_head(data, tmp_path):
    trained = {}
    for size in (0, 2):
        notes = []
        train_streams(
            make_model(), make_tokenizer(), data, tmp_path / f"{size}", StreamConfig(2, 2, 4, 4.0),
            TrainConfig(iters=3, batch_size=2, hosts=3), draft_vocabulary=size, note=notes.append,
        )  # fmt: skip
        trained[size] = load_streams(tmp_path / f"{size}", make_model())[0]
        lines = [line for line in notes if line.startswith("draft vocabulary")]
        assert lines == ["draft vocabulary: 3 of 67 tokens, 66.67% of 45 in the completions"] * (
            size > 0
        )
    assert trained[0].draft_vocabulary is None
    assert trained[2].draft_vocabulary.tolist() == [0, 7, 8]  # "a0" ends a text
    theirs = arrays(trained[0])
    for name, value in arrays(trained[2]).items():
        assert np.array_equal(np.array(value), np.array(theirs[name])), name
    with pytest.raises(BadArgument, match="'draft_vocabulary' must be >= 0, got -1"):
        train_streams(
            make_model(), make_tokenizer(), data, tmp_path / "x", StreamConfig(2, 2, 4),
            TrainConfig(), draft_vocabulary=-1,
        )  # fmt: skip


# --- the command line ---

TEXT = [
    {"prompt": f"MR: name[{n}]", "completion": f" The {n} is a pub."} for n in ("Mill", "Zizzi")
]


def run(capsys, *argv) -> tuple[int, str, str]:
    code = main([str(a) for a in argv])
    return code, *capsys.readouterr()


@pytest.fixture
def bundled(tmp_path) -> dict[str, Path]:
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in TEXT))
    copy = shutil.copytree(STREAMS, tmp_path / "streams")
    return {"--model": MODEL, "--streams": copy, "--data": tmp_path}


def flat(options) -> list:
    return [x for pair in options.items() for x in pair]


def test_the_command_puts_one_in_and_takes_it_out(capsys, bundled):
    streams = bundled["--streams"]
    code, _, err = run(capsys, "draft-vocabulary", *flat(bundled), "--size", "6")
    assert code == 0
    assert "tokens," in err
    ids = mx.load(str(streams / WEIGHTS))["draft_vocabulary"]
    assert 6 <= ids.size <= 8
    argv = ["generate", "--model", MODEL, "--streams", streams, "-p", "MR: name[Zizzi]\nText:"]
    short = run(capsys, *argv, "--tree", "best:8", "-m", "9")
    plain = run(capsys, *argv, "--no-streams", "-m", "9")
    assert (short[0], short[1]) == (0, plain[1])
    del bundled["--data"]
    code, _, err = run(capsys, "draft-vocabulary", *flat(bundled), "--size", "0")
    assert code == 0
    assert "whole vocabulary" in err
    want, got = (mx.load(str(folder / WEIGHTS)) for folder in (STREAMS, streams))
    assert got.keys() == want.keys()
    assert all(np.array_equal(np.array(got[name]), np.array(want[name])) for name in want)
    assert run(capsys, *argv, "--tree", "best:8", "-m", "9")[1] == plain[1]


def test_the_command_refuses(capsys, bundled):
    before = {p.name: p.read_bytes() for p in bundled["--streams"].iterdir()}
    for change, size, says in (
        ({}, "-1", "'--size' must be >= 0, got -1"),
        ({"--data": None}, "9", "'--data' is needed"),
        ({"--data": ROOT / "docs"}, "9", "must hold train.jsonl"),
        ({"--streams": ROOT / "docs"}, "9", "streams.json"),
        ({"--model": ROOT / "docs"}, "9", "has no config.json"),
    ):
        options = {k: v for k, v in {**bundled, **change}.items() if v is not None}
        code, out, err = run(capsys, "draft-vocabulary", *flat(options), "--size", size)
        assert (code, out) == (2, "")
        assert says in err
        assert err.strip().splitlines()[-1].startswith("mlx-specstream: error: ")
    assert {p.name: p.read_bytes() for p in bundled["--streams"].iterdir()} == before


def test_the_train_command_chooses_one(capsys, bundled):
    out = bundled["--data"] / "new"
    argv = ["train", *flat({**bundled, "--streams": out}), "--draft-vocabulary", "6"]
    argv += ["--num-streams", "1", "--msa-layers", "1", "--lora-rank", "2"]
    assert run(capsys, *argv, "--iters", "1", "--batch-size", "1", "--hosts", "2")[0] == 0
    assert 6 <= mx.load(str(out / WEIGHTS))["draft_vocabulary"].size <= 8
