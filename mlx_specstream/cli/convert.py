"""Convert a model, an adapter or streams to folders that mlx-lm and mlx-specstream load."""

from __future__ import annotations

import argparse
import contextlib
import sys
from functools import cache
from pathlib import Path

from .lines import printable

HELP = "convert a Hugging Face model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--hf-path",
        "--model",
        required=True,
        help="folder or hub id (Hugging Face, Meta, PEFT adapter) or a file with a state dict",
    )
    parser.add_argument("--mlx-path", default="mlx_model", help="new folder (default: %(default)s)")
    parser.add_argument(
        "--base",
        help="folder or hub id with what --hf-path lacks: config.json and tokenizer of a state dict, "
        "a tokenizer, the model that an adapter or streams belong to",
    )
    parser.add_argument(
        "--adapter", help="PEFT or mlx-lm adapter (folder or hub id) to merge into the weights"
    )
    parser.add_argument("-q", "--quantize", action="store_true", help="quantise the weights")
    parser.add_argument("--q-group-size", type=int, help="group size of the quantisation")
    parser.add_argument("--q-bits", type=int, help="bits per weight")
    parser.add_argument(
        "--q-mode",
        choices=("affine", "mxfp4", "nvfp4", "mxfp8"),
        default="affine",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--quant-predicate",
        choices=("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"),
        help="mixed-bit recipe of mlx-lm",
    )
    parser.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        help="of the weights that are not quantised (default: as in the checkpoint)",
    )
    parser.add_argument(
        "-d", "--dequantize", action="store_true", help="dequantise a quantised model"
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help="measure what the conversion did to the logits of a few prompts (needs memory for the "
        "whole model)",
    )
    parser.add_argument("--revision", help="hub revision of --hf-path")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="let the repository's own code run"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print every tensor's source, target, shape and dtype; write nothing",
    )
    parser.add_argument(
        "--upload-repo", help="then upload the new folder to this hub repository (owner/name)"
    )


def run(args: argparse.Namespace) -> None:
    from ..converters import convert
    from ..errors import BadArgument
    from ..hub import check_upload, upload

    for name, idle in (
        ("q_bits", None),
        ("q_group_size", None),
        ("quant_predicate", None),
        ("q_mode", "affine"),
    ):
        if not args.quantize and getattr(args, name) != idle:
            raise BadArgument(f"[{name}] needs -q (--quantize).")
    for name in ("upload_repo", "report"):
        if args.dry_run and getattr(args, name):
            raise BadArgument(f"[{name}] cannot be combined with --dry-run.")
    if args.upload_repo:
        check_upload(args.upload_repo)
    with contextlib.ExitStack() as stack:
        out = convert(
            args.hf_path,
            args.mlx_path,
            quantize=args.quantize,
            q_group_size=args.q_group_size,
            q_bits=args.q_bits,
            q_mode=args.q_mode,
            quant_predicate=args.quant_predicate,
            dtype=args.dtype,
            dequantize=args.dequantize,
            base=args.base,
            adapter=args.adapter,
            report=args.report,
            revision=args.revision,
            trust_remote_code=args.trust_remote_code,
            log=lambda line: print(printable(line), file=sys.stderr),
            progress=megabytes(stack),
            plan=(lambda line: print(printable(line))) if args.dry_run else None,
        )
    if out is not None:
        print(out)
    if args.upload_repo:
        if out != Path(args.mlx_path).expanduser():  # it may hold what nobody meant to publish
            raise BadArgument(
                f"[upload_repo] nothing was converted, so nothing was uploaded; if all of {out} is to "
                f"be published: hf upload {args.upload_repo} {out}"
            )
        print(upload(out, args.upload_repo))


def megabytes(stack: contextlib.ExitStack):
    """Takes bytes written and bytes in all; a bar on a terminal, from the first byte on."""
    from .show import Progress

    bar = cache(lambda: stack.enter_context(Progress("MB")))
    if not sys.stderr.isatty():
        return lambda done, total: None
    return lambda done, total: bar().step(done >> 20, total >> 20)
