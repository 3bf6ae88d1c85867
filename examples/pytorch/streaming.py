"""Streams on a frozen causal LM of transformers (llama, mistral, qwen2, qwen3 and their like).

Speculative Streaming, arXiv 2402.11131, as docs/format.md writes it down; parameters have the names that
``mlx-specstream convert`` reads. Nothing here imports the package.

Two placements with one result: *inline*, where stream rows run beside the main rows, and *deferred*, where
they run behind them over the keys and values that the main rows left. Training uses the second: the
base needs no gradient then.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import silu
from transformers import DynamicCache

FILE = "pytorch_streams.safetensors"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class StreamConfig:
    """The geometry of streams; every key of docs/format.md, with its meaning there."""

    num_streams: int = 4
    msa_layers: int = 2
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


class LowRank(nn.Module):
    """x A B, with B = 0 at first, so that it begins as no update."""

    def __init__(self, d_in: int, d_out: int, rank: int):
        super().__init__()
        self.lora_A, self.lora_B = (
            nn.Linear(*sizes, bias=False) for sizes in ((d_in, rank), (rank, d_out))
        )
        nn.init.uniform_(self.lora_A.weight, -(d_in**-0.5), d_in**-0.5)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lora_B(self.lora_A(x.to(self.lora_A.weight.dtype)))


class Weight(nn.Module):
    """A bare tensor that ends in ``.weight``; uniform as in ``LowRank``, or zero."""

    def __init__(self, *shape: int, bound: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


class Condition(nn.Module):
    """h <- h + RMS(h) silu(e A_j + h C_j + d_j) B_j: the guess, given the token before it (e), or where
    all streams of a host begin, given the token chosen there. ``shared``: A, B and C serve all streams."""

    def __init__(self, num_streams: int, width: int, rank: int, shared: bool = False):
        super().__init__()
        maps = 1 if shared else num_streams
        self.embedding = Weight(maps, rank, width, bound=width**-0.5)
        self.state = Weight(maps, rank, width, bound=width**-0.5)
        self.bias = nn.Parameter(torch.zeros(num_streams, 1, rank))
        self.out = Weight(maps, width, rank)

    def forward(self, hidden: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """States and embeddings of the tokens before, both [B, g, P, E]."""
        h, e = hidden.float(), before.float()
        rms = rms_of(h)
        inside = (e / rms_of(e)) @ self.embedding.weight.mT + (h / rms) @ self.state.weight.mT
        update = silu(inside + self.bias) @ self.out.weight.mT
        return (h + rms * update).to(hidden.dtype)


def rms_of(x: torch.Tensor) -> torch.Tensor:
    return (x.square().mean(-1, keepdim=True) + 1e-12).sqrt()


class Streams(nn.Module):
    """All parameters that streams add to ``model``; float32 whatever the model is in."""

    def __init__(self, model, config: StreamConfig):
        super().__init__()
        self.config = config
        g, width = config.num_streams, model.config.hidden_size
        layers = model.model.layers[-config.msa_layers :]
        if not config.value_rotation:
            self.stream_embeddings = nn.Embedding(g, width)
        if config.init_rank:
            self.stream_init = LowRank(width, width, config.init_rank)
        if config.prune_rank:
            self.early_exit = LowRank(width, width, config.prune_rank)
        if config.condition_rank:
            self.condition = Condition(g, width, config.condition_rank, config.condition_shared)
        if config.root_rank:
            self.root = Condition(1, width, config.root_rank)
        if config.lora_rank:
            self.msa_layers = nn.ModuleList(
                nn.ModuleDict(
                    {
                        name: LowRank(module.in_features, module.out_features, config.lora_rank)
                        for name, module in targets(layer, config)
                    }
                )
                for layer in layers
            )

    def begin(self, hidden: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
        """Eq. 3: hidden M^{N-Ns} [B, P, E] -> streams [B, g * P, E], stream-major.

        root: embeddings of the tokens that the text has behind these hosts [B, P, E]."""
        g = self.config.num_streams
        if self.config.root_rank:
            hidden = self.root(hidden[:, None], root[:, None])[:, 0]
        start = hidden + self.stream_init(hidden) if self.config.init_rank else hidden
        start = start[:, None].expand(-1, g, -1, -1)
        if not self.config.value_rotation:
            start = start + self.stream_embeddings.weight[:, None]
        return start.flatten(1, 2).to(hidden.dtype)

    def save(self, folder: Path, training: dict) -> Path:
        """Write ``FILE``, whole or not at all. ``training``: how they were trained, for people."""
        folder.mkdir(parents=True, exist_ok=True)
        about = {"stream_config": asdict(self.config), "stream_training": training}
        tensors = {k: v.detach().float().cpu().contiguous() for k, v in self.state_dict().items()}
        temporary = folder / f".{FILE}.tmp"
        save_file(
            tensors, temporary, {"format": "pt", **{k: json.dumps(v) for k, v in about.items()}}
        )
        os.replace(temporary, folder / FILE)
        return folder / FILE

    @classmethod
    def load(cls, model, path: Path) -> Streams:
        """What ``save`` wrote, or ``mlx-specstream export`` made of an MLX streams folder."""
        with safe_open(path, "pt") as file:
            streams = cls(model, StreamConfig(**json.loads(file.metadata()["stream_config"])))
            names = [name for name in file.keys() if name != "draft_vocabulary"]  # noqa: SIM118  MLX's
            streams.load_state_dict({name: file.get_tensor(name) for name in names})
        return streams


def targets(layer: nn.Module, config: StreamConfig):
    """(name, module) of the projections of a layer that get LoRA."""
    for path, module in layer.named_modules():
        name = path.rpartition(".")[2]
        if name in config.lora_targets and isinstance(module, nn.Linear):
            yield name, module


class Rows(NamedTuple):
    """Rows of a pass: of which stream (0: main) [R], of which host [R], and where that is [B or 1, R]."""

    stream: torch.Tensor
    slot: torch.Tensor
    place: torch.Tensor

    def and_then(self, more: Rows) -> Rows:
        batch = max(len(self.place), len(more.place))
        places = [rows.place.expand(batch, -1) for rows in (self, more)]
        return Rows(
            torch.cat([self.stream, more.stream]),
            torch.cat([self.slot, more.slot]),
            torch.cat(places, 1),
        )


def main_rows(length: int, device) -> Rows:
    where = torch.arange(length, device=device)
    return Rows(torch.zeros_like(where), where, where[None])


def stream_rows(hosts: torch.Tensor, num_streams: int) -> Rows:
    """The streams of the host positions [B or 1, P], stream-major."""
    P = hosts.shape[1]
    stream = torch.arange(1, num_streams + 1, device=hosts.device).repeat_interleave(P)
    slot = torch.arange(P, device=hosts.device).repeat(num_streams)
    return Rows(stream, slot, hosts.repeat(1, num_streams))


def sees(rows: Rows, keys: Rows, plans: bool) -> torch.Tensor:
    """Which keys a row attends to, bool [B or 1, R, K].

    Main rows see main rows up to themselves (Eq. 1), streams also streams 1..j of the same host
    (Eq. 2); with ``plans`` main rows also their own streams ([P] Eq. 1).
    """
    of_main = keys.place[:, None] <= rows.place[..., None]
    earlier = keys.stream[None] <= rows.stream[:, None]
    if plans:
        earlier = earlier | (rows.stream == 0)[:, None]
    own = (keys.slot[None] == rows.slot[:, None]) & earlier
    return torch.where(keys.stream == 0, of_main, own[None])


class States(NamedTuple):
    """Hidden states: M^{N-Ns} [B, L, E], main rows [B, L, E] and streams [B, g, P, E] after the last
    layer."""

    cut: torch.Tensor
    main: torch.Tensor
    streams: torch.Tensor


class StreamingModel:
    """A stock model of transformers and its streams.

    Args:
        model: a causal LM with ``model.layers``, ``model.rotary_emb`` and ``model.norm``; its weights are
            frozen, and it computes as ever where no streams run.
        streams: theirs.
    """

    def __init__(self, model, streams: Streams):
        self.model, self.streams, self.config = model, streams, streams.config
        self.inner = model.model
        self.cut = len(self.inner.layers) - self.config.msa_layers
        self.first: int | None = None  # index of the first stream row of the pass in force
        self._stream: torch.Tensor | None = None  # which stream each of these rows is
        model.requires_grad_(False)
        if self.config.lora_rank:
            for i, layer in enumerate(self.inner.layers[self.cut :]):
                for name, module in targets(layer, self.config):
                    module.register_forward_hook(self._lora_hook(streams.msa_layers[i][name]))
        if self.config.value_rotation:
            for layer in self.inner.layers[self.cut :]:
                layer.self_attn.v_proj.register_forward_hook(self._turn_hook(layer.self_attn))

    def inline(self, tokens: torch.Tensor) -> States:
        """Main rows and the streams of every one of them, together. tokens int64 [B, L]"""
        L, g = tokens.shape[1], self.config.num_streams
        rows = main_rows(L, tokens.device)
        cut = self._lower(tokens, rows)
        every = rows.and_then(stream_rows(rows.place, g))
        roots = self.inner.embed_tokens(torch.cat([tokens[:, 1:], tokens[:, -1:]], 1))
        entering = torch.cat([cut, self.streams.begin(cut, roots)], 1)
        last = self._run(range(self.cut, self.depth), entering, every, every, first=L)
        return States(cut, last[:, :L], last[:, L:].unflatten(1, (g, L)))

    def deferred(self, tokens: torch.Tensor, hosts: torch.Tensor) -> States:
        """The main rows without gradient, then the streams of the host positions int64 [B, P].

        Raises ValueError under the [P] mask, where main rows need their streams.
        """
        if self.config.main_sees_streams:
            raise ValueError("the [P] mask cannot be deferred: main rows see their streams")
        rows, cache = main_rows(tokens.shape[1], tokens.device), DynamicCache()
        upper = range(self.cut, self.depth)
        with torch.no_grad():
            cut = self._lower(tokens, rows)
            main = self._run(upper, cut, rows, rows, cache=cache)
        own = stream_rows(hosts, self.config.num_streams)
        roots = tokens.gather(1, (hosts + 1).clamp(max=tokens.shape[1] - 1))
        begin = self.streams.begin(pick(cut, hosts), self.inner.embed_tokens(roots))
        last = self._run(upper, begin, own, rows.and_then(own), first=0, cache=cache)
        return States(cut, main, last.unflatten(1, (self.config.num_streams, hosts.shape[1])))

    def given(
        self, states: torch.Tensor, tokens: torch.Tensor, hosts: torch.Tensor
    ) -> torch.Tensor:
        """Streams [B, g, P, E] corrected by the tokens that the text has before their targets."""
        if not self.config.condition_rank:
            return states
        ahead = torch.arange(1, self.config.num_streams + 1, device=tokens.device)[:, None]
        at = (hosts[:, None] + ahead).clamp(max=tokens.shape[1] - 1)  # [B, g, P]
        before = self.inner.embed_tokens(tokens.gather(1, at.flatten(1)))
        return self.streams.condition(states, before.unflatten(1, at.shape[1:]))

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits, float32, of last states [..., E]."""
        return self.model.lm_head(self.inner.norm(hidden)).float()

    @property
    def depth(self) -> int:
        return len(self.inner.layers)

    def _lower(self, tokens: torch.Tensor, rows: Rows) -> torch.Tensor:
        """M^{N-Ns}: the layers below the streams are stock and frozen."""
        with torch.no_grad():
            return self._run(range(self.cut), self.inner.embed_tokens(tokens), rows, rows)

    def _run(self, layers, hidden, rows: Rows, keys: Rows, first=None, cache=None) -> torch.Tensor:
        """Some stock layers over ``rows``, which attend to ``keys`` (those in the cache, then their own)."""
        at = rows.place + (rows.stream if self.config.stream_position == "t+j" else 0)
        keys_at = keys.place + (keys.stream if self.config.stream_position == "t+j" else 0)
        turn = self.inner.rotary_emb(hidden, at)
        seen = sees(rows, keys, self.config.main_sees_streams)
        self.first, self._stream = first, None if first is None else rows.stream[first:]
        try:
            for index in layers:
                allowed, window = seen, window_of(self.model.config, index)
                if window:
                    allowed = allowed & (at[..., None] < keys_at[:, None] + window)
                mask = torch.zeros(allowed.shape, dtype=hidden.dtype, device=hidden.device)
                mask = mask.masked_fill(~allowed, torch.finfo(hidden.dtype).min)[:, None]
                hidden = self.inner.layers[index](
                    hidden,
                    attention_mask=mask.expand(len(hidden), -1, -1, -1),
                    position_ids=at,
                    position_embeddings=turn,
                    past_key_values=cache,
                )
        finally:
            self.first = None
        return hidden

    def _lora_hook(self, lora: LowRank):
        scale = self.config.lora_alpha / self.config.lora_rank

        def add(module, inputs, out):
            if self.first is None:
                return out
            more = scale * lora(inputs[0][:, self.first :])
            return torch.cat([out[:, : self.first], out[:, self.first :] + more.to(out.dtype)], 1)

        return add

    def _turn_hook(self, attention):
        """V1 App. B Eq. 7: dims d and d + D/2 of the values of stream j turn by epsilon * j."""

        def turn(module, inputs, out):
            if self.first is None:
                return out
            rows = out[:, self.first :].float().unflatten(2, (-1, attention.head_dim))
            a, b = rows.chunk(2, -1)
            angle = (self.config.value_rotation * self._stream)[:, None, None]
            turned = [a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()]
            turned = torch.cat(turned, -1).flatten(2).to(out.dtype)
            return torch.cat([out[:, : self.first], turned], 1)

        return turn


def pick(hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """hidden [B, L, E] at rows int64 [B, P] -> [B, P, E]"""
    return hidden.gather(1, rows[..., None].expand(-1, -1, hidden.shape[-1]))


def window_of(config, layer: int) -> int | None:
    """The sliding window of a layer in tokens, or None."""
    kinds = getattr(config, "layer_types", None)
    if kinds and kinds[layer] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)
