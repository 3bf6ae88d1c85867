"""Convert a Hugging Face model to a folder that mlx-lm and mlx-specstream load."""

from __future__ import annotations

import argparse
import sys

HELP = "convert a Hugging Face model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hf-path", "--model", required=True, help="Hugging Face folder or hub id")
    parser.add_argument("--mlx-path", default="mlx_model", help="new folder (default: %(default)s)")
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
    parser.add_argument("--revision", help="hub revision")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="let the repository's own code run"
    )


def run(args: argparse.Namespace) -> None:
    from ..converters import convert
    from ..errors import BadArgument

    for name, idle in (
        ("q_bits", None),
        ("q_group_size", None),
        ("quant_predicate", None),
        ("q_mode", "affine"),
    ):
        if not args.quantize and getattr(args, name) != idle:
            raise BadArgument(f"[{name}] needs -q (--quantize).")
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
        revision=args.revision,
        trust_remote_code=args.trust_remote_code,
        log=lambda line: print(line, file=sys.stderr),
    )
    print(out)
