"""Generate an answer to a prompt. The text goes to stdout, the statistics to stderr."""

from __future__ import annotations

import argparse
import sys

from . import options

HELP = "generate an answer to a prompt"
MLX_LM_OPTIONS = (
    "num_draft_tokens",
    "max_kv_size",
    "kv_bits",
    "kv_group_size",
    "quantized_kv_start",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument("--prompt", "-p", required=True, help="the prompt; - reads stdin")
    parser.add_argument("--system-prompt", help="system message for the chat template")
    parser.add_argument(
        "--ignore-chat-template", action="store_true", help="feed the prompt as it is"
    )
    parser.add_argument("--extra-eos-token", nargs="+", help="more tokens that end the answer")
    options.add_streams(parser)
    options.add_sampling(parser, max_tokens=100)
    mlx_lm = parser.add_argument_group(
        "mlx-lm's own options (with --no-streams or without streams)"
    )
    mlx_lm.add_argument("--draft-model", help="a draft model for mlx-lm's speculative decoding")
    mlx_lm.add_argument("--num-draft-tokens", type=int, help="tokens per draft of --draft-model")
    mlx_lm.add_argument("--max-kv-size", type=int, help="tokens in a rotating K/V cache")
    mlx_lm.add_argument("--kv-bits", type=int, help="bits of a quantised K/V cache")
    mlx_lm.add_argument("--kv-group-size", type=int, help="its group size (default: 64)")
    mlx_lm.add_argument(
        "--quantized-kv-start", type=int, help="tokens before it is used (default: 5000)"
    )
    options.add_log(parser)
    parser.add_argument("--quiet", action="store_true", help="no statistics")


def run(args: argparse.Namespace) -> None:
    from ..errors import BadArgument
    from ..generate import prompt_tokens, statistics, stream_generate

    keywords = options.generation_arguments(args)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    if not prompt:
        raise BadArgument("[prompt] must hold at least one token; got an empty prompt.")
    if args.num_draft_tokens is not None and not args.draft_model:
        raise BadArgument("[num_draft_tokens] needs --draft-model.")
    model, tokenizer = options.load_model(args)
    log = options.answer_log(args, model)
    if args.draft_model:
        keywords["draft_model"] = options.draft_model(args.draft_model, tokenizer)
    for name in MLX_LM_OPTIONS:
        if getattr(args, name) is not None:
            keywords[name] = getattr(args, name)
    if tokenizer.has_chat_template and not args.ignore_chat_template:
        messages = [{"role": "user", "content": prompt}]
        if args.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": args.system_prompt})
        prompt = options.chat_tokens(tokenizer, messages)
    if log is not None:
        prompt = prompt_tokens(tokenizer, prompt).tolist()
    response, said = None, []
    for response in stream_generate(model, tokenizer, prompt, **keywords):
        said.append(response.token)
        print(response.text, end="", flush=True)
    print()
    if log is not None:
        log.add(prompt, said)
    if not args.quiet:
        print(statistics(response), file=sys.stderr)
