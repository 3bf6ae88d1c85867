"""Sliding-window layers in a bounded buffer: the same logits as with all K/V and a mask."""

import copy

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models.cache import (
    KVCache,
    RotatingKVCache,
    can_trim_prompt_cache,
    load_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)
from reference import assert_close
from tiny_models import CONFIGS, SLIDING, VOCABULARY, WINDOW, make_model

from mlx_specstream.errors import BadArgument
from mlx_specstream.model import cache as our_cache
from mlx_specstream.model.window import WindowedKVCache, can_trim, window_of

LONG = 37  # a window; with STEP and SLACK the buffer has 37 + 8 + 16 rows at most
STEP, SLACK = 16, 8
TEXT = [(7 * i * i + 3 * i) % VOCABULARY for i in range(4 * LONG)]
# Of the largest logit, fp32. A text in one go adds up in another order, which these random models
# turn into up to 1e-5 (gemma3); a row too many or too few gives 1e-2 and more.
TOLERANCE, ONE_GO = 1e-5, 4e-5
MODELS = ["gemma3_text", "gpt_oss", "mistral", "cohere2", "olmo3", "exaone4", "plamo3"]
PLAMO3 = {"window_size": WINDOW, "sliding_window_pattern": 2}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Buffers that slide often; and an architecture whose mask is wider than its own cache."""
    monkeypatch.setattr(WindowedKVCache, "step", STEP)
    monkeypatch.setitem(CONFIGS, "plamo3", PLAMO3)


def sliding(name, **more):
    argument = "window_size" if name == "plamo3" else "sliding_window"
    return make_model(name, **{argument: LONG}, **more)


def two_layers():
    return sliding("mistral", num_hidden_layers=2, layer_types=SLIDING)


def caches_of(model, slack=SLACK):
    made = [WindowedKVCache(w, slack) if w else KVCache() for w in window_of(model)]
    assert {type(c) for c in made} == {WindowedKVCache, KVCache}
    return made


def windowed(caches):
    return [c for c in caches if isinstance(c, WindowedKVCache)]


def feed(model, caches, tokens):
    """Logits [N, V] of the stock model."""
    logits = model(mx.array([tokens]), cache=caches)[0]
    mx.eval(logits, [c.state for c in caches])
    for c in windowed(caches):
        assert c.offset - c.base <= c.keys.shape[2] <= c.window + c.slack + c.step
    return logits


def in_chunks(model, caches, sizes, text=TEXT):
    """Logits of ``text`` behind what the caches hold, in chunks of these sizes (the last repeats)."""
    at, sizes, logits = caches[0].offset, list(sizes), []
    while at < len(text):
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        logits.append(feed(model, caches, text[at : at + size]))
        at += logits[-1].shape[0]
        assert {c.offset for c in caches} == {at}
    return mx.concatenate(logits)


def with_all_rows(model, text=TEXT, sizes=(10**6,)):
    """Logits [L, V] with a full KVCache on every layer and the window in the mask."""
    return in_chunks(model, [KVCache() for _ in model.layers], sizes, text)


def check(model, caches, sizes, want, text=TEXT, tolerance=ONE_GO):
    start = caches[0].offset
    got = in_chunks(model, caches, sizes, text)
    assert_close(got, want[start : len(text)], tolerance, f"tokens from {start}")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "sizes", [(5,), (20,), (41,), (len(TEXT),), (30, 29, 1, 24, 25, 1, 1, 2, 61, 3)], ids=str
)
def test_prefill_in_chunks(name, sizes):
    model = sliding(name)
    caches = caches_of(model)
    check(model, caches, sizes, with_all_rows(model, sizes=sizes), tolerance=TOLERANCE)
    assert all(c.base > len(TEXT) - 2 * LONG for c in windowed(caches)), "it never slid"


@pytest.mark.parametrize("name", ["gemma3_text", "gpt_oss", "mistral"])
def test_token_by_token(name):
    model = sliding(name)
    caches = caches_of(model)
    check(model, caches, (1,), with_all_rows(model, sizes=(1,)), tolerance=TOLERANCE)
    assert all(c.base > len(TEXT) - 2 * LONG for c in windowed(caches)), "it never slid"


def test_the_default_buffer(monkeypatch):
    """window + 512 rows; a slide every 256 tokens."""
    monkeypatch.undo()
    model, text = two_layers(), (8 * TEXT)[: LONG + 512 + 256 + 20]
    want, caches, slides = with_all_rows(model, text), [WindowedKVCache(LONG), KVCache()], []
    for at, token in enumerate(text):
        base = caches[0].base
        logits = model(mx.array([[token]]), cache=caches)[0]
        assert caches[0].keys.shape[2] <= LONG + 512
        if caches[0].base > base:
            slides.append(at)
        assert_close(logits[0], want[at], ONE_GO, f"token {at}")
    assert slides == [LONG + 512, LONG + 512 + 256]
    assert caches[0].rollback >= 256


@pytest.mark.parametrize("name", ["gemma3_text", "gpt_oss", "mistral"])
def test_rows_are_taken_back_after_a_slide(name):
    """Wrong tokens are fed and trimmed at every place, as many as ever possible in one go."""
    model = sliding(name)
    want, caches, taken = with_all_rows(model), caches_of(model), set()
    feed(model, caches, TEXT[: LONG + SLACK])
    for at in range(LONG + SLACK, LONG + SLACK + 2 * (STEP + SLACK)):
        wrong = 1 + at % (STEP + SLACK)
        feed(model, caches, [(t + 1) % VOCABULARY for t in TEXT[at : at + wrong]])
        assert can_trim_prompt_cache(caches)
        assert can_trim(caches, wrong)
        assert trim_prompt_cache(caches, wrong) == wrong
        logits = feed(model, caches, TEXT[at : at + 1])
        assert_close(logits[0], want[at], ONE_GO, f"token {at}")
        if caches[0].base:
            taken.add(wrong)
    assert len(taken) == STEP + SLACK


@pytest.mark.parametrize("chunk", [1, 3, SLACK + STEP, SLACK + STEP + 1, 5 * LONG])
def test_slack_rows_can_always_be_taken_back(chunk):
    model, text = two_layers(), 2 * TEXT
    want, caches = with_all_rows(model, text), caches_of(model)
    for end in range(chunk, 6 * LONG, chunk):
        feed(model, caches, text[end - chunk : end])
        go_back = min(SLACK, end)
        again = copy.deepcopy(caches)
        for c in again:
            assert c.trim(go_back) == go_back
        logits = feed(model, again, text[end - go_back : end + 1])
        assert_close(logits, want[end - go_back : end + 1], ONE_GO, f"{go_back} before {end}")


def test_what_is_gone_cannot_be_taken_back():
    model = sliding("mistral")
    caches = caches_of(model)
    feed(model, caches, TEXT)
    cache = caches[0]
    gone = cache.rollback + 1
    assert can_trim(caches, gone - 1)
    assert not can_trim(caches, gone)
    with pytest.raises(BadArgument, match=f"{gone - 1} tokens now, not {gone}"):
        cache.trim(gone)
    assert cache.offset == len(TEXT)
    assert cache.trim(gone - 1) == gone - 1
    assert cache.rollback == 0
    assert cache.trim(1000) == len(TEXT) - gone + 1  # from the beginning again
    for c in caches[1:]:
        c.trim(1000)
    check(model, caches, (7,), with_all_rows(model)[:50], TEXT[:50])


def rows_at(first, count, K=3, Dk=5, Dv=2):
    """K/V [2, K, count, D] that say their position."""
    where = mx.arange(first, first + count, dtype=mx.float32)[None, None, :, None]
    return mx.broadcast_to(where, (2, K, count, Dk)), mx.broadcast_to(-where, (2, K, count, Dv))


def positions(keys, values):
    k, v = np.array(keys), np.array(values)
    assert k.shape[:2] == v.shape[:2] == (2, 3)
    assert (k.shape[3], v.shape[3]) == (5, 2)
    assert (k == k[:1, :1, :, :1]).all()
    assert (v == -k[:1, :1, :, :1]).all()
    return k[0, 0, :, 0].astype(int).tolist()


def as_array(mask, N, keys):
    """What mlx-lm's attention makes of a mask, bool [N, keys]."""
    if mask is None:
        return np.ones((N, keys), bool)
    if isinstance(mask, str):
        return np.arange(keys - N, keys)[:, None] >= np.arange(keys)[None]
    assert mask.dtype == mx.bool_
    return np.array(mask)


@pytest.mark.parametrize("seed", range(12))
def test_every_row_sees_its_window(seed):
    """Any order of chunks, trims and room made: row p sees the positions p - window + 1 .. p."""
    pick = np.random.default_rng(seed)
    window, slack = int(pick.integers(1, 12)), int(pick.integers(0, 9))
    cache, slid = WindowedKVCache(window, slack), 0
    for _ in range(120):
        what = pick.choice(["one", "chunk", "trim", "room"])
        if what == "room":
            rows = int(pick.integers(0, STEP + slack + 1))
            base = cache.base
            now = cache.make_room(rows)
            assert now == (cache.base > base)
            slid += now
            assert cache.empty() or cache.stored + rows <= cache.keys.shape[2]
            continue
        if what == "trim":
            rows = int(pick.integers(0, cache.rollback + 1))
            assert cache.trim(rows) == rows
            continue
        N = 1 if what == "one" else int(pick.integers(1, 2 * STEP + window))
        asked = int(pick.integers(1, window + 1))  # a narrower one now and then
        asked = None if pick.random() < 0.4 else window if pick.random() < 0.5 else asked
        array = bool(pick.random() < 0.3)
        start, stored = cache.offset, cache.stored
        mask = cache.make_mask(N, return_array=array, window_size=asked)
        assert not (array and isinstance(mask, str))
        got = positions(*cache.update_and_fetch(*rows_at(start, N)))
        assert len(got) == min(stored, window - 1) + N  # no more: a plain step has no mask at all
        assert mask is None or N > 1 or asked is not None
        sees = as_array(mask, N, len(got))
        for row, p in enumerate(range(start, start + N)):
            seen = [at for at, yes in zip(got, sees[row], strict=True) if yes]
            assert seen == list(range(max(0, p - (asked or window) + 1), p + 1)), (p, asked)
        assert cache.offset == start + N
        assert cache.keys.shape[2] <= cache.capacity == window + slack + STEP
        assert positions(*cache.keys_and_values()) == list(range(cache.base, cache.offset))
        assert cache.size() == cache.offset - cache.base
        assert cache.base == 0 or cache.rollback >= 0
    assert slid
    assert cache.base > 0


def test_a_mask_wider_than_the_window_is_refused():
    with pytest.raises(BadArgument, match="window of 6 tokens, but this cache was made for 5"):
        WindowedKVCache(5).make_mask(3, window_size=6)


def test_room_for_a_loop_that_writes_by_itself():
    """Rows that it wrote behind ``offset`` keep their places, and it is told when it slid."""
    window, ahead = 9, 4
    cache = WindowedKVCache(window, SLACK)
    assert cache.make_room(ahead) is False  # no shape yet
    assert cache.empty()
    cache.update_and_fetch(*rows_at(0, window))
    slides = 0
    for offset in range(window, 90):
        base = cache.base
        slid = cache.make_room(ahead)
        assert slid == (cache.base > base)
        slides += slid
        at = cache.offset - cache.base
        assert at + ahead <= cache.keys.shape[2] <= cache.capacity
        if offset > window:  # what the last round wrote, of which one row was accepted
            assert positions(cache.keys[:, :, at : at + ahead - 1],
                             cache.values[:, :, at : at + ahead - 1]) == [
                offset + i for i in range(ahead - 1)
            ]  # fmt: skip
        keys, values = rows_at(offset, ahead)
        cache.keys[:, :, at : at + ahead] = keys
        cache.values[:, :, at : at + ahead] = values
        cache.offset += 1
        assert positions(*cache.keys_and_values()) == list(range(cache.base, offset + 1))
        assert cache.base == 0 or cache.rollback >= SLACK
    assert 4 <= slides <= 90 // (STEP - ahead)
    with pytest.raises(BadArgument, match=f"at most {STEP + SLACK} rows at a time, got 25"):
        cache.make_room(STEP + SLACK + 1)


def anew(tokens, logits):
    """A logits processor: without it a random model says one token for ever."""
    logits[:, tokens[-25:]] = -1e9
    return logits


@pytest.mark.parametrize("guess", ["none", "poor", "perfect"])
def test_tokens_of_mlx_lms_own_loops(guess):
    """Its plain loop, and its speculative one, which asks only once whether it may trim."""
    model, draft = two_layers(), make_model("qwen2", seed=9, num_hidden_layers=1)
    draft = model if guess == "perfect" else draft
    said = []
    for caches in ([KVCache(), KVCache()], caches_of(model)):
        options = {"max_tokens": 2 * LONG, "logits_processors": [anew], "prompt_cache": caches}
        if guess == "none":
            loop = generate_step(mx.array(TEXT[:50]), model, prefill_step_size=30, **options)
        else:
            options["prompt_cache"] = caches + [KVCache() for _ in draft.layers]
            loop = speculative_generate_step(
                mx.array(TEXT[:50]), model, draft, num_draft_tokens=3, **options
            )
        said.append([(token, *drafted) for token, _, *drafted in loop])
    assert said[0] == said[1]
    assert len({token for token, *_ in said[1]}) > 30
    assert caches[0].base > 50
    if guess != "none":
        drafted = sum(drafted for _, drafted in said[1])
        assert drafted > LONG if guess == "perfect" else 0 < drafted < LONG


@pytest.mark.parametrize("count", [0, 20, 100])
def test_saved_and_loaded(tmp_path, count):
    model = sliding("mistral")
    want, caches = with_all_rows(model), caches_of(model)
    if count:
        check(model, caches, (9,), want, TEXT[:count])
    save_prompt_cache(str(tmp_path / "ours.safetensors"), caches)
    loaded = load_prompt_cache(str(tmp_path / "ours.safetensors"))
    for old, new in zip(caches, loaded, strict=True):
        assert type(old) is type(new)
        assert old.empty() == new.empty() == (count == 0)
        assert old.nbytes == new.nbytes
    assert [c.base for c in windowed(loaded)] == [c.base for c in windowed(caches)]
    assert (windowed(loaded)[0].base > 0) == (count == 100)
    check(model, loaded, (4,), want)
    theirs = [c.to_rotating() if isinstance(c, WindowedKVCache) else c for c in caches]
    save_prompt_cache(str(tmp_path / "theirs.safetensors"), theirs)
    check(model, load_prompt_cache(str(tmp_path / "theirs.safetensors")), (4, 1), want)


def test_bytes_are_bounded():
    cache = WindowedKVCache(9, SLACK)
    assert cache.nbytes == 0
    for at in range(0, 900, 90):
        cache.update_and_fetch(*rows_at(at, 90))
        assert cache.nbytes == 2 * 3 * (9 + SLACK + STEP) * (5 + 2) * 4


@pytest.mark.parametrize("sizes", [(1,), (15,), (35, 1), (70, 1), (70, 1, 1, 5)], ids=str)
@pytest.mark.parametrize("count", [12, LONG, 50, 71, 110])
def test_from_and_to_mlx_lms_rotating_cache(sizes, count):
    model = two_layers()
    want, theirs = with_all_rows(model), model.make_cache()
    check(model, theirs, sizes, want, TEXT[:count])
    ours = [
        WindowedKVCache.from_rotating(c, SLACK) if isinstance(c, RotatingKVCache) else c
        for c in copy.deepcopy(theirs)
    ]
    assert [c.window for c in windowed(ours)] == [LONG]
    for c in windowed(ours):
        assert c.offset == count
        assert c.stored <= c.window + SLACK
    back = [c.to_rotating() if isinstance(c, WindowedKVCache) else c for c in copy.deepcopy(ours)]
    assert [type(c) for c in back] == [type(c) for c in theirs]
    for caches in (ours, back):
        check(model, caches, (1, 3, 1), want)
    for c in windowed(ours):  # and back when it has slid, with rows taken back
        c.trim(c.rollback)
    at = windowed(ours)[0].offset
    for c in ours:
        c.trim(c.offset - at)
    back = [c.to_rotating() if isinstance(c, WindowedKVCache) else c for c in ours]
    check(model, back, (1, 6), want)


def test_an_empty_rotating_cache():
    made = WindowedKVCache.from_rotating(RotatingKVCache(max_size=6))
    assert made.empty()
    assert made.to_rotating().empty()
    assert (made.window, made.offset, made.base) == (6, 0, 0)


def test_batches_are_merged_as_mlx_lm_does():
    caches = [WindowedKVCache(9, SLACK) for _ in range(3)]
    for cache, count in zip(caches, (4, 9, 60), strict=True):
        keys, values = rows_at(0, count)
        cache.update_and_fetch(keys[:1], values[:1])
    merged = WindowedKVCache.merge(caches)
    for index, first, end in ((0, 0, 4), (1, 0, 9), (2, 51, 60)):
        one = merged.extract(index)
        assert one.keys[0, 0, :, 0].tolist() == list(range(first, end))
        assert one.offset == end


def test_what_cannot_be_converted_is_refused():
    with pytest.raises(BadArgument, match="keeps its first 4 tokens"):
        WindowedKVCache.from_rotating(RotatingKVCache(max_size=9, keep=4))
    with pytest.raises(NotImplementedError):
        WindowedKVCache(9).to_quantized()
    for window, slack in ((0, 3), (2, -1)):
        with pytest.raises(BadArgument, match=f"{window} and {slack}"):
            WindowedKVCache(window, slack)


@pytest.mark.parametrize("name", [*MODELS, "llama", "gemma2", "qwen3"])
def test_windows_of_models(name):
    window = {"plamo3": WINDOW + 1}.get(name, WINDOW)
    layers = [window, None, window, None, window] if name in MODELS else [None] * 5
    assert window_of(make_model(name)) == layers


def test_prompt_caches():
    model = sliding("mistral")
    made = our_cache.make_prompt_cache(model)
    assert [getattr(c, "window", None) for c in made] == [LONG, None, LONG, None, LONG]
    assert {type(c) for c in our_cache.make_prompt_cache(make_model())} == {KVCache}
    our_cache.check_prompt_cache(made, model)
    our_cache.check_prompt_cache([KVCache() for _ in made], model)
    check(model, made, (41, 1, 7), with_all_rows(model))
    wrong = [
        made[:4],
        [*made[:2], WindowedKVCache(LONG - 1), *made[3:]],
        [made[0], WindowedKVCache(LONG), *made[2:]],
        model.make_cache(),
    ]
    for caches in wrong:
        with pytest.raises(BadArgument, match="make_prompt_cache"):
            our_cache.check_prompt_cache(caches, model)
