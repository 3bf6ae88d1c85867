"""The log of answers: what a model said in use, kept for training, where the user asked for it.

Off unless named. A jsonl file on this machine, readable by its owner alone, of token ids: one line per
answer with its prompt and the identity of the model that gave it. It never grows beyond ``LIMIT``: then
the older half goes.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import tempfile
from pathlib import Path

from ..errors import BadArgument, BadData
from .data import Example, usable
from .report import DataReport
from .session import Data

KIND = "mlx-specstream answers"
VERSION = 1
LIMIT = 32 << 20  # bytes; some millions of tokens
LEAST = 20  # different answers that a run needs
HELD_OUT = 10  # one prompt in so many is for validation


class AnswerLog:
    """Appends answers to a log; the file is made, or found to be one, at once.

    Args:
        path: the file.
        model: ``identity`` of the model that answers.

    Raises:
        BadArgument: the file is something else. OSError: it cannot be written.
    """

    def __init__(self, path: Path, model: str):
        self.path, self.model = path, model
        with self._opened():
            pass

    def add(self, prompt: list[int], answer: list[int]) -> None:
        """One answer, token ids; none at all, or one larger than half a log, is left out.

        Raises:
            OSError: it cannot be written; what was there stays.
        """
        row = {"model": self.model, "prompt": prompt, "answer": answer}
        line = json.dumps(row, separators=(",", ":")).encode() + b"\n"
        if not answer or len(line) > LIMIT // 2:
            return
        with self._opened() as file:
            full = file.tell() + len(line) > LIMIT
            if full:
                self._forget(file, LIMIT // 2 - len(line))
            elif file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        if full:  # there is room now, in another file
            self.add(prompt, answer)

    def _opened(self):
        """The file, locked, at its end, with a head and nothing half written."""
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
        while True:
            file = os.fdopen(os.open(self.path, flags, 0o600), "ab+", buffering=0)
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                found = os.fstat(file.fileno())
                if not stat.S_ISREG(found.st_mode):
                    raise BadArgument(f"[log] {self.path} is not an ordinary file.")
                if os.path.samestat(found, os.stat(self.path)):
                    break  # else another process has just replaced it
            except BaseException:
                file.close()
                raise
            file.close()
        try:
            file.seek(0)
            if found.st_size == 0:
                file.write(json.dumps({"kind": KIND, "version": VERSION}).encode() + b"\n")
            elif not _is_head(file.readline()):
                raise BadArgument(f"[log] {self.path} is no log of answers; name another file.")
            os.fchmod(file.fileno(), 0o600)
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # a disk that was full in the middle of a line
                file.write(b"\n")
        except BaseException:
            file.close()
            raise
        return file

    def _forget(self, file, most: int) -> None:
        """Keep the newest lines, at most ``most`` bytes of them."""
        file.seek(0)
        head, *lines = file.read().splitlines(keepends=True)
        kept, size = [], 0
        for line in reversed(lines):
            size += len(line)
            if size > most:
                break
            kept.append(line)
        handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}-")
        try:
            with os.fdopen(handle, "wb") as new:  # mkstemp makes files of mode 0600
                new.write(b"".join([head, *reversed(kept)]))
            os.replace(temporary, self.path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def read_log(path: Path, model: str, max_length: int) -> Data:
    """The answers of this very model, each once, one prompt in ``HELD_OUT`` held out.

    Raises:
        BadData: no log, or too few answers of this model.
    """
    if not path.is_file():
        raise BadData(f"[log] {path} is missing; make one with generate or chat --log {path}.")
    with open(path, "rb") as file:
        if not _is_head(file.readline()):
            raise BadData(f"[log] {path} is no log of answers.")
        found, others, damaged = {}, 0, 0
        for line in file:
            try:
                row = json.loads(line)
                prompt, answer = ([int(t) for t in row[k]] for k in ("prompt", "answer"))
                same = row["model"] == model
            except (ValueError, KeyError, TypeError):
                damaged += 1
                continue
            if same:
                found[tuple(prompt), tuple(answer)] = Example([*prompt, *answer], len(prompt))
            else:
                others += 1
    report = DataReport(path.name, max_length, unreadable=damaged, others=others)
    examples = usable(found.values(), report)
    places = {p: n for n, p in enumerate(dict.fromkeys(_prompt(e) for e in examples))}
    split = [[], []]
    for example in examples:
        split[places[_prompt(example)] % HELD_OUT == 0].append(example)
    if len(examples) < LEAST or not all(split):
        raise BadData(
            f"[log] {path} has {len(examples)} different answers of this model ({others} of others); "
            f"{LEAST} to several prompts are needed."
        )
    return Data(*split, [report])


def _prompt(example: Example) -> tuple[int, ...]:
    return tuple(example.tokens[: example.start])


def _is_head(line: bytes) -> bool:
    try:
        head = json.loads(line)
        return head["kind"] == KIND and head["version"] == VERSION
    except (ValueError, KeyError, TypeError):
        return False
