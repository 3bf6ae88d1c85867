"""Sampling: the main stream's law whatever the draft says, seeds, samplers and processors."""

from contextlib import contextmanager

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from reference import assert_close
from steps import decoder_for
from tiny_models import attached, make_model, make_streams, make_tokenizer

import mlx_specstream
from mlx_specstream import stream_generate
from mlx_specstream.config import StreamConfig
from mlx_specstream.decode.choose import (
    Drawn,
    Greedy,
    Opaque,
    SeededSampler,
    TemperatureSampler,
)
from mlx_specstream.decode.decoder import lazy_logprobs
from mlx_specstream.model.seams import attach

PROMPT = [53, 56, 8, 26, 42, 33]
TREE = "best:70"
SAMPLERS = {
    "temp": {"temp": 0.7},
    "top_p": {"temp": 1.0, "top_p": 0.8},
    "top_k": {"temp": 1.3, "top_k": 5},
    "min_p": {"temp": 0.9, "min_p": 0.05},
    "xtc": {"temp": 1.0, "xtc_probability": 0.5, "xtc_threshold": 0.05},
}
OURS = {
    "ours temp": {"temp": 0.8},
    "ours all": {"temp": 1.1, "top_p": 0.95, "min_p": 0.01, "top_k": 20},
}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(ends=False)


@pytest.fixture(scope="module")
def seams():
    return attached()


@contextmanager
def compiled():
    """mlx-lm compiles its samplers with ``mx.random.state`` as an input; the suite runs without."""
    mx.enable_compile()
    try:
        yield
    finally:
        mx.disable_compile()


def text(seams, tokenizer, use_streams=True, **options):
    if use_streams:
        options = {"tree": TREE, **options}
    answer = stream_generate(
        seams.model, tokenizer, PROMPT, max_tokens=14, use_streams=use_streams, **options
    )
    responses = list(answer)
    return [r.token for r in responses], responses[-1].passes


# --- the law ---

VOCABULARY, DRAWS = 11, 700
CRITICAL = {8: 26.12, 9: 27.88, 10: 29.59}  # chi-square, p = 0.001, by degrees of freedom


@pytest.fixture(scope="module")
def toy():
    sizes = {"hidden_size": 20, "intermediate_size": 28, "num_hidden_layers": 2, "head_dim": 6}
    model = make_model("llama", 4, vocab_size=VOCABULARY, **sizes)
    streams = make_streams(model, StreamConfig(num_streams=3, msa_layers=1, lora_rank=0))
    return attach(model, streams)


def exact_law(model, prompt, temperature):
    """P(x1), P(x2), P(x3) behind a prompt, by summing over all 121 beginnings."""

    def law(rows):
        logits = np.array(model(mx.array(rows))[:, -1], dtype=np.float64) / temperature
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        return p / p.sum(axis=1, keepdims=True)

    words = range(VOCABULARY)
    first = law([prompt])[0]
    second = law([[*prompt, a] for a in words])
    third = law([[*prompt, a, b] for a in words for b in words]).reshape(11, 11, 11)
    joint = first[:, None] * second
    return first, joint.sum(axis=0), np.einsum("ab,abc->c", joint, third)


def draw(seams, prompt, chooser):
    """Three tokens behind a prompt: the first alone, the others with drafts; (tokens, passes)."""
    decoder = decoder_for(seams, prompt, "best:18", "deferred", chooser=chooser)
    tokens, passes = [], 0
    while len(tokens) < 3:
        tokens += decoder.step(3 - len(tokens), ()).tokens
        passes += 1
    return tokens, passes


CHOOSERS = {
    "opaque": lambda t, seed: Opaque(SeededSampler(make_sampler(temp=t), seed), [], []),
    "coupled": lambda t, seed: Drawn(TemperatureSampler(t), seed),
    "uncoupled": lambda t, seed: Drawn(TemperatureSampler(t), seed, coupled=False),
}


def chi_square(counts, law):
    expected = law * counts.sum()
    small = expected < 5  # pooled, as the approximation needs
    observed = np.append(counts[~small], counts[small].sum())
    expected = np.append(expected[~small], expected[small].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    return ((observed - expected) ** 2 / expected).sum(), len(expected) - 1


def statistics(seams, temperature, make, draws=DRAWS):
    """Chi-square of the next three tokens, each with its degrees of freedom; passes per draw."""
    prompt = [3, 7, 1, 9]
    counts, passes = np.zeros((3, VOCABULARY)), 0
    for seed in range(draws):
        tokens, more = draw(seams, prompt, make(temperature, seed))
        passes += more
        for place, token in enumerate(tokens):
            counts[place, token] += 1
    laws = exact_law(seams.model, prompt, temperature)
    return [chi_square(counts[place], laws[place]) for place in range(3)], passes / draws


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chooser", CHOOSERS)
def test_sampled_tokens_have_the_law_of_the_stock_model(toy, chooser, temperature):
    found, passes = statistics(toy, temperature, CHOOSERS[chooser])
    assert passes < 2.8, "drafts were hardly ever accepted, so nothing was tested"
    for place, (value, freedom) in enumerate(found, 1):
        assert freedom >= 4
        assert value < CRITICAL[10], (
            f"token {place} ahead: chi-square {value:.1f}, {freedom} degrees"
        )


class TakesDraft(Drawn):
    """A wrong law: the drafts' own noise decides for the target too."""

    def scores(self, logits, depth, place, deepest):
        scores = super().scores(logits, depth, place, deepest)
        return scores + 2.0 * (mx.arange(logits.shape[-1]) % 2 == 0)


def test_the_chi_square_test_notices_a_wrong_law(toy):
    wrong = lambda t, seed: TakesDraft(TemperatureSampler(t), seed)  # noqa: E731
    found, _ = statistics(toy, 1.0, wrong, draws=300)
    assert all(value > CRITICAL[10] for value, _ in found)


# --- seeds ---


@pytest.mark.parametrize("name", [*SAMPLERS, *OURS])
def test_same_seed_same_text_with_streams_on_and_off(seams, tokenizer, name):
    sampler = (
        make_sampler(**SAMPLERS[name])
        if name in SAMPLERS
        else mlx_specstream.make_sampler(**OURS[name])
    )
    off, plain_passes = text(seams, tokenizer, False, sampler=sampler, seed=11)
    for placement in ("inline", "deferred"):
        on, passes = text(seams, tokenizer, sampler=sampler, seed=11, placement=placement)
        assert on == off
        assert passes < plain_passes
    assert text(seams, tokenizer, sampler=sampler, seed=12)[0] != off


def test_same_seed_same_text_with_compiled_samplers(seams, tokenizer):
    with compiled():
        for name in ("temp", "xtc"):
            sampler = make_sampler(**SAMPLERS[name])
            off, _ = text(seams, tokenizer, False, sampler=sampler, seed=3)
            assert text(seams, tokenizer, sampler=sampler, seed=3)[0] == off, name


def state():
    return mx.random.state[0].tolist()


@pytest.mark.parametrize("use_streams", [True, False])
def test_the_users_random_state_is_given_back(seams, tokenizer, use_streams):
    sampler = make_sampler(temp=0.8, top_p=0.9)
    for compile_samplers in (False, True):
        with compiled() if compile_samplers else contextmanager(lambda: (yield))():
            mx.random.seed(2**40 + 5)
            before = state()
            text(seams, tokenizer, use_streams, sampler=sampler, seed=1)
            assert state() == before
            # Between two tokens too: the user may draw numbers of their own.
            answer = stream_generate(
                seams.model, tokenizer, PROMPT, sampler=sampler, seed=1, use_streams=use_streams
            )
            next(answer)
            assert state() == before
            answer.close()


def test_without_a_seed_one_is_drawn(seams, tokenizer):
    sampler = make_sampler(temp=1.0)
    mx.random.seed(6)
    first, second = (text(seams, tokenizer, sampler=sampler)[0] for _ in range(2))
    assert first != second
    mx.random.seed(6)
    assert text(seams, tokenizer, sampler=sampler)[0] == first
    mx.random.seed(6)
    assert text(seams, tokenizer, False, sampler=sampler)[0] == first


def test_greedy_draws_nothing(seams, tokenizer):
    mx.random.seed(9)
    before = state()
    greedy = text(seams, tokenizer)
    assert text(seams, tokenizer, sampler=make_sampler(temp=0.0)) == greedy
    assert state() == before


def test_greedy_breaks_ties_of_rounding_as_mlx_lm_does():
    """In bf16 two different logits can have one log-probability; then the lower token wins."""
    logits = mx.full((1, 4000), 2.0, dtype=mx.bfloat16)
    logits[0, 7], logits[0, 3000] = 3.0, 3.015625
    logprobs = logits - mx.logsumexp(logits, keepdims=True)
    assert logprobs[0, 7].item() == logprobs[0, 3000].item()
    scores = Greedy().scores(logits, mx.array([0]), 0, 0)
    assert mx.argmax(scores, axis=-1).item() == mx.argmax(logprobs, axis=-1).item() == 7
    assert_close(lazy_logprobs(logits, 0), logprobs[0], 1e-6)


def test_a_seeded_draw_depends_on_seed_and_place_alone():
    logprobs = mx.log(mx.full((1, 50), 0.02))
    one, two = (SeededSampler(make_sampler(temp=1.0), seed=4) for _ in range(2))
    first = [one(logprobs).item() for _ in range(20)]
    mx.random.seed(77)
    assert [two(logprobs).item() for _ in range(20)] == first
    assert len(set(first)) > 10


# --- samplers and logits processors are mlx-lm's and see what they see there ---


class Recorder:
    """A logits processor with a memory: what it was called with, and a bias that depends on it."""

    def __init__(self):
        self.calls = []

    def __call__(self, tokens, logits):
        self.calls.append((tokens.tolist(), np.array(logits)))
        return logits.at[:, len(self.calls) % 5].add(2.0)


@pytest.mark.parametrize("sampler", [None, make_sampler(temp=0.0)], ids=["none", "greedy"])
@pytest.mark.parametrize("step_size", [2048, 2])
def test_processors_see_the_same_calls(seams, tokenizer, sampler, step_size):
    mine, theirs = Recorder(), Recorder()
    options = {"max_tokens": 14, "sampler": sampler, "prefill_step_size": step_size}
    want = list(
        mlx_lm.stream_generate(
            make_model(), tokenizer, PROMPT, logits_processors=[theirs], **options
        )
    )
    got = list(
        stream_generate(
            seams.model, tokenizer, PROMPT, tree=TREE, logits_processors=[mine], **options
        )
    )
    assert [r.token for r in got] == [r.token for r in want]
    assert got[-1].passes < len(got) - 1
    assert len(mine.calls) == len(got)  # mlx-lm works one token ahead
    for (tokens, logits), (wanted_tokens, wanted) in zip(mine.calls, theirs.calls, strict=False):
        assert tokens == wanted_tokens
        assert logits.shape == wanted.shape
        assert_close(logits, wanted, 1e-5, "logits")
    for a, b in zip(got, want, strict=True):
        assert_close(a.logprobs, b.logprobs, 1e-5, "logprobs")


class WithMemory:
    """A sampler that says what it likes at every fifth call."""

    def __init__(self):
        self.calls = 0

    def __call__(self, logprobs):
        self.calls += 1
        return mx.array([self.calls]) if self.calls % 5 == 0 else mx.random.categorical(logprobs)


@pytest.mark.parametrize("tree", [TREE, None])
def test_a_sampler_with_a_memory_is_called_once_per_token(seams, tokenizer, tree):
    plain, drafted = WithMemory(), WithMemory()
    want, _ = text(seams, tokenizer, use_streams=False, sampler=plain, seed=6)
    assert text(seams, tokenizer, sampler=drafted, seed=6, tree=tree)[0] == want
    assert drafted.calls == len(want)


def test_opaque_drafts_are_coupled_unless_told_not_to():
    logits = mx.random.normal((3, 67), key=mx.random.key(2))
    uncoupled = Greedy().guesses(logits, 5, 4).tokens.tolist()
    for sampler, coupled, same in (
        (make_sampler(temp=1.5), True, False),
        (make_sampler(temp=1.5), False, True),
        (WithMemory(), True, True),
    ):
        chooser = Opaque(SeededSampler(sampler, 3), [], [], coupled)
        assert (chooser.guesses(logits, 5, 4).tokens.tolist() == uncoupled) == same


def test_make_sampler_takes_mlx_lms_arguments():
    ours, logprobs = mlx_specstream.make_sampler, mx.random.normal((1, 67), key=mx.random.key(1))
    assert ours(0.7, 0.9, 0.05, 1, 20) == TemperatureSampler(0.7, 0.9, 0.05, 20)
    for more in ((0.05, 9), (0.0, 1, 7, 0.9, 0.01, [3])):  # what ours does not do
        drawn = []
        for make in (ours, make_sampler):
            mx.random.seed(8)
            names = ("xtc_probability", "xtc_threshold", "xtc_special_tokens")
            xtc = dict(zip(names, more[3:], strict=False))
            sampler = make(1.7, 1.0, *more[:3], **xtc)
            assert not isinstance(sampler, TemperatureSampler)
            drawn.append([sampler(logprobs).item() for _ in range(9)])
        assert drawn[0] == drawn[1]


def test_a_top_k_that_keeps_all_is_off(seams, tokenizer):
    all_of_them = TemperatureSampler(0.9, top_k=67)
    want = text(seams, tokenizer, sampler=TemperatureSampler(0.9), seed=5)
    for use_streams in (True, False):
        got = text(seams, tokenizer, use_streams, sampler=all_of_them, seed=5)
        assert got[0] == want[0]


def test_drafts_never_leave_the_vocabulary():
    """Where all but one token have no probability, and that one stands in a last block of two."""
    size = 32 * 9 + 2
    logits = mx.where(mx.arange(size) == size - 1, 9.0, -20.0) * mx.ones((3, 1))
    chooser = Drawn(TemperatureSampler(0.7, top_p=0.5), seed=3)
    chooser.noise(0, size)
    tokens = np.array(chooser.guesses(logits, 8, 0).tokens)
    assert tokens[:, 0].tolist() == [size - 1] * 3
    assert tokens.max() < size


def test_penalties_equal_mlx_lm(seams, tokenizer):
    make = lambda: make_logits_processors(  # noqa: E731
        {4: 1.5}, repetition_penalty=1.4, repetition_context_size=6, frequency_penalty=0.3
    )
    want = list(
        mlx_lm.stream_generate(
            make_model(), tokenizer, PROMPT, max_tokens=20, logits_processors=make()
        )
    )
    for tree in (TREE, "chain"):
        got = list(
            stream_generate(
                seams.model, tokenizer, PROMPT, max_tokens=20, tree=tree, logits_processors=make()
            )
        )
        assert [r.token for r in got] == [r.token for r in want]
    plain, _ = text(seams, tokenizer)
    assert [r.token for r in got][:14] != plain, "the penalties did nothing"


def test_processors_with_a_sampler_same_text_on_and_off(seams, tokenizer):
    sampler = make_sampler(temp=0.9)
    texts = [
        text(
            seams, tokenizer, on, sampler=sampler, seed=5,
            logits_processors=make_logits_processors(repetition_penalty=1.3),
        )[0]
        for on in (True, False)
    ]  # fmt: skip
    assert texts[0] == texts[1]
