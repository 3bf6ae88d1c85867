"""Tell what a file or folder is: which base, which streams, how large, and whether it is safe to use."""

from __future__ import annotations

import argparse
import json

from .lines import printable

HELP = "tell what a model, streams or weights file is, and whether it is safe"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="folder, file or hub id; nothing of it is run")
    parser.add_argument("--revision", help="of a hub id")
    parser.add_argument("--json", action="store_true", help="for machines")


def run(args: argparse.Namespace) -> None:
    from ..converters.inspection import inspect
    from ..errors import BadCheckpoint

    report = inspect(args.path, args.revision)
    if args.json:
        print(json.dumps({**report, "problems": report.problems}, indent=1))
    else:
        width = max(map(len, report))
        for label, value in report.items():
            print(printable(f"{label:<{width}}  {value}"))
    if report.problems:
        raise BadCheckpoint("; ".join(report.problems))
