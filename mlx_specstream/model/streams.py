"""Multi-stream attention: the streams' own parameters and arithmetic (method: arXiv 2402.11131).

A multi-stream attention (MSA) layer is a stock transformer layer that runs over more rows. Per
position t there is the main stream M_t and gamma streams S_t1 .. S_tgamma:

    M_t^{k+1}  = MHA(M_t^k,  M_{<=t}^k)                      Eq. 1, V1: the base model as it was
    M_t^{k+1}  = MHA(M_t^k,  M_{<=t}^k (+) S_{t,1..gamma}^k)  Eq. 1, [P]: the main stream plans
    S_tj^{k+1} = MHA(S_tj^k, M_{<=t}^k (+) S_{t,(<=j)}^k)     Eq. 2
    S_tj^{N-Ns} = f(M_t^{N-Ns}) + P_j                        Eq. 3: where streams begin

Who sees whom is a mask (``rows.py``); the layers are mlx-lm's (``seams.py``). What is left is here:
the start of a stream (Eq. 3), the gated LoRA that only stream rows get, the rotation of values
that can replace P_j, the low-rank early exit used for pruning, and (ours) two corrections: of a guess by
the token before it, and of where streams begin by the root.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..config import StreamConfig


class LowRank(nn.Module):
    """x A B, with B = 0 at first, so that it begins as no update. [..., d_in] -> [..., d_out]."""

    def __init__(self, d_in: int, d_out: int, rank: int):
        super().__init__()
        bound = d_in**-0.5
        self.a = mx.random.uniform(low=-bound, high=bound, shape=(d_in, rank))
        self.b = mx.zeros((rank, d_out))

    def __call__(self, x: mx.array) -> mx.array:
        return (x @ self.a) @ self.b


class Condition(nn.Module):
    """Corrects hidden states by a token that they do not know of.

    Streams guess side by side: none knows which token was chosen for the one before it. With e the
    embedding of that token and h the last state of stream j, both over their RMS,

        h <- h + RMS(h) silu(e A_j + h C_j + d_j) B_j

    B_j = 0 at first, so that it begins as no correction. The scale follows the state's own, so the
    same learning rate suits every model. With ``num_streams`` 1 it is also what tells the streams of a
    host their root: h is then M_t^{N-Ns}, and all layers above can make something of it.

    Args:
        shared: one A, B and C for all streams, which then differ by d_j alone: what a token says about
            the next one hardly depends on how far ahead they are, and all streams teach one map.
    """

    def __init__(
        self, num_streams: int, width: int, rank: int, token_width: int, shared: bool = False
    ):
        super().__init__()
        maps = 1 if shared else num_streams
        bound, shape = width**-0.5, (maps, width, rank)
        enter = (maps, token_width, rank)
        self.a = mx.random.uniform(low=-bound, high=bound, shape=enter)
        self.c = mx.random.uniform(low=-bound, high=bound, shape=shape)
        self.d = mx.zeros((num_streams, 1, rank))
        self.b = mx.zeros((maps, rank, width))

    def __call__(self, hidden: mx.array, before: mx.array, first: int = 0) -> mx.array:
        """hidden [g', n or 1, E] and embeddings [g', n, E] of streams ``first``.. -> [g', n, E]"""
        own = slice(first, first + hidden.shape[0])
        some = own if self.a.shape[0] == self.d.shape[0] else slice(None)
        h = hidden.astype(mx.float32)
        rms = mx.sqrt(h.square().mean(axis=-1, keepdims=True) + 1e-12)
        e = mx.fast.rms_norm(before.astype(mx.float32), None, 1e-12)
        update = nn.silu(e @ self.a[some] + (h / rms) @ self.c[some] + self.d[own]) @ self.b[some]
        return (h + rms * update).astype(hidden.dtype)


class Streams(nn.Module):
    """All parameters that streams add to a base model.

    Args:
        config: the geometry.
        width: E, the hidden size of the base.
        shapes: per MSA layer (lowest first) the (d_in, d_out) of each projection that gets LoRA.
        embedding_scale: standard deviation of the initial P_j (about 5% of the RMS of M^{N-Ns}).
        token_width: of the base's token embedding, where it is not E (OPT-350m).

    Attributes:
        draft_vocabulary: the only tokens that drafts may hold, int32 [F]; None: all V. No
            parameter: training does not see it.
        temperatures: what the logits of each stream are divided by, float32 [g], so that its
            probabilities are right on average; None: by nothing. No parameter either.
    """

    def __init__(
        self,
        config: StreamConfig,
        width: int,
        shapes: list[dict[str, tuple[int, int]]],
        embedding_scale: float = 0.02,
        token_width: int | None = None,
    ):
        super().__init__()
        self._config = config
        self.draft_vocabulary: np.ndarray | None = None
        self.temperatures: np.ndarray | None = None
        g = config.num_streams
        if not config.value_rotation:
            self.embeddings = embedding_scale * mx.random.normal((g, width))
        if config.init_rank:
            self.init = LowRank(width, width, config.init_rank)
        if config.prune_rank:
            self.early_exit = LowRank(width, width, config.prune_rank)
        if config.condition_rank:
            self.condition = Condition(
                *(g, width, config.condition_rank, token_width or width), config.condition_shared
            )
        if config.root_rank:
            self.root = Condition(1, width, config.root_rank, token_width or width)
        if config.lora_rank:
            self.lora = [
                {name: LowRank(*dims, config.lora_rank) for name, dims in layer.items()}
                for layer in shapes
            ]

    @property
    def config(self) -> StreamConfig:
        return self._config

    def begin(
        self, hidden: mx.array, root: mx.array | None = None, gamma: int | None = None
    ) -> mx.array:
        """Eq. 3. hidden M^{N-Ns} [B, n, E] -> the first ``gamma`` streams [B, g * n, E], stream-major.

        ``f`` is the identity, or the identity plus a rank-eta map that starts at zero.

        Args:
            root: embeddings of the tokens chosen at these hosts [B, n, token width], with ``root_rank``.
        """
        B, n, E = hidden.shape
        g = gamma or self._config.num_streams
        if self._config.root_rank:
            if root is None:
                raise ValueError("streams with root_rank cannot begin without their roots")
            known = self.root(hidden.reshape(1, B * n, E), root.reshape(1, B * n, -1))
            hidden = known.reshape(B, n, E)
        start = hidden + self.init(hidden) if self._config.init_rank else hidden
        start = mx.broadcast_to(start[:, None], (B, g, n, E))
        if not self._config.value_rotation:
            start = start + self.embeddings[None, :g, None]
        return start.reshape(B, g * n, E).astype(hidden.dtype)

    def lora_update(
        self, x: mx.array, layer: int, keys: list[str | None], sizes: list[int]
    ) -> mx.array:
        """The gated LoRA's addition to a projection, x [..., d_in] -> [..., sum(sizes)].

        ``keys`` has one entry per column block of the projection (one for plain projections,
        several for fused ones); None is a block without LoRA.
        """
        scale = self._config.lora_scale
        parts = [
            mx.zeros((*x.shape[:-1], size), dtype=x.dtype)
            if key is None
            else (scale * self.lora[layer][key](x)).astype(x.dtype)
            for key, size in zip(keys, sizes, strict=True)
        ]
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)

    def rotate_values(self, values: mx.array, stream_of: mx.array, main: int) -> mx.array:
        """V1 App. B Eq. 7: V * exp(i * epsilon * j) for the rows of stream j. values [B, K, R, D].

        Dims d and d + D/2 are the real and the imaginary part, as in (non-traditional) rope.
        """
        if not self._config.value_rotation:
            return values
        rows = values[:, :, main:].astype(mx.float32)
        angle = (self._config.value_rotation * stream_of)[:, None]  # [R - main, 1]
        half = rows.shape[-1] // 2
        re, im, rest = rows[..., :half], rows[..., half : 2 * half], rows[..., 2 * half :]
        cos, sin = mx.cos(angle), mx.sin(angle)
        turned = mx.concatenate([re * cos - im * sin, re * sin + im * cos, rest], axis=-1)
        return mx.concatenate([values[:, :, :main], turned.astype(values.dtype)], axis=2)

    def exit_hidden(self, hidden: mx.array) -> mx.array:
        """What the early exit feeds to norm and head: M + M A B, rank theta. [B, n, E]."""
        return (hidden + self.early_exit(hidden)).astype(hidden.dtype)
