"""Whole decode steps against the NumPy oracle: adapters, pruning, trees, both placements."""

import numpy as np
import pytest
from mlx.utils import tree_flatten
from reference import Reference, assert_close, numpy_weights
from steps import decoder_for
from tiny_models import make_model, make_streams

from mlx_specstream.config import StreamConfig
from mlx_specstream.decode import step
from mlx_specstream.decode.prune import PruneRule
from mlx_specstream.model.seams import attach

# Every size differs: layers 7, MSA layers 4, streams 3, heads 6, K/V heads 2, ...
SIZES = {
    "vocab_size": 19,
    "hidden_size": 44,
    "intermediate_size": 52,
    "num_hidden_layers": 7,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
}
STREAMS = {"num_streams": 3, "msa_layers": 4, "lora_rank": 5, "lora_alpha": 7.5, "prune_rank": 8}
PROMPT = [4, 11, 0, 17, 6, 9, 13, 2]
TOLERANCE = 2e-5  # of the largest log-probability: fp32 against float64 over seven layers


def both(seed=0, temperatures=None, **options):
    """The same random model with the same random streams, ours and the oracle's."""
    config = StreamConfig(**{**STREAMS, **options})
    model = make_model("llama", seed, **SIZES)
    streams = make_streams(model, config, seed + 1)
    if config.prune_rank:  # small, so that the early exit is a fair guess of the model's own
        streams.early_exit.b = 0.1 * streams.early_exit.b
    reference = Reference(
        numpy_weights(dict(tree_flatten(model.parameters()))),
        numpy_weights(dict(tree_flatten(streams.parameters()))),
        heads=SIZES["num_attention_heads"],
        kv_heads=SIZES["num_key_value_heads"],
        head_dim=SIZES["head_dim"],
        theta=10000.0,
        eps=1e-5,
        gamma=config.num_streams,
        msa_layers=config.msa_layers,
        scale=config.lora_alpha / max(config.lora_rank, 1),
        plan=config.main_sees_streams,
        shift=config.stream_position == "t+j",
        epsilon=config.value_rotation,
        temperatures=temperatures,
    )
    if temperatures is not None:
        streams.temperatures = np.array(temperatures, np.float32)
    return attach(model, streams), reference


def check_steps(seams, reference, tree, placement, prune=None, steps=4, limits=None):
    """Steps of both sides, each with its own cache and its own guesses; returns tokens per step."""
    decoder = decoder_for(seams, PROMPT, tree, placement, prune)
    stores = decoder.buffers.stores
    reference.prefill(PROMPT[:-1])
    root, theirs, lengths = PROMPT[-1], None, []
    kind, _, size = tree.partition(":")
    rule = {"keep": prune.keep, "threshold": prune.threshold} if prune else {}
    for number in range(steps):
        limit = limits[number] if limits else 50
        result = decoder.step(limit, ())
        guesses = decoder.guessed[number]
        where = f"step {number}"
        if number:
            top = said_of(theirs, np.array(guesses.tokens))
            assert_close(guesses.logprobs, top, TOLERANCE, f"{where}, stream log-probabilities")
            if top.ndim == 2:
                assert_close(top[:, 0], theirs.max(axis=1), 1e-6, f"{where}, the best guess")
        tokens, theirs, paths, kept = reference.step(
            root, theirs, kind=kind, size=int(size or 1), limit=limit, **rule
        )
        assert result.tokens == tokens, where
        assert decoder.nodes[number] == len(paths), where
        lengths.append((len(tokens), len(paths), len(kept)))
        for row, log_probs in enumerate(result.logprobs):
            assert_close(log_probs.max(), np.array(log_probs)[tokens[row]], 1e-6, where)
        root = tokens[-1]
        if result.ended:
            assert len(tokens) == limit
            break
    decoder.close()
    for layer, (store, cached) in enumerate(zip(stores, reference.cache, strict=True)):
        assert store.offset == len(cached)
        for got, want in zip(store.keys_and_values(), zip(*cached, strict=True), strict=True):
            assert_close(got[0], np.stack(want, axis=1), TOLERANCE, f"cache of layer {layer}")
    return lengths


def said_of(theirs, tokens):
    """The oracle's log-probabilities of our guesses [g, K]: [g, K] or, given the one before, [g, K, K]."""
    if theirs.ndim == 2:
        return np.take_along_axis(theirs, tokens, axis=-1)
    before = np.concatenate([tokens[:1], tokens[:-1]])
    return np.stack([t[np.ix_(a, b)] for t, a, b in zip(theirs, before, tokens, strict=True)])


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("placement", ["inline", "deferred"])
@pytest.mark.parametrize("tree", ["chain", "cartesian:3", "best:24"])
def test_conditioned_steps_equal_the_oracle(tree, placement, shared, monkeypatch):
    """Drafts that know the token before theirs; every guess of the vocabulary is scored again."""
    monkeypatch.setattr(step, "WIDE", SIZES["vocab_size"])
    streams = both(seed=8, condition_rank=6, condition_shared=shared)
    lengths = check_steps(*streams, tree, placement, steps=5)
    if tree != "chain":
        assert sum(n for n, _, _ in lengths) > len(lengths), "nothing was accepted"


@pytest.mark.parametrize(
    "options", [{"condition_rank": 6, "init_rank": 3}, {}], ids=["conditioned", ""]
)
def test_steps_of_streams_that_know_their_root_equal_the_oracle(options, monkeypatch):
    monkeypatch.setattr(step, "WIDE", SIZES["vocab_size"])
    seams, reference = both(seed=8, root_rank=9, **options)
    lengths = check_steps(seams, reference, "best:24", "deferred", steps=5)
    assert sum(n for n, _, _ in lengths) > len(lengths), "nothing was accepted"
    seams, reference = both(seed=8, root_rank=9, **options)
    reference.choices = lambda rows: [3] * len(rows)  # another root
    with pytest.raises(AssertionError):
        check_steps(seams, reference, "best:24", "deferred", steps=5)


@pytest.mark.parametrize("placement", ["inline", "deferred"])
@pytest.mark.parametrize("tree", ["chain", "cartesian:3", "best:24"])
def test_steps_equal_the_oracle(tree, placement):
    lengths = check_steps(*both(), tree, placement, steps=5)
    if tree != "chain":
        assert sum(n for n, _, _ in lengths) > len(lengths), "nothing was accepted"


@pytest.mark.parametrize("condition_rank", [0, 6])
def test_calibrated_steps_equal_the_oracle(condition_rank, monkeypatch):
    """Temperatures change which nodes a best-first tree holds, given the token before or not."""
    monkeypatch.setattr(step, "WIDE", SIZES["vocab_size"])
    heat = (0.5, 1.7, 2.9)
    options = {"condition_rank": condition_rank, "seed": 8}
    seams, reference = both(temperatures=heat, **options)
    check_steps(seams, reference, "best:24", "deferred", steps=5)
    if condition_rank:
        return
    seams, reference = both(temperatures=heat, **options)
    reference.heat = (1.0, 1.0, 1.0)
    with pytest.raises(AssertionError):
        check_steps(seams, reference, "best:24", "deferred", steps=5)


@pytest.mark.parametrize(
    ("placement", "root_rank"), [("inline", 0), ("deferred", 0), ("deferred", 9)]
)
@pytest.mark.parametrize("prune", [PruneRule(keep=9), PruneRule(threshold=0.04)], ids=str)
def test_pruned_steps_equal_the_oracle(prune, placement, root_rank):
    """The root of streams that are told theirs comes from what the early exit left."""
    sides = both(seed=3, root_rank=root_rank)
    lengths = check_steps(*sides, "best:26", placement, prune, steps=5)
    assert any(kept < nodes for _, nodes, kept in lengths), "nothing was pruned"
    assert any(kept > 1 for _, _, kept in lengths)
    assert sum(n for n, _, _ in lengths) > len(lengths), "nothing was accepted"


@pytest.mark.parametrize(
    ("options", "placement"),
    [
        ({"main_sees_streams": True}, "inline"),
        ({"stream_position": "t"}, "inline"),
        ({"stream_position": "t"}, "deferred"),
        ({"value_rotation": 0.05}, "inline"),
        ({"value_rotation": 0.05}, "deferred"),
        ({"init_rank": 2}, "inline"),
        ({"init_rank": 2}, "deferred"),
        ({"lora_targets": ("q_proj", "v_proj", "down_proj")}, "inline"),
        ({"lora_rank": 0, "num_streams": 4, "msa_layers": 3, "prune_rank": 0}, "deferred"),
        ({"msa_layers": 7}, "inline"),
        ({"msa_layers": 7}, "deferred"),
    ],
    ids=str,
)
def test_options_equal_the_oracle(options, placement):
    check_steps(*both(seed=5, **options), "best:11", placement, steps=3)


def test_plan_mask_with_pruning_equals_the_oracle():
    seams, reference = both(seed=7, main_sees_streams=True)
    check_steps(seams, reference, "cartesian:2", "inline", PruneRule(keep=6))


def test_oracle_notices_one_wrong_detail():
    """The comparison is not vacuous: a shifted position, a missing adapter, a lost row are seen."""
    for change in ({"shift": False}, {"scale": 1.4}, {"plan": True}, {"eps": 1e-2}):
        seams, reference = both()
        for name, value in change.items():
            setattr(reference, name, value)
        with pytest.raises(AssertionError):
            check_steps(seams, reference, "best:24", "inline", steps=2)


def test_limit_inside_a_path():
    seams, reference = both()
    free = check_steps(seams, reference, "best:24", "deferred", steps=5)
    step_of_long_path = next(n for n, (length, _, _) in enumerate(free) if length > 1)
    limits = [50] * step_of_long_path + [free[step_of_long_path][0] - 1]
    seams, reference = both()
    cut = check_steps(seams, reference, "best:24", "deferred", steps=5, limits=limits)
    assert len(cut) == step_of_long_path + 1


def test_nothing_is_chosen_after_a_stop_token():
    seams, _ = both()
    decoder = decoder_for(seams, PROMPT, "best:24", "deferred")
    decoder.step(50, ())
    second = decoder.step(50, range(19))
    assert len(second.tokens) == 1
    assert second.ended
    decoder.close()
    assert decoder.buffers.stores[0].offset == len(PROMPT) + 1


def test_rows_of_an_inline_cartesian_pass(monkeypatch):
    """(1 + gamma)(1 + sum k^g) rows (method 1.4)."""
    seams, _ = both(prune_rank=0)
    g, k = 3, 2
    seen = []
    decoder = decoder_for(seams, PROMPT, f"cartesian:{k}", "inline")
    decoder.step(50, ())
    forward = type(seams).forward

    def spy(self, run, *args, **kwargs):
        out = forward(self, run, *args, **kwargs)
        seen.append((run.rows.count, out.shape[1]))
        return out

    monkeypatch.setattr(type(seams), "forward", spy)
    decoder.step(50, ())
    nodes = 1 + sum(k**d for d in range(1, g + 1))
    # The streams of the accepted node go through the head; then a pass, whose head sees main rows only.
    assert seen[0][1] == g
    assert seen[1] == ((1 + g) * nodes, nodes)
