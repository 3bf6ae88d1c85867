"""Less memory and time: accumulated gradients, hidden states on disk, quantised bases, an estimate."""

import dataclasses
import json
import os
import signal
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from reference import assert_close
from test_shared_training import EXAMPLES, SHARED, a_batch, tuned
from tiny_models import attached, make_model, make_streams, make_tokenizer, quantized

from mlx_specstream.config import StreamConfig
from mlx_specstream.errors import BadArgument
from mlx_specstream.model.checkpoint import fingerprint
from mlx_specstream.model.seams import attach, seams_of
from mlx_specstream.train import estimate as estimate_of
from mlx_specstream.train import hidden as hidden_of
from mlx_specstream.train.config import TrainConfig
from mlx_specstream.train.data import Example, batches, make_batch
from mlx_specstream.train.estimate import Estimate, duration, estimate, longest
from mlx_specstream.train.hidden import hidden_states
from mlx_specstream.train.passes import base_pass, run_batch
from mlx_specstream.train.session import train_streams
from mlx_specstream.train.trainer import Trainer

CONFIG = TrainConfig(
    iters=7,
    batch_size=2,
    hosts=3,
    learning_rate=5e-3,
    embedding_rate=2.0,
    eval_every=3,
    save_every=3,
)
STREAMS = StreamConfig(num_streams=2, msa_layers=2, lora_rank=4, lora_alpha=4.0)
MANY = [
    Example(np.random.default_rng(k).integers(1, 60, 5 + k % 4).tolist(), 1 + k % 3)
    for k in range(11)
]


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, count in (("train", 11), ("valid", 3)):
        rows = [
            {
                "prompt": " ".join(f"a{t}" for t in rng.integers(5, 30, 2 + k % 3)),
                "completion": " ".join(f"a{t}" for t in (7, 9, 11, 7, 9, 11, 7, 9)[: 5 + k % 4]),
            }
            for k in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(data, out, model=None, **options):
    model, notes, seen = model or make_model(), [], []
    config = dataclasses.replace(CONFIG, **options.pop("config", {}))
    stop = options.pop("stop", None)

    def report(progress):
        seen.append(progress)
        if progress.iteration == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    train_streams(
        model, make_tokenizer(), data, out, options.pop("streams", STREAMS), config,
        report=report, note=notes.append, **options,
    )  # fmt: skip
    return dict(tree_flatten(seams_of(model).streams.parameters())), notes, seen


def check_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert np.array_equal(np.array(a[name]), np.array(b[name])), name


# --- accumulated gradients ---


def test_a_step_of_two_batches_is_one_of_their_mean_gradient():
    seams = attached(num_streams=3)
    parts = [make_batch(EXAMPLES[k : k + 1], [np.array(EXAMPLES[k].hosts())], 3) for k in (0, 1)]
    trainer = Trainer(seams, dataclasses.replace(CONFIG, learning_rate=1e-3), None)
    single = [dict(tree_flatten(trainer.gradient(part)[0])) for part in parts]
    losses = [trainer.gradient(part)[1] for part in parts]
    caught = {}
    trainer.optimizer.update = lambda model, gradient: caught.update(tree_flatten(gradient))
    found, main = trainer.step(*parts)
    mean = {name: (single[0][name] + single[1][name]) / 2 for name in single[0]}
    norm = np.sqrt(sum(float((v * v).sum()) for v in mean.values()))
    assert norm > 1.0  # so the mean is what is clipped
    for name, value in mean.items():
        assert_close(caught[name], value / norm, 1e-5, name)
    assert_close(np.array(found), (losses[0] + losses[1]) / 2, 1e-6)
    assert (main, trainer.iteration) == (0.0, 1)


def test_accumulated_batches_are_those_that_come_next(data, tmp_path):
    """Step i of two batches each takes batches 2 i and 2 i + 1, after an interruption, too."""
    config = {"grad_accumulation_steps": 2}
    trainer = Trainer(attached(num_streams=2), dataclasses.replace(CONFIG, **config), None)
    trainer.iteration = 3
    plain = batches(MANY, size=2, hosts=3, num_streams=2, seed=0, first=6)
    for ours, want in zip(trainer.source(MANY), [next(plain) for _ in range(4)], strict=False):
        assert np.array_equal(ours.tokens, want.tokens)
        assert np.array_equal(ours.hosts, want.hosts)
    whole, _, _ = run(data, tmp_path / "whole", config=config)
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "parts", config=config, stop=4)
    parts, notes, _ = run(data, tmp_path / "parts", config=config, resume=True)
    assert "resumed at step 4" in notes
    check_equal(whole, parts)


# --- gradient checkpointing, whole runs ---


def test_a_run_may_go_on_with_gradient_checkpointing(data, tmp_path):
    whole, _, _ = run(data, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "parts", stop=4)
    parts, _, _ = run(data, tmp_path / "parts", resume=True, config={"grad_checkpoint": True})
    for name in whole:
        assert_close(parts[name], whole[name], 1e-4, name)


# --- hidden states on disk ---


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_hidden_states_are_those_of_the_base(name, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(hidden_of, "TOKENS_AT_ONCE", 17)
    model = make_model(name)
    model.set_dtype(dtype)
    seams = attach(model, make_streams(model, STREAMS))
    notes = []
    kept = hidden_states(seams, MANY, tmp_path, fingerprint(model), notes.append)
    batch = make_batch([MANY[7], MANY[2]], [np.array([3]), np.array([2])], 2, (7, 2))
    found = kept.add_to(batch).cut_hidden
    want, _ = base_pass(seams, mx.array(batch.tokens))
    assert found.dtype == want.dtype == dtype
    for b, k in enumerate((7, 2)):
        n = len(MANY[k].tokens)
        assert_close(found[b, :n], want[b, :n], 1e-5 if dtype == mx.float32 else 2e-2, f"{b}")
    a, b = run_batch(seams, kept.add_to(batch)).streams, run_batch(seams, batch).streams
    assert_close(a, b, 1e-5 if dtype == mx.float32 else 3e-2)
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size == sum(len(e.tokens) for e in MANY) * want.shape[-1] * dtype.size
    assert len(notes) == 1
    hidden_states(seams, MANY, tmp_path, fingerprint(model), notes.append)
    assert len(notes) == 1, "made twice"
    hidden_states(seams, MANY[:-1], tmp_path, fingerprint(model), notes.append)
    assert len(list(tmp_path.iterdir())) == 2


def test_an_interrupted_file_is_completed(tmp_path, monkeypatch):
    monkeypatch.setattr(hidden_of, "TOKENS_AT_ONCE", 17)
    seams = attached(num_streams=2)
    read = lambda: hidden_states(seams, MANY, tmp_path, {}, lambda line: None)  # noqa: E731
    read()
    (file,) = tmp_path.iterdir()
    whole, calls, real = file.read_bytes(), [], hidden_of._computed
    monkeypatch.setattr(hidden_of, "_computed", lambda *a: calls.append(1) or real(*a))
    for size, groups in ((len(whole), 0), (len(whole) - 1, 1), (3, 6), (0, 6)):
        file.write_bytes(whole[:size])
        calls.clear()
        read()
        assert (len(calls), file.read_bytes() == whole) == (groups, True)
    file.write_bytes(b"")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=100))
    with pytest.raises(BadArgument, match=r"'cache_hidden' needs .* GB are free"):
        read()


@pytest.mark.parametrize("mode", ["lossless", "V1", "P"])
def test_a_run_on_cached_hidden_states(mode, data, tmp_path):
    """Nearly the same streams as without (other shapes of products), and exactly after a resumption."""
    more = {"config": {"target": "distill"}, "streams": STREAMS}
    if mode != "lossless":
        seams, lora = tuned(mode, num_layers=2)
        trainer = Trainer(seams, SHARED, None, main_lora=lora)
        trainer.hidden = hidden_states(seams, EXAMPLES, tmp_path, {}, lambda line: None)
        batch = dataclasses.replace(a_batch(), examples=(0, 1, 2))
        found = dict(tree_flatten(trainer.gradient(trainer.prepared(batch))[0]))
        for name, value in tree_flatten(trainer.gradient(batch)[0]):
            assert_close(found[name], value, 1e-4, name)
        return
    plain, _, _ = run(data, tmp_path / "plain", **more)
    cached = {**more, "cache_hidden": tmp_path / "hidden"}
    whole, notes, _ = run(data, tmp_path / "whole", **cached)
    assert any("hidden states of 11 rows" in line for line in notes)
    for name in plain:
        assert_close(whole[name], plain[name], 1e-3, name)
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "parts", stop=4, **cached)
    parts, _, _ = run(data, tmp_path / "parts", resume=True, **cached)
    check_equal(whole, parts)


# --- a quantised base ---


@pytest.mark.parametrize("bits", [4, 8])
def test_streams_train_on_a_quantised_base(bits, data, tmp_path):
    base = quantized(make_model(), bits)
    before = {n: np.array(p) for n, p in tree_flatten(base.parameters())}
    _, _, seen = run(data, tmp_path / "out", base, config={"iters": 30, "grad_checkpoint": True})
    assert np.mean(seen[-1].losses) < 0.6 * np.mean(seen[1].losses)
    made = mx.load(str(tmp_path / "out" / "streams.safetensors"))
    assert {v.dtype for v in made.values()} == {mx.float32}
    for name, value in tree_flatten(base.parameters()):
        assert np.array_equal(np.array(value), before[name]), name


# --- what is said before and during a run ---


def test_progress_says_speed_and_memory(data, tmp_path):
    _, _, seen = run(data, tmp_path / "out")
    assert all(p.tokens_per_second > 0 and p.peak_memory > 0 for p in seen[1:])
    last = seen[-1]
    assert last.main_loss is None
    fed = last.tokens_per_second * last.seconds
    trainer = Trainer(attached(num_streams=2), CONFIG, None)
    assert (
        CONFIG.iters * 2 * 8 <= round(fed) <= CONFIG.iters * 2 * 13
    )  # rows of 8 to 13 tokens, two a step
    assert next(trainer.source(MANY)).num_tokens == sum(
        (next(trainer.source(MANY)).tokens > 0).sum(axis=1)
    )


def test_the_estimate_is_said_before_the_run(data, tmp_path):
    _, notes, _ = run(data, tmp_path / "out")
    (line,) = [line for line in notes if line.startswith("about ")]
    assert line.endswith(" GB")


def test_what_an_estimate_counts(monkeypatch):
    """Steps, batches per step and validations that are left; a run by the clock lasts as long as it says."""
    config = dataclasses.replace(CONFIG, iters=100, grad_accumulation_steps=3, eval_every=30)
    trainer = Trainer(attached(num_streams=2), config, None)
    before = {n: np.array(v) for n, v in tree_flatten(trainer.learner.parameters())}
    times, did = iter([9.0, 2.0, 1.5, 4.0] * 3), []
    monkeypatch.setattr(estimate_of, "_seconds", lambda do: did.append(do()) or next(times))
    held_out = len(trainer.held_out(MANY[:5]))
    assert held_out == 3
    found = estimate(trainer, MANY, MANY[:5])
    looks = 5  # before the first step, at 30, 60, 90 and the end
    assert found.seconds == 100 * 1.5 * 3 + looks * held_out * 4.0
    assert found.memory > 1000
    trainer.iteration, trainer.history = 60, [{}] * 3
    assert estimate(trainer, MANY, MANY[:5]).seconds == 40 * 1.5 * 3 + 2 * held_out * 4.0
    trainer.config = dataclasses.replace(config, minutes=5.0)
    trainer.seconds = 60.0
    assert estimate(trainer, MANY, MANY[:5]).seconds == pytest.approx(240.0)
    for name, value in tree_flatten(trainer.learner.parameters()):
        assert np.array_equal(np.array(value), before[name]), name
    assert longest(trainer, MANY).tokens.shape == (2, max(len(e.tokens) for e in MANY))


def test_how_estimates_read():
    assert str(Estimate(41 * 60 + 5, 3_240_000_000)) == "about 41 min, 3.2 GB"
    assert [duration(s) for s in (3.2, 89, 91, 3600, 5400, 36000)] == [
        "3 s", "89 s", "2 min", "60 min", "1.5 h", "10.0 h",
    ]  # fmt: skip
