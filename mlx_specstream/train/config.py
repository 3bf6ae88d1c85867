"""How to train: what a user sets. A leaf."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from ..config import PROJECTIONS
from ..errors import BadArgument

TARGETS = ("hard", "distill")
ONLY = ("pruning",)
LOSSLESS_DECAY = 0.8  # alpha_j of lossless mode: only their ratios matter there
SHARED_ALPHA = 0.1  # alpha_j of shared mode beside alpha_0 = 1, as in the paper


@dataclass(frozen=True)
class FineTune:
    """The LoRA of shared mode.

    Args:
        rank: of the update of each projection.
        alpha: the update is scaled by ``alpha / rank``.
        targets: which projections get it, in the names of ``PROJECTIONS``.
        num_layers: how many layers get it, from the top; -1 means all (method section 4, row 4). The
            MSA layers must be among them.
    """

    rank: int = 32
    alpha: float = 32.0
    targets: tuple[str, ...] = PROJECTIONS
    num_layers: int = -1

    def __post_init__(self):
        object.__setattr__(self, "targets", tuple(self.targets))
        if self.rank < 1:
            raise BadArgument(
                f"[train] 'lora_rank' must be >= 1 in shared mode, got {self.rank}: there is nothing "
                "else to fine-tune."
            )
        if self.num_layers != -1 and self.num_layers < 1:
            raise BadArgument(
                f"[train] 'num_layers' must be >= 1, or -1 for all; got {self.num_layers}."
            )


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Args:
        iters: steps (updates) of the run.
        minutes: stop after this much training time, the schedule stretched to fit; None for iters.
        batch_size: sequences per batch.
        grad_accumulation_steps: batches whose gradients make one step.
        hosts: positions per sequence that get streams in a step: a few each and many steps learn
            faster than all positions of few steps.
        learning_rate: peak rate of the LoRA; linear warm-up, then linear decay to zero.
        embedding_rate: peak rate of P_j, as a multiple of ``learning_rate`` and of the RMS of the
            hidden states that P_j is added to: 20 times the LoRA's rate was best at RMS 9 (docs/log.md).
        fine_tune: the LoRA that main stream and streams share (shared mode, alpha_0 = 1); None
            leaves the base as it is (lossless mode, alpha_0 = 0).
        target: ``"hard"`` (the text) or ``"distill"`` (the main stream's own distributions).
        alphas: alpha_j, the weight of each stream in the loss, or one for all. Without: 0.1 each in
            shared mode, 0.8 ** (j - 1) in lossless mode.
        only: ``"pruning"`` trains the early-exit head and leaves all else as it is; None trains all.
        grad_checkpoint: make the layers' activations again for the gradient instead of keeping them.
        seed: of the initial values and of the order of the data.
        eval_every: steps between validations; None, for a run of ``minutes``: ``validations`` of them,
            evenly in time.
        save_every: steps between checkpoints.
        patience: end the run after so many validations without progress, and take the values of the
            best one (that before the first step included); None runs to the end, and in shared mode takes
            the last (lossless runs always take the best).
    """

    iters: int = 3000
    minutes: float | None = None
    batch_size: int = 4
    grad_accumulation_steps: int = 1
    hosts: int = 16
    learning_rate: float = 1e-3
    embedding_rate: float = 2.2
    fine_tune: FineTune | None = None
    target: str = "hard"
    alphas: tuple[float, ...] | None = None
    only: str | None = None
    grad_checkpoint: bool = False
    seed: int = 0
    eval_every: int | None = 200
    validations: int = 15
    save_every: int = 200
    patience: int | None = None

    def __post_init__(self):
        for name in (
            "iters", "batch_size", "grad_accumulation_steps", "hosts", "eval_every", "validations",
            "save_every",
        ):  # fmt: skip
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise BadArgument(f"[train] '{name}' must be >= 1, got {getattr(self, name)}.")
        for name in ("learning_rate", "embedding_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise BadArgument(f"[train] '{name}' must be > 0, got {getattr(self, name)}.")
        if self.seed < 0:
            raise BadArgument(f"[train] 'seed' must be >= 0, got {self.seed}.")
        if self.patience is not None and self.patience < 1:
            raise BadArgument(f"[train] 'patience' must be >= 1 validation, got {self.patience}.")
        if self.only is not None and self.only not in ONLY:
            raise BadArgument(f"[train] 'only' must be {' or '.join(ONLY)}, got '{self.only}'.")
        if self.minutes is not None and not self.minutes > 0:
            raise BadArgument(f"[train] 'minutes' must be > 0, got {self.minutes}.")
        if self.eval_every is None and self.minutes is None:
            raise BadArgument(
                "[train] 'eval_every' must be a number of steps in a run without 'minutes'."
            )
        if self.target not in TARGETS:
            raise BadArgument(
                f"[train] 'target' must be one of {', '.join(TARGETS)}; got '{self.target}'."
            )
        if self.alphas is not None:
            object.__setattr__(self, "alphas", tuple(map(float, self.alphas)))
            if not self.alphas or not all(a > 0 and math.isfinite(a) for a in self.alphas):
                raise BadArgument(f"[train] 'alphas' must be > 0, got {self.alphas}.")

    @property
    def mode(self) -> str:
        return "lossless" if self.fine_tune is None else "shared"

    def stream_weights(self, num_streams: int) -> list[float]:
        """alpha_1 .. alpha_g."""
        if self.alphas is None and self.fine_tune is None:
            return [LOSSLESS_DECAY**j for j in range(num_streams)]
        alphas = self.alphas or (SHARED_ALPHA,)
        if len(alphas) not in (1, num_streams):
            raise BadArgument(
                f"[train] 'alphas' must be one number or one for each of {num_streams} streams, got "
                f"{len(alphas)}."
            )
        return list(alphas) * (num_streams // len(alphas))

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))
