"""Write a model or streams back for PyTorch: Hugging Face safetensors, stream tensors by their names there."""

from __future__ import annotations

import argparse
import sys

from .lines import printable

HELP = "write a model or streams back for PyTorch"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, help="model folder (its streams come along) or streams folder"
    )
    parser.add_argument("--out", required=True, help="new folder")
    parser.add_argument(
        "-d", "--dequantize", action="store_true", help="write full weights of a quantised model"
    )


def run(args: argparse.Namespace) -> None:
    from ..converters.export import export

    out = export(
        args.model,
        args.out,
        dequantize=args.dequantize,
        log=lambda line: print(printable(line), file=sys.stderr),
    )
    print(out)
