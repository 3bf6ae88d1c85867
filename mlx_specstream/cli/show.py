"""Progress on stderr, tables on stdout."""

from __future__ import annotations

import sys
import time
from typing import Any

WIDTH = 118  # columns of the tables where the output is no terminal


class Progress:
    """A bar on stderr; where that is no terminal, a line for every tenth.

    Args:
        what: the things that are counted.
    """

    def __init__(self, what: str):
        self.what, self.tenths, self.begun = what, 0, time.perf_counter()

    def __enter__(self):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        self.bar = Progress(
            "{task.description}",
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self.task = self.bar.add_task(self.what, total=None)
        self.bar.start()
        return self

    def __exit__(self, *error):
        self.bar.stop()

    def step(self, done: int, total: int) -> None:
        self.bar.update(self.task, completed=done, total=total)
        if not self.bar.console.is_terminal and 10 * done // total > self.tenths:
            self.tenths = 10 * done // total
            seconds = time.perf_counter() - self.begun
            print(f"{self.what}: {done} of {total}, {seconds:.0f} s", file=sys.stderr, flush=True)


def print_tables(results: dict[str, Any], tables: list) -> None:
    """What the results are about, then the tables (of ``measure/tables.py``)."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from ..measure.tables import about_lines

    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    whole = console.width >= WIDTH  # on a narrow terminal cells fold

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    for line in about_lines(results):
        say(line)
    for table in tables:
        shown = Table(title=table.title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
        for n, name in enumerate(table.columns):
            shown.add_column(name, justify="right" if n else "left", no_wrap=whole)
        for row in table.rows:
            shown.add_row(*row)
        console.print()
        console.print(shown, markup=False, highlight=False)
        for note in table.notes:
            say(note)
