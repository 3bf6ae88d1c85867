"""Generation: prefill, the loop, stopping, text and statistics. A superset of mlx-lm's functions.

Without streams the tokens come from mlx-lm's own loop; with them from ``decode.step``. Nothing here
knows of trees.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import GenerationResponse as PlainResponse
from mlx_lm.generate import (
    generate_step,
    generation_stream,
    speculative_generate_step,
    wired_limit,
)
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .decode.arrange import make_chooser, make_copier, make_steering, seams_for_copies, seeded
from .decode.choose import Opaque
from .decode.decoder import Decoder
from .decode.prune import PruneRule
from .decode.record import Record
from .encode import encode_text
from .errors import BadArgument
from .model.cache import check_prompt_cache, make_prompt_cache
from .model.prompt import feed, last_rows, see_to_buffers
from .model.seams import Seams, seams_of

NO_LIMIT = 1 << 40  # tokens


@dataclass
class GenerationResponse(PlainResponse):
    """mlx-lm's response and two counts.

    Args:
        passes: forwards of the model so far, the prompt's own not counted.
        tokens_per_pass: (generation_tokens - 1) / passes; plain decoding is exactly 1.
    """

    passes: int = 0
    tokens_per_pass: float = 1.0


@dataclass(frozen=True)
class Emitted:
    """One token as it leaves the loop."""

    token: int
    logprobs: mx.array
    from_draft: bool
    passes: int


def generate(
    model: nn.Module,
    tokenizer,
    prompt: str | list[int] | mx.array,
    verbose: bool = False,
    **kwargs,
) -> str:
    """Generate a complete answer: ``mlx_lm.generate`` with streams.

    Args:
        model, tokenizer: from ``load``.
        prompt: text or token ids.
        verbose: print the text as it comes, and the statistics.
        kwargs: see ``stream_generate``.
    """
    text, response = "", None
    if verbose:
        print("=" * 10)
    for response in stream_generate(model, tokenizer, prompt, **kwargs):
        if verbose:
            print(response.text, end="", flush=True)
        text += response.text
    if verbose:
        print("\n" + "=" * 10)
        print(statistics(response))
    return text


def statistics(response: GenerationResponse) -> str:
    """The counts of a finished answer, in four lines."""
    return (
        f"Prompt: {response.prompt_tokens} tokens, {response.prompt_tps:.3f} tokens-per-sec\n"
        f"Generation: {response.generation_tokens} tokens, "
        f"{response.generation_tps:.3f} tokens-per-sec\n"
        f"Passes: {response.passes}, {response.tokens_per_pass:.2f} tokens-per-pass\n"
        f"Peak memory: {response.peak_memory:.3f} GB"
    )


def stream_generate(
    model: nn.Module,
    tokenizer,
    prompt: str | list[int] | mx.array,
    max_tokens: int = 256,
    draft_model: nn.Module | None = None,
    stream=generation_stream,
    *,
    use_streams: bool = True,
    seed: int | None = None,
    tree: str | None = None,
    placement: str | None = None,
    prune: PruneRule | None = None,
    copies: bool | None = None,
    history: list[int] | None = None,
    coupled: bool = True,
    guard: float = 0.0,
    record: Record | None = None,
    sampler: Callable[[mx.array], mx.array] | None = None,
    logits_processors: list[Callable[[mx.array, mx.array], mx.array]] | None = None,
    prompt_cache: list | None = None,
    prefill_step_size: int = 2048,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
    **kwargs,
) -> Generator[GenerationResponse, None, None]:
    """Generate text token by token: ``mlx_lm.stream_generate`` with streams.

    Args:
        model, tokenizer: from ``load``. A model without streams decodes plainly.
        prompt: text or token ids.
        max_tokens: at most this many tokens; -1 means no limit.
        draft_model: mlx-lm's own speculative decoding; only with ``use_streams=False`` or a model
            without streams.
        stream: the MLX stream to work on.
        use_streams: False decodes plainly with mlx-lm's loop.
        seed: of the sampler; the same seed gives the same text with streams on and off. None draws
            one from ``mx.random``, whose state is otherwise left alone.
        tree: ``"chain"``, ``"cartesian:K"`` or ``"best:M"`` for every pass. None leaves it to the
            planner, which weighs trees of several sizes, and plain decoding, by what they cost on
            this machine (``mlx-specstream tune``) and by how good the drafts turn out to be.
        placement: where streams run, ``"inline"`` or ``"deferred"``; None is chosen for you.
        prune: early-exit pruning; None is off.
        copies: draft from the prompt and the text so far, too. Needs no streams. None: together
            with streams, unless ``tree`` is given.
        history: token ids that ``prompt_cache`` holds already, to copy from; they are not fed.
        coupled: at a temperature, rank drafts with the noise of the draws that will judge them.
            Speed only; the text is the same.
        guard: a choice between two logits that are closer than this is left to a pass of one row,
            the arithmetic of plain decoding; 0 is off. For machines whose arithmetic depends on the
            number of rows. Knows greedy choices and draws of ``mlx_specstream.make_sampler``.
        record: filled with what every pass did.
        sampler: mlx-lm's, or of ``mlx_specstream.make_sampler``, whose drafts are coupled best.
        logits_processors: mlx-lm's.
        prompt_cache: of ``make_prompt_cache``; holds prompt and answer afterwards.
        prefill_step_size: prompt tokens per forward.
        prompt_progress_callback: called with (tokens done, tokens in all).
        kwargs: mlx-lm's other options (``kv_bits``, ``max_kv_size``, ``input_embeddings``,
            ``num_draft_tokens`` ...): honoured in plain decoding, refused together with streams.

    Yields:
        One GenerationResponse per token; an end-of-sequence token appears only in the last.

    Raises:
        BadArgument: an argument that breaks a rule, or cannot be honoured together with streams.
    """
    max_tokens = check_max_tokens(max_tokens)
    if not isinstance(tokenizer, TokenizerWrapper):
        tokenizer = TokenizerWrapper(tokenizer)
    tokens = prompt_tokens(tokenizer, prompt)
    if tokens.size == 0 and kwargs.get("input_embeddings") is None:
        raise BadArgument("[prompt] must hold at least one token; got an empty prompt.")
    seams = seams_of(model)
    with_streams = use_streams and seams is not None and seams.streams is not None
    if copies and not with_streams:
        seams = seams_for_copies(model, seams)
    if with_streams or copies:
        # mlx-lm's callers always pass these; they mean nothing without what they belong to.
        idle = {"kv_group_size", "quantized_kv_start", "num_draft_tokens"}
        given = [name for name, value in kwargs.items() if value is not None and name not in idle]
        if draft_model is not None:
            given.insert(0, "draft_model")
        if given:
            raise BadArgument(
                f"[{given[0]}] is not supported together with streams or copies; pass "
                "use_streams=False, copies=False."
            )
        if guard < 0:
            raise BadArgument(f"[guard] must be >= 0, got {guard}.")
        if copies is None:
            copies = tree is None and prune is None
        chooser = make_chooser(sampler, seed, coupled, logits_processors, tokens)
        if guard and isinstance(chooser, Opaque):
            raise BadArgument(
                "[guard] cannot see near-ties behind logits_processors or a sampler of another kind; use "
                "mlx_specstream.make_sampler, or guard=0."
            )
        how = {
            "streams": with_streams,
            "chooser": chooser,
            "steering": make_steering(seams, with_streams, copies, tree, placement, prune),
            "copier": make_copier(seams, tokenizer, [*(history or []), *tokens.tolist()])
            if copies
            else None,
            "guard": guard,
            "record": record,
        }
        source = _streamed(
            seams,
            tokens,
            how=how,
            max_tokens=NO_LIMIT if max_tokens == -1 else max_tokens,
            stop=tokenizer.eos_token_ids,
            prompt_cache=prompt_cache,
            prefill_step_size=prefill_step_size,
            progress=prompt_progress_callback or (lambda done, total: None),
        )
    else:
        for name, value in (("tree", tree), ("placement", placement), ("prune", prune)):
            if value is not None:
                raise BadArgument(f"[{name}] needs streams; load some, or do not set it.")
        source = _plain(
            model,
            tokens,
            draft_model,
            stream,
            max_tokens=max_tokens,
            sampler=seeded(sampler, seed),
            logits_processors=logits_processors,
            prompt_cache=prompt_cache,
            prefill_step_size=prefill_step_size,
            prompt_progress_callback=prompt_progress_callback,
            **kwargs,
        )
    return _responses(source, model, tokenizer, tokens.size, max_tokens, stream)


def check_max_tokens(max_tokens: int) -> int:
    """A positive whole number, or -1 for no limit; anything else raises BadArgument."""
    try:
        number = operator.index(max_tokens)
    except TypeError:
        number = 0
    if number == 0 or number < -1:
        raise BadArgument(
            f"[max_tokens] must be a positive whole number, or -1 for no limit; got {max_tokens}."
        )
    return number


def _responses(
    source: Iterator[Emitted], model, tokenizer, prompt_tokens: int, max_tokens: int, stream
) -> Generator[GenerationResponse, None, None]:
    """Tokens to text and statistics, as mlx-lm does it."""
    detokenizer = tokenizer.detokenizer
    with wired_limit(model, [stream]), mx.stream(stream):
        tic = time.perf_counter()
        prompt_tps = 0.0
        try:
            for n, out in enumerate(source, 1):
                if n == 1:
                    prompt_tps = prompt_tokens / (time.perf_counter() - tic)
                    tic = time.perf_counter()
                stop = out.token in tokenizer.eos_token_ids
                ended = stop or n == max_tokens
                if not stop:
                    detokenizer.add_token(out.token)
                if ended:
                    detokenizer.finalize()
                yield GenerationResponse(
                    text=detokenizer.last_segment,
                    token=out.token,
                    logprobs=out.logprobs,
                    from_draft=out.from_draft,
                    prompt_tokens=prompt_tokens,
                    prompt_tps=prompt_tps,
                    generation_tokens=n,
                    generation_tps=n / (time.perf_counter() - tic),
                    peak_memory=mx.get_peak_memory() / 1e9,
                    finish_reason="stop" if stop else "length" if ended else None,
                    passes=out.passes,
                    tokens_per_pass=(n - 1) / out.passes if out.passes else 1.0,
                )
                if ended:
                    return
        finally:
            source.close()


def _without_seams(steps: Iterator, model) -> Iterator:
    """What ``steps`` yields, made by the stock model."""
    seams = seams_of(model)
    while True:
        with seams.out() if seams is not None else nullcontext():
            step = next(steps, None)
        if step is None:
            return
        yield step


def _plain(model, tokens, draft_model, stream, **kwargs) -> Iterator[Emitted]:
    """Tokens of mlx-lm's own loops."""
    if draft_model is None:
        kwargs.pop("num_draft_tokens", None)
        steps = generate_step(tokens, model, stream, **kwargs)
        for n, (token, logprobs) in enumerate(_without_seams(steps, model)):
            yield Emitted(token, logprobs, False, n)
        return
    if kwargs["max_tokens"] == -1:  # mlx-lm's speculative loop does not know -1
        kwargs["max_tokens"] = NO_LIMIT
    if kwargs.pop("input_embeddings", None) is not None:
        raise BadArgument("[input_embeddings] is not supported together with draft_model.")
    for name in ("max_kv_size", "prompt_progress_callback"):
        if kwargs.pop(name, None) is not None:
            raise BadArgument(f"[{name}] is not supported together with draft_model.")
    passes = -1  # each pass ends with a token of the model itself; the first is the prompt's own
    try:
        steps = speculative_generate_step(tokens, model, draft_model, stream, **kwargs)
        for token, logprobs, from_draft in _without_seams(steps, model):
            passes += not from_draft
            yield Emitted(token, logprobs, from_draft, max(passes + from_draft, 0))
    except ValueError as error:  # a cache that cannot be trimmed
        raise BadArgument(f"[draft_model] mlx-lm cannot use it here: {error}") from error


def _streamed(
    seams: Seams,
    tokens: mx.array,
    *,
    how: dict,
    max_tokens: int,
    stop: Collection[int],
    prompt_cache: list | None,
    prefill_step_size: int,
    progress: Callable[[int, int], None],
) -> Iterator[Emitted]:
    """Tokens of the streams' loop: prefill, then steps until the end."""
    if prompt_cache is not None:
        check_prompt_cache(prompt_cache, seams.model)
    stores = prompt_cache if prompt_cache is not None else make_prompt_cache(seams.model)
    begin = stores[0].offset
    sure, emitted = begin, 0  # K/V up to `sure` are of accepted tokens, whatever happens next
    known, decoder = tokens.tolist(), None
    try:
        progress(0, len(known))
        last = last_rows(seams, len(known)) if prefill_step_size > 1 else 1
        last = min(last, prefill_step_size)
        while len(known) - (sure - begin) > last:
            count = min(prefill_step_size, len(known) - 1 - (sure - begin))
            feed(seams, stores, tokens[sure - begin :][:count])
            sure += count
            progress(sure - begin, len(known))
            mx.clear_cache()
        see_to_buffers(seams, stores, tokens)
        decoder = Decoder(seams, stores, known[sure - begin :], **how)
        if sure - begin < len(known) - 1:  # mlx-lm reports the last token apart
            progress(len(known) - 1, len(known))
        passes = -1  # the first is the prompt's own
        while True:
            result = decoder.step(max_tokens - emitted, stop)
            passes += 1
            sure = decoder.buffers.offset
            if passes == 0:
                progress(len(known), len(known))
            known += result.tokens
            for at, (token, logprobs) in enumerate(
                zip(result.tokens, result.logprobs, strict=True)
            ):
                emitted += 1
                drafted = at < len(result.tokens) - 1
                yield Emitted(token, logprobs, drafted, passes)
            if result.ended:
                return
    finally:
        if decoder is not None:
            sure = decoder.buffers.offset
            decoder.close()
        if prompt_cache is not None:
            fed = known[: tokens.size + emitted]
            _settle(seams, stores, fed, begin, sure, complete=sure - begin >= tokens.size - 1)


def _settle(
    seams: Seams, stores: list, fed: list[int], begin: int, sure: int, complete: bool
) -> None:
    """Leave a caller's cache with exactly the tokens in ``fed`` behind ``begin``, as mlx-lm does.

    Not ``complete`` (interrupted in the prompt): only what is sure stays.
    """
    have = min(sure, begin + len(fed))
    for store in stores:
        store.trim(store.offset - have)
    if complete and have < begin + len(fed):
        seams.model(mx.array([fed[have - begin :]]), cache=stores)
        mx.eval([store.state for store in stores])


def prompt_tokens(tokenizer: TokenizerWrapper, prompt) -> mx.array:
    """The token ids that a prompt is fed as, int32 [n]: of text with the tokenizer's special ones."""
    if isinstance(prompt, mx.array):
        return prompt
    if isinstance(prompt, str):
        try:
            prompt = encode_text(tokenizer, prompt) if prompt else []
        except (TypeError, UnicodeError) as error:
            raise BadArgument(f"[prompt] must be valid Unicode text: {error}.") from None
    return mx.array(prompt, dtype=mx.int32)
