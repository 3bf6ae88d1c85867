"""Parts that our passes compute in another way on a CPU: nobody but our passes meets them."""

import sys

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.models import activations, base, gemma2, llama, switch_layers
from tiny_models import attached, make_model, make_tokenizer

from mlx_specstream import stream_generate
from mlx_specstream.model import cpu
from mlx_specstream.model.activation import fast_swiglu
from mlx_specstream.model.attention import rows_attention
from mlx_specstream.model.cpu import PARTS, Part, places_of, quicker_parts
from mlx_specstream.model.rows import causal_rows
from mlx_specstream.model.seams import Pass

STOCK = {part.name: part.stock for part in PARTS}
OURS = {"swiglu": fast_swiglu, "scaled_dot_product_attention": rows_attention}
GATE, ATTENTION = OURS
PROMPT = [53, 56, 8, 26, 42, 33]


def named(places):
    return [(place.module, place.part.name) for place in places]


def is_stock(module) -> bool:
    return all(getattr(module, name, stock) is stock for name, stock in STOCK.items())


def is_ours(module) -> bool:
    return all(getattr(module, name) is ours for name, ours in OURS.items())


def test_the_parts_take_the_place_of_mlx_lm_s_own():
    assert {GATE: activations.swiglu, ATTENTION: base.scaled_dot_product_attention} == STOCK
    assert {part.name: part.ours for part in PARTS} == OURS


def test_which_modules_have_them():
    both = [(llama, GATE), (llama, ATTENTION)]
    assert named(places_of(make_model().layers)) == both
    assert (gemma2, GATE) not in named(places_of(make_model("gemma2").layers))  # another activation
    assert (switch_layers, GATE) in named(places_of(make_model("mixtral").layers))
    assert named(places_of(attached().model.layers)) == both  # the seams do not hide them


def test_modules_are_patched_for_a_while_and_mlx_lm_s_own_functions_never():
    places = places_of(make_model().layers)
    with quicker_parts(places):
        assert is_ours(llama)
        assert activations.swiglu is STOCK[GATE]
        assert base.scaled_dot_product_attention is STOCK[ATTENTION]
        with quicker_parts([]):
            assert is_ours(llama)
        assert is_ours(llama)
    assert is_stock(llama)
    assert is_stock(switch_layers)


def test_modules_are_restored_after_an_exception():
    def fail():
        with quicker_parts(places_of(make_model().layers)):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert is_stock(llama)
    seams = attached()

    def boom(hidden, rows):
        assert is_ours(llama)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        seams.forward(Pass(causal_rows(0, 2), at_cut=boom, decoding=True), mx.array([[3, 4]]))
    assert is_stock(llama)
    assert seams.running is None


@pytest.mark.parametrize("why", ["gpu", "no compiler"])
def test_where_they_would_be_slower_the_stock_ones_stay(monkeypatch, why):
    """On a GPU an exponential is cheap; without a C++ compiler the parts would run one by one."""
    if why == "gpu":
        monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu, 0))
    else:
        monkeypatch.setattr(cpu, "COMPILER", False)
    with quicker_parts(places_of(make_model().layers)):
        assert is_stock(llama)


@pytest.fixture
def uses(monkeypatch):
    """Rows that each part was called with; checks that none is ever left behind."""
    calls = {name: [] for name in OURS}

    def counted(name, ours):
        def call(x, *args, **kwargs):
            calls[name].append(x.shape[-2])
            return ours(x, *args, **kwargs)

        return Part(name, STOCK[name], call)

    monkeypatch.setattr(cpu, "PARTS", [counted(name, ours) for name, ours in OURS.items()])
    yield calls
    modules = [m for n, m in sys.modules.items() if n.startswith("mlx_lm") and m is not None]
    assert [m for m in modules if not is_stock(m)] == []


def test_only_our_own_decoding_uses_them(uses):
    seams, tokenizer = attached(), make_tokenizer(ends=False)
    plain = [r.token for r in mlx_lm.stream_generate(seams.model, tokenizer, PROMPT, max_tokens=9)]
    for options in ({"use_streams": False}, {"use_streams": False, "max_kv_size": 99}):
        answer = stream_generate(seams.model, tokenizer, PROMPT, max_tokens=9, **options)
        assert [r.token for r in answer] == plain
    seams.model(mx.array([[3, 4, 5]]))
    mx.eval(seams.logits(mx.array([[3, 4, 5]])))  # what training and measuring look at
    mx.eval(seams.forward(Pass(causal_rows(0, 3)), mx.array([[3, 4, 5]])))
    assert uses == {GATE: [], ATTENTION: []}
    got = stream_generate(seams.model, tokenizer, PROMPT, max_tokens=9, tree="best:7")
    assert [r.token for r in got] == plain
    for name, rows in uses.items():
        assert {7, 3} <= set(rows), f"{name}: passes of the tree and of the streams"


def test_between_two_tokens_the_stock_ones_are_back(uses):
    seams, tokenizer = attached(), make_tokenizer(ends=False)
    for number, _ in enumerate(
        stream_generate(seams.model, tokenizer, PROMPT, max_tokens=9, tree="best:7")
    ):
        assert is_stock(llama), number
    assert all(uses.values())
