"""Shared mode: one LoRA for model and streams, V1 and [P]. Whole runs are in test_shared_runs.py."""

import dataclasses

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from reference import Reference, assert_close
from test_step import both
from tiny_models import make_model, make_streams, quantized

from mlx_specstream.config import StreamConfig
from mlx_specstream.errors import BadArgument
from mlx_specstream.model.seams import attach
from mlx_specstream.train import passes
from mlx_specstream.train.config import FineTune, TrainConfig
from mlx_specstream.train.data import Example, make_batch
from mlx_specstream.train.loss import evaluate, stream_losses
from mlx_specstream.train.shared import add_lora, fuse
from mlx_specstream.train.trainer import Trainer

EXAMPLES = [
    Example([3, 8, 12, 4, 7, 7, 12, 0], 3),
    Example([9, 14, 3, 2, 6, 16, 1, 5, 11, 5, 0], 4),
    Example([5, 6, 15, 6, 0], 1),
]
TUNE = FineTune(rank=3, alpha=6.0)
SHARED = TrainConfig(
    iters=9,
    batch_size=2,
    hosts=3,
    learning_rate=2e-2,
    embedding_rate=2.0,
    fine_tune=TUNE,
    eval_every=4,
    save_every=4,
)
MASKS = {"V1": False, "P": True}


def streams_for(mask: str, **options) -> StreamConfig:
    options = {"num_streams": 3, "msa_layers": 2, "lora_rank": 0, **options}
    return StreamConfig(main_sees_streams=MASKS[mask], **options)


def a_batch(num_streams=3):
    return make_batch(EXAMPLES, [np.array(e.hosts())[1:4] for e in EXAMPLES], num_streams)


def tuned(mask, model=None, num_layers=-1, **options):
    """Seams of a model in which every LoRA is random, and the modules that have one."""
    config, model = streams_for(mask, **options), model or make_model()
    lora = add_lora(model, dataclasses.replace(TUNE, num_layers=num_layers), config.msa_layers)
    mx.random.seed(5)
    for module in lora:
        module.lora_b = 0.2 * mx.random.normal(module.lora_b.shape)
    return attach(model, make_streams(model, config)), lora


# --- what a pass computes ---


class Told(Reference):
    """The oracle along a given text: its main and stream log-probabilities at every completion row."""

    def log_probs(self, x, *heat):
        said = super().log_probs(x, *heat)
        self.said.append(said)
        return said

    def along(self, example):
        self.cache, main, streams = [[] for _ in range(self.N)], [], []
        first = max(example.start - 1, 0)
        self.prefill(example.tokens[:first])
        for token in example.tokens[first:-1]:
            self.said = []
            streams.append(self.step(token, None, kind="chain", size=1, limit=1)[1])
            main.append(self.said[0])
        return np.array(main), np.array(streams)  # [rows, V], [rows, g, V]


@pytest.mark.parametrize("segment", [2, 64])
@pytest.mark.parametrize("mask", MASKS)
def test_losses_equal_the_oracle(mask, segment, monkeypatch):
    """Prompts without streams, completions with, in segments or at once; every row of the batch."""
    monkeypatch.setattr(passes, "SEGMENT", segment)
    seams, reference = both(main_sees_streams=MASKS[mask], prune_rank=0)
    reference.__class__ = Told
    batch = a_batch()
    got = stream_losses(seams, batch, main=True)
    main, losses, counts = [], np.zeros(3), np.zeros(3)
    for example, hosts in zip(EXAMPLES, batch.hosts, strict=True):
        said, streams = reference.along(example)
        text = np.array(example.tokens)
        first = max(example.start - 1, 0)
        main += [-row[token] for row, token in zip(said, text[first + 1 :], strict=True)]
        for host in np.array(example.hosts())[1:4]:
            assert host in hosts
            for j in range(3):
                if host + 2 + j < len(text):
                    losses[j] -= streams[host - first, j, text[host + 2 + j]]
                    counts[j] += 1
    assert_close(got.main, np.mean(main), 2e-5, "main loss")
    assert_close(got.streams, losses / counts, 2e-5, "stream losses")
    evaluated = evaluate(seams, [batch], 4, main=True)
    assert_close(evaluated["main_loss"], [np.mean(main)], 2e-5)
    assert_close(evaluated["loss"], losses / counts, 2e-5)


def test_only_completions_have_streams(monkeypatch):
    """[P]: of prompts, and of what follows the last completion row, not one stream is fed."""
    monkeypatch.setattr(passes, "SEGMENT", 4)
    seams, _ = tuned("P")
    fed, forward = [], type(seams).forward

    def spy(self, run, *args, **options):
        out = forward(self, run, *args, **options)
        fed.append((run.rows.main, run.rows.count))
        return out

    monkeypatch.setattr(type(seams), "forward", spy)
    long = Example([*range(20, 29), 0], 5)  # its rows 4 .. 8 have streams
    passes.run_batch(seams, make_batch([long, long], [np.array([4, 7])] * 2, 3))
    assert fed == [(4, 4), (4, 16), (1, 4)]


def test_the_oracle_tells_the_masks_apart():
    values = []
    for mask in MASKS.values():
        seams, _ = both(main_sees_streams=mask, prune_rank=0)
        values.append(stream_losses(seams, a_batch(), main=True).main.item())
    assert abs(values[0] - values[1]) > 1e-3


@pytest.mark.parametrize("mask", MASKS)
def test_windows_and_other_forms_of_layers(mask, monkeypatch):
    """Segments change nothing where layers slide, have experts or fused projections."""
    for name in ("gemma3_text", "qwen3_moe", "phi3"):
        found = []
        for segment in (2, 64):
            monkeypatch.setattr(passes, "SEGMENT", segment)
            seams, _ = tuned(mask, make_model(name), condition_rank=2, prune_rank=2)
            found.append(stream_losses(seams, a_batch(), "distill", main=True))
        for a, b in zip(*found, strict=True):
            assert_close(a, b, 1e-5, name)


# --- what is trained ---


def gradients(seams, lora, config=SHARED, batch=None):
    trainer = Trainer(seams, config, None, main_lora=lora)
    return dict(tree_flatten(trainer.gradient(batch or a_batch())[0]))


@pytest.mark.parametrize("base", ["fp32", "4-bit"])
@pytest.mark.parametrize("mask", MASKS)
def test_gradients_are_those_of_lora_and_streams(mask, base):
    model = make_model("mixtral")
    seams, lora = tuned(mask, quantized(model) if base == "4-bit" else model, num_layers=4)
    frozen = {
        n: np.array(p.astype(mx.float32))
        for n, p in tree_flatten(seams.model.parameters())
        if "lora" not in n
    }
    where = [any("lora_a" in m for _, m in x.named_modules()) for x in seams.model.layers]
    assert where == [False, True, True, True, True]
    trainer = Trainer(seams, SHARED, None, main_lora=lora)
    found = dict(tree_flatten(trainer.gradient(a_batch())[0]))
    assert found.keys() == dict(tree_flatten(trainer.learner.trainable_parameters())).keys()
    for name, value in found.items():
        assert value.dtype == mx.float32, name
        assert np.array(value).any(), f"no gradient reaches {name}"
    trainer.step(a_batch())
    for name, value in tree_flatten(seams.model.parameters()):
        if "lora" not in name:
            assert np.array_equal(np.array(value.astype(mx.float32)), frozen[name]), name
        else:
            assert value.dtype == mx.float32


def test_loss_is_that_of_equation_5():
    """alpha_0 = 1 and 0.1 for each stream; other alphas as they are given."""
    for alphas, weights in ((None, [0.1] * 3), ((0.5,), [0.5] * 3), ((1, 2, 3), [1, 2, 3])):
        seams, lora = tuned("V1")
        config = dataclasses.replace(SHARED, alphas=alphas)
        got = gradients(seams, lora, config)

        def loss(module, weights=weights, seams=seams, lora=lora):
            lora[4].update(module)
            losses = stream_losses(seams, a_batch(), main=True)
            return losses.main + (losses.streams * mx.array(weights)).sum()

        want = mx.grad(loss)(lora[4].trainable_parameters())
        assert_close(got["lora.4.lora_a"], want["lora_a"], 1e-5, str(alphas))
    with pytest.raises(BadArgument, match="'alphas' must be one number or one for each of 3"):
        gradients(*tuned("V1"), dataclasses.replace(SHARED, alphas=(1, 2)))


@pytest.mark.parametrize("mode", ["lossless", *MASKS])
def test_gradient_checkpointing_changes_no_gradient(mode, monkeypatch):
    monkeypatch.setattr(passes, "SEGMENT", 3)
    config = dataclasses.replace(SHARED, fine_tune=None if mode == "lossless" else TUNE)
    for name in ("llama", "qwen3_moe"):
        for target in ("hard", "distill"):
            if mode == "lossless":
                model = make_model(name)
                options = StreamConfig(3, 2, 4, init_rank=2, prune_rank=2, condition_rank=2)
                seams, lora = attach(model, make_streams(model, options)), []
            else:
                seams, lora = tuned(mode, make_model(name), num_layers=3, condition_rank=2)
            given = dataclasses.replace(config, target=target)
            plain = gradients(seams, lora, given)
            calls = []
            with monkeypatch.context() as patch:
                spy = lambda f, of=mx.checkpoint, to=calls: to.append(f) or of(f)  # noqa: E731
                patch.setattr(mx, "checkpoint", spy)
                found = gradients(seams, lora, dataclasses.replace(given, grad_checkpoint=True))
            layers = [f for f in calls if f.__name__ == "layer"]
            assert len(layers) >= (2 if mode == "lossless" else 3)
            assert seams.around is None
            assert found.keys() == plain.keys()
            for key in plain:
                assert_close(found[key], plain[key], 1e-5, f"{name} {target} {key}")


def test_lora_where_it_was_asked_for():
    model = make_model("phi3")
    lora = add_lora(model, FineTune(rank=2, targets=("q_proj", "down_proj"), num_layers=3), 2)
    assert len(lora) == 6
    paths = [path for path, module in model.named_modules() if "lora_a" in module]
    assert sorted(paths) == sorted(
        f"model.layers.{i}.{name}"
        for i in (2, 3, 4)
        for name in ("self_attn.qkv_proj", "mlp.down_proj")
    )
    mixed = make_model("qwen3_moe")  # layer 3 has no experts
    add_lora(mixed, FineTune(targets=("up_proj",)), 2)
    paths = [path for path, module in mixed.named_modules() if "lora_a" in module]
    assert sorted(paths) == sorted(
        f"model.layers.{i}.mlp.{'up_proj' if i == 3 else 'switch_mlp.up_proj'}" for i in range(5)
    )
    for rule, says in (
        (FineTune(num_layers=1), "at least the 2 MSA layers, got 1"),
        (FineTune(targets=()), "none of"),
    ):
        with pytest.raises(BadArgument, match=says):
            add_lora(make_model(), rule, 2)
    for wrong in ({"rank": 0}, {"num_layers": 0}, {"num_layers": -2}):
        with pytest.raises(BadArgument, match=r"'(lora_rank|num_layers)'"):
            FineTune(**wrong)


def test_lora_that_is_there_is_fused_first():
    model = make_model()
    tokens = mx.array([EXAMPLES[0].tokens])
    for module in add_lora(model, TUNE, 2):
        module.lora_b = 0.2 * mx.random.normal(module.lora_b.shape)
    want = model(tokens)
    fresh = add_lora(model, TUNE, 2)
    assert len(fresh) == 35
    assert_close(model(tokens), want, 1e-4)
    fuse(model)
    assert_close(model(tokens), want, 1e-4)
    assert not any("lora" in name for name, _ in tree_flatten(model.parameters()))
