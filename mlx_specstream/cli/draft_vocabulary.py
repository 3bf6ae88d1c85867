"""Let the streams of a folder draft only frequent tokens, which is faster where the vocabulary is large.

The streams are not trained again, and the text stays the same.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import options

HELP = "limit what streams draft to the frequent tokens of your text"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument("--streams", type=Path, required=True, help="streams folder to change")
    parser.add_argument(
        "--data",
        type=Path,
        help="folder with train.jsonl (or .jsonl.gz) whose rows have answers, best what the model says; their "
        "tokens are counted (for prompts alone: train --self-distill --draft-vocabulary)",
    )
    parser.add_argument(
        "--size",
        type=int,
        required=True,
        help="how many tokens, end of sequence besides; 0: the whole vocabulary again",
    )


def run(args: argparse.Namespace) -> None:
    from ..errors import BadArgument
    from ..load import load_base, model_folder
    from ..model.checkpoint import load_streams, save_draft_vocabulary
    from ..model.projections import embedding_of, weight_shape
    from ..model.seams import attach
    from ..model.support import check_supported
    from ..train.data import read_examples
    from ..train.vocabulary import from_examples

    if args.size < 0:
        raise BadArgument(f"[draft-vocabulary] '--size' must be >= 0, got {args.size}.")
    if args.size and args.data is None:
        raise BadArgument("[draft-vocabulary] '--data' is needed to choose tokens from.")
    model, tokenizer, _ = load_base(
        model_folder(args.model, args.revision, args.trust_remote_code),
        adapter_path=args.adapter_path,
        trust_remote_code=args.trust_remote_code,
    )
    check_supported(model)
    streams, note = load_streams(args.streams, model)
    if note:
        print(f"mlx-specstream: note: {note}", file=sys.stderr)
    streams.draft_vocabulary, line = None, "streams draft from the whole vocabulary"
    if args.size:
        examples, _ = read_examples(args.data, "train", tokenizer, sys.maxsize)
        streams.draft_vocabulary, line = from_examples(
            examples, args.size, tokenizer.eos_token_ids, weight_shape(embedding_of(model))[0]
        )
        attach(model, streams)  # a head that cannot be found says so before anything is written
    save_draft_vocabulary(args.streams, streams.draft_vocabulary)
    print(f"{args.streams}: {line}", file=sys.stderr)
