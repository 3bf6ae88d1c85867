"""The loop on the device: K/V are written in place, compiled passes are the same passes."""

import gc
import time
from contextlib import nullcontext
from dataclasses import replace

import mlx.core as mx
import pytest
from reference import assert_close
from steps import Watched, decoder_for
from test_sampling import compiled
from tiny_models import attached, make_tokenizer

from mlx_specstream.decode import decoder as loop
from mlx_specstream.decode.buckets import MOST, Buckets, round_up
from mlx_specstream.decode.choose import Drawn, Greedy, TemperatureSampler
from mlx_specstream.decode.copy import Copied, Copier
from mlx_specstream.decode.plan import Fixed, make_plan
from mlx_specstream.decode.prune import PruneRule
from mlx_specstream.model.cache import make_prompt_cache

PROMPT = [53, 56, 8, 26, 42, 33]
TREE = "best:70"  # some draft is always accepted, and seldom the first nodes
SMALL, LARGE, HUGE = 256, 16384, 65536  # rows of a buffer
ROW = 2 * 24 * 4  # bytes: K/V heads x head size x float32
LAYERS = 5
FOREVER = 1 << 30


class Roomy(Watched):
    """A decoder behind PROMPT in buffers of ``capacity`` rows, which says how it committed."""

    def __init__(self, seams, capacity, tree, placement="deferred", prune=None, chooser=None):
        stores = make_prompt_cache(seams.model)
        for store in stores:
            store.keys, store.values = mx.zeros((2, 1, 2, capacity, 24))
        seams.model(mx.array([PROMPT[:-1]]), cache=stores)
        mx.eval([store.state for store in stores])
        assert all(store.keys.shape[2] == capacity for store in stores)
        plan = Fixed(make_plan(seams.streams.config, tree, placement, prune))
        super().__init__(seams, stores, PROMPT[-1:], chooser or Greedy(), plan)
        self.moved = 0  # how many commits had rows to move

    def _redraft(self, flight, accepted, path, streams):
        self.moved += path != list(range(len(path)))
        return super()._redraft(flight, accepted, path, streams)

    def timed_step(self):
        mx.synchronize()
        tic = time.perf_counter()
        self.step(FOREVER, ())
        mx.synchronize()
        return time.perf_counter() - tic


def extra_memory(seams, capacity, *way, hold=None, steps=8):
    """(the most memory in use during a step beside the buffers, commits that moved rows)."""
    gc.collect()
    mx.synchronize()
    before = mx.get_active_memory()
    decoder = Roomy(seams, capacity, *way)
    buffers = sum(a.nbytes for a in (*decoder.buffers.keys, *decoder.buffers.values))
    assert buffers == 2 * LAYERS * capacity * ROW
    for _ in range(3):
        decoder.step(FOREVER, ())
    most = 0
    for _ in range(steps):
        mx.synchronize()
        mx.clear_cache()
        mx.reset_peak_memory()
        held = list(getattr(decoder.buffers, hold)) if hold else []
        decoder.step(FOREVER, ())
        mx.synchronize()
        most = max(most, mx.get_peak_memory(), mx.get_active_memory())
        held.clear()
    return most - before - buffers, decoder.moved


WAYS = {
    "deferred": (TREE, "deferred"),
    "inline": ("best:30", "inline"),
    "pruned": ("best:30", "deferred", PruneRule(keep=9)),
    "pruned inline": ("best:30", "inline", PruneRule(keep=9)),
    "drawn": ("best:30", "deferred", None, Drawn(TemperatureSampler(0.8), 3)),
}


@pytest.fixture(scope="module")
def seams():
    return attached(prune_rank=8)


# --- nothing is copied ---


@pytest.mark.parametrize("way", WAYS)
def test_no_step_copies_a_buffer(seams, way):
    """Pass, commit and streams take as much memory with room for 16384 rows as with 256."""
    small, moved = extra_memory(seams, SMALL, *WAYS[way])
    large, moved_too = extra_memory(seams, LARGE, *WAYS[way])
    assert large - small < LARGE * ROW / 8, "a buffer was copied"
    assert min(moved, moved_too) >= 3, "no commit had rows to move"


def test_no_compiled_step_copies_a_buffer(seams):
    with compiled():
        small, _ = extra_memory(seams, SMALL, TREE)
        large, moved = extra_memory(seams, LARGE, TREE)
    assert large - small < LARGE * ROW / 8, "a buffer was copied"
    assert moved >= 3


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("hold", ["keys", "values"])
def test_a_copy_would_be_noticed(seams, hold, compiling):
    """A buffer that somebody holds is copied when it is written: then memory does grow."""
    with compiled() if compiling else nullcontext():
        taken, _ = extra_memory(seams, LARGE, TREE, hold=hold, steps=2)
    assert taken > LAYERS * LARGE * ROW


def test_time_per_step_does_not_grow_with_the_buffer(seams):
    """Interleaved, and the fastest step of each, because the machine has other work."""
    small, huge = (Roomy(seams, capacity, "chain") for capacity in (SMALL, HUGE))
    for _ in range(2):
        small.step(FOREVER, ())
        huge.step(FOREVER, ())
    times = [(small.timed_step(), huge.timed_step()) for _ in range(12)]
    fast, slow = (min(column) for column in zip(*times, strict=True))
    assert slow < 2 * fast, f"{1e3 * fast:.1f} ms a step grew to {1e3 * slow:.1f} ms"


# --- compiled steps are the same steps ---


def answer(seams, tree, placement, chooser=None, prompt=PROMPT, copies=False, length=24):
    """(tokens of every step, guesses before every pass, K/V) of an answer behind a prompt."""
    copier = Copier(make_tokenizer(), prompt) if copies else None
    decoder = decoder_for(seams, prompt, tree, placement, chooser=chooser, copier=copier)
    steps, stores = [], decoder.buffers.stores
    while sum(map(len, steps)) < length:
        steps.append(decoder.step(length - sum(map(len, steps)), ()).tokens)
    decoder.close()
    return steps, decoder.guessed, [store.keys_and_values() for store in stores]


COMPILED = {
    "best": (TREE, "deferred"),
    "inline": ("chain", "inline"),
    "beyond a bucket": ("chain", "deferred", None, PROMPT * 8),  # from 48 tokens to 72
    "cartesian": ("cartesian:3", "deferred"),
    "drawn": (TREE, "deferred", Drawn(TemperatureSampler(0.7), 5)),
    "copies": ("best:12", "deferred", None, PROMPT * 3, True),
}


def check_equal(got, want):
    assert got[0] == want[0]
    for n, (a, b) in enumerate(zip(got[1], want[1], strict=True)):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.tokens.tolist() == b.tokens.tolist(), f"guesses of step {n}"
            assert_close(a.logprobs, b.logprobs, 1e-5, f"guesses of step {n}")
    for layer, (a, b) in enumerate(zip(got[2], want[2], strict=True)):
        assert_close(a[0], b[0], 1e-5, f"keys of layer {layer}")
        assert_close(a[1], b[1], 1e-5, f"values of layer {layer}")


@pytest.fixture(scope="module")
def shared():
    """The traces of all of these answers, so that none may be taken for another."""
    return Buckets(worth=0)


@pytest.mark.parametrize("way", COMPILED)
def test_compiled_steps_equal_plain_ones(seams, shared, way):
    seams.kept.clear()
    want = answer(seams, *COMPILED[way])
    seams.kept["buckets"] = shared
    with compiled():
        got = answer(seams, *COMPILED[way])
        again = answer(seams, *COMPILED[way])  # with traces that another answer left
    seams.kept.clear()
    check_equal(got, want)
    check_equal(again, want)
    assert any(len(step) > 1 for step in want[0]), "nothing was accepted"


@pytest.fixture
def traces(monkeypatch):
    """Counts how often Python runs the parts of a step: once per trace, if they are compiled."""
    calls = []
    for name in ("verify_pass", "commit", "stream_logits"):
        whole = getattr(loop, name)

        def counted(*args, _name=name, _whole=whole):
            calls.append(_name)
            return _whole(*args)

        monkeypatch.setattr(loop, name, counted)
    return calls


@pytest.mark.parametrize("tree", [TREE, "chain"])
def test_an_answer_needs_few_traces(seams, traces, tree):
    seams.kept.clear()
    seams.kept["buckets"] = Buckets(worth=0)
    with compiled():
        steps, _, _ = answer(seams, tree, "deferred", length=40)
        first = len(traces)
        assert len(steps) > 15
        answer(seams, tree, "deferred", length=40)
    made = len(seams.kept["buckets"])
    assert 2 <= made <= 6
    # The prompt's own pass is not compiled; a trace of commit and streams runs both parts.
    assert first <= 1 + 2 * made
    assert len(traces) - first <= 1, "the second answer made traces again"
    seams.kept.clear()


class Restless(Fixed):
    """Drafts of four nodes by another number of streams every time."""

    def __init__(self, config):
        super().__init__(make_plan(config, "best:4", "deferred"))
        self.turn, self.texts = 0, set()

    def next_pass(self, guesses, text, context):
        self.turn += 1
        if guesses is not None:
            self.texts.add((guesses.tokens.shape[0], text is not None))
        plan = super().next_pass(guesses, text, context)
        return replace(plan, gamma=(None, 2, 1)[self.turn % 3])


def test_one_trace_serves_drafts_of_fewer_streams_with_text_and_without(seams):
    seams.kept.clear()
    buckets = seams.kept["buckets"] = Buckets(worth=0)
    prompt, steering = PROMPT * 3, Restless(seams.streams.config)
    with compiled():
        copier = Copier(make_tokenizer(), prompt)
        decoder = decoder_for(seams, prompt, "best:4", copier=copier)
        decoder.steering, said = steering, []
        while len(said) < 60:
            said += decoder.step(60 - len(said), ()).tokens
    assert len(steering.texts) >= 4, "all drafts were of one kind"
    kinds = [kind for kind in buckets._made if kind[0] == "pass" and kind[1].nodes == 4]
    assert len(kinds) == 1
    seams.kept.clear()
    steps, _, _ = answer(seams, "best:4", "deferred", prompt=prompt, length=60)
    assert said == [token for tokens in steps for token in tokens]


@pytest.mark.parametrize("tree", ["chain", "cartesian:2"])
def test_a_text_that_agrees_with_the_guesses_changes_no_answer(seams, tree):
    """Such trees hold every slot of the text, so a node may stand twice: it counts once."""

    class Agreeing(Copier):
        def propose(self):
            found, guesses = super().propose(), self.decoder._guesses
            if guesses is None:
                return found
            first = guesses.tokens[:, 0].tolist()
            return Copied(first, [-0.3] * len(first), [("", "", "")] * len(first))

        def observe(self, copied, right, tried):
            pass

    seams.kept.clear()
    copier = Agreeing(make_tokenizer(), PROMPT)
    copier.decoder = decoder = decoder_for(seams, PROMPT, tree, "deferred", copier=copier)
    said, logprobs = [], []
    while len(said) < 40:
        step = decoder.step(40 - len(said), ())
        said, logprobs = said + step.tokens, logprobs + step.logprobs
    plain = mx.array([PROMPT + said[:-1]])
    logits = seams.model(plain)[0, len(PROMPT) - 1 :]
    assert said == mx.argmax(logits, axis=-1).tolist()
    want = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    assert_close(mx.stack(logprobs), want, 1e-4, "log-probabilities")


def test_a_replaced_weight_is_seen(seams):
    """Traces hold the weights they were made with, so they go when one is replaced."""
    streams, linear = seams.streams, seams.model.layers[1].mlp.down_proj
    seams.kept["buckets"] = Buckets(worth=0)
    for module, name in (
        (linear, "weight"),
        (streams, "embeddings"),
        (streams.lora[1]["v_proj"], "b"),
    ):
        with compiled():
            before = answer(seams, TREE, "deferred", length=9)
            old = module[name]
            module[name] = old + 0.7 * mx.random.normal(old.shape, key=mx.random.key(3))
            after = answer(seams, TREE, "deferred", length=9)
        want = answer(seams, TREE, "deferred", length=9)
        check_equal(after, want)
        with pytest.raises(AssertionError):
            check_equal(before, want)
        module[name] = old
    seams.kept.clear()


def test_old_traces_are_forgotten():
    buckets, made = Buckets(worth=0), []

    def use(key):
        def make():
            made.append(key)
            return lambda: key

        return buckets.get(key, make)()

    assert [use(key) for key in range(MOST)] == list(range(MOST))
    assert use(0) == 0  # now the latest one
    assert made == list(range(MOST))
    assert use("new") == "new"
    assert len(buckets) == MOST
    assert 0 in buckets
    assert 1 not in buckets
    assert use(1) == 1
    assert made == [*range(MOST), "new", 1]
    buckets.clear()
    assert len(buckets) == 0


def test_a_bucket_is_compiled_when_it_has_been_used_for_a_while(monkeypatch):
    """A long answer leaves every bucket before a trace would pay; short lengths come back."""
    traced = []
    monkeypatch.setattr("mlx_specstream.decode.buckets.mx.compile", lambda f: traced.append(f) or f)
    buckets = Buckets(worth=3)
    for number in range(1, 6):
        assert buckets.get("short", lambda: len)("ab") == 2
        assert len(traced) == (number > 3)
    for length in range(9):
        buckets.get(length, lambda: len)
        buckets.get(length, lambda: len, False)
    assert len(buckets) == len(traced) == 1
    assert "short" in buckets
    buckets.clear()
    for _ in range(1, 6):
        buckets.get("short", lambda: len, False)
    assert len(traced) == 1, "not where nothing shall be compiled"


@pytest.mark.parametrize("length", [1, 31, 64, 65, 500, 513, 4095, 4097, 10_001])
def test_few_buckets_and_little_waste(length):
    rounded = round_up(length)
    assert length <= rounded <= max(length + 127, 1.3 * length)
    assert round_up(rounded) == rounded
    lengths = {round_up(n) for n in range(1, length + 1)}
    assert len(lengths) <= 6 + length / 256
