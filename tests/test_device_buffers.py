"""Buffers that grow, the end of a prompt in one pass, and what a stopped answer leaves in a cache."""

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache
from reference import assert_close
from test_generate import check_cache
from tiny_models import VOCABULARY, attached, make_model, make_tokenizer

from mlx_specstream import stream_generate
from mlx_specstream.decode import decoder as loop
from mlx_specstream.decode.buckets import round_up
from mlx_specstream.model.buffers import Buffers
from mlx_specstream.model.cache import RowStore, make_prompt_cache
from mlx_specstream.model.prompt import last_rows, see_to_buffers
from mlx_specstream.model.window import WindowedKVCache

PROMPT = [53, 56, 8, 26, 42, 33]
TREE = "best:70"


@pytest.fixture(scope="module")
def seams():
    return attached()


# --- buffers grow, and nothing is written behind their end ---


@pytest.mark.parametrize("at", [0, 3, 8, 9, 10, 40, -5, 2**31 - 1])
def test_writes_stay_within_the_buffer(at):
    capacity, rows = 13, 5
    old = mx.arange(2 * capacity * 3, dtype=mx.float32).reshape(1, 2, capacity, 3)
    new = -1 - mx.arange(2 * rows * 3, dtype=mx.float32).reshape(1, 2, rows, 3)
    store = RowStore(old, 2 * old, mx.array(at), 0, capacity)
    store.write(new, 2 * new)
    place = min(max(at, 0), capacity - rows)
    want = np.array(old)
    want[:, :, place : place + rows] = np.array(new)
    assert_close(store.keys, want, 0)
    assert_close(store.values, 2 * want, 0)


def filled(capacity, offset, base=0, window=None):
    """A cache of distinct numbers: row r of key r + 1000."""
    store = WindowedKVCache(window) if window else KVCache()
    number = 1000.0 + mx.arange(capacity)[None, None, :, None]
    store.keys = mx.broadcast_to(number, (1, 2, capacity, 3)) + 0.0
    store.values = mx.broadcast_to(-number, (1, 2, capacity, 7)) + 0.0
    store.offset = offset
    if window:
        store.base = base
    return store


@pytest.mark.parametrize(("offset", "rows"), [(250, 6), (250, 7), (256, 1), (99, 700), (0, 256)])
def test_room_is_made_in_whole_steps(offset, rows):
    stores = [filled(256, offset), filled(300, offset)]
    buffers = Buffers(stores)
    assert all(store.keys is None for store in stores), "a second owner makes every write a copy"
    lengths = buffers.make_room(rows, round_up)
    for length, keys, values, had in zip(
        lengths, buffers.keys, buffers.values, (256, 300), strict=True
    ):
        capacity = keys.shape[2]
        assert offset + rows <= length <= capacity
        assert capacity == values.shape[2]
        assert (capacity - had) % 256 == 0
        assert capacity - 256 < max(had, offset + rows)
        assert keys[0, 1, :offset, 2].tolist() == [1000.0 + n for n in range(offset)]
        assert values[0, 1, :offset, 6].tolist() == [-1000.0 - n for n in range(offset)]
    buffers.give_back()
    assert [store.offset for store in stores] == [offset] * 2
    assert buffers.keys is None


def test_room_behind_a_window_that_slides():
    """A full sliding layer drops what nobody sees; a full layer beside it grows."""
    window, offset = 6, 515
    sliding = filled(window + 256 + 256, offset, base=0, window=window)
    buffers = Buffers([filled(768, offset), sliding])
    assert buffers.base_of == (0, 0)
    lengths = buffers.make_room(9, round_up)
    assert buffers.base_of == (0, 1)
    first, second = (int(base.item()) for base in buffers.bases)
    assert first == 0
    assert 0 < second <= offset - window
    assert offset - second + 9 <= lengths[1] <= buffers.keys[1].shape[2] <= sliding.capacity
    assert buffers.keys[1][0, 0, : offset - second, 0].tolist() == [
        1000.0 + n for n in range(second, offset)
    ]


def test_a_long_answer_across_two_growths(seams, monkeypatch):
    """From one step of room to three, with the rows of a whole tree behind the end every time."""
    monkeypatch.setattr(KVCache, "step", 96)  # mlx-lm's 256 take three times as long to fill
    tokenizer = make_tokenizer(ends=False)
    prompt = [int(t) for t in np.random.default_rng(2).integers(1, VOCABULARY, 90)]
    cache = make_prompt_cache(seams.model)
    got = stream_generate(
        seams.model, tokenizer, prompt, max_tokens=120, tree="best:24", prompt_cache=cache
    )
    got = [r.token for r in got]
    want = mlx_lm.stream_generate(make_model(), tokenizer, prompt, max_tokens=120)
    assert got == [r.token for r in want]
    assert {store.keys.shape[2] for store in cache} == {288}
    check_cache(cache, prompt + got)


# --- the end of a prompt, in one pass with the first choice ---


@pytest.fixture
def prompt_passes(monkeypatch):
    """The number of rows of every pass that ran the end of a prompt."""
    rows, whole = [], loop.prompt_pass

    def counted(seams, shape, tokens, *rest):
        rows.append(tokens.size)
        return whole(seams, shape, tokens, *rest)

    monkeypatch.setattr(loop, "prompt_pass", counted)
    return rows


@pytest.mark.parametrize("before", [0, 11])
@pytest.mark.parametrize(
    ("length", "step_size", "ends"),
    [(1, 2048, []), (2, 2048, [2]), (7, 2048, [7]), (7, 3, [1]), (300, 128, [44])],
)
def test_the_end_of_a_prompt_in_one_pass(seams, prompt_passes, before, length, step_size, ends):
    """The same tokens, log-probabilities and K/V as with the last token apart, as in mlx-lm."""
    tokenizer = make_tokenizer(ends=False)
    numbers = np.random.default_rng(4).integers(1, VOCABULARY, 400).tolist()
    prompt, text = numbers[:length], numbers[300 : 300 + before]
    found = []
    for kept in (False, True):
        seams.kept.clear()
        if kept:  # an answer before this one tells how large rows of K/V are
            list(stream_generate(seams.model, tokenizer, [3], max_tokens=1, tree=TREE))
        cache = make_prompt_cache(seams.model)
        if before:
            seams.model(mx.array([text]), cache=cache)
        responses = stream_generate(
            seams.model, tokenizer, prompt, max_tokens=9, tree=TREE,
            prompt_cache=cache, prefill_step_size=step_size,
        )  # fmt: skip
        found.append(list(responses))
        check_cache(cache, text + prompt + [r.token for r in found[-1]])
    apart, together = found
    assert prompt_passes == [n for n in ends if n > 1]
    assert [r.token for r in together] == [r.token for r in apart]
    assert together[-1].passes == apart[-1].passes
    for a, b in zip(together, apart, strict=True):
        assert_close(a.logprobs, b.logprobs, 1e-5, "logprobs")


def test_prompts_that_must_not_end_in_one_pass():
    """16 bits: the choice could depend on the number of rows. Shared: rows see their streams."""
    half = attached()
    half.model.set_dtype(mx.bfloat16)
    for seams in (half, attached(main_sees_streams=True)):
        assert last_rows(seams, 7) == 1
        cache = make_prompt_cache(seams.model)
        see_to_buffers(seams, cache, mx.array([3]))
        assert last_rows(seams, 7) == 1


# --- what is in the caller's cache when an answer is stopped ---


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize(
    "options", [{}, {"tree": "best:12", "copies": True}, {"copies": True}], ids=str
)
def test_the_cache_of_an_answer_that_is_closed(seams, options, count):
    """Every second answer begins with a pass over the end of its prompt."""
    tokenizer, cache, said = make_tokenizer(ends=False), make_prompt_cache(seams.model), []
    for prompt in (PROMPT * 2, PROMPT[2:]):
        answer = stream_generate(
            seams.model, tokenizer, prompt, max_tokens=30, prompt_cache=cache, **options
        )
        said += prompt + [next(answer).token for _ in range(count)]
        answer.close()
        check_cache(cache, said)


PLACES = ["prompt_pass", "verify_pass", "commit", "stream_logits", "_read", "_after", "_advance"]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("strike", [1, 3])
@pytest.mark.parametrize("place", PLACES)
def test_the_cache_after_an_interrupt(seams, monkeypatch, place, strike, late):
    """Ctrl-C before or behind a part of a step: the tokens that were given stay, and no others."""
    tokenizer, cache, calls = make_tokenizer(ends=False), make_prompt_cache(seams.model), []
    list(stream_generate(seams.model, tokenizer, [3], max_tokens=1, tree=TREE))
    owner = loop.Decoder if place.startswith("_") else loop
    whole = getattr(owner, place)

    def interrupted(*args):
        calls.append(place)
        result = whole(*args) if late or len(calls) != strike else None
        if len(calls) == strike:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(owner, place, interrupted)
    said, before = [5, 6], []
    seams.model(mx.array([said]), cache=cache)

    def talk():
        while True:
            before[:] = said
            said.extend(PROMPT)
            answer = stream_generate(
                seams.model, tokenizer, PROMPT, max_tokens=10, prompt_cache=cache, tree=TREE
            )
            said.extend(response.token for response in answer)

    with pytest.raises(KeyboardInterrupt):
        talk()
    assert len(calls) == strike
    if cache[0].offset == len(before) and place in ("prompt_pass", "_advance"):
        assert said == before + PROMPT, "a token was given, so the prompt must stay"
        said = before
    check_cache(cache, said)
