"""The decode loop around ``step.py``: what is left for the host, between two passes.

One turn of the loop::

    pass in flight ──> read its report ──> streams (queued) ──> plan ──> next pass (queued)
                                                └ copied drafts are looked up meanwhile

The next pass is on its way before the caller gets the tokens of the one before.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from ..model.buffers import Buffers
from ..model.seams import Seams
from .buckets import Buckets, round_up
from .choose import Drawn, Greedy, Opaque, logprobs_of
from .compiling import compiles
from .draft import CopiedText, Guesses, padded
from .plan import NextPass, Steering
from .record import PassRecord, Record
from .step import (
    PassShape,
    Said,
    Verified,
    commit,
    guesses_of,
    judge,
    prompt_pass,
    stream_logits,
    verify_pass,
)
from .tree import HostTree, Tree, TreeShape
from .verify import Accepted, descend

if TYPE_CHECKING:
    from .copy import Copied, Copier


MERGED = 128 << 20  # bytes that copies of the MSA layers' weights with LoRA may take


@dataclass(frozen=True)
class StepResult:
    """What a pass decided.

    Args:
        tokens: the chosen tokens; the last one is the new root and has no K/V yet. Empty if the
            pass only found that a near-tie needs a pass of one row.
        logprobs: log-probabilities [V] that each token was chosen from (lazy).
        ended: an end-of-sequence token or the limit was reached.
    """

    tokens: list[int]
    logprobs: list[mx.array]
    ended: bool


@dataclass
class _Flight:
    """A pass that was queued."""

    shape: PassShape
    plan: NextPass
    place: int
    verified: Verified
    copied: Copied | None
    seconds: float
    recheck: bool


class Decoder:
    """Decodes one sequence, pass by pass.

    Args:
        seams: the model; its streams may be None (copied drafts need none).
        stores: its prompt cache, not empty of buffers; in use until ``close``.
        prompt: the end of the prompt that is not in the cache yet, at least its last token.
        chooser: names the main stream's tokens.
        steering: says what the next pass looks like.
        streams: use the model's streams.
        copier: finds copied drafts, or None.
        guard: a gap of two logits below this is a near-tie, whose choice is left to a pass of one
            row; 0: no guard.
        record: filled with what happened, or None.
    """

    def __init__(
        self,
        seams: Seams,
        stores: list,
        prompt: list[int],
        chooser: Greedy | Drawn | Opaque,
        steering: Steering,
        streams: bool = True,
        copier: Copier | None = None,
        guard: float = 0.0,
        record: Record | None = None,
    ):
        self.seams, self.chooser, self.steering = seams, chooser, steering
        self.copier, self.guard, self.record = copier, guard, record
        self.config = seams.streams.config if streams else None
        self.buffers = Buffers(stores)
        self._compiled = compiles(seams)
        self.buckets: Buckets = seams.kept.setdefault("buckets", Buckets())
        if seams.watch.changed():
            self.buckets.clear()
            if seams.streams is not None:
                seams.merge_lora(MERGED)
        self.place = 0  # number of the token that the root's pass will choose
        self.recheck = False
        self._prompt = mx.array(prompt, dtype=mx.int32)
        self._root = self._prompt[-1]
        self._offset = mx.array(self.buffers.offset, dtype=mx.int32)
        self._guesses: Guesses | None = None
        self._flight: _Flight | None = None
        self._news: tuple[NextPass, int, list[int]] | None = None
        self._behind: tuple[_Flight, Accepted, int] | None = None
        self._noted = time.perf_counter()  # when the last pass ended
        self._runs_ahead = mx.default_device().type == mx.DeviceType.cpu

    # --- one turn ---

    def step(self, limit: int, stop: Collection[int]) -> StepResult:
        """The outcome of the pass in flight; queues the next one before it returns.

        Args:
            limit: how many more tokens are wanted (>= 1).
            stop: end-of-sequence tokens.
        """
        if self._flight is None:
            self._prepare()
        first = self.place == 0
        result = self._read(limit, stop)
        # The first token of an answer is not kept waiting for the first trace of a bucket.
        if not result.ended and not first:
            self._prepare()
        return result

    def close(self) -> None:
        """Give the K/V back to the prompt cache: every token before the root."""
        if self.buffers.keys is not None:
            self.buffers.give_back()

    def _prepare(self) -> None:
        """Run the streams behind the last pass, plan, queue the next pass."""
        tic = time.perf_counter()
        self._guesses = self._streams()
        self._tell()  # while they run
        copied = self.copier.propose() if self.copier and not self.recheck else None
        if self._splits or not self._runs_ahead:
            # On a GPU a buffer whose reader is still queued would be copied when it is written.
            mx.eval(self._guesses or [], self.buffers.keys)
        self._launch(copied, time.perf_counter() - tic)

    def _streams(self) -> Guesses | None:
        """Commit the last pass; what its streams guess, if they were to run."""
        if self._behind is None:
            return None
        flight, accepted, path = self._behind
        self._behind = None
        wanted = flight.plan.streams and not self.recheck and self.config is not None
        return self._redraft(flight, accepted, path, wanted)

    @property
    def _splits(self) -> bool:
        return self.record is not None and self.record.split

    # --- draft and pass ---

    def _launch(self, copied: Copied | None, streams_s: float) -> None:
        tic = time.perf_counter()
        guesses, text = self._guesses, None
        if self.place == 0:  # the prompt's own pass drafts nothing
            copied = None
        if copied is not None and guesses is not None and copied.unlikely:
            copied = None
        if copied is not None and copied.tokens:
            text = CopiedText.of(copied.tokens, copied.logprobs, self.copier.longest)
        plan = self.steering.next_pass(guesses, text, self.buffers.offset)
        if plan.nodes == 1:
            guesses = text = copied = None
        guesses, text = self._filled(plan.tree, guesses, text)
        if self.place == 0 and self._prompt.size > 1:
            shape, verified = self._run_prompt(plan)
        else:
            shape = self._shape(plan, guesses, text)
            verified = self._verify(shape, guesses, text)
        self._streams_s, self._draft_s = streams_s, time.perf_counter() - tic
        if self._splits:
            mx.eval(verified.logits)
        seconds = time.perf_counter() - tic
        self._flight = _Flight(shape, plan, self.place, verified, copied, seconds, self.recheck)

    def _filled(self, tree: TreeShape, guesses, text):
        """All streams and a text, empty perhaps, so that one trace serves every draft of a size."""
        if guesses is None or self.config is None or tree.kind != "best":
            return guesses, text
        if text is None and self.copier is not None:
            text = CopiedText.of([], [], self.copier.longest)
        return padded(guesses, self.config.num_streams), text

    def _run_prompt(self, plan: NextPass) -> tuple[PassShape, Verified]:
        """The end of the prompt and its own choice in one go."""
        rows, buffers = self._prompt.size, self.buffers
        shape = self._shape(plan, None, None, rows)
        # One choice, which has no other pass to be left to.
        shape = replace(shape, inline=False, prune=None, guard=0.0)
        bases = [buffers.bases[i] for i in buffers.base_of]
        keys, values = list(buffers.keys), list(buffers.values)
        verified = prompt_pass(self.seams, shape, self._prompt, self._offset, bases, keys, values)
        buffers.keys, buffers.values = keys, values
        del keys, values
        self._advance(rows - 1)
        mx.async_eval(verified.logits, buffers.keys, buffers.values)
        return shape, verified

    def _shape(self, plan: NextPass, guesses, text, rows: int = 0) -> PassShape:
        inline = plan.inline and self.config is not None
        deepest = max(
            0 if guesses is None else guesses.tokens.shape[0],
            0 if text is None else text.tokens.shape[0],
        )
        depth = min(plan.nodes - 1, deepest)
        g = self.config.num_streams if self.config else 0
        room = max(rows + g, plan.nodes * (1 + g if inline else 1), depth + 1 + g)
        return PassShape(
            nodes=plan.nodes,
            tree=plan.tree,
            inline=inline,
            prune=plan.prune,
            depth=depth,
            lengths=self.buffers.make_room(room, round_up),
            greedy=isinstance(self.chooser, Greedy),
            guard=self.guard if plan.nodes > 1 else 0.0,
        )

    def _verify(self, shape: PassShape, guesses, text) -> Verified:
        seams, buffers, base_of = self.seams, self.buffers, self.buffers.base_of

        def make():
            def run(root, offset, bases, guesses, text, keys, values):
                keys, values = list(keys), list(values)
                verified = verify_pass(
                    seams,
                    shape,
                    root,
                    offset,
                    [bases[i] for i in base_of],
                    Guesses(*guesses) if guesses else None,
                    CopiedText(*text) if text else None,
                    keys,
                    values,
                )
                accepted = list(verified.accepted) if verified.accepted else []
                return [
                    list(verified.tree), verified.logits, verified.hidden, verified.kept,
                    verified.fresh, accepted, keys, values,
                ]  # fmt: skip

            return run

        threshold = shape.prune is not None and shape.prune.threshold is not None
        drafting = 0 if guesses is None else guesses.tokens.shape[0]
        key = "pass", shape, base_of, drafting, text is not None
        cold = self.place == 0 and key not in self.buckets  # the first token waits for no trace
        run = make() if cold or threshold else self.buckets.get(key, make, self._compiled)
        tree, logits, hidden, kept, fresh, accepted, keys, values = run(
            self._root, self._offset, buffers.bases, list(guesses or []), list(text or []),
            buffers.keys, buffers.values,
        )  # fmt: skip
        buffers.keys, buffers.values = keys, values
        verified = Verified(
            Tree(*tree), logits, hidden, kept, fresh,
            Accepted(*accepted) if accepted else None,
        )  # fmt: skip
        mx.async_eval(accepted[2] if accepted else logits, keys, values)
        return verified

    # --- verify ---

    def _read(self, limit: int, stop: Collection[int]) -> StepResult:
        flight, verified = self._flight, self._flight.verified
        tic = time.perf_counter()
        tie = False
        if isinstance(self.chooser, Opaque):
            self.chooser.begin(verified.logits)
            tree = HostTree.of(verified.tree)
            path, tokens = descend(tree, self.chooser.token, limit=limit, stop=stop)
            logprobs = [self.chooser.logprobs(node) for node in path]
            nodes = np.zeros(flight.shape.depth + 1, np.int32)
            nodes[: len(path)] = path
            accepted = Accepted(mx.array(nodes), mx.array(len(path), dtype=mx.int32), None)
        else:
            accepted = verified.accepted
            if accepted is None:
                scores = self.chooser.scores(
                    verified.logits, verified.tree.depth, flight.place, flight.shape.depth
                )
                accepted = judge(verified.tree, scores, flight.shape)
            count, tie, *rest = np.array(accepted.report).tolist()
            path, tokens = rest[:count], rest[flight.shape.depth + 1 :][:count]
            if tie:
                path, tokens = path[:-1], tokens[:-1]
            ends = next((i for i, t in enumerate(tokens, 1) if t in stop), limit)
            if len(tokens) >= ends:
                path, tokens, tie = path[:ends], tokens[:ends], False
            logits = verified.logits
            logprobs = [lazy_logprobs(logits, node) for node in path]
        waited = time.perf_counter() - tic
        ended = bool(tokens) and (len(tokens) == limit or tokens[-1] in stop)
        self._after(flight, accepted, path, tokens, bool(tie), ended, waited)
        return StepResult(tokens, logprobs, ended)

    def _after(self, flight, accepted, path, tokens, tie, ended, waited) -> None:
        """What the host keeps of a pass."""
        self._flight = None
        self.recheck = tie
        self.place += len(tokens)
        if tokens:
            self._root = mx.array(tokens[-1], dtype=mx.int32)
        if self.copier is not None:
            self.copier.extend(tokens)
            if flight.copied is not None and flight.copied.tokens:
                self._credit(flight, tokens)
        right = max(len(path) - 1 + tie, 0)  # a path that ends before a near-tie lacks that node
        if flight.place:
            self._news = flight.plan, self.buffers.offset, tokens[:right]
        now = time.perf_counter()
        if self.record is not None and flight.place:
            self._note(flight, path, right, waited, now - self._noted)
        self._noted = now
        if ended:
            self._tell()
            self._redraft(flight, accepted, path, False)
        elif path:
            self._behind = flight, accepted, path
        else:  # the root itself is a near-tie: nothing of this pass stays
            self._behind = self._guesses = None

    def _tell(self) -> None:
        """What the last pass accepted, to whoever plans."""
        if self._news is not None:
            self.steering.observe(*self._news)
            self._news = None

    def _credit(self, flight: _Flight, chosen: list[int]) -> None:
        """Tell the copier how far its text was right, as far as the tree can have held it."""
        tried = min(len(flight.copied.tokens), flight.plan.nodes - 1)
        right = 0
        for copy, token in zip(flight.copied.tokens[:tried], chosen, strict=False):
            if copy != token:
                break
            right += 1
        self.copier.observe(flight.copied, right, min(tried, len(chosen)))

    def _note(self, flight, path, right, waited, whole) -> None:
        base = flight.seconds - self._draft_s
        host = whole - base - self._draft_s - self._streams_s
        copied = np.array(flight.verified.tree.copied)[path].sum() if path else 0
        self.record.passes.append(
            PassRecord(
                nodes=flight.plan.nodes,
                accepted=right,
                copied=int(copied),
                streams=flight.plan.streams,
                base_s=waited if not self._splits else base,
                streams_s=self._streams_s,
                draft_s=self._draft_s,
                host_s=0.0 if not self._splits else host,
                recheck=flight.recheck,
            )
        )

    # --- commit and streams ---

    def _redraft(
        self, flight: _Flight, accepted: Accepted, path: list[int], streams: bool
    ) -> Guesses | None:
        """Commit the accepted path and, if wanted, ask the streams of its last node.

        In one go, so that a compiled step has two halves: this and the pass.
        """
        seams, buffers, shape, verified = self.seams, self.buffers, flight.shape, flight.verified
        count, base_of, gamma = len(path), self.buffers.base_of, flight.plan.gamma
        in_place = path == list(range(count)) and shape.prune is None
        if in_place and not streams:
            self._advance(count)
            return None
        # Greedy guesses need no noise, so they are part of what is compiled.
        greedy = self.chooser if isinstance(self.chooser, Greedy) else None
        K = self.steering.candidates(seams.vocabulary_size)

        def make():
            def run(path, root, offset, after, bases, hidden, kept, fresh, keys, values):
                keys, values = list(keys), list(values)
                bases = [bases[i] for i in base_of]
                if not in_place:
                    commit(fresh, kept, seams.cut, path, offset, bases, keys, values)
                drafts = []
                if streams:
                    where = root, after, bases, keys, values
                    said = stream_logits(seams, shape, hidden, *where, gamma)
                    drafts = list(guesses_of(seams, said, greedy, K, 0) if greedy else said)
                return [drafts, keys, values]

            return run

        kind = (
            "streams" if in_place else "commit and streams" if streams else "commit",
            shape.inline, shape.lengths, base_of, K, greedy is None, gamma if streams else None,
        )  # fmt: skip
        threshold = shape.prune is not None and shape.prune.threshold is not None
        run = make() if threshold else self.buckets.get(kind, make, self._compiled)
        after = mx.array(buffers.offset + count, dtype=mx.int32)
        drafts, keys, values = run(
            [] if in_place else accepted.path, self._root, self._offset, after, buffers.bases,
            verified.of_node(path[-1], shape.inline) if streams else [],
            [] if in_place else verified.kept, [] if in_place else verified.fresh,
            buffers.keys, buffers.values,
        )  # fmt: skip
        buffers.keys, buffers.values = keys, values
        self._advance(count)
        if drafts and not greedy:
            drafts = list(guesses_of(seams, Said(*drafts), self.chooser, K, self.place))
        mx.async_eval(drafts, keys, values)
        return Guesses(*drafts) if drafts else None

    def _advance(self, count: int) -> None:
        self.buffers.offset += count
        self._offset = mx.array(self.buffers.offset, dtype=mx.int32)


def lazy_logprobs(logits: mx.array, node: int) -> mx.array:
    """Log-probabilities [V] at a node; lazy, so they cost only whoever reads them."""
    return logprobs_of(logits[node])
