"""What the scripts of the study share: the tasks, where things lie, runs that can be killed.

A work folder outside the checkout holds what may hold text or is large::

    WORK/{task}/reference/{train,valid}.jsonl   prompts of the train split and the data's answers
    WORK/{task}/own/{train,valid}.jsonl         the same prompts and the base's own greedy answers
    WORK/{task}/base/                           the base, where the task needs one of its own
    WORK/{task}/rows/{row}-{seed}/              what was trained for a row of the headline table
    WORK/{task}/points/{point}/                 what was trained for a point of a curve

``valid`` is a part of the task's train split, to tune on; the task's own validation split is looked at
only by ``headline.py``.
"""

from __future__ import annotations

import mlx_specstream  # first: it finds a fast BLAS before mlx loads  # isort: skip
import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(1, str(HERE.parent))

from tasks import DATA, FORMS  # noqa: E402

from mlx_specstream.files import write_text  # noqa: E402
from mlx_specstream.measure import quality  # noqa: E402
from mlx_specstream.measure.questions import Question, read_questions  # noqa: E402
from mlx_specstream.train.trainer import CHECKPOINT  # noqa: E402

__all__ = ["FORMS", "mlx_specstream"]
RESULTS = HERE.parent / "results/paper"
COMMAND = "command.txt"
MOST_NODES = 32  # of a tree in the tables
BEST = f"best:{MOST_NODES}"


@dataclass(frozen=True)
class Task:
    """A task of the study.

    Args:
        form: what the base expects around a prompt.
        metrics: of ``measure/quality.py``.
        max_tokens: of an answer.
        longest_prompt: in tokens; longer ones are left out (the base reads 1,024).
        own_base: it has to be fine-tuned first: the base knows nothing of it.
    """

    form: str
    metrics: tuple[str, ...]
    max_tokens: int = 96
    longest_prompt: int = 800
    own_base: bool = False


TASKS = {
    "sqlctx": Task(FORMS["sqlctx"], ("exact",)),
    # Short dialogues: fine-tuning reads every prompt token in all layers.
    "dialogsum": Task("{}\nSummary:", ("rouge",), longest_prompt=256, own_base=True),
    "e2e": Task(FORMS["e2e"], ("bleu", "rouge")),
}


def add_places(parser) -> None:
    """``--work``, ``--base`` and ``--task`` of every script."""
    place = lambda path: Path(path).resolve()  # noqa: E731  runs note it: one spelling
    parser.add_argument("--work", type=place, required=True, help="folder outside the checkout")
    parser.add_argument(
        "--base", type=place, required=True, help="folder of e2e-sql-14m for mlx-lm"
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))


def check_metrics(tasks: list[str]) -> None:
    """Raises BadArgument before hours of work if a library is missing (the extra ``eval``)."""
    for task in tasks:
        quality.check_metrics(list(TASKS[task].metrics))


def base_of(task: str, work: Path, base: Path) -> Path:
    """The model that a task's lossless rows are made for."""
    return work / task / "base" if TASKS[task].own_base else base


def questions_of(task: str, tokenizer, count: int) -> list[Question]:
    """Prompts of the task's validation split, the same ones in every study."""
    path = DATA / task / "valid.jsonl.gz"
    form, longest = TASKS[task].form, TASKS[task].longest_prompt
    found, _ = read_questions(path, tokenizer, limit=-1, seed=11, form=form)
    fit = [q for q in found if len(q.prompt.tokens) <= longest]
    step = max(1, len(fit) // count)
    return fit[::step][:count]


@dataclass(frozen=True)
class Run:
    """A training run, in a process of its own.

    Args:
        folder: where it goes; a checkpoint in it means that a killed run is to go on. What it is made
            by is noted there, so that nothing made by another command is taken for it.
        command: without ``--resume``.
        made: the file in ``folder`` that is there when it is finished.
        minutes: what it is given, where that is a time.
        needs: files that must be there before.
        resumes: it knows ``--resume``.
    """

    folder: Path
    command: list[str]
    made: str
    minutes: float | None = None
    needs: list[Path] = field(default_factory=list)
    resumes: bool = True

    @property
    def done(self) -> bool:
        note, made = self.folder / COMMAND, (self.folder / self.made).exists()
        noted = note.read_text(encoding="utf-8") if note.exists() else None
        if noted != self._noted and (made or noted is not None):
            sys.exit(f"{self.folder} was made by another command (its {COMMAND}); remove it")
        return made

    @property
    def _noted(self) -> str:
        return " ".join(self.command[1:]) + "\n"  # whatever Python runs it

    def begin(self) -> None:
        """Make the folder and note the command in it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / COMMAND, self._noted)


def finish(runs: Iterable[Run], dry: bool = False) -> None:
    """Run what is not done, one after the other; what was killed goes on from its checkpoint."""
    open_runs = [run for run in runs if not run.done]
    minutes = sum(run.minutes or 0 for run in open_runs)
    print(f"{len(open_runs)} runs" + (f", {minutes:.0f} minutes" if minutes else ""), flush=True)
    for run in open_runs:
        command = list(run.command)
        if run.resumes and (run.folder / CHECKPOINT).exists():
            command.append("--resume")
        print(time.strftime("%H:%M"), " ".join(command), flush=True)
        if dry:
            continue
        for path in run.needs:
            if not path.exists():
                sys.exit(f"{path} is missing: run prepare.py")
        run.begin()
        with open(run.folder / "train.log", "a", encoding="utf-8") as log:
            if subprocess.run(command, stdout=log, stderr=log).returncode:
                sys.exit(f"it failed; see {run.folder / 'train.log'}")


def train_command(base: Path, data: Path, out: Path, **flags) -> list[str]:
    """``mlx-specstream train``."""
    places = as_flags(model=base, data=data, streams=out)
    return [sys.executable, "-m", "mlx_specstream", "train", *places, *as_flags(**flags)]


def script_command(script: str, **flags) -> list[str]:
    """``python SCRIPT train`` of this folder."""
    return [sys.executable, str(HERE / script), "train", *as_flags(**flags)]


def as_flags(**flags) -> list[str]:
    """Arguments of a command line: True stands alone, a list is spread, None and False are left out."""
    found = []
    for name, value in flags.items():
        if value is None or value is False:
            continue
        found.append("--" + name.replace("_", "-"))
        if value is not True:
            found += map(str, value if isinstance(value, list | tuple) else [value])
    return found


def save_json(path: Path, found: dict) -> None:
    """Numbers and ids; whole or not at all."""
    write_text(path, json.dumps(found, indent=1) + "\n")


def read_json(path: Path) -> dict:
    """Empty where there is no such file yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def train_and_measure(about: str, train, measure, made: str, prompts: int):
    """A command line of two commands for something that is trained beside a model, then measured.

    Args:
        about: for --help; train, measure: called with the arguments.
        made: option of ``measure`` that names what was trained.
        prompts: how many, if not told otherwise.

    Returns:
        (the parser, that of ``train``, which gets options of its own).
    """
    parser = argparse.ArgumentParser(description=about)
    commands = parser.add_subparsers(dest="command", required=True)
    begin, look = commands.add_parser("train"), commands.add_parser("measure")
    for command in (begin, look):
        command.add_argument("--model", type=Path, required=True)
    for name in ("--data", "--out"):
        begin.add_argument(name, type=Path, required=True)
    length = begin.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float)
    length.add_argument("--iters", type=int, choices=range(1, 1 << 30), metavar="STEPS")
    begin.add_argument("--seed", type=int, default=0)
    begin.add_argument("--resume", action="store_true")
    begin.set_defaults(run=train)
    look.add_argument(made, type=Path, required=True)
    look.add_argument("--task", choices=TASKS, required=True)
    look.add_argument("--prompts", type=int, default=prompts)
    look.set_defaults(run=measure)
    return parser, begin
