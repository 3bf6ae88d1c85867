"""Streams' LoRA inside copies of the weights: the same logits, and used where it may be."""

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from reference import assert_close
from steps import decoder_for
from tiny_models import attached, make_model, make_streams, quantized

from mlx_specstream.config import StreamConfig
from mlx_specstream.decode import decoder as loop
from mlx_specstream.model.cache import make_prompt_cache
from mlx_specstream.model.rows import causal_rows
from mlx_specstream.model.seams import Pass, attach

PROMPT = [53, 56, 8, 26, 42]
PLENTY = 1 << 30


def stream_logits(seams, decoding=True, changed=None):
    """What the streams of the prompt's last token say, run alone behind its K/V."""
    cache = make_prompt_cache(seams.model)
    run = Pass(causal_rows(0, len(PROMPT)))
    seams.forward(run, mx.array([PROMPT]), cache)
    hosts = mx.array([[len(PROMPT) - 1]])
    hidden, roots = run.cut_hidden[:, -1:], mx.array([[7]])
    run = seams.run_streams(hidden, hosts, roots, cache, decoding=decoding)
    return seams.head(run.last_hidden)[0]


def spoil(seams):
    """Whoever uses the merged weights now says something else."""
    seams.merged = {key: weight + 1.0 for key, weight in seams.merged.items()}


def used(seams, **options):
    """Whether the merged weights of ``seams`` have a say in what the streams say."""
    before = stream_logits(seams, **options)
    kept = seams.merged
    spoil(seams)
    after = stream_logits(seams, **options)
    seams.merged = kept
    return mx.abs(after - before).max().item() > 0.1


KINDS = {
    "llama": ("llama", {}, 7),
    "llama with biases": ("llama:llama3-rope", {}, 7),
    "phi3: fused": ("phi3", {}, 4),
    "phi: names of its own, biases": ("phi", {}, 6),
    "some targets": ("llama", {"lora_targets": ("q_proj", "down_proj")}, 2),
    "fused, some targets": ("phi3", {"lora_targets": ("k_proj", "up_proj")}, 2),
    "other geometry": ("qwen3", {"num_streams": 4, "msa_layers": 3, "lora_rank": 5}, 7),
}


@pytest.mark.parametrize("kind", KINDS)
def test_merged_streams_equal_unmerged_ones(kind):
    name, options, modules = KINDS[kind]
    seams = attached(name, **options)
    seams.merge_lora(0)
    assert seams.merged == {}
    want = stream_logits(seams)
    seams.merge_lora(PLENTY)
    assert len(seams.merged) == modules * seams.streams.config.msa_layers
    assert_close(stream_logits(seams), want, 1e-5, kind)
    assert used(seams)
    for lora in seams.streams.lora:  # and the LoRA does count
        for update in lora.values():
            update.b = mx.zeros_like(update.b)
    with pytest.raises(AssertionError):
        assert_close(stream_logits(attach(seams.model, seams.streams)), want, 1e-2)


def test_all_copies_together_keep_to_the_limit():
    seams = attached()
    layers = seams.model.layers[seams.cut :]
    size = sum(
        p.nbytes for layer in layers for n, p in tree_flatten(layer.parameters()) if "proj" in n
    )
    assert size == 2 * 4 * 64 * (2 * 96 + 2 * 48 + 3 * 160)
    seams.merge_lora(size)
    assert sum(weight.nbytes for weight in seams.merged.values()) == size
    seams.merge_lora(size - 1)
    assert seams.merged == {}
    assert not used(seams)


def test_training_and_other_rows_never_use_them():
    seams = attached()
    tokens = mx.array([PROMPT])
    inline = lambda: seams.forward(  # noqa: E731
        Pass(causal_rows(0, 5), at_cut=seams.add_streams, decoding=True), tokens
    )
    want = [stream_logits(seams, decoding=False), *seams.logits(tokens), inline()]
    seams.merge_lora(PLENTY)
    assert used(seams)
    assert not used(seams, decoding=False)
    spoil(seams)
    got = [stream_logits(seams, decoding=False), *seams.logits(tokens), inline()]
    for a, b in zip(got, want, strict=True):
        assert mx.array_equal(a, b).item()


def adapted():
    """A model whose every linear layer has an adapter of mlx-lm's around it."""
    model = make_model()
    linear_to_lora_layers(model, 5, {"rank": 4, "scale": 3.0, "dropout": 0.0})
    return attach(model, make_streams(model, StreamConfig(num_streams=3, msa_layers=2)))


def in_four_bits():
    model = quantized(make_model())
    return attach(model, make_streams(model, StreamConfig(num_streams=3, msa_layers=2)))


@pytest.mark.parametrize("make", [in_four_bits, adapted])
def test_layers_that_are_not_plain_are_left_alone(make):
    seams = make()
    want = stream_logits(seams)
    seams.merge_lora(PLENTY)
    assert seams.merged == {}
    assert_close(stream_logits(seams), want, 1e-5)


def test_experts_are_left_alone_and_the_attention_beside_them_is_not():
    seams = attached("mixtral")
    want = stream_logits(seams)
    seams.merge_lora(PLENTY)
    names = {n.split(".")[-1] for n, m in seams.model.named_modules() if id(m) in seams.merged}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert_close(stream_logits(seams), want, 1e-5)


def test_streams_without_lora_have_nothing_to_merge():
    seams = attached(lora_rank=0)
    seams.merge_lora(PLENTY)
    assert seams.merged == {}


def guesses(seams, placement="deferred"):
    decoder = decoder_for(seams, PROMPT, "best:70", placement)
    for _ in range(5):
        decoder.step(1 << 30, ())
    return decoder.guessed


def test_a_decoder_merges_and_guesses_the_same(monkeypatch):
    seams = attached()
    monkeypatch.setattr(loop, "MERGED", 0)
    want = guesses(seams)
    assert seams.merged == {}
    monkeypatch.undo()
    seams = attached()
    got = guesses(seams)
    assert len(seams.merged) == 14
    for a, b in zip(got[1:], want[1:], strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        assert_close(a.logprobs, b.logprobs, 1e-5)


@pytest.mark.parametrize("which", ["base", "lora"])
def test_a_decoder_merges_anew_when_a_weight_was_replaced(which):
    """Even if an answer without streams came between."""
    seams = attached()
    guesses(seams)
    layer, lora = seams.model.layers[-1].mlp.down_proj, seams.streams.lora[-1]["down_proj"]
    if which == "base":
        layer.weight = 1.5 * layer.weight
    else:
        lora.b = lora.b - 1.0
    plain = decoder_for(seams, PROMPT, "chain", streams=False)
    plain.step(1, ())
    plain.close()
    got = guesses(seams)
    fresh = attach(make_model(), seams.streams)
    if which == "base":
        down = fresh.model.layers[-1].mlp.down_proj
        down.weight = 1.5 * down.weight
    want = guesses(fresh)
    for a, b in zip(got[1:], want[1:], strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        assert_close(a.logprobs, b.logprobs, 1e-5)
