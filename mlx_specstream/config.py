"""What a streams folder declares: the geometry of the streams. A leaf: imports nothing of ours but errors."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from .errors import BadArgument

FORMAT_VERSION = 1
LATER = {"root_rank", "condition_shared"}  # fields that older files lack
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class StreamConfig:
    """The streams of one model.

    Args:
        num_streams: gamma, how many tokens beyond the next one are predicted (>= 1).
        msa_layers: Ns, how many of the top layers are multi-stream attention layers (>= 1).
        lora_rank: rank of the gated LoRA on the MSA layers; 0 means none.
        lora_alpha: the update is scaled by ``lora_alpha / lora_rank``.
        lora_targets: which projections get it, in the names of ``PROJECTIONS``. A fused
            ``qkv_proj`` or ``gate_up_proj`` gets one update per column block.
        main_sees_streams: False is the V1 mask (main stream = ordinary attention, so the output
            is the base model's own); True is the [P] mask, in which M_t also attends to its streams.
        stream_position: rope position of S_tj: ``"t+j"`` or ``"t"``.
        init_rank: rank eta of ``f`` in S_tj = f(M_t) + P_j (Eq. 3); 0 means the identity.
        value_rotation: 0 means learned embeddings P_j; else epsilon of V * exp(i * epsilon * j)
            (V1 App. B, Eq. 7), and there are no P_j.
        prune_rank: rank theta of the early-exit head for tree pruning; 0 means none.
        condition_rank: rank of the map that corrects a stream's guess by the token that was guessed
            (or, for the first stream, chosen) before it; 0 means none.
        condition_shared: one such map for all streams, of which each has its own bias, instead of one
            for each of them.
        root_rank: rank of the map that tells all streams of a host, where they begin, which token was
            chosen there (the root); 0 means none. A row inside a tree has no root yet, so such
            streams are deferred, and ``main_sees_streams`` must be False.

    Raises:
        BadArgument: a value breaks its rule.
    """

    num_streams: int = 4
    msa_layers: int = 4
    lora_rank: int = 32
    lora_alpha: float = 32.0
    lora_targets: tuple[str, ...] = PROJECTIONS
    main_sees_streams: bool = False
    stream_position: str = "t+j"
    init_rank: int = 0
    value_rotation: float = 0.0
    prune_rank: int = 0
    condition_rank: int = 0
    condition_shared: bool = False
    root_rank: int = 0

    def __post_init__(self):
        object.__setattr__(self, "lora_targets", tuple(self.lora_targets))
        for name, least in (
            ("num_streams", 1),
            ("msa_layers", 1),
            ("lora_rank", 0),
            ("init_rank", 0),
            ("prune_rank", 0),
            ("condition_rank", 0),
            ("root_rank", 0),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise BadArgument(
                    f"[StreamConfig] '{name}' must be an int >= {least}, got {value!r}."
                )
        for name in ("main_sees_streams", "condition_shared"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise BadArgument(f"[StreamConfig] '{name}' must be true or false, got {value!r}.")
        if self.condition_shared and not self.condition_rank:
            raise BadArgument(
                "[StreamConfig] 'condition_rank' must be >= 1 with 'condition_shared', got 0: there is "
                "nothing to share."
            )
        if self.root_rank and self.main_sees_streams:
            raise BadArgument(
                f"[StreamConfig] 'root_rank' must be 0 with 'main_sees_streams', got {self.root_rank}: "
                "there streams run before their root is chosen."
            )
        for name in ("lora_alpha", "value_rotation"):
            value = getattr(self, name)
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not math.isfinite(value)
            ):
                raise BadArgument(
                    f"[StreamConfig] '{name}' must be a finite number, got {value!r}."
                )
        if self.stream_position not in ("t+j", "t"):
            raise BadArgument(
                f"[StreamConfig] 'stream_position' must be 't+j' or 't', got {self.stream_position!r}."
            )
        unknown = [name for name in self.lora_targets if name not in PROJECTIONS]
        if unknown:
            raise BadArgument(
                f"[StreamConfig] 'lora_targets' must be among {', '.join(PROJECTIONS)}; got {unknown}."
            )

    @property
    def lora_scale(self) -> float:
        return self.lora_alpha / self.lora_rank if self.lora_rank else 0.0

    def to_json(self) -> dict[str, Any]:
        """The fields; without those of ``LATER`` that say nothing, as in files from before them."""
        found = {**asdict(self), "lora_targets": list(self.lora_targets)}
        return {name: value for name, value in found.items() if value or name not in LATER}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> StreamConfig:
        """Strict: our own format, so an unknown key is an error, not something to skip.

        Files from before ``LATER`` lack these fields: they have none.
        """
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(data) - known)
        missing = sorted(known - LATER - set(data))
        if unknown or missing:
            raise BadArgument(
                f"[StreamConfig] keys must be exactly {sorted(known)}; unknown {unknown}, missing {missing}."
            )
        return cls(**data)
