"""The fast gate of SwiGLU blocks: how exact it is."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import activations
from reference import assert_close
from test_sampling import compiled

from mlx_specstream.model.activation import fast_swiglu

STOCK = activations.swiglu


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
