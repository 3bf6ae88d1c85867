"""The fast gate of SwiGLU blocks: how exact it is, and that nobody but our passes meets it."""

import sys

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.models import activations, llama, switch_layers
from reference import assert_close
from test_sampling import compiled
from tiny_models import attached, make_model, make_tokenizer

from mlx_specstream import stream_generate
from mlx_specstream.model import activation
from mlx_specstream.model.activation import (
    fast_activations,
    fast_swiglu,
    modules_with_swiglu,
)
from mlx_specstream.model.rows import causal_rows
from mlx_specstream.model.seams import Pass

STOCK = activations.swiglu
PROMPT = [53, 56, 8, 26, 42, 33]


def exact(gate, x):
    gate, x = (np.array(a, dtype=np.float64) for a in (gate, x))
    with np.errstate(over="ignore"):
        return gate / (1 + np.exp(-gate)) * x


GATES = {
    "small": np.linspace(-1e-3, 1e-3, 2001),
    "usual": np.linspace(-9, 9, 20_001),
    "where it is clipped": np.linspace(-18.5, -17.5, 2001),
    "far": np.linspace(-300, 300, 20_001),
    "farther": np.array([-3e6, -1e4, 1e4, 3e6]),
}


@pytest.mark.parametrize("name", GATES)
def test_the_sigmoid_is_right_to_the_last_bits_of_float32(name):
    gate = mx.array(GATES[name].astype(np.float32))
    ones = mx.ones(gate.shape)
    got, want = np.array(fast_swiglu(gate, ones), np.float64), exact(gate, ones)
    size = np.maximum(np.abs(np.array(gate, np.float64)), 1e-30)
    assert (np.abs(got - want) / size).max() < 2.1e-7, "absolute error of the sigmoid"
    stock = np.array(STOCK(gate, ones), np.float64)
    assert (np.abs(stock - want) / size).max() < 2.1e-7, "the stock one is not better than that"


def test_a_block_is_right_relative_to_its_largest_value():
    rng = np.random.default_rng(0)
    gate, x = (mx.array(rng.normal(0, s, (31, 160)).astype(np.float32)) for s in (6.0, 3.0))
    assert_close(fast_swiglu(gate, x), exact(gate, x), 3e-7)
    assert_close(fast_swiglu(gate[:, :1], x), exact(gate[:, :1], x), 3e-7, "broadcast")


def test_what_is_not_finite_stays_so():
    gate = mx.array([mx.inf, mx.nan, 1.0, 1.0, 0.0])
    x = mx.array([2.0, 1.0, mx.nan, -mx.inf, 5.0])
    got = np.array(fast_swiglu(gate, x))
    assert got[0] == np.inf
    assert np.isnan(got[1:3]).all()
    assert got[3] == -np.inf
    assert got[4] == 0.0


def test_compiled_it_is_the_same():
    gate = mx.array(GATES["usual"].astype(np.float32))
    plain = fast_swiglu(gate, gate - 1)
    with compiled():
        assert_close(fast_swiglu(gate, gate - 1), plain, 1e-7)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_sixteen_bits_go_the_stock_way(dtype):
    gate = mx.array(GATES["usual"].astype(np.float32)).astype(dtype)
    x = (gate * 3 + 1).astype(dtype)
    got = fast_swiglu(gate, x)
    assert got.dtype == dtype
    assert mx.array_equal(got, STOCK(gate, x)).item()


def test_which_modules_have_the_gate():
    assert modules_with_swiglu(make_model().layers) == [llama]
    assert modules_with_swiglu(make_model("gemma2").layers) == []  # another activation
    assert switch_layers in modules_with_swiglu(make_model("mixtral").layers)
    assert modules_with_swiglu(attached().model.layers) == [llama]  # the seams do not hide it


def test_modules_are_patched_for_a_while_and_mlx_lm_s_own_function_never():
    with fast_activations([llama]):
        assert llama.swiglu is fast_swiglu
        assert activations.swiglu is STOCK
        with fast_activations([]):
            assert llama.swiglu is fast_swiglu
        assert llama.swiglu is fast_swiglu
    assert llama.swiglu is STOCK
    assert switch_layers.swiglu is STOCK


def test_modules_are_restored_after_an_exception():
    def fail():
        with fast_activations([llama]):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert llama.swiglu is STOCK
    seams = attached()

    def boom(hidden, rows):
        assert llama.swiglu is fast_swiglu
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        seams.forward(Pass(causal_rows(0, 2), at_cut=boom, decoding=True), mx.array([[3, 4]]))
    assert llama.swiglu is STOCK
    assert seams.running is None


@pytest.mark.parametrize("why", ["gpu", "no compiler"])
def test_where_it_would_be_slower_the_stock_one_stays(monkeypatch, why):
    """On a GPU an exponential is cheap; without a C++ compiler the parts would run one by one."""
    if why == "gpu":
        monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu, 0))
    else:
        monkeypatch.setattr(activation, "COMPILER", False)
    with fast_activations([llama]):
        assert llama.swiglu is STOCK


@pytest.fixture
def uses(monkeypatch):
    """How often the fast gate was used, and checks that it is never left behind."""
    calls = []

    def counted(gate, x):
        calls.append(gate.shape)
        return fast_swiglu(gate, x)

    monkeypatch.setattr(activation, "fast_swiglu", counted)
    yield calls
    patched = [n for n, m in sys.modules.items() if n.startswith("mlx_lm") and m is not None
               and getattr(m, "swiglu", STOCK) is not STOCK]  # fmt: skip
    assert patched == []


def test_only_our_own_decoding_uses_it(uses):
    seams, tokenizer = attached(), make_tokenizer(ends=False)
    plain = [r.token for r in mlx_lm.stream_generate(seams.model, tokenizer, PROMPT, max_tokens=9)]
    for options in ({"use_streams": False}, {"use_streams": False, "max_kv_size": 99}):
        answer = stream_generate(seams.model, tokenizer, PROMPT, max_tokens=9, **options)
        assert [r.token for r in answer] == plain
    seams.model(mx.array([[3, 4, 5]]))
    mx.eval(seams.logits(mx.array([[3, 4, 5]])))  # what training and measuring look at
    mx.eval(seams.forward(Pass(causal_rows(0, 3)), mx.array([[3, 4, 5]])))
    assert uses == []
    got = stream_generate(seams.model, tokenizer, PROMPT, max_tokens=9, tree="best:7")
    assert [r.token for r in got] == plain
    layers = {shape[1] for shape in uses}
    assert {7, 3} <= layers, "passes of the tree and of the streams"


def test_between_two_tokens_the_stock_gate_is_back(uses):
    seams, tokenizer = attached(), make_tokenizer(ends=False)
    for number, _ in enumerate(
        stream_generate(seams.model, tokenizer, PROMPT, max_tokens=9, tree="best:7")
    ):
        assert llama.swiglu is STOCK, number
    assert uses
