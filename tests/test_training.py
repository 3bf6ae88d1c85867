"""Training: data, loss, gradients, one tiny run, and going on with an interrupted one."""

import gzip
import json
import os
import signal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from reference import assert_close
from tiny_models import attached, make_model, make_tokenizer, quantized, stock_hidden

from mlx_specstream.config import StreamConfig
from mlx_specstream.errors import BadArgument, BadCheckpoint, BadData, UnsupportedModel
from mlx_specstream.model.checkpoint import load_streams
from mlx_specstream.model.rows import causal_rows
from mlx_specstream.model.seams import Pass, attach, seams_of
from mlx_specstream.train.data import Batch, Example, batches, make_batch, read_examples
from mlx_specstream.train.initial import hidden_rms, scale_embeddings
from mlx_specstream.train.loss import evaluate, stream_losses
from mlx_specstream.train.session import train_streams
from mlx_specstream.train.trainer import CHECKPOINT, TrainConfig, Trainer

EXAMPLES = [
    Example([3, 8, 21, 40, 7, 7, 12, 0], 3),
    Example([9, 14, 33, 2, 60, 0], 2),
    Example([5, 6, 5, 6, 5, 6, 5, 6, 5, 0], 0),
    Example([44, 1, 2, 3, 4, 5, 6, 0], 4),
    Example([10, 20, 30, 40, 50, 60, 0], 1),
]
SMALL = TrainConfig(
    iters=8,
    batch_size=2,
    hosts=3,
    eval_every=4,
    save_every=4,
    seed=3,
    learning_rate=5e-3,
    embedding_rate=2.0,
)
STREAMS = StreamConfig(num_streams=2, msa_layers=2, lora_rank=4, lora_alpha=4.0)


def write(folder, name, rows):
    folder.mkdir(exist_ok=True)
    text = "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    if name.endswith(".gz"):
        (folder / name).write_bytes(gzip.compress(text.encode()))
    else:
        (folder / name).write_text(text)
    return folder


def some_text(rng, length):
    return " ".join(f"a{t}" for t in rng.integers(5, 30, length))


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        {"prompt": some_text(rng, 4), "completion": " a7 a9 a11 a7 a9 a11 a7 a9"} for _ in range(12)
    ]
    write(tmp_path / "data", "train.jsonl", rows[:9])
    return write(tmp_path / "data", "valid.jsonl", rows[9:])


# --- data ---


def test_forms_of_rows(tmp_path):
    tokenizer, chat = make_tokenizer(), make_tokenizer(chat=True)
    messages = [{"role": "user", "content": "a5 a6"}, {"role": "assistant", "content": "a7 a8"}]
    forms = {
        "prompt": ({"prompt": "a5 a6", "completion": "a7 a8"}, tokenizer, [5, 6, 7, 8, 0], 2),
        "text": ({"text": "a5 a6 a7"}, tokenizer, [5, 6, 7, 0], 0),
        "ended": ({"text": "a5 a6 a7 a0"}, tokenizer, [5, 6, 7, 0], 0),
        "chat": ({"messages": messages}, chat, [3, 5, 6, 4, 7, 8, 0], 4),
        "both": ({"prompt": "a5 a6", "completion": "a7 a8"}, chat, [3, 5, 6, 4, 7, 8, 0], 4),
    }
    for name, (row, reader, tokens, start) in forms.items():
        for ending in ("jsonl", "jsonl.gz"):
            folder = write(tmp_path / f"{name}-{ending}", f"train.{ending}", [row, "\n"])
            examples, report = read_examples(folder, "train", reader, 99)
            assert examples == [Example(tokens, start)], name
            assert (report.rows, report.used, report.cut) == (1, 1, 0)


def test_long_rows_are_cut_and_short_ones_left_out(tmp_path):
    rows = [{"text": "a5 a6 a7 a8 a9 a10"}, {"prompt": "a5 a6", "completion": ""}, {"text": "a5"}]
    examples, report = read_examples(
        write(tmp_path, "train.jsonl", rows), "train", make_tokenizer(), 4
    )
    assert examples == [Example([5, 6, 7, 8], 0)]
    assert (report.rows, report.used, report.cut, report.empty, report.short) == (3, 1, 1, 1, 1)
    assert (report.longest, report.tokens) == (8, 4)  # "a10" is "a1" and an unknown word


@pytest.mark.parametrize(
    ("rows", "line", "says"),
    [
        ([{"text": "a5 a6 a7"}, "{\n"], 2, "not a row of JSON"),
        (["\n", {"txt": "a5"}], 2, "must have"),
        ([{"prompt": 3, "completion": "a5"}], 1, "must be strings"),
        ([{"prompt": "a5"}], 1, "must have"),
        (["[1, 2]\n"], 1, "must have"),
        (["7\n"], 1, "must have"),
        (["null\n"], 1, "must have"),
        ([{"text": None}], 1, "must be a string"),
        ([{"messages": []}], 1, "must have"),
        ([{"messages": [{"role": "user", "content": "a5"}]}], 1, "chat template"),
    ],
)
def test_unreadable_rows_are_named(tmp_path, rows, line, says):
    with pytest.raises(BadData, match=says) as caught:
        read_examples(write(tmp_path, "train.jsonl", rows), "train", make_tokenizer(), 99)
    message = str(caught.value)
    assert f"{tmp_path / 'train.jsonl'}:{line}:" in message
    assert "\n" not in message


def test_messages_without_an_answer(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "a5"}]}]
    with pytest.raises(BadData, match=r"train.jsonl:1:.*must be the assistant's"):
        read_examples(write(tmp_path, "train.jsonl", rows), "train", make_tokenizer(chat=True), 99)


def test_unreadable_files(tmp_path):
    with pytest.raises(BadData, match="there is neither"):
        read_examples(tmp_path, "train", make_tokenizer(), 99)
    for data, line in ((b'{"text": "a5 a6 a7"}\n\xff\xfe\n', ""), (b"", "no row")):
        (tmp_path / "train.jsonl").write_bytes(data)
        with pytest.raises(BadData, match=rf"train.jsonl.*{line}"):
            read_examples(tmp_path, "train", make_tokenizer(), 99)
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a5"}\n' * 99)[:-9])
    with pytest.raises(BadData, match=r"train\.jsonl\.gz"):
        read_examples(tmp_path, "train", make_tokenizer(), 99)


def test_hosts_and_targets():
    """Row i predicts token i + 1, its stream j token i + 1 + j; the last prompt token is a host."""
    example = Example([3, 8, 21, 40, 7, 0], 3)
    assert list(example.hosts()) == [2, 3]
    batch = make_batch([example, EXAMPLES[2]], [np.array([2, 3]), np.array([0])], 3)
    assert batch.tokens[0].tolist() == [3, 8, 21, 40, 7, 0, 0, 0, 0, 0]
    assert batch.targets[0].tolist() == [[7, 0], [0, -1], [-1, -1]]
    assert batch.targets[1].tolist() == [[5, -1], [6, -1], [5, -1]]


def test_batches_depend_on_seed_and_index_alone():
    take = lambda **o: [  # noqa: E731
        b.tokens.tolist() + b.hosts.tolist()
        for b, _ in zip(
            batches(EXAMPLES, size=2, hosts=2, num_streams=2, **o), range(5), strict=False
        )
    ]
    assert take(seed=1) == take(seed=1) != take(seed=2)
    assert take(seed=1, first=3)[:2] == take(seed=1)[3:]


# --- loss ---


def direct_losses(seams, batch):
    """Eq. 5 from the logits of model(tokens, streams=True), one target after the other."""
    _, logits = seams.model(mx.array(batch.tokens), streams=True)
    logits = np.array(logits.astype(mx.float32), dtype=np.float64)
    B, g, P = batch.targets.shape
    sums, counts = np.zeros(g), np.zeros(g)
    for b in range(B):
        for j in range(g):
            for p in range(P):
                target = batch.targets[b, j, p]
                if target >= 0:
                    row = logits[b, j, batch.hosts[b, p]]
                    sums[j] += np.log(np.exp(row - row.max()).sum()) + row.max() - row[target]
                    counts[j] += 1
    return sums / np.maximum(counts, 1)


def a_batch(num_streams=3) -> Batch:
    picked = [np.array(e.hosts())[:4] for e in EXAMPLES]
    return make_batch(EXAMPLES, picked, num_streams)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_moe", "phi3", "gpt_oss"])
@pytest.mark.parametrize("options", [{}, {"stream_position": "t", "init_rank": 2}], ids=str)
def test_loss_equals_a_direct_computation(name, options):
    seams = attached(name, **options)
    assert_close(stream_losses(seams, a_batch())[0], direct_losses(seams, a_batch()), 1e-5, name)


def test_loss_of_a_single_sequence():
    """gemma2's own attention takes one mask for all sequences, so it trains on one at a time."""
    seams, batch = attached("gemma2"), make_batch(EXAMPLES[:1], [np.array([2, 3, 5])], 3)
    assert_close(stream_losses(seams, batch)[0], direct_losses(seams, batch), 1e-5)


def test_loss_in_chunks_of_the_head(monkeypatch):
    monkeypatch.setattr("mlx_specstream.train.loss.HEAD_ELEMENTS", 5 * 67 * 2)
    seams = attached()
    assert_close(stream_losses(seams, a_batch())[0], direct_losses(seams, a_batch()), 1e-5)


def test_the_early_exit_learns_the_next_token():
    seams, batch = attached(prune_rank=2), a_batch()
    found = stream_losses(seams, batch).early_exit
    run = Pass(causal_rows(0, batch.tokens.shape[1]))
    seams.forward(run, mx.array(batch.tokens))
    logits = np.array(seams.head(seams.streams.exit_hidden(run.cut_hidden)), np.float64)
    losses = []
    for b, example in enumerate(EXAMPLES):
        for host in list(example.hosts())[:4]:
            row = logits[b, host]
            losses.append(np.log(np.exp(row).sum()) - row[example.tokens[host + 1]])
    assert_close(found, np.mean(losses), 1e-5)
    loss = lambda batch: stream_losses(seams, batch).early_exit  # noqa: E731
    _, gradient = nn.value_and_grad(seams.streams, loss)(batch)
    assert np.array(gradient["early_exit"]["b"]).any()


def test_a_base_that_takes_one_mask_per_batch_trains_on_one_sequence(tmp_path):
    with pytest.raises(BadArgument, match="'batch_size' must be 1 for gemma2"):
        train_streams(
            make_model("gemma2"), None, tmp_path, tmp_path / "out", StreamConfig(), TrainConfig()
        )


def test_evaluation_counts_what_it_says():
    seams, batch = attached(), a_batch()
    found = evaluate(seams, [batch, a_batch()], top_k=4)
    assert_close(found["loss"], direct_losses(seams, batch), 1e-5)
    _, logits = seams.model(mx.array(batch.tokens), streams=True)
    rows = np.take_along_axis(np.array(logits), batch.hosts[:, None, :, None], axis=2)
    order = np.argsort(-rows, axis=-1)
    for j in range(3):
        valid = batch.targets[:, j] >= 0
        hit = order[:, j] == batch.targets[:, j][..., None]
        assert_close(found["top1"][j], np.array(hit[..., 0][valid].mean()), 1e-6)
        assert_close(found["topk"][j], np.array(hit[..., :4].any(-1)[valid].mean()), 1e-6)


@pytest.mark.parametrize("base", ["fp32", "4-bit"])
def test_gradients_are_those_of_the_streams_only(base):
    seams = attached("mixtral", init_rank=2)
    if base == "4-bit":
        streams, model = seams.streams, quantized(seams.detach())
        seams = attach(model, streams)
    before = {n: np.array(p.astype(mx.float32)) for n, p in tree_flatten(seams.model.parameters())}
    trainer = Trainer(seams, SMALL, folder=None)
    streams_before = {n: np.array(p) for n, p in tree_flatten(seams.streams.parameters())}
    loss = lambda batch: stream_losses(seams, batch)[0].sum()  # noqa: E731
    _, gradient = nn.value_and_grad(seams.streams, loss)(a_batch())
    for name, value in tree_flatten(gradient):
        assert np.array(value).any(), f"no gradient reaches {name}"
    trainer.step(a_batch())
    trainer.step(a_batch())
    for name, value in tree_flatten(seams.model.parameters()):
        assert np.array_equal(np.array(value.astype(mx.float32)), before[name]), name
    for name, value in tree_flatten(seams.streams.parameters()):
        assert not np.array_equal(np.array(value), streams_before[name]), f"{name} did not move"


def test_embeddings_begin_and_learn_on_the_scale_of_the_hidden_states():
    """That of the rows where streams begin: no prompt, and no huge first token, moves it."""
    model = make_model()
    rms = lambda x: np.sqrt(np.mean(np.square(np.array(x, np.float64)), axis=-1))  # noqa: E731
    want = [
        size
        for example in EXAMPLES
        for size in rms(stock_hidden(model, example.tokens, 3))[list(example.hosts())]
    ]
    seams = attached()
    assert_close(np.array(hidden_rms(seams, EXAMPLES)), np.median(want), 1e-5)
    embedding = seams.model.model.embed_tokens
    embedding.weight = embedding.weight * mx.where(mx.arange(67) == 3, 1000.0, 1.0)[:, None]
    assert hidden_rms(seams, [Example([3, 8, 21, 40, 7, 0], 0)]) < 10
    before = seams.streams.embeddings
    scale_embeddings(seams, 6.0)
    assert_close(seams.streams.embeddings, 0.3 * before, 1e-6)
    trainer = Trainer(attached(), SMALL, None, hidden_rms=7.5)
    trainer.step(a_batch())
    of_embeddings, of_lora = (o.learning_rate.item() for o in trainer.optimizer.optimizers)
    assert of_embeddings == pytest.approx(SMALL.embedding_rate * 7.5 * of_lora)


# --- runs ---


def run(data, out, **options):
    model = options.pop("model", None) or make_model()
    notes = []
    config = TrainConfig(**{**vars(SMALL), **options.pop("config", {})})
    about = train_streams(
        model, make_tokenizer(), data, out, options.pop("streams", STREAMS), config,
        note=notes.append, **options,
    )  # fmt: skip
    return about, notes, model


def test_a_tiny_run_lowers_the_loss(data, tmp_path):
    seen = []
    about, notes, model = run(
        data, tmp_path / "out", config={"iters": 40, "eval_every": 20}, report=seen.append
    )
    assert [p.iteration for p in seen] == list(range(41))  # 0: what streams begin with
    assert seen[0].validation["loss"][0] > 2 * seen[-1].validation["loss"][0]
    assert np.mean(seen[-1].losses) < 0.5 * np.mean(seen[1].losses)
    assert about["validation"]["top1"][0] > 0.4  # of 67 words
    assert about["steps"] == 40
    assert not (tmp_path / "out" / CHECKPOINT).exists()
    streams, note = load_streams(tmp_path / "out", make_model())
    assert note is None
    assert streams.config == STREAMS
    ours = seams_of(model).streams
    for (name, a), (_, b) in zip(
        tree_flatten(ours.parameters()), tree_flatten(streams.parameters()), strict=True
    ):
        assert np.array_equal(np.array(a), np.array(b)), name
    assert any("9 rows to train on, 3 held out" in line for line in notes)


def test_a_run_by_the_clock_ends_with_a_validation(data, tmp_path):
    about, _, _ = run(data, tmp_path / "out", config={"minutes": 0.005, "eval_every": 10**6})
    assert about["validation"]["iteration"] == about["steps"] > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_resumed_run_equals_an_uninterrupted_one(data, tmp_path, number):
    whole = seams_of(run(data, tmp_path / "whole")[2]).streams

    def stop(progress):
        if progress.iteration == 5:
            os.kill(os.getpid(), number)

    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "parts", report=stop)
    assert (tmp_path / "parts" / CHECKPOINT).is_file()
    _, notes, model = run(data, tmp_path / "parts", resume=True)
    assert "resumed at step 5" in notes
    for (name, a), (_, b) in zip(
        tree_flatten(whole.parameters()),
        tree_flatten(seams_of(model).streams.parameters()),
        strict=True,
    ):
        assert np.array_equal(np.array(a), np.array(b)), name


def test_nothing_or_something_else_to_resume(data, tmp_path):
    with pytest.raises(BadCheckpoint, match="nothing to resume"):
        run(data, tmp_path / "none", resume=True)
    out = tmp_path / "other"

    def stop(progress):
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(data, out, report=stop)
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(BadCheckpoint, match="another base"):
        run(data, out, resume=True, model=make_model(seed=7))
    with pytest.raises(BadCheckpoint, match=r"learning_rate = 0\.005, not 0\.1"):
        run(data, out, resume=True, config={"learning_rate": 0.1})
    with pytest.raises(BadCheckpoint, match="num_streams = 2, not 3"):
        run(data, out, resume=True, streams=StreamConfig(3, 2, 4, 4.0))
    whole = mx.load(str(out / CHECKPOINT), return_metadata=True)
    for name in (
        "learner.embeddings",
        "optimizer.states.0.step",
    ):  # of a version that names things so
        other = {k: v for k, v in whole[0].items() if k != next(iter(whole[0]))}
        mx.save_safetensors(str(out / CHECKPOINT), {**other, name: mx.zeros(1)}, whole[1])
        with pytest.raises(BadCheckpoint, match="another version"):
            run(data, out, resume=True)
    mx.save_safetensors(str(out / CHECKPOINT), *whole)
    write(data, "train.jsonl", [{"text": "a5 a6 a7 a8"}, {"text": "a5 a6 a7 a9"}])
    with pytest.raises(BadCheckpoint, match="of other data"):
        run(data, out, resume=True)
    (out / CHECKPOINT).write_bytes(b"damaged")
    with pytest.raises(BadCheckpoint, match="cannot be read"):
        run(data, out, resume=True)


def test_runs_that_could_not_end_well_do_not_start(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="exists"):
        run(data, tmp_path / "file", report=lambda progress: pytest.fail("it started"))
    nothing = StreamConfig(2, 2, lora_rank=0, value_rotation=0.01)
    with pytest.raises(BadArgument, match="nothing to train"):
        run(data, tmp_path / "out", streams=nothing)
    with pytest.raises(BadArgument, match="'seed' must be >= 0, got -1"):
        run(data, tmp_path / "out", config={"seed": -1})
    with pytest.raises(BadArgument, match="'max_seq_length' must be >= 3 tokens, got 2"):
        run(data, tmp_path / "out", max_length=2)
    assert not (tmp_path / "out").exists()


def test_a_failed_run_leaves_the_finished_streams(data, tmp_path):
    out = tmp_path / "out"
    run(data, out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def fail(progress):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        run(data, out, config={"seed": 9}, report=fail)
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.name in before} == before


def test_runs_that_cannot_be(data, tmp_path):
    for streams, says in (
        (StreamConfig(2, 6, 4), "at most the model's 5 layers, got 6"),
        (StreamConfig(2, 2, 4, main_sees_streams=True), "lossless"),
    ):
        with pytest.raises(BadArgument, match=says):
            run(data, tmp_path / "out", streams=streams)
    model = make_model()
    model.model_type = "gemma4_text"
    with pytest.raises(UnsupportedModel):
        run(data, tmp_path / "out", model=model)
    with pytest.raises(BadArgument, match="--learning-rate"):
        run(data, tmp_path / "out", config={"learning_rate": 1e30})
    for name in ("iters", "hosts", "learning_rate", "minutes"):
        with pytest.raises(BadArgument, match=f"'{name}'.*got 0"):
            TrainConfig(**{name: 0})
