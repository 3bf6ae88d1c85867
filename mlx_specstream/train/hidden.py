"""The frozen lower layers' work, done once: M^{N-Ns} of all training rows, on disk.

A step then begins at the cut: of the main rows only the MSA layers run. Worth it where a row is
trained on more than once and the disk has room: each token takes E numbers of the model's precision.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..errors import BadArgument
from ..model.seams import Seams
from .data import Batch, Example, digest, make_batch
from .passes import base_pass

TOKENS_AT_ONCE = 4096  # fed in one pass while the file is made, padding counted
UINT = {2: (np.uint16, mx.uint16), 4: (np.uint32, mx.uint32)}  # NumPy has no bfloat16


class HiddenStates:
    """M^{N-Ns} of examples, in a file that holds nothing else: example after example, token by token.

    Args:
        path: the file.
        places: index of the first token of each example.
        width: E.
        dtype: of the model's activations.
    """

    def __init__(self, path: Path, places: np.ndarray, width: int, dtype: mx.Dtype):
        self.places, self.dtype = places, dtype
        self._rows = np.memmap(path, UINT[dtype.size][0], "r").reshape(-1, width)

    def add_to(self, batch: Batch) -> Batch:
        """The batch with its hidden states; zeros behind the end of an example."""
        B, L = batch.tokens.shape
        found = np.zeros((B, L, self._rows.shape[1]), self._rows.dtype)
        for b, number in enumerate(batch.examples):
            begin, end = self.places[number], self.places[number + 1]
            found[b, : end - begin] = self._rows[begin:end]
        return replace(batch, cut_hidden=mx.array(found).view(self.dtype))


def hidden_states(
    seams: Seams,
    examples: list[Example],
    folder: Path,
    base: str,
    note: Callable[[str], None],
    make: bool = True,
) -> HiddenStates | None:
    """Read the hidden states of ``examples`` from ``folder``, or make what is not there yet.

    The file's name says of which base, cut and examples it is. An interrupted run leaves whole
    groups of examples behind, and the next one goes on there.

    Args:
        base: ``identity`` of the base.
        make: False: only say what there would be; None is returned if anything is missing.

    Raises:
        BadArgument: the disk has no room for them.
    """
    first = base_pass(seams, mx.array([examples[0].tokens]))[0]
    width, dtype = first.shape[-1], first.dtype
    what = f"{digest(examples)} {base} {seams.cut} {dtype}"
    name = hashlib.sha256(what.encode()).hexdigest()[:16]
    path = folder / f"hidden-{name}.bin"
    lengths = [len(e.tokens) for e in examples]
    places = np.concatenate([[0], np.cumsum(lengths)])
    row = width * dtype.size  # bytes
    groups = list(_groups(lengths))
    ends = [0, *(int(places[end]) * row for _, end in groups)]
    have = path.stat().st_size if path.is_file() else 0
    done = max(i for i, end in enumerate(ends) if end <= have)
    missing = ends[-1] - ends[done]
    if missing:
        there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
        free = shutil.disk_usage(there).free
        if missing > free:
            raise BadArgument(
                f"[train] 'cache_hidden' needs {missing / 1e9:.1f} GB in {folder}, where {free / 1e9:.1f} "
                "GB are free; name another folder, or train without."
            )
        line = f"hidden states of {len(examples)} rows: {ends[-1] / 1e9:.2f} GB in {path}"
        if not make:
            note(f"{line}, not made yet: steps are timed without")
            return None
        note(line)
        folder.mkdir(parents=True, exist_ok=True)
        with open(path, "r+b" if have else "wb") as file:
            file.truncate(ends[done])
            file.seek(ends[done])
            for begin, end in groups[done:]:
                file.write(_computed(seams, examples[begin:end], dtype))
            file.flush()
            os.fsync(file.fileno())
    return HiddenStates(path, places, width, dtype)


def _groups(lengths: list[int]) -> list[tuple[int, int]]:
    """Runs of examples that go through the model together."""
    groups, begin, longest = [], 0, 0
    for at, length in enumerate(lengths):
        longest = max(longest, length)
        if at > begin and longest * (at + 1 - begin) > TOKENS_AT_ONCE:
            groups.append((begin, at))
            begin, longest = at, length
    return [*groups, (begin, len(lengths))]


def _computed(seams: Seams, examples: list[Example], dtype: mx.Dtype) -> bytes:
    batch = make_batch(examples, [np.array(e.hosts()[:1]) for e in examples], 1)
    hidden = base_pass(seams, mx.array(batch.tokens))[0]
    bits = np.array(hidden.view(UINT[dtype.size][1]))
    return b"".join(bits[b, : len(e.tokens)].tobytes() for b, e in enumerate(examples))
