"""Generation end to end: token by token what mlx_lm.stream_generate gives, and the same cache."""

import time

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache as stock_cache
from mlx_lm.models.cache import trim_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from reference import assert_close
from tiny_models import attached, make_model, make_tokenizer

from mlx_specstream import generate, make_prompt_cache, stream_generate
from mlx_specstream.decode.decoder import Decoder
from mlx_specstream.decode.plan import Fixed
from mlx_specstream.decode.prune import PruneRule
from mlx_specstream.decode.record import Record
from mlx_specstream.errors import BadArgument
from mlx_specstream.model.cache import RowStore
from mlx_specstream.model.seams import attach

PROMPT = [53, 56, 8, 26, 42, 33]  # its greedy answer goes on for long, without repeating itself
LONG = [int(t) for t in np.random.default_rng(0).integers(1, 67, 301)]
TREE = "best:70"  # every token once at depth 1 and a few deeper: some draft is always accepted


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def seams():
    return attached(prune_rank=8)


def ours(seams, tokenizer, prompt=PROMPT, **options):
    options = {"max_tokens": 12, "tree": TREE, **options}
    return list(stream_generate(seams.model, tokenizer, prompt, **options))


def stock(tokenizer, prompt=PROMPT, name="llama", **options):
    options = {"max_tokens": 12, **options}
    return list(mlx_lm.stream_generate(make_model(name), tokenizer, prompt, **options))


def check_same(got, want):
    assert [r.token for r in got] == [r.token for r in want]
    assert [r.text for r in got] == [r.text for r in want]
    assert [r.finish_reason for r in got] == [r.finish_reason for r in want]
    assert [r.generation_tokens for r in got] == [r.generation_tokens for r in want]
    assert {r.prompt_tokens for r in got} == {r.prompt_tokens for r in want}
    for a, b in zip(got, want, strict=True):
        assert a.logprobs.shape == b.logprobs.shape
        assert_close(a.logprobs, b.logprobs, 1e-5, "logprobs")


def check_cache(cache, tokens, name="llama"):
    """The cache holds exactly these tokens: the K/V of a plain prefill of them."""
    model = make_model(name)
    clean = make_prompt_cache(model)
    model(mx.array([tokens]), cache=clean)
    for layer, (got, want) in enumerate(zip(cache, clean, strict=True)):
        assert got.offset == want.offset == len(tokens)
        for a, b in zip(got.keys_and_values(), want.keys_and_values(), strict=True):
            assert_close(a, b, 1e-5, f"K/V of layer {layer}")


@pytest.mark.parametrize("placement", ["inline", "deferred", None])
@pytest.mark.parametrize("tree", ["chain", "cartesian:2", "best:9", TREE, None])
def test_greedy_equals_mlx_lm(seams, tokenizer, tree, placement):
    got = ours(seams, tokenizer, tree=tree, placement=placement)
    check_same(got, stock(tokenizer))
    last = got[-1]
    assert last.tokens_per_pass == (last.generation_tokens - 1) / last.passes
    assert last.passes <= last.generation_tokens - 1
    if tree == TREE:
        assert last.passes < last.generation_tokens - 1
        assert any(r.from_draft for r in got)
    assert [r.passes for r in got] == sorted(r.passes for r in got)
    assert sum(not r.from_draft for r in got) >= last.passes


@pytest.mark.parametrize("name", ["gemma3_text", "gpt_oss", "phi3", "mixtral"])
def test_other_architectures_equal_mlx_lm(tokenizer, name):
    """The sliding ones far past their window, against mlx-lm's rotating caches."""
    got = ours(attached(name), tokenizer, LONG[:40])
    check_same(got, stock(tokenizer, LONG[:40], name))
    assert got[-1].passes < len(got) - 1


@pytest.mark.parametrize("rule", [PruneRule(keep=5), PruneRule(threshold=0.05)], ids=str)
@pytest.mark.parametrize("placement", ["inline", "deferred"])
def test_pruned_output_is_the_same(seams, tokenizer, rule, placement):
    got = ours(seams, tokenizer, prune=rule, placement=placement)
    check_same(got, stock(tokenizer))


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 4, 7])
def test_max_tokens_inside_a_path(seams, tokenizer, max_tokens):
    got = ours(seams, tokenizer, max_tokens=max_tokens)
    check_same(got, stock(tokenizer, max_tokens=max_tokens))
    assert got[-1].finish_reason == "length"
    assert got[-1].tokens_per_pass >= 1.0


def test_end_of_text_inside_a_path(seams, tokenizer):
    plain = [r.token for r in stock(tokenizer)]
    drafted = 0
    for end in dict.fromkeys(plain):
        ending = TokenizerWrapper(tokenizer._tokenizer, eos_token_ids=[end])
        cache = make_prompt_cache(seams.model)
        got = ours(seams, ending, prompt_cache=cache)
        check_same(got, stock(ending))
        assert got[-1].finish_reason == "stop"
        assert all(r.token != end for r in got[:-1])
        assert [r.text for r in got[:-1]] == [f"a{r.token}" for r in got[:-1]]
        drafted += len(got) > 1 and got[-2].from_draft  # one pass brought it and a token before
        check_cache(cache, PROMPT + [r.token for r in got])
    assert drafted, "no end of text was inside a path"


@pytest.mark.parametrize(
    ("prompt", "step_size"), [([9], 2048), (LONG, 64), (LONG[:251], 2048), (LONG[:257], 256)]
)
def test_prompts_of_any_length(seams, tokenizer, prompt, step_size):
    """One token, many chunks, and growth of mlx-lm's 256-token buffers in the middle of a draft."""
    options = {"prefill_step_size": step_size}
    check_same(ours(seams, tokenizer, prompt, **options), stock(tokenizer, prompt, **options))


def progress(run, *arguments, **options):
    calls = []
    report = lambda *done: calls.append(done)  # noqa: E731
    run(*arguments, prompt_progress_callback=report, **options)
    return calls


@pytest.mark.parametrize(("prompt", "step_size"), [([9], 2048), (LONG, 64)])
def test_progress_of_the_prompt(seams, tokenizer, prompt, step_size):
    options = {"prefill_step_size": step_size, "max_tokens": 1}
    wanted = progress(stock, tokenizer, prompt, **options)
    got = progress(ours, seams, tokenizer, prompt, **options)
    assert got[: len(wanted) - 1] == wanted[:-1]


def test_the_last_word_on_progress(seams, tokenizer):
    wanted = progress(stock, tokenizer, LONG)
    assert wanted[-1] == (301, 301)
    assert progress(ours, seams, tokenizer, LONG) == wanted


def test_text_prompts(seams, tokenizer):
    for text in ("a5 a17 a3", "a1 a5 a17"):
        check_same(ours(seams, tokenizer, text), stock(tokenizer, text))
    check_same(ours(seams, tokenizer, mx.array(PROMPT)), stock(tokenizer))
    check_same(ours(seams, tokenizer._tokenizer), stock(tokenizer._tokenizer))


def test_generate_returns_the_text(seams, tokenizer, capsys):
    options = {"max_tokens": 9}
    want = mlx_lm.generate(make_model(), tokenizer, PROMPT, **options)
    assert generate(seams.model, tokenizer, PROMPT, tree=TREE, **options) == want
    assert capsys.readouterr().out == ""
    assert generate(seams.model, tokenizer, PROMPT, verbose=True, **options) == want
    out = capsys.readouterr().out
    assert want in out
    assert "tokens-per-pass" in out


def test_no_limit(seams, tokenizer):
    answer = stream_generate(seams.model, tokenizer, PROMPT, max_tokens=-1, tree=TREE)
    got = [next(answer).token for _ in range(40)]
    answer.close()
    assert got == [r.token for r in stock(tokenizer, max_tokens=40)]


def test_cache_holds_prompt_and_answer_and_goes_on(seams, tokenizer):
    cache, theirs = make_prompt_cache(seams.model), stock_cache(make_model())
    said = []
    for more in (PROMPT, [7, 30], [12]):
        got = ours(seams, tokenizer, more, prompt_cache=cache, max_tokens=7)
        check_same(got, stock(tokenizer, more, prompt_cache=theirs, max_tokens=7))
        said += more + [r.token for r in got]
        assert cache[0].offset == theirs[0].offset == len(said)
        check_cache(cache, said)
    # It is mlx-lm's own kind, so the stock loop goes on with it too.
    assert trim_prompt_cache(cache, 4) == trim_prompt_cache(theirs, 4) == 4
    check_same(
        stock(tokenizer, [1], prompt_cache=cache), stock(tokenizer, [1], prompt_cache=theirs)
    )


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_cache_after_an_early_close(seams, tokenizer, count):
    cache, theirs = make_prompt_cache(seams.model), stock_cache(make_model())
    for model, kept, run, options in (
        (seams.model, cache, stream_generate, {"tree": TREE}),
        (make_model(), theirs, mlx_lm.stream_generate, {}),
    ):
        answer = run(model, tokenizer, PROMPT, max_tokens=30, prompt_cache=kept, **options)
        tokens = [next(answer).token for _ in range(count)]
        answer.close()
    assert cache[0].offset == theirs[0].offset
    check_cache(cache, PROMPT + tokens)


@pytest.mark.parametrize("strike", [2, 9, 13, 20])
@pytest.mark.parametrize("where", ["write", "update_and_fetch"])
def test_cache_after_an_interrupt_inside_a_step(tokenizer, monkeypatch, where, strike):
    seams, calls = attached(), []
    whole = getattr(RowStore, where)

    def interrupted(self, *args):
        calls.append(0)
        if len(calls) == strike:
            raise KeyboardInterrupt
        return whole(self, *args)

    monkeypatch.setattr(RowStore, where, interrupted)
    cache, tokens = make_prompt_cache(seams.model), []
    answer = stream_generate(
        seams.model, tokenizer, PROMPT, max_tokens=99, prompt_cache=cache, tree=TREE
    )
    with pytest.raises(KeyboardInterrupt):
        tokens.extend(response.token for response in answer)
    check_cache(cache, PROMPT + tokens)
    assert tokens == [r.token for r in stock(tokenizer, max_tokens=99)][: len(tokens)]


def test_two_answers_at_once(seams, tokenizer):
    prompts = (PROMPT, LONG[:9])
    answers = [stream_generate(seams.model, tokenizer, p, max_tokens=9, tree=TREE) for p in prompts]
    got = [[], []]
    for pair in zip(*answers, strict=True):
        for tokens, response in zip(got, pair, strict=True):
            tokens.append(response.token)
    for tokens, prompt in zip(got, prompts, strict=True):
        assert tokens == [r.token for r in stock(tokenizer, prompt, max_tokens=9)]


def test_without_streams_it_is_mlx_lm(seams, tokenizer):
    for model in (seams.model, make_model()):
        got = list(
            stream_generate(
                model, tokenizer, PROMPT, max_tokens=9, use_streams=False, max_kv_size=99
            )
        )
        check_same(got, stock(tokenizer, max_tokens=9))
        assert got[-1].passes == 8
        assert got[-1].tokens_per_pass == 1.0


def test_draft_model_without_streams(seams, tokenizer):
    options = {"max_tokens": 9, "num_draft_tokens": 2, "draft_model": make_model("qwen2")}
    got = list(stream_generate(seams.model, tokenizer, PROMPT, use_streams=False, **options))
    check_same(got, stock(tokenizer, **options))


def test_shared_mode_streams_run_inline(tokenizer):
    seams = attached(main_sees_streams=True)
    got = [r.token for r in ours(seams, tokenizer)]
    assert got == [r.token for r in ours(seams, tokenizer, tree="chain", placement="inline")]
    with pytest.raises(BadArgument, match="use 'inline'"):
        ours(seams, tokenizer, placement="deferred")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"draft_model": object()}, "draft_model"),
        ({"kv_bits": 4}, "kv_bits"),
        ({"max_kv_size": 64}, "max_kv_size"),
        ({"input_embeddings": mx.zeros((3, 64))}, "input_embeddings"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"tree": "bush"}, "tree"),
        ({"placement": "behind"}, "placement"),
        ({"no_such_option": 1}, "no_such_option"),
    ],
    ids=str,
)
def test_refusals(seams, tokenizer, options, name):
    with pytest.raises(BadArgument, match=rf"\[{name}\]") as caught:
        ours(seams, tokenizer, **options)
    assert "\n" not in str(caught.value)


def test_refused_caches(seams, tokenizer):
    rotating = stock_cache(make_model("gemma3_text"))
    for cache in (rotating, make_prompt_cache(seams.model)[:3]):
        with pytest.raises(BadArgument, match="make_prompt_cache"):
            ours(seams, tokenizer, prompt_cache=cache)


@pytest.mark.parametrize("option", [{"tree": "chain"}, {"placement": "inline"}], ids=str)
def test_options_of_streams_need_streams(seams, tokenizer, option):
    (name,) = option
    for model in (make_model(), attach(make_model()).model):
        with pytest.raises(BadArgument, match=rf"\[{name}\] needs streams"):
            next(stream_generate(model, tokenizer, PROMPT, **option))
    with pytest.raises(BadArgument, match=r"\[prune\]"):
        next(stream_generate(seams.model, tokenizer, PROMPT, use_streams=False, prune=PruneRule(3)))
    no_exit = attached()
    with pytest.raises(BadArgument, match="no early-exit head"):
        ours(no_exit, tokenizer, prune=PruneRule(keep=3))


@pytest.mark.parametrize("how", [{}, {"draft_model": True}])
def test_plain_decoding_is_done_by_the_stock_model(seams, tokenizer, how):
    """So it costs what mlx-lm's loop costs; between two tokens the seams are there."""
    model, seen = seams.model, []
    seam = type(model.layers[1])
    if how:
        how = {"draft_model": make_model()}

    def sampler(logprobs):
        seen.append(type(model.layers[1]))
        return mx.argmax(logprobs, axis=-1)

    options = {"max_tokens": 7, "use_streams": False, "sampler": sampler, **how}
    for _ in stream_generate(model, tokenizer, PROMPT, **options):
        assert type(model.layers[1]) is seam
    assert set(seen) == {type(make_model().layers[1])}
    assert seam not in seen


def test_the_seams_are_back_after_an_interrupt(seams, tokenizer):
    def sampler(logprobs):
        raise KeyboardInterrupt

    before = [type(module) for module, _ in seams._stock]
    with pytest.raises(KeyboardInterrupt):
        list(stream_generate(seams.model, tokenizer, PROMPT, use_streams=False, sampler=sampler))
    assert [type(module) for module, _ in seams._stock] == before
    assert len(ours(seams, tokenizer)) == 12


def test_the_prompts_own_pass_drafts_nothing(monkeypatch):
    """Its last token alone may be left, and the prompt may repeat itself."""
    seen, real = [], Decoder._shape

    def shape(decoder, plan, *rest):
        seen.append((decoder.place, plan.nodes))
        return real(decoder, plan, *rest)

    monkeypatch.setattr(Decoder, "_shape", shape)
    model, tokenizer = make_model(), make_tokenizer(ends=False)
    for tree in ("best:5", None):
        seen.clear()
        how = {"tree": tree, "copies": True, "use_streams": False, "prefill_step_size": 1}
        list(stream_generate(model, tokenizer, [5, 9, 13] * 6, max_tokens=12, **how))
        assert [nodes for place, nodes in seen if place == 0] == [1]
    assert max(nodes for _, nodes in seen) > 1


def test_a_model_may_change_its_dtype():
    seams, tokenizer = attached(), make_tokenizer(ends=False)
    prompt = [5, 9, 13, 2, 7]
    list(stream_generate(seams.model, tokenizer, prompt, max_tokens=3))
    seams.model.set_dtype(mx.float16)
    cache = make_prompt_cache(seams.model)
    list(stream_generate(seams.model, tokenizer, prompt, max_tokens=9, prompt_cache=cache))
    assert {store.keys.dtype for store in cache} == {mx.float16}


def test_parts_of_a_split_record_add_up(monkeypatch):
    real = Fixed.next_pass

    def slow(*args):
        time.sleep(0.03)
        return real(*args)

    monkeypatch.setattr(Fixed, "next_pass", slow)
    seams, record = attached(), Record(split=True)
    tic = time.perf_counter()
    how = {"max_tokens": 9, "tree": "best:8", "record": record}
    list(stream_generate(seams.model, make_tokenizer(ends=False), [5, 9, 13, 2], **how))
    wall, sums = time.perf_counter() - tic, record.totals()
    assert sums["draft_s"] >= 0.03 * sums["passes"]
    parts = sum(sums[f"{name}_s"] for name in ("base", "streams", "draft", "host"))
    assert 0.03 * sums["passes"] < parts < wall
