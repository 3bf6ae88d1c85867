"""``mlx-specstream train`` as a whole: presets, reports, killed and failing runs, what they leave."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import save_config, save_model
from tiny_models import COMMON, CONFIGS, make_model, make_tokenizer

from mlx_specstream.cli.main import main
from mlx_specstream.config import StreamConfig
from mlx_specstream.errors import BadArgument
from mlx_specstream.load import load_base
from mlx_specstream.measure import rehearsal
from mlx_specstream.measure.simulate import guesses_along, replay, tokens_per_pass
from mlx_specstream.model.checkpoint import load_streams, read_description
from mlx_specstream.model.seams import attach
from mlx_specstream.train import trainer as trainer_of
from mlx_specstream.train.data import read_examples
from mlx_specstream.train.health import WINDOW, Health
from mlx_specstream.train.initial import new_streams
from mlx_specstream.train.loss import evaluate
from mlx_specstream.train.presets import PRESETS, learning_rate, msa_layers
from mlx_specstream.train.record import RECORD
from mlx_specstream.train.trainer import CHECKPOINT

SHORT = ["--batch-size", "2", "--hosts", "3", "--learning-rate", "5e-3", "--lora-rank", "4"]
SHORT += ["--condition-rank", "3", "--num-streams", "2", "--msa-layers", "2"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_model(folder, make_model())
    config = {**COMMON, "model_type": "llama", "tie_word_embeddings": False}
    save_config(config, folder / "config.json")
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    folder, rng = tmp_path / "data", np.random.default_rng(0)
    folder.mkdir()
    for split, count in (("train", 11), ("valid", 3)):
        rows = [
            {
                "prompt": " ".join(f"a{t}" for t in rng.integers(5, 30, 4)),
                "completion": " a7 a9 a11 a7 a9 a11 a7 a9",
            }
            for _ in range(count)
        ]
        write(folder, split, rows)
    return folder


def write(folder, split, rows):
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def command(base, data, out, *more, rehearsal=False):
    argv = ["train", "--model", base, "--data", data, "--streams", out, *SHORT, *more]
    return [str(a) for a in (argv if rehearsal else [*argv, "--no-rehearsal"])]


def run(capsys, *argv):
    code = main(list(map(str, argv)))
    return code, capsys.readouterr().err


def weights(folder):
    return mx.load(str(folder / "streams.safetensors"))


def check_same(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    for name in a:
        assert np.array_equal(np.array(a[name]), np.array(b[name])), name


def record(folder):
    return json.loads((folder / "train.json").read_text())


def curve(folder):
    """The history without what the clock says."""
    return [{k: v for k, v in h.items() if k != "seconds"} for h in record(folder)["history"]]


def child(argv):
    """The command in a process of its own, on the CPU as the tests are."""
    code = (
        "import mlx_specstream, sys, mlx.core as mx; mx.set_default_device(mx.cpu); mx.disable_compile();"
        "from mlx_specstream.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *argv], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


# --- killed runs, full disks ---


def test_a_killed_run_goes_on_to_the_same_weights(base, data, tmp_path, capsys):
    """kill -9 in the middle of the run, then --resume: the same final weights and the same curve."""
    more = ["--iters", "60", "--eval-every", "12", "--save-every", "5"]
    assert run(capsys, *command(base, data, tmp_path / "whole", *more))[0] == 0
    parts = tmp_path / "parts"
    process = child(command(base, data, parts, *more))
    deadline = time.monotonic() + 300
    while not (parts / RECORD).exists():  # written behind the first checkpoint
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (parts / "streams.json").exists()
    assert record(parts)["finished"] is False
    code, err = run(capsys, *command(base, data, parts, *more, "--resume"))
    assert code == 0
    step = int(re.search(r"resumed at step (\d+)", err)[1])
    assert 0 < step < 60
    check_same(tmp_path / "whole", parts)
    assert curve(parts) == curve(tmp_path / "whole")
    assert record(parts)["finished"] is True
    assert len(curve(parts)) == 6  # before the first step, and five


def test_a_full_disk_leaves_the_last_good_checkpoint(base, data, tmp_path, capsys):
    """A limit on the size of files stops the second checkpoint in the middle."""
    more = ["--iters", "12", "--eval-every", "6", "--save-every", "3"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run(capsys, *command(base, data, whole, *more))[0] == 0
    before, real, calls = resource.getrlimit(resource.RLIMIT_FSIZE), trainer_of.save_tensors, []

    def save(path, *args):
        calls.append(path)
        if len(calls) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        real(path, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_of, "save_tensors", save)
        try:
            code, err = run(capsys, *command(base, data, out, *more))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 2
    assert "is the disk full?" in err
    assert "Traceback" not in err
    assert not [p for p in out.iterdir() if p.name.startswith(".")], "litter"
    state, about = mx.load(str(out / CHECKPOINT), return_metadata=True)
    assert json.loads(about["about"])["iteration"] == 3
    assert state
    code, err = run(capsys, *command(base, data, out, *more, "--resume"))
    assert (code, "resumed at step 3" in err) == (0, True)
    check_same(whole, out)


# --- what a run says and leaves ---


def test_what_a_run_leaves(base, data, tmp_path, capsys, monkeypatch):
    """train.json and train.svg, with the tokens per pass that the finished streams really have."""
    monkeypatch.setattr(rehearsal, "TOKENS", 20)
    out = tmp_path / "out"
    more = ["--iters", "12", "--eval-every", "6"]
    code, err = run(capsys, *command(base, data, out, *more, rehearsal=True))
    assert code == 0
    assert sorted(p.name for p in out.iterdir()) == [
        "streams.json", "streams.safetensors", "train.json", "train.svg",
    ]  # fmt: skip
    about = record(out)
    assert [h["iteration"] for h in about["history"]] == [0, 6, 12]
    assert about["history"][0]["train_loss"] == []
    assert len(about["history"][1]["train_loss"]) == 2
    assert {f["name"]: f["used"] for f in about["files"]} == {"train.jsonl": 11, "valid.jsonl": 3}
    assert about["versions"]["mlx-lm"]
    assert len(about["data"]) == 16
    assert about["hidden_rms"] > 0.1

    model, tokenizer, _ = load_base(base)
    streams, _ = load_streams(out, model)
    assert streams.temperatures.tolist() == pytest.approx(about["temperatures"])
    streams.temperatures = None  # they came after the last validation
    seams, replays = attach(model, streams), []
    from mlx_lm import stream_generate

    from mlx_specstream.decode.tree import TreeShape

    shape = TreeShape.parse("best:8")
    for line in (data / "valid.jsonl").read_text().splitlines():
        prompt = tokenizer.encode(json.loads(line)["prompt"])
        answer = [r.token for r in stream_generate(model, tokenizer, prompt, max_tokens=20)]
        guesses = guesses_along(seams, prompt, answer, shape.candidates(67))
        replays.append(replay(guesses, answer, shape, len(answer), tokenizer.eos_token_ids))
    assert about["history"][-1]["tokens_per_pass"] == pytest.approx(tokens_per_pass(replays))
    decoded = about["history"][0]["decoded"]
    assert (decoded["same_text"], decoded["answers"]) == (2, 2)
    assert "2 of 2 texts the plain ones" in err

    root = ElementTree.fromstring((out / "train.svg").read_text())
    titles = [e.text for e in root.iter() if e.tag.endswith("text") and e.get("class") == "t"]
    assert [t.split()[0] for t in titles] == ["Validation", "Validation", "Tokens"]
    lines = [e for e in root.iter() if e.tag.endswith("polyline")]
    assert [len(e.get("points").split()) for e in lines] == [
        3
    ] * 5  # 2 + 2 streams, tokens per pass


def test_trouble_in_the_data_is_counted(base, data, tmp_path, capsys):
    """By a dry run, too, which writes nothing."""
    good = [{"prompt": f"a5 a{n}", "completion": " a7 a9 a11"} for n in range(20, 26)]
    rows = [*good, good[0], good[1], {"prompt": "a5", "completion": ""}, {"text": ""}]
    rows += [
        {"text": " ".join(["a9"] * 30)},
        {"prompt": " ".join(["a9"] * 20), "completion": "a5 a6"},
    ]
    write(data, "train", rows)
    write(data, "valid", [good[2], {"prompt": "a40 a41", "completion": " a7 a9 a11"}])
    out = tmp_path / "out"
    code, err = run(capsys, *command(base, data, out, "--dry-run", "--max-seq-length", "16"))
    assert code == 0
    for line in (
        "train.jsonl: 12 rows, 9 used",
        "left out: 2 with nothing to learn",
        "left out: 1 whose prompt leaves no room",
        "cut to 16 tokens (--max-seq-length): 1",
        "duplicates, which count twice: 2",
        "also in the training rows, so validation flatters: 1",
        "nothing was trained",
    ):
        assert line in err, line
    assert "about " in err
    assert not out.exists()
    write(data, "train", [*good, {"txt": 1}, {"text": 5}, {"prompt": "a5"}])
    code, err = run(capsys, *command(base, data, out))
    assert code == 2
    assert "train.jsonl:7: a row must have" in err
    assert "2 more of 9 rows cannot be read" in err


def test_a_run_stops_where_nothing_gets_better(base, data, tmp_path, capsys):
    """And takes the best values, not the last; after a kill, too."""
    more = ["--iters", "90", "--eval-every", "3", "--save-every", "3", "--patience", "2"]
    more += ["--learning-rate", "0.05"]
    code, err = run(capsys, *command(base, data, tmp_path / "out", *more))
    assert code == 0
    assert "no progress in 2 validations: stopped at step" in err
    about = record(tmp_path / "out")
    losses = {h["iteration"]: np.mean(h["loss"]) for h in about["history"]}
    assert about["steps"] == max(losses) < 90
    assert about["taken"] == max(losses) - 6
    assert losses[about["taken"]] == min(losses.values())
    assert "tokens_per_pass" not in about["history"][-1]
    assert about["validation"]["iteration"] == about["taken"]
    model, tokenizer, _ = load_base(base)
    seams = attach(model, load_streams(tmp_path / "out", model)[0])
    valid, _ = read_examples(data, "valid", tokenizer, 99)
    found = evaluate(seams, trainer_of.validation_batches(valid, 2, 2), 4)
    assert found["loss"] == pytest.approx(about["validation"]["loss"], abs=1e-5)


def test_the_best_values_are_taken_without_patience_too(base, data, tmp_path, capsys):
    other = {
        "prompt": "a5 a6",
        "completion": " a7 a30 a29 a28 a31 a9 a30",
    }  # not what is trained on
    write(data, "valid", [other, {**other, "prompt": "a8 a9 a5"}])
    more = ["--iters", "90", "--eval-every", "9", "--learning-rate", "0.05"]
    code, err = run(capsys, *command(base, data, tmp_path / "out", *more))
    assert code == 0
    about = record(tmp_path / "out")
    losses = {h["iteration"]: np.mean(h["loss"]) for h in about["history"]}
    assert about["steps"] == max(losses) == 90
    assert losses[about["taken"]] == min(losses.values()) < losses[90]
    assert f"the streams of step {about['taken']} are taken" in err


def test_rows_are_no_longer_than_the_model_reads(data, tmp_path, capsys):
    folder = tmp_path / "base"
    save_model(folder, make_model())
    config = {**COMMON, "model_type": "llama", "max_position_embeddings": 11}
    save_config({**config, "tie_word_embeddings": False}, folder / "config.json")
    make_tokenizer().save_pretrained(folder)
    argv = command(folder, data, tmp_path / "out", "--dry-run")
    code, err = run(capsys, *argv)
    assert (code, "cut to 11 tokens (--max-seq-length): 11" in err) == (0, True)
    code, err = run(capsys, *argv, "--max-seq-length", "12")
    assert code == 2
    assert "[max_seq_length] must be at most the 11 tokens that the model reads, got 12" in err


def test_what_does_not_fit_into_memory_is_said(base, data, tmp_path, capsys, monkeypatch):
    def no_room(*args):
        raise RuntimeError("[malloc] Unable to allocate 99 bytes.")

    monkeypatch.setattr(trainer_of.Trainer, "gradient", no_room)
    code, err = run(capsys, *command(base, data, tmp_path / "out", "--iters", "4"))
    assert code == 2
    assert "the longest rows do not fit into memory: [malloc] Unable to allocate 99 bytes" in err
    assert "--grad-accumulation-steps" in err


def test_divergence_and_nan_are_caught():
    health = Health(1e-3)
    with pytest.raises(
        BadArgument, match=r"became \[1\.0, nan\] at step 7.*lower --learning-rate than 0.001"
    ):
        health.check_finite(7, loss=[1.0, float("nan")], gradient=1.0)
    with pytest.raises(BadArgument, match="gradient became inf"):
        health.check_finite(7, loss=[1.0], gradient=float("inf"))
    with pytest.raises(BadArgument, match="base's own arithmetic overflows"):
        health.check_finite(0, loss=[float("nan")])
    for step in range(200):  # learning with much noise
        health.check_progress(step, 3.0 + (-1) ** step - step / 100)
    health = Health(1e-3)
    for step in range(10):
        health.check_progress(step, 2.0)
    diverge = lambda: [health.check_progress(step, 4.0) for step in range(10, 10 + WINDOW)]  # noqa: E731
    with pytest.raises(BadArgument, match=r"the run diverges: the loss was 2\.00 and is 3"):
        diverge()
    health = Health(1e-3)
    for step in range(400):  # from 6 to 1, where it falls back to the frequencies of words
        health.check_progress(step, max(1.0, 6.0 - step / 40))
    with pytest.raises(BadArgument, match=r"the loss was 1\.00"):
        [health.check_progress(step, 5.0) for step in range(400, 400 + WINDOW)]


def test_a_nan_gradient_never_reaches_the_streams(base, data, tmp_path, capsys, monkeypatch):
    real, calls = trainer_of.optim.clip_grad_norm, []

    def clip(gradient, max_norm):
        calls.append(1)
        found = real(gradient, max_norm)
        return (found[0], mx.array(float("nan"))) if len(calls) == 5 else found

    monkeypatch.setattr(trainer_of.optim, "clip_grad_norm", clip)
    more = ["--iters", "12", "--eval-every", "4", "--save-every", "2"]
    code, err = run(capsys, *command(base, data, tmp_path / "out", *more))
    assert code == 2
    assert "gradient became nan at step 5" in err
    state = mx.load(str(tmp_path / "out" / CHECKPOINT))
    assert all(bool(mx.isfinite(v).all()) for v in state.values())


# --- presets ---


def test_presets_and_what_wins_over_them(base, data, tmp_path, capsys):
    argv = ["train", "--model", base, "--data", data, "--dry-run", "--streams", tmp_path / "out"]
    argv.append("--no-rehearsal")
    found = {}
    for name in PRESETS:
        code, err = run(capsys, *argv, "--preset", name)
        assert code == 0, err
        found[name] = int(re.search(r"([\d,]+) parameters", err)[1].replace(",", ""))
    assert found["quick"] < found["default"] < found["best"]
    argv = [a for a in argv if a != "--dry-run"] + [
        "--streams",
        tmp_path / "streams",
        "--preset",
        "quick",
    ]
    assert run(capsys, *argv, "--iters", "2", "--lora-rank", "5", "--batch-size", "3")[0] == 0
    description = read_description(tmp_path / "streams")
    streams, config = description["config"], description["training"]["config"]
    assert (streams.lora_rank, streams.lora_alpha, streams.num_streams) == (5, 5.0, 3)
    assert (streams.condition_rank, streams.root_rank, streams.msa_layers) == (32, 16, 2)
    assert streams.condition_shared
    assert (config["iters"], config["batch_size"], config["eval_every"]) == (2, 3, 2)
    assert config["learning_rate"] == 1e-3


def test_what_follows_from_the_size_of_a_model():
    assert [learning_rate(width) for width in (64, 384, 1536, 4096)] == [1e-3, 1e-3, 5e-4, 3.1e-4]
    assert {n: msa_layers(n) for n in (1, 5, 8, 32)} == {1: 1, 5: 2, 8: 4, 32: 4}


def test_a_model_of_one_mask_per_batch_takes_its_rows_one_by_one(data, tmp_path, capsys):
    folder, out = tmp_path / "gemma2", tmp_path / "streams"
    folder.mkdir()
    save_model(folder, make_model("gemma2"))
    save_config({**COMMON, **CONFIGS["gemma2"], "model_type": "gemma2"}, folder / "config.json")
    make_tokenizer().save_pretrained(folder)
    argv = ["train", "--model", folder, "--data", data, "--streams", out, "--preset", "quick"]
    code, err = run(capsys, *argv, "--iters", "1", "--no-rehearsal")
    assert code == 0, err
    config = read_description(out)["training"]["config"]
    assert (config["batch_size"], config["grad_accumulation_steps"]) == (1, 4)
    assert run(capsys, *argv, "--batch-size", "2")[0] == 2


def test_help_says_what_presets_mean(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, preset in PRESETS.items():
        assert f"{name}: {preset.iters} steps" in text
        assert f"LoRA rank {preset.lora_rank}" in text


def test_the_docs_have_the_presets_as_they_are():
    root = Path(__file__).parents[1]
    text = (root / "docs/training.md").read_text(encoding="utf-8")
    model, _, _ = load_base(root / "examples/models/e2e-sql-14m-4bit")
    for name, p in PRESETS.items():
        cells = (p.iters, p.batch_size, p.num_streams, p.lora_rank, p.condition_rank, p.root_rank)
        (line,) = [x for x in text.splitlines() if x.startswith(f"| `{name}` |")]
        found = [cell.strip() for cell in line.split("|")[2:-1]]
        assert found[:6] == list(map(str, cells))
        shape = {
            "num_streams": p.num_streams,
            "lora_rank": p.lora_rank,
            "msa_layers": msa_layers(8),
        }
        shape |= {"condition_rank": p.condition_rank, "root_rank": p.root_rank}
        shape["condition_shared"] = True
        parameters = new_streams(model, StreamConfig(**shape)).parameters()
        assert found[6] == f"{sum(v.size for _, v in tree_flatten(parameters)) / 1e6:.2f} M"
