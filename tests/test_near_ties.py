"""The guard: a choice between nearly equal logits is left to a pass of one row."""

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm import sample_utils
from mlx_lm.tokenizer_utils import TokenizerWrapper
from steps import decoder_for
from test_generate import check_cache
from tiny_models import attached, make_model, make_tokenizer

import mlx_specstream
from mlx_specstream import make_prompt_cache, stream_generate
from mlx_specstream.decode import decoder as loop
from mlx_specstream.decode.prune import PruneRule
from mlx_specstream.decode.record import Record
from mlx_specstream.errors import BadArgument

PROMPT = [53, 56, 8, 26, 42, 33]
TREE = "best:70"  # some draft is always accepted
LENGTH = 18
GUARD = 0.35  # a third of the choices here are closer than this
ALWAYS = 1e9


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(ends=False)


@pytest.fixture(scope="module")
def seams():
    return attached(prune_rank=8)


@pytest.fixture(scope="module")
def plain(tokenizer):
    """mlx-lm's tokens, and how far each was ahead of the second best."""
    answer = mlx_lm.stream_generate(make_model(), tokenizer, PROMPT, max_tokens=LENGTH)
    responses = list(answer)
    best = [np.sort(np.array(r.logprobs))[-2:] for r in responses]
    return [r.token for r in responses], [float(b - a) for a, b in best]


def guarded(seams, tokenizer, prompt=PROMPT, **options):
    record = Record()
    options = {"max_tokens": LENGTH, "tree": TREE, "guard": GUARD, "record": record, **options}
    return list(stream_generate(seams.model, tokenizer, prompt, **options)), record.passes


WAYS = {
    "best": {},
    "inline": {"tree": "best:30", "placement": "inline"},
    "chain": {"tree": "chain"},
    "pruned": {"tree": "best:30", "prune": PruneRule(keep=12)},
    "pruned by a threshold": {"tree": "best:30", "prune": PruneRule(threshold=0.02)},
    "planned": {"tree": None, "copies": False},
}


@pytest.mark.parametrize("way", WAYS)
def test_near_ties_are_left_to_passes_of_one_row(seams, tokenizer, plain, way):
    tokens, gaps = plain
    assert min(abs(gap - GUARD) for gap in gaps) > 1e-4
    got, passes = guarded(seams, tokenizer, **WAYS[way])
    assert [r.token for r in got] == tokens
    assert got[-1].passes == len(passes), "a pass was not counted"
    chose = [None, *([] for _ in passes)]  # the places that each pass chose; the prompt's is 0
    for place, response in enumerate(got):
        if place:
            chose[response.passes].append(place)
    for number, record in enumerate(passes, 1):
        ties = [place for place in chose[number] if gaps[place] < GUARD]
        if record.recheck:
            assert record.nodes == 1
            assert record.accepted == 0
            assert chose[number] == ties, "a pass of one row for a choice that was clear"
            assert len(ties) == 1
            assert passes[number - 2].nodes > 1
            assert not passes[number - 2].recheck
        else:
            assert not ties or record.nodes == 1, "a near-tie was decided among many rows"
            again = number < len(passes) and passes[number].recheck
            assert record.accepted == len(chose[number]) - (not again)
    ties = sum(gap < GUARD for gap in gaps[1:])
    assert 3 <= ties <= LENGTH - 4
    if way != "planned":  # the planner may decode plainly
        assert sum(p.recheck for p in passes) == ties


def test_without_a_guard_there_are_no_rechecks(seams, tokenizer, plain):
    got, passes = guarded(seams, tokenizer, guard=0.0)
    assert [r.token for r in got] == plain[0]
    assert not any(p.recheck for p in passes)
    assert len(passes) < len(guarded(seams, tokenizer)[1])


@pytest.mark.parametrize("way", ["best", "inline", "planned"])
def test_a_guard_that_trusts_nothing_is_plain_decoding(seams, tokenizer, plain, way):
    """It ends, with the right text: two passes a token, each chosen by the second."""
    got, passes = guarded(seams, tokenizer, guard=ALWAYS, **WAYS[way])
    assert [r.token for r in got] == plain[0]
    assert not any(r.from_draft for r in got)
    if way == "planned":
        assert len(passes) <= 2 * (LENGTH - 1)
        return
    assert [p.recheck for p in passes] == [False, True] * (LENGTH - 1)
    assert [p.nodes > 1 for p in passes] == [True, False] * (LENGTH - 1)
    assert [r.passes for r in got] == list(range(0, 2 * LENGTH, 2))


def test_a_pass_may_give_no_token(seams, plain):
    """A near-tie at the root: nothing of the pass stays. One further down: what came before stays."""
    decoder = decoder_for(seams, PROMPT, TREE, guard=GUARD)
    said, ties = [], set()
    while len(said) < LENGTH:
        again, offset = decoder.recheck, decoder.buffers.offset
        tokens = decoder.step(LENGTH - len(said), ()).tokens
        said += tokens
        if again:
            assert len(tokens) == 1
            assert not decoder.recheck
        if decoder.recheck:
            ties.add(len(tokens))
        if not tokens:
            assert decoder.recheck
            assert decoder.buffers.offset == offset
    assert said == plain[0]
    assert 0 in ties, "no root was a near-tie"
    assert max(ties) > 0, "no near-tie was below a root"


def test_a_recheck_feeds_one_row(seams, monkeypatch):
    """Not one of its layers sees more: that is the arithmetic of plain decoding."""
    rows, whole = [], type(seams).forward

    def counted(self, run, tokens=None, stores=None):
        out = whole(self, run, tokens, stores)
        if tokens is not None:
            rows.append(run.rows.count)
        return out

    decoder = decoder_for(seams, PROMPT, TREE, guard=ALWAYS)
    monkeypatch.setattr(type(seams), "forward", counted)
    for _ in range(9):
        decoder.step(99, ())
    assert rows == [1, *[70, 1] * 4, 70]


@pytest.mark.parametrize("guard", [GUARD, ALWAYS])
@pytest.mark.parametrize("count", [1, 2, 9])
def test_the_cache_afterwards(seams, tokenizer, guard, count):
    """Closed anywhere, and gone on with: the second answer runs its prompt's end in one pass."""
    cache, said = make_prompt_cache(seams.model), []
    for prompt in (PROMPT, [7, 30, 5]):
        answer = stream_generate(
            seams.model, tokenizer, prompt, tree=TREE, guard=guard, prompt_cache=cache
        )
        said += prompt + [next(answer).token for _ in range(count)]
        answer.close()
        check_cache(cache, said)
    got, _ = guarded(seams, tokenizer, [12], guard=guard, prompt_cache=cache, max_tokens=count)
    check_cache(cache, [*said, 12, *(r.token for r in got)])


def test_limits_and_ends_among_near_ties(seams, tokenizer, plain):
    tokens, gaps = plain
    for limit in (1, 2, 5, 6):
        got, _ = guarded(seams, tokenizer, max_tokens=limit)
        assert [r.token for r in got] == tokens[:limit]
        assert got[-1].finish_reason == "length"
    for end in dict.fromkeys(t for t, gap in zip(tokens[:9], gaps, strict=False) if gap < GUARD):
        cache = make_prompt_cache(seams.model)
        ending = TokenizerWrapper(tokenizer._tokenizer, eos_token_ids=[end])
        got, _ = guarded(seams, ending, prompt_cache=cache)
        assert [r.token for r in got] == tokens[: tokens.index(end) + 1]
        assert got[-1].finish_reason == "stop"
        check_cache(cache, PROMPT + [r.token for r in got])


@pytest.mark.parametrize("guard", [GUARD, ALWAYS])
@pytest.mark.parametrize("prompt", [PROMPT * 3, [26]])
def test_copied_drafts_and_the_prompt_s_own_pass(seams, tokenizer, prompt, guard, monkeypatch):
    """Its choice is never left to another pass, which would write the prompt a second time."""
    rows, whole = [], loop.prompt_pass
    monkeypatch.setattr(
        loop, "prompt_pass", lambda *args: rows.append(args[2].size) or whole(*args)
    )
    want = mlx_lm.stream_generate(make_model(), tokenizer, prompt, max_tokens=LENGTH)
    want = [r.token for r in want]
    for _ in range(2):  # the second runs its prompt in one pass
        cache = make_prompt_cache(seams.model)
        got, _ = guarded(
            seams, tokenizer, prompt, guard=guard, tree="best:9", copies=True, prompt_cache=cache
        )
        assert [r.token for r in got] == want
        check_cache(cache, prompt + want)
    assert set(rows) <= {len(prompt)}


@pytest.mark.parametrize("guard", [GUARD, ALWAYS])
def test_draws_are_guarded_too(seams, tokenizer, guard):
    """The gap is that of the scores that the draw compares; the text stays that of the seed."""
    sampler = mlx_specstream.make_sampler(temp=0.8, top_k=20)
    want, free = guarded(seams, tokenizer, sampler=sampler, seed=3, guard=0.0)
    got, passes = guarded(seams, tokenizer, sampler=sampler, seed=3, guard=guard)
    assert [r.token for r in got] == [r.token for r in want]
    assert sum(p.recheck for p in passes) >= 2
    assert len(passes) > len(free)


def test_a_negative_guard_is_refused(seams, tokenizer):
    with pytest.raises(BadArgument, match=r"\[guard\] must be >= 0, got -0.1"):
        guarded(seams, tokenizer, guard=-0.1)


def test_sixteen_bits_end_too(tokenizer):
    """Log-probabilities of 16 bits hold many exact ties, which are near-ties for any guard."""
    seams = attached()
    seams.model.set_dtype(mx.bfloat16)
    got, passes = guarded(seams, tokenizer, guard=0.05)
    assert len(got) == LENGTH
    assert 1 <= sum(p.recheck for p in passes) < len(passes)


def test_what_a_guard_cannot_see_is_refused(seams, tokenizer):
    for options in (
        {"logits_processors": [lambda tokens, logits: logits]},
        {"sampler": sample_utils.make_sampler(temp=0.7)},
    ):
        with pytest.raises(BadArgument, match=r"\[guard\] cannot see near-ties"):
            guarded(seams, tokenizer, **options)
        guarded(seams, tokenizer, guard=0.0, **options)
