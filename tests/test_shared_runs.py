"""Whole runs in shared mode, V1 and [P], and the fused model that they leave."""

import dataclasses
import json
import os
import signal

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import save_config, save_model
from reference import Reference, assert_close, numpy_weights
from test_shared_training import MASKS, SHARED
from tiny_models import COMMON, attached, make_model, make_tokenizer, quantized

from mlx_specstream import generate, load
from mlx_specstream.cli.main import main
from mlx_specstream.config import StreamConfig
from mlx_specstream.errors import BadArgument, BadCheckpoint
from mlx_specstream.load import load_base
from mlx_specstream.model.checkpoint import load_streams, read_description
from mlx_specstream.model.seams import seams_of
from mlx_specstream.train.config import FineTune, TrainConfig
from mlx_specstream.train.session import train_streams
from mlx_specstream.train.shared import Destination
from mlx_specstream.train.trainer import CHECKPOINT

TOKENS = mx.array([[5, 17, 3, 42, 8, 29, 11, 9, 7]])


def streams_for(mask: str, **options) -> StreamConfig:
    options = {"num_streams": 3, "msa_layers": 2, "lora_rank": 0, **options}
    return StreamConfig(main_sees_streams=MASKS[mask], **options)


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, count in (("train", 9), ("valid", 3)):
        rows = [
            {
                "prompt": " ".join(f"a{t}" for t in rng.integers(5, 30, 4)),
                "completion": " a7 a9 a11 a7 a9 a11 a7 a9",
            }
            for _ in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def base(tmp_path):
    return save_base(make_model(), tmp_path / "base")


def save_base(model, folder, **more):
    """A tiny model in mlx-lm's layout."""
    save_model(folder, model)
    save_config(
        {**COMMON, "model_type": "llama", "tie_word_embeddings": False, **more},
        folder / "config.json",
    )
    make_tokenizer().save_pretrained(folder)
    return folder


def run(base, data, tmp_path, mask, **options):
    model, tokenizer, config = load_base(base)
    settings = TrainConfig(**{**vars(SHARED), **options.pop("config", {})})
    out, notes = options.pop("out", tmp_path / "streams"), []
    about = train_streams(
        model, tokenizer, data, out, options.pop("streams", None) or streams_for(mask), settings,
        fused=Destination(out.parent / f"{out.name}-fused", base, config, options.pop("dequantize", False)),
        note=notes.append, **options,
    )  # fmt: skip
    return about, notes, model


@pytest.mark.parametrize("mask", MASKS)
def test_the_fused_model_is_the_one_that_was_trained(mask, base, data, tmp_path):
    trained, plain = {}, load_base(base)[0](TOKENS)

    def keep(progress):
        if progress.done == 1.0:
            seams = seams_of(model)
            trained["main"] = seams.model(TOKENS) if mask == "V1" else seams.logits(TOKENS)[0]
            trained["streams"] = seams.logits(TOKENS)[1]
            mx.eval(trained)

    model, tokenizer, config = load_base(base)
    about = train_streams(
        model, tokenizer, data, tmp_path / "streams", streams_for(mask), SHARED, report=keep,
        fused=Destination(tmp_path / "fused", base, config), note=lambda line: None,
    )  # fmt: skip
    assert about["mode"] == "shared"
    assert np.abs(np.array(trained["main"] - plain)).max() > 0.1, "nothing was learned"

    fused, tokenizer = load(tmp_path / "fused", streams=tmp_path / "streams")
    seams = seams_of(fused)
    assert seams.streams.config == streams_for(mask)
    main, streams = seams.logits(TOKENS)
    assert_close(fused(TOKENS) if mask == "V1" else main, trained["main"], 1e-4, "main")
    assert_close(streams, trained["streams"], 1e-4, "streams")
    stock, _ = mlx_lm.load(str(tmp_path / "fused"))
    assert_close(stock(TOKENS), fused(TOKENS), 1e-6)
    assert load_streams(tmp_path / "streams", stock)[1] is None  # the very same base: no note
    assert read_description(tmp_path / "streams")["training"]["config"]["fine_tune"]["rank"] == 3
    # The model that was passed in is the fused one, ready for use.
    assert_close(model(TOKENS), stock(TOKENS), 1e-6)
    assert seams_of(model).streams.config == streams_for(mask)


@pytest.mark.parametrize(("held_out", "worse"), [(" a7 a9 a11", False), (" a20 a26 a23", True)])
def test_a_run_says_whether_it_made_the_model_worse(held_out, worse, base, data, tmp_path):
    rows = [json.loads(line) for line in (data / "valid.jsonl").read_text().splitlines()]
    lines = [json.dumps({**row, "completion": held_out * 2}) + "\n" for row in rows]
    (data / "valid.jsonl").write_text("".join(lines))
    about, notes, _ = run(base, data, tmp_path, "V1", config={"iters": 20})
    said = [note for note in notes if "worse on the held-out rows" in note]
    assert len(said) == worse, notes
    if worse:
        (now,) = about["validation"]["main_loss"]
        assert f"is {now:.3f}." in said[0]
        assert "--mode lossless" in said[0]


def test_v1_says_the_same_with_and_without_streams(base, data, tmp_path):
    run(base, data, tmp_path, "V1", config={"iters": 20})
    before, _ = mlx_lm.load(str(base))
    stock, tokenizer = mlx_lm.load(str(tmp_path / "streams-fused"))
    fused, _ = load(tmp_path / "streams-fused", streams=tmp_path / "streams")
    for prompt in ("a5 a17 a3", "a8 a29 a11 a9 a7"):
        want = mlx_lm.generate(stock, tokenizer, prompt, max_tokens=20)
        assert mlx_lm.generate(before, tokenizer, prompt, max_tokens=20) != want
        for options in ({}, {"use_streams": False}, {"tree": "best:7"}, {"tree": "chain"}):
            assert generate(fused, tokenizer, prompt, max_tokens=20, **options) == want, options


def test_p_decodes_what_its_own_plain_forward_says(base, data, tmp_path):
    """Against the oracle on the saved files, one row after the other; trees of all kinds."""
    run(base, data, tmp_path, "P", config={"iters": 25})
    fused, tokenizer = load(tmp_path / "streams-fused", streams=tmp_path / "streams")
    weights = dict(mx.load(str(tmp_path / "streams-fused" / "model.safetensors")))
    streams = dict(mx.load(str(tmp_path / "streams" / "streams.safetensors")))
    oracle = Reference(
        numpy_weights(weights), numpy_weights(streams), heads=4, kv_heads=2, head_dim=24,
        theta=10000.0, eps=1e-5, gamma=3, msa_layers=2, scale=1.0, plan=True,
    )  # fmt: skip
    for prompt in ([5, 17, 3], [8, 29, 11, 9, 7]):
        oracle.cache = [[] for _ in range(oracle.N)]
        oracle.prefill(prompt[:-1])
        root, want = prompt[-1], []
        while len(want) < 16 and root != 0:
            root = oracle.step(root, None, kind="chain", size=1, limit=1)[0][0]
            want.append(root)
        want = [token for token in want if token]
        for options in ({}, {"tree": "best:7"}, {"tree": "chain"}, {"copies": True}):
            text = generate(fused, tokenizer, prompt, max_tokens=16, **options)
            assert text == tokenizer.decode(want), options


def test_the_planner_never_drops_streams_that_the_model_sees():
    """Without them it would be another model, and the text would depend on what drafting costs."""
    seams, tokenizer = attached(main_sees_streams=True), make_tokenizer(ends=False)
    texts = [
        generate(seams.model, tokenizer, [5, 17, 3, 42, 8], max_tokens=60, **options)
        for options in ({"tree": "chain"}, {}, {"copies": False}, {"placement": "inline"})
    ]
    assert texts[1:] == texts[:1] * 3


@pytest.mark.parametrize("mask", MASKS)
def test_resumed_run_equals_an_uninterrupted_one(mask, base, data, tmp_path):
    more = {"config": {"grad_accumulation_steps": 2, "target": "distill"}}
    streams = streams_for(mask, condition_rank=2, prune_rank=2)

    def stop(progress):
        if progress.iteration == 5:
            os.kill(os.getpid(), signal.SIGINT)

    run(base, data, tmp_path, mask, out=tmp_path / "whole", streams=streams, **more)
    with pytest.raises(KeyboardInterrupt):
        run(
            base, data, tmp_path, mask, out=tmp_path / "parts", streams=streams, report=stop, **more
        )
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == [CHECKPOINT, "train.json"]
    assert not (tmp_path / "parts-fused").exists()
    with pytest.raises(BadCheckpoint, match="made with fine_tune"):
        run(
            base, data, tmp_path, mask, out=tmp_path / "parts", streams=streams, resume=True,
            config={**more["config"], "fine_tune": FineTune(rank=3, alpha=5.0)},
        )  # fmt: skip
    again = run(
        base, data, tmp_path, mask, out=tmp_path / "parts", streams=streams, resume=True, **more
    )
    assert "resumed at step 5" in again[1]
    for file in ("-fused/model.safetensors", "/streams.safetensors"):
        whole, parts = (mx.load(str(tmp_path / f"{name}{file}")) for name in ("whole", "parts"))
        assert whole.keys() == parts.keys()
        for name in whole:
            assert np.array_equal(np.array(whole[name]), np.array(parts[name])), name


@pytest.mark.parametrize("dequantize", [False, True])
def test_a_quantised_base(dequantize, data, tmp_path):
    """Its LoRA is float32; fused it is quantised again or dequantised, and V1 stays lossless."""
    more = {"quantization": {"group_size": 32, "bits": 4}}
    base = save_base(quantized(make_model()), tmp_path / "base", **more)
    seen = []
    run(base, data, tmp_path, "V1", dequantize=dequantize, config={"iters": 15}, report=seen.append)
    assert np.mean([p.main_loss for p in seen[-3:]]) < 0.6 * seen[1].main_loss
    fused, tokenizer = load(tmp_path / "streams-fused", streams=tmp_path / "streams")
    kinds = {type(m).__name__ for _, m in fused.named_modules()}
    assert ("QuantizedLinear" in kinds) != dequantize
    texts = {
        generate(fused, tokenizer, "a8 a29", max_tokens=12, use_streams=use)
        for use in (True, False)
    }
    assert len(texts) == 1


def test_an_older_fused_model_is_replaced_whole(base, data, tmp_path):
    target = tmp_path / "streams-fused"
    target.mkdir()
    (target / "model-00002-of-00002.safetensors").write_bytes(b"old")
    (target / "notes.txt").write_text("kept")
    run(base, data, tmp_path, "V1", config={"iters": 1})
    assert (target / "notes.txt").read_text() == "kept"
    assert [p.name for p in target.glob("model*.safetensors")] == ["model.safetensors"]
    assert load(target, streams=tmp_path / "streams")
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_full_disk_leaves_a_run_that_can_go_on(base, data, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise RuntimeError("[save_safetensors] no space")

    whole = run(base, data, tmp_path, "V1", out=tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("mlx_specstream.train.shared.save", full)
        with pytest.raises(BadCheckpoint, match="is the disk full"):
            run(base, data, tmp_path, "V1")
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    again = run(base, data, tmp_path, "V1", resume=True)
    assert again[0]["validation"] == whole[0]["validation"]
    a, b = (tree_flatten(made[2].parameters()) for made in (whole, again))
    assert all(
        np.array_equal(np.array(x), np.array(y)) for (_, x), (_, y) in zip(a, b, strict=True)
    )


def test_runs_that_cannot_be(base, data, tmp_path):
    model, tokenizer, config = load_base(base)
    with pytest.raises(BadArgument, match="--fused-path"):
        train_streams(model, tokenizer, data, tmp_path / "out", streams_for("V1"), SHARED)
    lossless = dataclasses.replace(SHARED, fine_tune=None)
    with pytest.raises(BadArgument, match="--mode shared"):
        train_streams(model, tokenizer, data, tmp_path / "out", streams_for("P"), lossless)
    with pytest.raises(BadArgument, match="must not be the base itself"):
        Destination(base / ".." / "base", base, config)
    with pytest.raises(BadArgument, match="'cache_hidden' needs lower layers"):
        run(base, data, tmp_path, "V1", cache_hidden=tmp_path / "cache")
    assert not (tmp_path / "out").exists()


# --- the command ---


def test_from_a_plain_base_to_a_model_that_streams(base, data, tmp_path, capsys):
    """Fine-tuning, streams and their own answers in one command; then ``generate`` needs nothing new."""
    out, fused = tmp_path / "fused" / "streams", tmp_path / "fused"
    argv = ["train", "--model", base, "--data", data, "--streams", out, "--mode", "shared"]
    argv += ["--fused-path", fused, "--main-sees-streams", "--num-layers", 3, "--lora-rank", 4]
    argv += ["--num-streams", 2, "--msa-layers", 2, "--iters", 3, "--batch-size", 2, "--alpha", 0.2]
    argv += [
        "--self-distill",
        "--self-distill-max-tokens",
        6,
        "--self-distill-cache",
        tmp_path / "own",
    ]
    argv += ["--target", "distill", "--grad-checkpoint", "--grad-accumulation-steps", 2]
    assert main([str(a) for a in argv]) == 0
    err = capsys.readouterr().err
    for said in (
        "about ",
        "self-distillation: 9 prompts",
        "main loss",
        "tokens/s",
        "fine-tuned model",
    ):
        assert said in err, said
    description = read_description(out)
    assert description["config"].lora_rank == 0
    assert description["config"].main_sees_streams
    trained = description["training"]
    assert trained["mode"] == "shared"
    assert trained["config"]["fine_tune"] == {
        "rank": 4, "alpha": 4.0, "num_layers": 3, "targets": list(StreamConfig().lora_targets),
    }  # fmt: skip
    assert (trained["config"]["alphas"], trained["config"]["target"]) == ([0.2], "distill")
    files = ["streams.json", "streams.safetensors", "train.json", "train.svg"]
    assert sorted(p.name for p in out.iterdir()) == files
    asked = ["generate", "--model", str(fused), "-p", "a5 a17 a3", "--max-tokens", "5", "--quiet"]
    assert main(asked) == 0
    text = capsys.readouterr().out
    assert main([*asked, "--tree", "chain"]) == 0
    assert capsys.readouterr().out == text


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--mode", "shared"], "--fused-path"),
        (["--fused-path", "x"], "--fused-path"),
        (["--main-sees-streams"], "--mode shared"),
        (["--num-layers", "3"], "'num_layers' is about the fine-tuned model"),
        (["--dequantize"], "'dequantize' is about the fine-tuned model"),
        (["--mode", "shared", "--fused-path", "x", "--lora-rank", "0"], "'lora_rank' must be >= 1"),
        (["--mode", "shared", "--fused-path", "x", "--num-layers", "1"], "the 2 MSA layers, got 1"),
        (["--alpha", "1", "2", "3"], "one for each of 4 streams, got 3"),
        (["--self-distill-temperature", "0.5"], "[self_distill_temperature] needs --self-distill"),
        (["--self-distill", "--self-distill-temperature", "-1"], "'temperature' must be >= 0"),
        (["--grad-accumulation-steps", "0"], "'grad_accumulation_steps' must be >= 1, got 0"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_one_line_says_what_cannot_be(given, says, base, data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["train", "--model", base, "--data", data, "--streams", "out", "--msa-layers", "2"]
    assert main([str(a) for a in [*argv, *given]]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "error:" in x]
    assert says in line
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "x").exists()
