"""What a training run sees of decoding: tokens per pass so far, by exact replay, and a real decode.

The base's own greedy text of a few held-out prompts is made once. With a base that stays as it is, the
replay of a tree on that text (``simulate.py``) is exact; a base that is being trained answers anew every
time, and where it sees its streams ([P]) only a real decode says anything.
"""

from __future__ import annotations

from typing import Any

from ..decode.record import Record
from ..generate import stream_generate
from ..model.seams import Seams
from ..train.data import Example, spread
from .evaluate import replayed

TREE = "best:8"
PROMPTS, TOKENS = 8, 64  # replayed, and how much of each answer
DECODED = 2  # of them really decoded
LONGEST = 512  # tokens of a prompt


class Rehearsal:
    """A ``Look`` of ``train_streams``.

    Args:
        tokenizer: mlx-lm's.
        changes: the base itself is trained (shared mode).
        decode_every: validations from one real decode to the next.
    """

    def __init__(self, tokenizer, changes: bool = False, decode_every: int = 5):
        self.tokenizer, self.changes, self.decode_every = tokenizer, changes, decode_every
        self.seams: Seams | None = None
        self.prompts: list[list[int]] = []
        self.answers: list[list[int]] = []

    def prepare(self, seams: Seams, valid: list[Example]) -> None:
        """Choose prompts, spread over the held-out rows; of plain text its first half."""
        rows = [e.tokens[: e.start or len(e.tokens) // 2] for e in valid]
        rows = list(map(list, dict.fromkeys(tuple(row) for row in rows if 0 < len(row) <= LONGEST)))
        self.seams = seams
        self.prompts = [rows[number] for number in spread(len(rows), PROMPTS)]
        self.answers = [] if self.changes else self._plain()

    def __call__(self, number: int) -> dict[str, Any]:
        """``tokens_per_pass`` of ``TREE``, exact where it can be; with a real decode also
        ``decoded``: its own count, and how many answers were the plain ones, of how many."""
        if not self.prompts:
            return {}
        found, sees = {}, self.seams.streams.config.main_sees_streams
        answers = self.answers or ([] if sees else self._plain())
        if not sees:
            stop = self.tokenizer.eos_token_ids
            replay = replayed(self.seams, self.prompts, answers, [TREE], stop)[TREE]
            found = {k: replay[k] for k in ("tokens_per_pass", "acceptance")}
        if sees or number % self.decode_every == 0:
            found["decoded"] = self._decoded(answers)
            if sees:
                found["tokens_per_pass"] = found["decoded"]["tokens_per_pass"]
        return found

    def _plain(self) -> list[list[int]]:
        return [self._answer(p, use_streams=False, copies=False)[0] for p in self.prompts]

    def _decoded(self, answers: list[list[int]]) -> dict[str, Any]:
        tokens, passes, same = 0, 0, 0
        chosen = self.prompts[:DECODED]
        for number, prompt in enumerate(chosen):
            said, took = self._answer(prompt, tree=TREE)
            tokens, passes = tokens + len(said) - 1, passes + took
            same += bool(answers) and said == answers[number]
        found = {"tokens_per_pass": tokens / max(1, passes), "answers": len(chosen)}
        return {**found, "same_text": same} if answers else found

    def _answer(self, prompt: list[int], **how) -> tuple[list[int], int]:
        """(token ids, passes). Nothing is compiled: the weights are others the next time."""
        seams, record = self.seams, Record()
        compiles, seams.compiles = seams.compiles, False
        try:
            how = {"max_tokens": TOKENS, "record": record, **how}
            said = [r.token for r in stream_generate(seams.model, self.tokenizer, prompt, **how)]
        finally:
            seams.kept.clear()
            seams.compiles = compiles
        return said, len(record.passes)
