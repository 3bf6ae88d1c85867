"""Streams: their parameters, the V1 mask's promise to the main stream, gradients, the [P] mask."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from reference import assert_close
from tiny_models import attached, make_model, make_streams, randomized, without_lora

from mlx_specstream.config import PROJECTIONS, StreamConfig
from mlx_specstream.errors import BadArgument
from mlx_specstream.model.projections import stream_shapes
from mlx_specstream.model.seams import attach
from mlx_specstream.model.streams import LowRank, Streams

TOKENS = [[3, 60, 21, 9, 14, 35, 52], [8, 8, 1, 30, 66, 0, 17]]


def both_logits(seams):
    main, streams = seams.model(mx.array(TOKENS), streams=True)
    mx.eval(main, streams)
    return main, streams


def size(streams):
    return sum(v.size for _, v in tree_flatten(streams.parameters()))


def test_shapes():
    main, streams = both_logits(attached(num_streams=4))
    assert main.shape == (2, 7, 67)
    assert streams.shape == (2, 4, 7, 67)


def test_extra_parameters_are_20h():
    """Four streams, identity f, pruning rank 8, no LoRA (method 1.2)."""
    for width in (64, 96):
        config = StreamConfig(num_streams=4, msa_layers=3, lora_rank=0, prune_rank=8)
        assert size(Streams(config, width, [])) == 20 * width


def test_lora_parameters_count_what_they_adapt():
    model = make_model()
    for rank, targets in ((5, ("q_proj", "v_proj")), (3, PROJECTIONS)):
        config = StreamConfig(2, 2, rank, lora_targets=targets)
        shapes = stream_shapes(model, config)
        assert [set(layer) for layer in shapes] == [set(targets)] * 2
        wanted = sum(rank * (d_in + d_out) for layer in shapes for d_in, d_out in layer.values())
        assert size(Streams(config, 64, shapes)) == wanted + 2 * 64


def test_new_streams_begin_as_the_base():
    """B = 0: before training the adapters, f and the early exit add nothing."""
    model = make_model()
    config = StreamConfig(2, 2, 4, init_rank=3, prune_rank=8)
    streams = Streams(config, 64, stream_shapes(model, config))
    hidden = mx.random.normal((1, 5, 64))
    assert np.array_equal(np.array(streams.exit_hidden(hidden)), np.array(hidden))
    begin = streams.begin(hidden).reshape(2, 5, 64)
    assert_close(begin, hidden + streams.embeddings[:, None], 1e-6)
    for j in range(2):  # Eq. 3
        assert_close(begin[j], hidden[0] + streams.embeddings[j], 1e-6)
    assert np.array(LowRank(4, 3, 2)(mx.ones((1, 4)))).tolist() == [[0.0] * 3]


def test_arbitrary_streams_leave_the_main_logits_bitwise_equal():
    seams = attached()
    before, streams_before = both_logits(seams)
    for seed in (7, 8):
        randomized(seams.streams, seed)
        seams.streams.embeddings = 50.0 * mx.random.normal(seams.streams.embeddings.shape)
        after, streams_after = both_logits(seams)
        assert np.array_equal(np.array(before), np.array(after))
        assert mx.abs(streams_after - streams_before).max() > 0.1


def test_streams_on_and_off_agree():
    for name in ("llama", "gemma3_text", "mixtral"):
        seams = attached(name)
        main, _ = both_logits(seams)
        assert_close(main, seams.model(mx.array(TOKENS)), 1e-5, name)
        assert_close(main, seams.detach()(mx.array(TOKENS)), 1e-5, name)


def test_main_logits_have_zero_gradient_in_the_streams():
    seams = attached("gpt_oss", init_rank=2)

    def loss(which):
        def value():
            return seams.model(mx.array(TOKENS), streams=True)[which].square().sum()

        return nn.value_and_grad(seams.streams, value)()[1]

    for path, gradient in tree_flatten(loss(0)):
        assert not np.array(gradient).any(), path
    for path, gradient in tree_flatten(loss(1)):  # and not because nothing is connected
        assert np.array(gradient).any(), path


def test_plan_mask_lets_the_main_stream_see_its_streams():
    """[P] Eq. 1, the shared mode: then streams do change the output."""
    seams = attached(main_sees_streams=True)
    before, _ = both_logits(seams)
    seams.streams.embeddings = 2.0 * seams.streams.embeddings
    after, _ = both_logits(seams)
    assert mx.abs(before - after).max() > 1e-2


def test_streams_see_no_later_token_and_no_other_position():
    seams = attached()
    _, before = both_logits(seams)
    changed = mx.array(TOKENS)
    changed[:, 4] = 5
    _, after = seams.model(changed, streams=True)
    assert_close(after[:, :, :4], before[:, :, :4], 1e-6)
    assert mx.abs(after[:, :, 4] - before[:, :, 4]).max() > 1e-2
    # Stream j of the same position sees streams 1..j only.
    embeddings = seams.streams.embeddings
    seams.streams.embeddings = embeddings * mx.array([[1.0], [1.0], [3.0]])
    _, after = both_logits(seams)
    assert_close(after[:, :2], before[:, :2], 1e-6)
    assert mx.abs(after[:, 2] - before[:, 2]).max() > 1e-2


@pytest.mark.parametrize(
    "options",
    [
        {"stream_position": "t"},
        {"value_rotation": 0.1},
        {"init_rank": 3},
        {"lora_targets": ("q_proj",)},
        {"lora_rank": 0},
        {"lora_alpha": 30.0},
        {"msa_layers": 5},
    ],
    ids=str,
)
def test_every_option_changes_the_streams_and_only_them(options):
    plain_main, plain = both_logits(attached(init_rank=0))
    main, streams = both_logits(attached(**options))
    assert_close(main, plain_main, 1e-5)
    assert mx.abs(streams - plain).max() > 1e-3


def test_value_rotation_turns_pairs_of_values():
    config = StreamConfig(2, 1, 0, value_rotation=0.25)
    streams = Streams(config, 12, [])
    assert not tree_flatten(streams.parameters())  # it replaces P_j and adds nothing
    values = mx.random.normal((1, 2, 6, 10))  # two main rows, two streams of each
    turned = np.array(streams.rotate_values(values, mx.array([1, 1, 2, 2]), 2))
    assert np.array_equal(turned[:, :, :2], np.array(values)[:, :, :2])
    as_complex = lambda v: v[..., :5] + 1j * v[..., 5:]  # noqa: E731
    for row, j in ((2, 1), (3, 1), (4, 2), (5, 2)):
        want = as_complex(np.array(values)[:, :, row]) * np.exp(0.25j * j)
        assert_close(turned[:, :, row, :5], want.real, 1e-6)
        assert_close(turned[:, :, row, 5:], want.imag, 1e-6)


def test_zero_adapter_equals_no_adapter():
    seams = attached()
    without_lora(seams.streams)
    _, zero = both_logits(seams)
    config = StreamConfig(3, 2, lora_rank=0)
    bare = make_streams(seams.detach(), config)
    bare.embeddings = seams.streams.embeddings
    _, none = both_logits(attach(seams.model, bare))
    assert_close(zero, none, 1e-6)


def test_base_parameters_are_not_the_streams():
    seams = attached()
    names = {n for n, _ in tree_flatten(seams.model.parameters())}
    stock = {n for n, _ in tree_flatten(make_model().parameters())}
    assert names == stock
    total = tree_map(lambda p: p.size, seams.model.parameters())
    assert sum(v for _, v in tree_flatten(total)) == sum(
        p.size for _, p in tree_flatten(make_model().parameters())
    )


def test_streamed_logits_take_tokens_alone():
    seams = attached()
    with pytest.raises(BadArgument, match="no cache"):
        seams.model(mx.array(TOKENS), cache=[None] * 5, streams=True)


@pytest.mark.parametrize(
    "values",
    [
        {"num_streams": 0},
        {"msa_layers": 0},
        {"lora_rank": -1},
        {"num_streams": True},
        {"lora_alpha": float("nan")},
        {"stream_position": "t+1"},
        {"lora_targets": ("q_proj", "head")},
        {"main_sees_streams": "yes"},
        {"value_rotation": "0.1"},
        {"prune_rank": 2.0},
        {"condition_shared": 1},
        {"condition_shared": True, "condition_rank": 0},
    ],
    ids=str,
)
def test_config_refuses(values):
    with pytest.raises(BadArgument, match=r"\[StreamConfig\].*got") as caught:
        StreamConfig(**values)
    assert next(iter(values)) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_config_round_trip():
    config = StreamConfig(3, 2, 4, 8.0, ("q_proj",), True, "t", 2, 0.5, 8)
    assert StreamConfig.from_json(config.to_json()) == config
