"""Attention of the rows of a pass on a CPU: as exact as the stock one, and taken where it is meant."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.base import scaled_dot_product_attention as stock
from reference import assert_close
from test_sampling import compiled

from mlx_specstream.model import attention
from mlx_specstream.model.attention import LEAST, SMALL, fast_exp, rows_attention

BATCH, HEADS, KV_HEADS, ROWS, KEYS, WIDTH, VALUE_WIDTH = 2, 6, 2, 5, 97, 24, 13
SCALE = WIDTH**-0.5


def exact(queries, keys, values, mask):
    """float64, head by head."""
    queries, keys, values = (np.array(x, dtype=np.float64) for x in (queries, keys, values))
    shared = queries.shape[1] // keys.shape[1]
    keys, values = np.repeat(keys, shared, axis=1), np.repeat(values, shared, axis=1)
    scores = SCALE * queries @ keys.swapaxes(2, 3)
    scores = np.where(np.array(mask), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ values


def inputs(sharp=1.0, masks=BATCH, seed=0):
    rng = np.random.default_rng(seed)

    def make(*shape, by=1.0):
        return mx.array(rng.normal(0, by, shape).astype(np.float32))

    mask = rng.random((masks, 1, ROWS, KEYS)) < 0.6
    mask[..., 0] = True
    return (
        make(BATCH, HEADS, ROWS, WIDTH, by=sharp),
        make(BATCH, KV_HEADS, KEYS, WIDTH),
        make(BATCH, KV_HEADS, KEYS, VALUE_WIDTH),
        mx.array(mask),
    )


def attend(how, queries, keys, values, mask):
    return how(queries, keys, values, None, SCALE, mask)


@pytest.fixture
def never_stock(monkeypatch):
    def refuse(*args):
        raise AssertionError("the stock attention was called")

    monkeypatch.setattr(attention, "scaled_dot_product_attention", refuse)


@pytest.mark.parametrize("sharp", [0.1, 1.0, 30.0], ids=["flat", "usual", "one key wins"])
@pytest.mark.parametrize("masks", [BATCH, 1])
def test_it_is_attention(never_stock, sharp, masks):
    given = inputs(sharp, masks)
    got = attend(rows_attention, *given)
    assert got.shape == (BATCH, HEADS, ROWS, VALUE_WIDTH)
    assert_close(got, exact(*given), 4e-6 if sharp > 1 else 6e-7)


def test_it_is_about_as_exact_as_the_stock_one():
    worst = {rows_attention: 0.0, stock: 0.0}
    for seed in range(20):
        given = inputs(2.0, seed=seed)
        for how in worst:
            error = np.abs(np.array(attend(how, *given), np.float64) - exact(*given)).max()
            worst[how] = max(worst[how], error)
    assert worst[rows_attention] < 3 * worst[stock] < 1e-5


@pytest.mark.parametrize("lead", [6.0, 10.0, 14.0])
def test_small_weights_beside_a_sink_keep_their_precision(never_stock, lead):
    """One key wins and holds nearly nothing: what is said comes from the weights that are left."""
    rng = np.random.default_rng(5)
    keys = 1024
    scores = rng.normal(0, 1, keys)
    scores[0] = scores[1:].max() + lead
    k = np.zeros((1, 1, keys, WIDTH), np.float32)
    k[..., 0] = scores / SCALE
    v = rng.normal(0, 1, (1, 1, keys, VALUE_WIDTH)).astype(np.float32)
    v[:, :, 0] = 1e-3 * v[:, :, 0]
    q = np.zeros((1, 1, 2, WIDTH), np.float32)
    q[..., 0] = 1.0
    given = [mx.array(x) for x in (q, k, v, np.ones((1, 1, 2, keys), bool))]
    want = exact(*given)
    error, least = (
        np.abs(np.array(attend(how, *given), np.float64) - want).max()
        for how in (rows_attention, stock)
    )
    assert error < 4 * least + 1e-7
    assert error < 2e-4 * np.abs(want).max()


def test_a_key_that_is_not_seen_adds_nothing_whatever_it_holds(never_stock):
    queries, keys, values, mask = inputs()
    hidden = mx.arange(KEYS) % 3 == 1
    mask = mask & ~hidden
    far = mx.where(hidden[:, None], 1e4, keys)  # would win every row
    large = mx.where(hidden[:, None], 1e30, values)
    want = attend(rows_attention, queries, keys, values, mask)
    assert mx.array_equal(attend(rows_attention, queries, far, large, mask), want).item()


def test_compiled_it_is_the_same():
    given = inputs()
    plain = attend(rows_attention, *given)
    with compiled():
        again = mx.compile(lambda *given: attend(rows_attention, *given))(*given)
        assert_close(again, plain, 4e-7)


def test_the_exponential():
    x = np.linspace(-40, 0, 400_001).astype(np.float32)
    got, want = np.array(fast_exp(mx.array(x)), np.float64), np.exp(x.astype(np.float64))
    assert np.abs(got - want).max() < 2e-7
    assert (got >= 0).all()
    assert got[-1] == 1.0
    relative = np.abs(got - want) / want
    assert relative[x > -10].max() < 6e-6
    assert relative[x > -15].max() < 3e-5
    assert (got[x < LEAST] == 0).all()
    assert np.array(fast_exp(mx.array([-1e30]))) == 0


def test_what_is_not_finite_stays_so():
    queries, keys, values, mask = inputs()
    queries[0, 1, 2] = mx.nan
    got = np.array(attend(rows_attention, queries, keys, values, mask))
    assert np.isnan(got[0, 1, 2]).all()
    assert np.isfinite(np.delete(got.reshape(-1, VALUE_WIDTH), 1 * ROWS + 2, axis=0)).all()


def test_one_row_behind_many_keys_is_plain_decoding_s():
    queries, keys, values, mask = (mx.concatenate([x] * 9, axis=-2) for x in inputs())
    one = queries[:, :, :1, :VALUE_WIDTH], keys[..., :VALUE_WIDTH], values
    mask = mx.concatenate([mask[:, :, :1]] * 9, axis=-1)
    assert mask.size / BATCH >= SMALL
    got = rows_attention(*one, None, SCALE, mask)
    assert mx.array_equal(got, stock(*one, None, SCALE, mask)).item()


def test_a_quantised_cache_of_another_thread_s_model_goes_the_stock_way(monkeypatch):
    monkeypatch.setattr(attention, "scaled_dot_product_attention", lambda *given: given)
    queries, _, _, mask = inputs()
    packed = (mx.zeros(1), mx.zeros(1), mx.zeros(1))
    got = rows_attention(queries, packed, packed, "cache", SCALE, mask)
    assert got == (queries, packed, packed, "cache", SCALE, mask, None)


@pytest.mark.parametrize("heads", [(6, 6), (6, 1)], ids=["one each", "one for all"])
def test_other_ways_to_share_keys(never_stock, heads):
    queries, keys, values, mask = inputs()
    keys, values = (
        mx.concatenate([x, 2 * x, x - 1], axis=1)[:, : heads[1]] for x in (keys, values)
    )
    given = queries, keys, values, mask
    assert_close(attend(rows_attention, *given), exact(*given), 2e-6)


def test_keys_of_a_buffer_and_of_sixteen_bits(never_stock):
    queries, keys, values, mask = inputs()
    spare = mx.full((BATCH, KV_HEADS, 31, 1), 7.0)
    longer = [mx.concatenate([x, spare + 0 * x[:, :, :31]], axis=2) for x in (keys, values)]
    cut = [x[:, :, :KEYS] for x in longer]
    want = exact(queries, keys, values, mask)
    assert_close(attend(rows_attention, queries, *cut, mask), want, 6e-7)
    half = [x.astype(mx.float16) for x in (keys, values)]
    want = exact(queries, *half, mask)
    assert_close(attend(rows_attention, queries, *half, mask), want, 2e-6)


SHORT = SMALL // ROWS  # keys
OTHERS = {
    "sixteen bits": lambda q, k, v, m: ([x.astype(mx.bfloat16) for x in (q, k, v)], m, {}),
    "an additive mask": lambda q, k, v, m: ((q, k, v), mx.where(m, 0.0, -1e9), {}),
    "no mask": lambda q, k, v, m: ((q, k, v), None, {}),
    "a mask of its own per head": lambda q, k, v, m: (
        (q, k, v), mx.broadcast_to(m, (BATCH, HEADS, ROWS, KEYS)), {},
    ),
    "sinks": lambda q, k, v, m: ((q, k, v), m, {"sinks": mx.ones(HEADS)}),
    "one row": lambda q, k, v, m: ((q[:, :, :1], k, v), m[:, :, :1], {}),
    "few rows and keys": lambda q, k, v, m: (
        (q, k[:, :, :SHORT], v[:, :, :SHORT]), m[..., :SHORT], {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_anything_else_goes_the_stock_way(kind):
    arrays, mask, more = OTHERS[kind](*inputs())
    arrays = [x[..., :VALUE_WIDTH] for x in arrays]  # one width: what the stock one takes
    got = rows_attention(*arrays, None, SCALE, mask, **more)
    assert mx.array_equal(got, stock(*arrays, None, SCALE, mask, **more)).item()
