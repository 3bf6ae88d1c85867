"""Every supported architecture: trees and streams against the stock model's plain decoding."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import llama
from mlx_lm.models.cache import KVCache
from mlx_lm.tuner.utils import linear_to_lora_layers
from reference import assert_close
from steps import decoder_for
from tiny_models import (
    CONFIGS,
    VOCABULARY,
    attached,
    before_layer,
    make_model,
    merge_lora,
    quantized,
    stock_hidden,
    stock_logits,
    without_lora,
)

from mlx_specstream.config import StreamConfig
from mlx_specstream.errors import UnsupportedModel
from mlx_specstream.model.cache import make_prompt_cache
from mlx_specstream.model.checkpoint import compare, fingerprint
from mlx_specstream.model.cpu import places_of
from mlx_specstream.model.projections import stream_shapes
from mlx_specstream.model.rows import tree_rows
from mlx_specstream.model.seams import Pass, Seams, attach, detach, seams_of
from mlx_specstream.model.support import TESTED, check_supported

NAMES = sorted(CONFIGS)
PROMPT = [5, 17, 3, 42, 8, 29, 11, 64, 2, 50, 31]
# Two branches, one of them longer than the sliding window of the tiny models.
#            0   1   2   3   4   5   6   7   8
TOKENS = [40, 7, 7, 19, 23, 61, 13, 36, 54]
PARENTS = [-1, 0, 0, 1, 3, 4, 5, 2, 2]
TOLERANCE = 1e-5  # of the largest logit, fp32


def tree():
    n = len(PARENTS)
    depth, sees = np.zeros(n, int), np.eye(n, dtype=bool)
    for node in range(1, n):
        depth[node] = depth[PARENTS[node]] + 1
        sees[node] |= sees[PARENTS[node]]
    return depth, sees


def path_to(node):
    return [*path_to(PARENTS[node]), node] if node >= 0 else []


def tokens_to(node):
    return PROMPT + [TOKENS[k] for k in path_to(node)]


def tree_pass(seams, sees=None, **options):
    """One pass over the tree behind the prompt; the prompt goes through the stock path."""
    depth, ancestors = tree()
    stores = [KVCache() for _ in seams.model.layers]
    seams.model(mx.array([PROMPT]), cache=stores)
    run = Pass(tree_rows(len(PROMPT), depth, ancestors if sees is None else sees), **options)
    logits = seams.forward(run, mx.array([TOKENS]), stores)[0]
    mx.eval(logits)
    return logits, run


def check_tree(model, seams, tolerance=TOLERANCE, sees=None):
    """Logits of every node against plain decoding of its path, by the stock model."""
    logits, _ = tree_pass(seams, sees)
    detach(model)
    for node in range(len(TOKENS)):
        plain = model(mx.array([tokens_to(node)]))[0, -1]
        assert_close(logits[node], plain, tolerance, f"node {node}")


def run_steps(seams, placement, count, prune=None):
    """Greedy steps from the prompt with full-vocabulary guesses; every step drafts 68 nodes."""
    decoder = decoder_for(seams, PROMPT, f"best:{VOCABULARY + 1}", placement)
    tokens, seen = [], []
    for _ in range(count):
        tokens += decoder.step(100, ()).tokens
    decoder.close()
    for guesses in decoder.guessed[1:]:
        logprobs = np.array(guesses.logprobs)
        by_token = np.empty_like(logprobs)
        np.put_along_axis(by_token, np.array(guesses.tokens), logprobs, axis=-1)
        seen.append(by_token)
    return tokens, seen, decoder.buffers.stores


@pytest.mark.parametrize("name", NAMES)
def test_tree_nodes_equal_plain_decoding(name):
    model = make_model(name)
    check_tree(model, attach(model))


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mixtral"])
def test_tree_parity_notices_one_wrong_mask_bit(name):
    sees = tree()[1]
    sees[8, 1] = True  # a node of the other branch
    model = make_model(name)
    with pytest.raises(AssertionError, match="node 8"):
        check_tree(model, attach(model), sees=sees)


@pytest.mark.parametrize("name", NAMES)
def test_streams_equal_a_causal_run_of_the_upper_layers(name):
    """Stream (t, j), adapter zero: the last row of a plain run over [M up to t, S_t1 .. S_tj]."""
    seams = attached(name)
    without_lora(seams.streams)
    n, g = len(TOKENS), seams.streams.config.num_streams
    logits, _ = tree_pass(seams, at_cut=seams.add_streams)
    rows = logits[n:].reshape(g, n, -1)
    model = seams.detach()
    for node in range(n):
        hidden = stock_hidden(model, tokens_to(node), seams.cut)
        begin = seams.streams.begin(hidden[None, -1:])[0]  # [g, E]
        plain = stock_logits(model, mx.concatenate([hidden, begin]), seams.cut)
        assert_close(logits[node], plain[-g - 1], TOLERANCE, f"main stream of node {node}")
        for j in range(1, g + 1):
            assert_close(
                rows[j - 1, node], plain[-g - 1 + j], TOLERANCE, f"stream {j}, node {node}"
            )


@pytest.mark.parametrize("name", NAMES)
def test_adapters_never_touch_the_main_stream(name):
    """At the same shapes: bitwise equal main logits and K/V, whatever the adapters do."""
    seams = attached(name)
    with_lora, run = tree_pass(seams, at_cut=seams.add_streams)
    fresh = [c.fresh for c in run.contexts]
    if any(seams.streams.lora):
        without_lora(seams.streams)
    seams.streams.embeddings = -3.0 * seams.streams.embeddings
    without, run = tree_pass(seams, at_cut=seams.add_streams)
    n = len(TOKENS)
    assert np.array_equal(np.array(with_lora[:n]), np.array(without[:n]))
    for old, new in zip(fresh, [c.fresh for c in run.contexts], strict=True):
        for a, b in zip(old, new, strict=True):
            assert np.array_equal(np.array(a[:, :, :n]), np.array(b[:, :, :n]))
    assert np.abs(np.array(with_lora[n:] - without[n:])).max() > 1e-2  # and streams do change


@pytest.mark.parametrize("name", NAMES)
def test_gated_adapters_equal_merged_weights(name):
    """A stream runs as if LoRA were merged into the weights, behind K/V of the unmerged model."""
    seams = attached(name)
    n, g = len(TOKENS), seams.streams.config.num_streams
    logits, _ = tree_pass(seams, at_cut=seams.add_streams)
    rows = logits[n:].reshape(g, n, -1)
    model, node = seams.detach(), 6
    hidden = stock_hidden(model, tokens_to(node), seams.cut)
    prefix = make_prompt_cache(model)
    mx.eval(model(mx.array([tokens_to(node)]), cache=prefix))
    assert merge_lora(model, seams.streams) == sum(map(len, seams.streams.lora))
    begin = seams.streams.begin(hidden[None, -1:])
    with before_layer(model, seams.cut, lambda x: begin):
        merged = model(mx.zeros((1, g), dtype=mx.int32), cache=prefix)[0]
    assert_close(rows[:, node], merged, TOLERANCE, "streams")


@pytest.mark.parametrize("name", NAMES)
def test_steps_of_both_placements_equal_plain_decoding(name):
    """Same tokens as plain greedy; same stream logits; K/V of exactly the accepted tokens."""
    seams = attached(name)
    inline, inline_guesses, stores = run_steps(seams, "inline", 3)
    deferred, deferred_guesses, deferred_stores = run_steps(seams, "deferred", 3)
    assert inline == deferred
    assert len(inline) > 3, "nothing was accepted, so nothing was tested"
    for a, b in zip(inline_guesses, deferred_guesses, strict=True):
        assert_close(a, b, 1e-4, "stream log-probabilities")
    model = seams.detach()
    logits = model(mx.array([PROMPT + inline]))[0]
    plain = mx.argmax(logits[len(PROMPT) - 1 : -1], axis=-1).tolist()
    assert plain == inline
    clean = make_prompt_cache(model)
    model(mx.array([PROMPT + inline[:-1]]), cache=clean)
    for layer, (want, a, b) in enumerate(zip(clean, stores, deferred_stores, strict=True)):
        for got in (a, b):
            assert got.offset == want.offset
            for x, y in zip(got.keys_and_values(), want.keys_and_values(), strict=True):
                assert_close(x, y, TOLERANCE, f"K/V of layer {layer}")


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_get_the_same_adapter_sorted_and_unsorted(name, monkeypatch):
    """mlx-lm sorts 64 (row, expert) pairs or more; both ways must mean the same LoRA."""
    seams = attached(name)
    calls = []

    def spy(self, y, x, projection, sorted_rows):
        calls.append(sorted_rows)
        return stock_add(self, y, x, projection, sorted_rows)

    stock_add = Pass.add_expert_lora
    monkeypatch.setattr(Pass, "add_expert_lora", spy)
    tokens = mx.array([[3, 60, 21, 9, 14, 35, 52]])  # 7 tokens, 28 rows, 56 pairs
    _, few = seams.model(tokens, streams=True)
    mx.eval(few)
    assert set(calls) == {False}
    calls.clear()
    longer = mx.concatenate([tokens, mx.array([[1, 44]])], axis=1)
    _, many = seams.model(longer, streams=True)
    mx.eval(many)
    assert set(calls) == {True}
    assert_close(many[:, :, :7], few, TOLERANCE, "stream logits")


@pytest.mark.parametrize("name", ["llama", "phi3", "mixtral", "gpt_oss"])
def test_quantized_bases(name):
    model = quantized(make_model(name))
    check_tree(model, attach(model))
    seams = attached(name)
    quantized(seams.detach())
    seams = attach(seams.model, seams.streams)
    inline, a, _ = run_steps(seams, "inline", 2)
    deferred, b, _ = run_steps(seams, "deferred", 2)
    assert inline == deferred
    for x, y in zip(a, b, strict=True):
        assert_close(x, y, 1e-4, "stream log-probabilities")


@pytest.mark.parametrize(("name", "dora"), [("llama", False), ("llama", True), ("mixtral", False)])
def test_bases_with_adapters_of_mlx_lm(name, dora):
    """An unfused fine-tune wraps the linears that our seams and the fingerprint look for."""
    seams = attached(name)
    model, streams = seams.detach(), seams.streams
    bare = fingerprint(model)
    keys = ["self_attn.q_proj", "self_attn.v_proj", "block_sparse_moe.switch_mlp.up_proj"]
    settings = {"rank": 3, "dropout": 0.0, "scale": 2.0, "keys": keys}
    linear_to_lora_layers(model, 2, settings, use_dora=dora)
    for path, p in tree_flatten(model.trainable_parameters()):
        if path.endswith("lora_b"):
            model.update(tree_unflatten([(path, 0.1 * mx.random.normal(p.shape))]))
    assert any(path.endswith("lora_b") for path, _ in tree_flatten(model.parameters()))
    assert compare(bare, fingerprint(model))[0] == "same"
    check_tree(model, attach(model))
    seams = attach(model, streams)
    inline, a, _ = run_steps(seams, "inline", 2)
    deferred, b, _ = run_steps(seams, "deferred", 2)
    assert inline == deferred
    for x, y in zip(a, b, strict=True):
        assert_close(x, y, 1e-4, "stream log-probabilities")


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_half_precision_bases_keep_their_dtype(dtype):
    seams = attached("qwen3")
    seams.model.set_dtype(dtype)
    main, streams = seams.model(mx.array([PROMPT]), streams=True)
    assert main.dtype == streams.dtype == dtype
    assert_close(main, detach(seams.model)(mx.array([PROMPT])), 5e-2, "main logits")


@pytest.mark.parametrize("name", NAMES)
def test_attach_and_detach_leave_the_stock_model(name):
    model = make_model(name)
    tokens = mx.array([PROMPT])
    kinds = [type(m) for _, m in model.named_modules()]
    attributes = [set(vars(m)) for _, m in model.named_modules()]
    parameters = dict(tree_flatten(model.parameters()))
    before = np.array(model(tokens))
    seams = attached(name)
    streams, model_2 = seams.streams, model
    attach(model_2, streams)
    assert seams_of(model).streams is streams
    assert dict(tree_flatten(model.parameters())).keys() == parameters.keys()
    assert np.array_equal(np.array(model(tokens)), before)  # the plain path of an attached model
    assert detach(model) is model
    assert [type(m) for _, m in model.named_modules()] == kinds
    assert [set(vars(m)) for _, m in model.named_modules()] == attributes
    assert np.array_equal(np.array(model(tokens)), before)
    assert seams_of(model) is None
    assert detach(model) is model  # twice does no harm


def test_every_model_type_called_tested_is_tested():
    assert {name.partition(":")[0] for name in CONFIGS} == TESTED


@pytest.mark.parametrize("name", NAMES)
def test_where_attention_is_mlx_lm_s_a_cpu_has_its_own(name):
    parts = {place.part.name for place in places_of(make_model(name).layers)}
    own = name.startswith("gemma2")  # caps its scores, so it has an attention of its own
    assert ("scaled_dot_product_attention" in parts) == (not own)


@pytest.mark.parametrize("name", NAMES)
def test_adapters_reach_every_projection(name):
    missing = {  # these have no such projection, or (internlm2) no column block of its own for it
        "phi": {"gate_proj"},
        "starcoder2": {"gate_proj"},
        "gpt2": {"gate_proj"},
        "opt": {"gate_proj"},
        "opt:350m": {"gate_proj"},
        "internlm2": {"q_proj", "k_proj", "v_proj"},
    }
    config = StreamConfig(num_streams=1, msa_layers=2)
    heads = {"q_proj": 4, "k_proj": 2, "v_proj": 2}
    if name in ("phi", "gpt2", "opt", "opt:350m"):
        heads = dict.fromkeys(heads, 4)
    for layer in stream_shapes(make_model(name), config):
        assert set(config.lora_targets) - set(layer) == missing.get(name, set())
        for projection in heads.keys() & layer.keys():  # fused ones are split into their blocks
            assert layer[projection][1] == heads[projection] * 24


def test_supported_models_pass_the_probe_of_unknown_ones(monkeypatch):
    monkeypatch.setattr("mlx_specstream.model.support.TESTED", frozenset())
    for name in ("llama", "gemma3_text", "gpt_oss"):
        model = make_model(name)
        check_supported(model)
        assert seams_of(model) is None


def refused(module: str, config: dict, match: str):
    import importlib

    lib = importlib.import_module(f"mlx_lm.models.{module}")
    model = lib.Model(lib.ModelArgs.from_dict({"model_type": module, **config}))
    with pytest.raises(UnsupportedModel, match=match) as caught:
        check_supported(model)
    assert "\n" not in str(caught.value)
    assert f"'{module}'" in str(caught.value)


def test_refusals_name_the_reason(monkeypatch):
    small = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2}
    mamba = {**small, "intermediate_size": 48, "state_size": 4, "conv_kernel": 3}
    mamba |= {"use_bias": False, "use_conv_bias": True, "time_step_rank": 2}
    refused("mamba", mamba, "recurrent or hybrid")
    dynamic = {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 64}
    dynamic |= {"intermediate_size": 40, "num_attention_heads": 2, "rms_norm_eps": 1e-5}
    refused("llama", {**small, **dynamic}, "dynamic NTK")
    # A table of positions under a name that the seams do not know: the probe finds out.
    monkeypatch.setattr("mlx_specstream.model.support.TESTED", frozenset())
    monkeypatch.setattr("mlx_specstream.model.positions.TABLES", ())
    gpt2 = {"n_ctx": 40, "n_embd": 32, "n_head": 2, "n_layer": 2, "n_positions": 40}
    refused(
        "gpt2", {**gpt2, "layer_norm_epsilon": 1e-5, "vocab_size": 61}, "does not fit the seams"
    )


class SeesTokens(llama.TransformerBlock):
    """A layer that reads the tokens again, as per-layer inputs do."""

    tokens = None

    def __call__(self, x, mask=None, cache=None):
        return super().__call__(x + 0.1 * self.tokens[..., None], mask, cache)


class PassesTokens(llama.LlamaModel):
    def __call__(self, inputs, cache=None, input_embeddings=None):
        SeesTokens.tokens = inputs
        return super().__call__(inputs, cache, input_embeddings)


def test_layers_that_cannot_run_alone_are_refused():
    model = make_model("llama")
    model.model_type = "inputs-per-layer"
    check_supported(model)
    model.model.__class__, model.layers[-1].__class__ = PassesTokens, SeesTokens
    with pytest.raises(UnsupportedModel, match="more than the hidden states"):
        check_supported(model)


def test_model_without_streams_says_so():
    model = make_model()
    attach(model)
    with pytest.raises(ValueError, match="needs a model with streams"):
        model(mx.array([PROMPT]), streams=True)


def test_stock_callers_see_the_stock_signature():
    """mlx-lm asks a model for ``input_embeddings`` by its signature."""
    import inspect

    model = make_model("qwen3")
    stock = inspect.signature(model.__call__)
    Seams(model)
    assert inspect.signature(model.__call__) == stock
