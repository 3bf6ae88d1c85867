"""``mlx-specstream``: finds the command, runs it, turns errors of the user into one line and exit 2."""

from __future__ import annotations

import argparse
import signal
import sys

from .. import __version__, blas
from ..errors import SpecStreamError
from . import bench, chat, convert, draft_vocabulary, eval, export, generate, inspect, train, tune
from .lines import one_line

COMMANDS = {
    "generate": generate,
    "chat": chat,
    "convert": convert,
    "export": export,
    "inspect": inspect,
    "train": train,
    "eval": eval,
    "tune": tune,
    "bench": bench,
    "draft-vocabulary": draft_vocabulary,
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlx-specstream",
        description="Speculative Streaming on MLX: the same text in fewer passes, without a draft model.",
    )
    parser.add_argument("--version", action="store_true", help="print versions and the BLAS in use")
    parser.add_argument("--debug", action="store_true", help="show the traceback of errors")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, module in COMMANDS.items():
        sub = commands.add_parser(name, help=module.HELP, description=module.__doc__)
        module.add_arguments(sub)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command line; returns the exit code (0 ok, 2 an error of the user, 130 interrupted)."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.version:
        print(_versions())
        return 0
    if args.command is None:
        parser.print_help()
        return 2
    # So that a terminated command cleans up like an interrupted one.
    signal.signal(signal.SIGTERM, terminate)
    try:
        COMMANDS[args.command].run(args)
    except (SpecStreamError, OSError, UnicodeError) as error:
        if args.debug:
            raise
        print(f"mlx-specstream: error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mlx-specstream: interrupted", file=sys.stderr)
        return 130
    return 0


def terminate(number, frame):
    """Leave as after an interrupt; a second signal must not cut the cleaning up short."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(128 + number)


def _versions() -> str:
    from importlib.metadata import version

    import mlx.core  # noqa: F401  so that its BLAS is loaded

    parts = [f"mlx-specstream {__version__}"]
    parts += [f"{name} {version(name)}" for name in ("mlx", "mlx-lm")]
    return ", ".join(parts) + f"; BLAS: {blas.name()}"
