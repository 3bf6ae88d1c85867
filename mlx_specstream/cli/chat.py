"""Chat with a model. /reset forgets the conversation, /help lists the commands, Ctrl-C stops an answer."""

from __future__ import annotations

import argparse
import sys

from ..errors import BadArgument, SpecStreamError
from . import options

HELP = "chat with a model"
COMMANDS = """/reset  forget the conversation
/stats  show or hide speed after each answer
/help   this list
/exit   leave (also Ctrl-D); Ctrl-C stops an answer"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument("--system-prompt", help="system message of the conversation")
    options.add_streams(parser)
    options.add_sampling(parser, max_tokens=512)
    options.add_log(parser)


def run(args: argparse.Namespace) -> None:
    keywords = options.generation_arguments(args)
    from ..decode.plan import make_plan
    from ..model.seams import seams_of

    model, tokenizer = options.load_model(args)
    if not tokenizer.has_chat_template:
        raise BadArgument("[chat] this model has no chat template; use mlx-specstream generate.")
    seams = seams_of(model)
    if seams is not None:  # a plan that cannot be made is said now, not after the first message
        make_plan(seams.streams.config, args.tree or "chain", args.placement, keywords["prune"])
    if (
        seams is not None
        and seams.streams is not None
        and args.tree is None
        and not args.no_streams
    ):
        for line in options.planner_note(seams):
            print(f"mlx-specstream: note: {line}", file=sys.stderr)
    log = options.answer_log(args, model)
    conversation = Conversation(model, tokenizer, args.system_prompt, keywords, log)
    read = _reader()
    show_stats = True
    print(COMMANDS, file=sys.stderr)
    while True:
        try:
            text = read().strip()
        except EOFError:
            break
        except KeyboardInterrupt:  # clears the line, as in a shell
            print(file=sys.stderr)
            continue
        if text == "/exit":
            break
        if text == "/reset":
            conversation.reset()
            print("conversation forgotten", file=sys.stderr)
        elif text == "/stats":
            show_stats = not show_stats
        elif text.startswith("/"):
            print(COMMANDS, file=sys.stderr)
        elif text:
            _answer(conversation, text, show_stats)


class Conversation:
    """Messages so far and the K/V of the tokens they became.

    Only tokens behind the common prefix with the turn before are fed to the model.
    """

    def __init__(self, model, tokenizer, system_prompt: str | None, keywords: dict, log=None):
        self.model, self.tokenizer, self.keywords = model, tokenizer, keywords
        self.log = log
        self.system = (
            [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        )
        self.reset()

    def reset(self) -> None:
        self.messages = list(self.system)
        self._cache, self._fed = None, []

    def answer(self, text: str):
        """Yield the responses to a message. Closing or interrupting keeps what was said so far."""
        from ..generate import stream_generate

        messages = [*self.messages, {"role": "user", "content": text}]
        tokens = options.chat_tokens(self.tokenizer, messages)
        known = self._reuse(tokens)
        self._fed = list(tokens)
        said, answer = "", []
        responses = stream_generate(
            self.model,
            self.tokenizer,
            tokens[known:],
            prompt_cache=self._cache,
            history=tokens[:known],
            **self.keywords,
        )
        try:
            for response in responses:
                self._fed.append(response.token)
                answer.append(response.token)
                said += response.text
                yield response
        except GeneratorExit:  # closed between two tokens: cache and tokens agree
            raise
        except BaseException:  # in the middle of a token: the cache may hold more than was said
            self._cache, self._fed = None, []
            raise
        finally:
            responses.close()
            if said:  # else it is as if it had not been asked
                self.messages = [*messages, {"role": "assistant", "content": said}]
            if self.log is not None:
                self.log.add(tokens, answer)

    def _reuse(self, tokens: list[int]) -> int:
        """How many of ``tokens`` the cache already holds; the cache is cut to them (or made anew)."""
        from mlx_lm.models import cache as mlx_lm_cache

        from ..model.cache import make_prompt_cache
        from ..model.seams import seams_of
        from ..model.window import can_trim

        known = 0
        limit = min(len(tokens) - 1, len(self._fed))  # one token must be left to feed
        while known < limit and tokens[known] == self._fed[known]:
            known += 1
        surplus = len(self._fed) - known
        if self._cache is not None and known:
            if not surplus:
                return known
            if can_trim(self._cache, surplus):
                mlx_lm_cache.trim_prompt_cache(self._cache, surplus)
                return known
        seams = seams_of(self.model)
        streams = seams is not None and seams.streams is not None and self.keywords["use_streams"]
        drafts = streams or self.keywords.get("copies")
        make = make_prompt_cache if drafts else mlx_lm_cache.make_prompt_cache
        self._cache = make(self.model)
        return 0


def _answer(conversation: Conversation, text: str, show_stats: bool) -> None:
    responses = conversation.answer(text)
    response = None
    try:
        for response in responses:
            print(response.text, end="", flush=True)
        print()
    except KeyboardInterrupt:
        responses.close()
        print("\n(stopped)", file=sys.stderr)
    except (SpecStreamError, OSError) as error:  # OSError: a log on a full disk
        print(f"mlx-specstream: error: {error}", file=sys.stderr)
    if show_stats and response is not None:
        print(
            f"[{response.generation_tokens} tokens, {response.generation_tps:.1f} per second, "
            f"{response.tokens_per_pass:.2f} per pass]",
            file=sys.stderr,
        )


def _reader():
    """A function that reads a line: with history and editing on a terminal, plainly from a pipe."""
    if not sys.stdin.isatty():
        return lambda: input()
    from prompt_toolkit import PromptSession

    session = PromptSession()
    return lambda: session.prompt(">> ")
