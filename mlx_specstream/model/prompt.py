"""How a prompt enters the cache: in chunks by the stock model, its end by the first pass of a decoder."""

from __future__ import annotations

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache

from .seams import Seams
from .window import WindowedKVCache

MOST_ROWS = 256  # of a prompt's end that one pass takes


def last_rows(seams: Seams, length: int) -> int:
    """How many tokens of a prompt the pass that chooses the first token should take.

    One, as in mlx-lm: in 16 bits the choice could depend on the number of rows. In float32 on a CPU
    it does not, and all that is left of the prompt may go in one pass, which spares one.
    """
    rows = _known_rows(seams)
    if rows is None or mx.default_device().type != mx.DeviceType.cpu:
        return 1
    shared = seams.streams is not None and seams.streams.config.main_sees_streams
    exact = rows[0][-1] == mx.float32  # K/V have the dtype of the activations
    return min(length, MOST_ROWS) if exact and not shared else 1


def feed(seams: Seams, stores: list[KVCache], tokens: mx.array) -> None:
    """Run prompt tokens, int32 [r], into the cache; interrupted, the cache is as before."""
    # A sliding window drops rows when it takes new ones, so trimming would not bring it back.
    windowed = [(s, s.state) for s in stores if isinstance(s, WindowedKVCache) and not s.empty()]
    begin = stores[0].offset
    try:
        seams.model(tokens[None], cache=stores)
        mx.eval([store.state for store in stores])
    except BaseException:
        for store, state in windowed:
            store.state = state
        for store in stores:
            store.trim(store.offset - begin)
        raise


def see_to_buffers(seams: Seams, stores: list[KVCache], tokens: mx.array) -> None:
    """Make sure that empty caches have buffers; how large a row is, the model says once."""
    if stores[0].keys is None and (rows := _known_rows(seams)):
        for store, (heads, d_key, d_value, dtype) in zip(stores, rows, strict=True):
            store.keys = mx.zeros((1, heads, store.step, d_key), dtype)
            store.values = mx.zeros((1, heads, store.step, d_value), dtype)
    elif stores[0].keys is None:
        seams.model(tokens[:1][None], cache=stores)
        for store in stores:
            store.trim(1)
    rows = [(s.keys.shape[1], s.keys.shape[3], s.values.shape[3], s.keys.dtype) for s in stores]
    seams.kept["kv"] = _dtypes(seams), rows


def _known_rows(seams: Seams) -> list[tuple] | None:
    """(heads, D of keys, D of values, dtype) per layer, once seen; a model may change its dtype."""
    dtypes, rows = seams.kept.get("kv", (None, None))
    return rows if dtypes == _dtypes(seams) else None


def _dtypes(seams: Seams) -> list[mx.Dtype]:
    return [array.dtype for _, array in tree_flatten(seams.model.layers[0].parameters())]
