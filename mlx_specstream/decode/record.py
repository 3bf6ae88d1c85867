"""What the passes of an answer did: sizes, acceptance and, if asked for, where the time went."""

from __future__ import annotations

from dataclasses import dataclass, field, fields


@dataclass
class PassRecord:
    """One pass after the prompt's own.

    Args:
        nodes: rows of the draft that were fed, the root included.
        accepted: drafted tokens that the model agreed with (the token it adds itself not counted).
        copied: those of ``accepted`` that were copied from earlier text.
        streams: the streams ran for the draft after this one.
        base_s, streams_s, draft_s, host_s: seconds until the pass was computed (the tree is drafted in
            it), until the streams and the copies were, in planning the pass and queueing it, and in
            everything else since the pass before, the caller's own work included. Meaningful only in
            a ``split`` record: without it the device works on while the host goes on.
        recheck: a pass of one row that repeats a near tie; it drafts nothing.
    """

    nodes: int
    accepted: int
    copied: int = 0
    streams: bool = False
    base_s: float = 0.0
    streams_s: float = 0.0
    draft_s: float = 0.0
    host_s: float = 0.0
    recheck: bool = False


@dataclass
class Record:
    """The passes of one answer, or of several when the same record is passed again.

    Args:
        passes: in order.
        split: ask the loop to wait after each part of a pass, so that the parts can be timed. Waiting
            is slower, so a split record is for looking, not for timing.
    """

    passes: list[PassRecord] = field(default_factory=list)
    split: bool = False

    def acceptance_by_depth(self, depth: int) -> list[float]:
        """Share of passes that accepted at least 1, 2, .. ``depth`` drafted tokens; re-checks left out.

        Their sum + 1 is the tokens per pass, as long as ``depth`` reaches the deepest acceptance.
        """
        accepted = [p.accepted for p in self.passes if not p.recheck]
        return [sum(a >= d for a in accepted) / max(1, len(accepted)) for d in range(1, depth + 1)]

    def deepest(self) -> int:
        """The most drafted tokens that any pass accepted."""
        return max((p.accepted for p in self.passes), default=0)

    def totals(self) -> dict[str, float]:
        """The number of passes under ``passes``, and the sum of every field of ``PassRecord``."""
        sums = {f.name: sum(getattr(p, f.name) for p in self.passes) for f in fields(PassRecord)}
        return {"passes": len(self.passes), **sums}
