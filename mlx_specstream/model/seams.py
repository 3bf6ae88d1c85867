"""The five seams through which a stock mlx-lm model becomes a Speculative Streaming model.

The only file that knows mlx-lm's model internals. A seam swaps the class of a stock module for a
subclass that looks at the pass in force; parameters and their names stay as they are, and with
nothing in force (``mlx_lm.generate`` on the same model) the stock code runs untouched.

1. rope        reads positions [B, R] as one position per row;
2. cache       (``cache.py``) positions, K/V of prefix and rows, a request for a mask;
3. layer gate  makes the mask of its rows; takes, prunes and extends the rows at the cut N-Ns;
               skips the lower layers when rows enter at the cut;
4. projections add the gated LoRA to stream rows of the MSA layers;
5. head        the last gate passes on only the rows that are to go through norm and head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, wraps

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

from ..errors import BadArgument, SpecStreamError
from .cache import LayerContext, MaskRequest, NoStore, RowStore
from .cpu import places_of, quicker_parts
from .draft_head import DraftHead, SomeRows
from .experts import ExpertSeam, RouterSeam
from .positions import in_table, query_scale, tables_of
from .projections import Projection, embedding_of, projections_of, weight_shape
from .rope import ROPES, has_table, rope_rows, rope_table, signature, turn
from .rows import Rows, causal_rows, stream_rows, with_streams
from .streams import Streams
from .watch import Watch


@dataclass
class Pass:
    """One forward: what each seam is to do, and what it caught on the way.

    Args:
        rows: the rows in force; the gate at the cut may replace them.
        first: index of the layer where ``enters`` comes in; the layers below are skipped.
        enters: hidden states [B, R, E] that replace what comes out of the skipped layers.
        at_cut: called with (hidden [B, n, E], rows) before the first MSA layer; returns both anew.
        take: which rows go through norm and head: a slice or int32 indices; None means all.
        takes_main: the main rows go through the head, however many are left after the cut.
        decoding: what is only for speed may be used: merged weights, fast activations.
        cut_hidden: caught: hidden states before the first MSA layer (``at_cut`` may set it anew).
        last_hidden: caught: hidden states after the last layer, all rows [B, R, E].
    """

    rows: Rows
    streams: Streams | None = None
    first: int = 0
    enters: mx.array | None = None
    at_cut: Callable[[mx.array, Rows], tuple[mx.array, Rows]] | None = None
    take: slice | mx.array | None = None
    takes_main: bool = False
    decoding: bool = False
    cut_hidden: mx.array | None = None
    last_hidden: mx.array | None = None
    contexts: list[LayerContext] = field(default_factory=list)
    expert_rows: Callable[[bool], mx.array] | None = None
    _made: dict = field(default_factory=dict)

    @property
    def merged(self) -> bool:
        """All rows are streams and may use the weights of ``merge_lora``."""
        return self.decoding and self.rows.main == 0

    def mask(self, request: MaskRequest, store) -> mx.array:
        rows, window = self.rows, request.window
        if isinstance(store, RowStore):
            key = id(rows), window, id(store.at), store.length
            make = lambda: rows.mask_in_place(store.at, store.base, store.length, window)  # noqa: E731
        else:
            key = id(rows), window, store.offset
            make = lambda: rows.mask(store.offset, window)  # noqa: E731
        return self._once(key, make, store)

    def _once(self, key, make, *alive):
        """``make()``, once a pass; ``alive`` keeps the objects whose ids are in the key."""
        if key not in self._made:
            self._made[key] = make(), self.rows, alive
        return self._made[key][0]

    def turn(self, rope: nn.Module, stock, x: mx.array) -> mx.array:
        """x [B, H, R, D] turned by ``rope`` at these rows' positions."""
        if not has_table(rope, x):
            return rope_rows(stock, x, self.rows.positions)
        kind = rope.dims, rope.traditional
        table = self._once(
            ("rope", rope._seam_signature, id(self.rows)),
            lambda: rope_table(stock, *kind, self.rows.positions),
        )
        return turn(x, table, *kind)

    def stream_values(self, values: mx.array) -> mx.array:
        if self.streams is None or self.rows.stream_of is None:
            return values
        return self.streams.rotate_values(values, self.rows.stream_of, self.rows.main)

    def add_lora(self, y: mx.array, x: mx.array, projection: Projection) -> mx.array:
        """y [B, R, d_out] of the stock projection of x [B, R, d_in], plus LoRA on stream rows."""
        main = self.rows.main
        more = self.streams.lora_update(
            x[:, main:], projection.layer, projection.keys, projection.sizes
        )
        if main == 0:
            return y + more
        return mx.concatenate([y[:, :main], y[:, main:] + more], axis=1)

    def add_expert_lora(self, y, x, projection: Projection, sorted_rows: bool) -> mx.array:
        """As ``add_lora`` for experts, whose rows may lie sorted by expert: one update for all."""
        more = self.streams.lora_update(x, projection.layer, projection.keys, projection.sizes)
        return mx.where(self.expert_rows(sorted_rows), y + more, y)


class Seams:
    """A stock model with the seams in. Made by ``attach``.

    Args:
        model: an mlx-lm model; changed in place (classes only) until ``detach``.
        streams: their parameters, or None for tree decoding alone.
    """

    def __init__(self, model: nn.Module, streams: Streams | None = None):
        self.model = model
        self.num_layers = len(model.layers)
        self.running: Pass | None = None
        self.kept: dict = {}  # what one answer leaves for the next: compiled passes, statistics
        self.compiles: bool | None = None  # decode/compiling.py finds out
        self._draft_head: DraftHead | None = None
        self.head_rows: SomeRows | None = None  # norm and head over a few tokens
        self.around: Callable | None = None  # calls a layer: (call, x, context, index) -> x
        self.merged: dict[int, mx.array] = {}  # id of a projection -> weight with LoRA [in, out]
        self._stock: list[tuple[nn.Module, type]] = []
        self.streams = streams
        self._quicker = places_of(model.layers)
        self.watch = Watch(model, *([] if streams is None else [streams]))
        self.vocabulary_size = weight_shape(embedding_of(model))[0]
        self.cut = self.num_layers - (0 if streams is None else streams.config.msa_layers)
        self._swap(model, _ModelSeam)
        for table in tables_of(model):
            self._swap(table, _TableSeam)
        for index, layer in enumerate(model.layers):
            scaled = hasattr(getattr(layer, "self_attn", None), "scaling_beta")
            self._swap(layer, _ScaledGate if scaled else _LayerGate, index=index)
            for _, module in layer.named_modules():
                if isinstance(module, ROPES):
                    self._swap(module, _RopeSeam, signature=signature(module))
            if index >= self.cut and streams.config.lora_rank:
                self._gate_projections(layer, index - self.cut)
        if streams is not None:
            try:
                self.draft_vocabulary = streams.draft_vocabulary
                if streams.config.condition_rank:
                    self.head_rows = SomeRows(model, self.head)
            except SpecStreamError:
                self.detach()
                raise

    def _gate_projections(self, layer: nn.Module, msa_index: int) -> None:
        wanted = set(self.streams.config.lora_targets)
        for module, projection in projections_of(layer, msa_index):
            projection = projection.only(wanted)
            if any(projection.keys):
                seam = ExpertSeam if projection.experts else _ProjectionSeam
                self._swap(module, seam, projection=projection)
        for _, module in layer.named_modules():
            if isinstance(module, SwitchGLU | SwitchMLP):
                self._swap(module, RouterSeam)

    def _swap(self, module: nn.Module, seam: type, **attributes) -> None:
        stock = type(module)
        if issubclass(stock, _Seam):  # a module shared by several layers is already done
            return
        self._stock.append((module, stock))
        module.__class__ = _with_seam(seam, stock)
        module._seams = self
        for name, value in attributes.items():
            setattr(module, f"_seam_{name}", value)

    def detach(self) -> nn.Module:
        """Give the stock model back, as it was before ``attach``."""
        for module, stock in self._stock:
            module.__class__ = stock
            for name in [n for n in vars(module) if n == "_seams" or n.startswith("_seam_")]:
                delattr(module, name)
        self._stock.clear()
        return self.model

    @contextmanager
    def out(self) -> Iterator[None]:
        """For a while the stock model itself, which does not look at ours in every layer."""
        seams = [type(module) for module, _ in self._stock]
        # Not a module's own, which also looks for arrays: this is done at every token.
        become = object.__setattr__
        try:
            for module, stock in self._stock:
                become(module, "__class__", stock)
            yield
        finally:
            for (module, _), seam in zip(self._stock, seams, strict=True):
                become(module, "__class__", seam)

    def forward(self, run: Pass, tokens: mx.array | None = None, stores: list | None = None):
        """Run the stock model under ``run``. Returns logits of the rows in ``run.take`` [B, r, V].

        Args:
            tokens: int32 [B, R]; None if rows enter at ``run.first``.
            stores: where each layer's K/V live; None for none.
        """
        if tokens is None:  # the embedding of these is never computed: nothing reads it
            tokens = mx.zeros(run.enters.shape[:2], dtype=mx.int32)
        run.streams = self.streams
        stores = stores if stores is not None else [NoStore()] * self.num_layers
        run.contexts = [LayerContext(run, store) for store in stores]
        outer, self.running = self.running, run  # pruning calls the head inside a pass
        try:
            with quicker_parts(
                self._quicker if run.decoding and self.compiles is not False else []
            ):
                return self.model(tokens, cache=run.contexts)
        finally:
            self.running = outer

    def head(self, hidden: mx.array) -> mx.array:
        """Norm and head of the stock model on chosen rows. hidden [B, r, E] -> logits [B, r, V]."""
        rows = causal_rows(0, hidden.shape[1])
        return self.forward(Pass(rows, first=self.num_layers, enters=hidden))

    def draft_head(self, hidden: mx.array) -> mx.array:
        """The same for drafts, over the draft vocabulary if there is one: logits [B, r, V or F]."""
        return self.head(hidden) if self._draft_head is None else self._draft_head(hidden)

    @property
    def draft_vocabulary(self) -> mx.array | None:
        """The token of each column of ``draft_head``, int32 [F]; None: all V. May be set anew."""
        return None if self._draft_head is None else self._draft_head.tokens

    @draft_vocabulary.setter
    def draft_vocabulary(self, tokens: mx.array | np.ndarray | None) -> None:
        if tokens is not None:
            tokens = DraftHead(self.model, self.head, mx.array(tokens))
        self._draft_head = tokens
        self.kept.clear()  # compiled passes hold the old rows, statistics are of the old drafts

    def add_streams(
        self, hidden: mx.array, rows: Rows, roots: mx.array | None = None
    ) -> tuple[mx.array, Rows]:
        """Begin the streams beside every main row (an ``at_cut`` for inline passes).

        ``roots``: as in ``run_streams``, of every row; streams with ``root_rank`` cannot do without.
        """
        config = self.streams.config
        rows = with_streams(
            rows,
            num_streams=config.num_streams,
            at_host=config.stream_position == "t",
            main_sees_streams=config.main_sees_streams,
        )
        return mx.concatenate([hidden, self.streams.begin(hidden, self._told(roots))], axis=1), rows

    def run_streams(
        self,
        host_hidden: mx.array,
        hosts: mx.array,
        roots: mx.array,
        stores: list,
        prefix: int | None = None,
        decoding: bool = False,
        gamma: int | None = None,
    ) -> Pass:
        """Run only the streams of some hosts through the MSA layers (deferred placement).

        Args:
            host_hidden: M^{N-Ns} of the hosts [B, P, E].
            hosts: their positions, int32 [B, P].
            roots: the tokens chosen there, int32 [B, P]; read with ``root_rank`` only.
            stores: where the K/V of the main rows lie.
            prefix: as in ``stream_rows``.
            decoding: of ``Pass``.
            gamma: only the first so many streams, which do not see those behind them; None: all.

        Returns:
            The pass; its ``last_hidden`` is [B, g * P, E], stream-major.
        """
        config = self.streams.config
        rows = stream_rows(
            hosts=hosts,
            num_streams=gamma or config.num_streams,
            at_host=config.stream_position == "t",
            prefix=prefix,
        )
        enters = self.streams.begin(host_hidden, self._told(roots), gamma)
        run = Pass(rows, first=self.cut, enters=enters, take=slice(0, 1), decoding=decoding)
        self.forward(run, stores=stores)
        return run

    def _told(self, roots: mx.array | None) -> mx.array | None:
        told = roots is not None and self.streams.config.root_rank
        return embedding_of(self.model)(roots) if told else None

    def merge_lora(self, most_bytes: int) -> None:
        """Make weights with the LoRA in them for passes of streams alone.

        They spare two small products per projection, which weigh much where layers are small. Only
        for plain linear layers, and only if all copies together stay within ``most_bytes``.
        """
        self.merged.clear()
        modules = [
            m for m, stock in self._stock if stock is nn.Linear and hasattr(m, "_seam_projection")
        ]
        if not modules or sum(m.weight.nbytes for m in modules) > most_bytes:
            return
        for module in modules:
            projection = module._seam_projection
            unit = mx.eye(projection.d_in, dtype=module.weight.dtype)
            update = self.streams.lora_update(
                unit, projection.layer, projection.keys, projection.sizes
            )
            self.merged[id(module)] = mx.contiguous(module.weight + update.T).T
        mx.eval(list(self.merged.values()))

    def logits(self, tokens: mx.array) -> tuple[mx.array, mx.array]:
        """Main logits [B, L, V] and stream logits [B, g, L, V] at every position of tokens [B, L].

        Row i predicts token i + 1; stream j of row i predicts token i + 1 + j. With ``root_rank`` streams
        also read token i + 1, which nobody knows of the last row: theirs are [B, g, L - 1, V].
        """
        (B, L), config = tokens.shape, self.streams.config
        roots = mx.concatenate([tokens[:, 1:], tokens[:, -1:]], axis=1)
        at_cut = lambda hidden, rows: self.add_streams(hidden, rows, roots)  # noqa: E731
        out = self.forward(Pass(causal_rows(0, L), at_cut=at_cut), tokens)
        of_streams = out[:, L:].reshape(B, config.num_streams, L, -1)
        return out[:, :L], of_streams[:, :, : L - 1] if config.root_rank else of_streams


def attach(model: nn.Module, streams: Streams | None = None) -> Seams:
    """Put the seams into ``model`` (again, if other streams were attached before)."""
    detach(model)
    return Seams(model, streams)


def detach(model: nn.Module) -> nn.Module:
    """Take the seams out of ``model``, if there are any."""
    seams = seams_of(model)
    return seams.detach() if seams else model


def seams_of(model: nn.Module) -> Seams | None:
    return vars(model).get("_seams")


class _Seam:
    """Marks a class made by ``_with_seam``."""


@cache
def _with_seam(seam: type, stock: type) -> type:
    made = type(stock.__name__, (seam, _Seam, stock), {"__module__": stock.__module__})
    # mlx-lm reads the signature of __call__ (input_embeddings, say), so it must stay the stock one.
    made.__call__ = wraps(stock.__call__)(lambda self, *a, **k: seam.__call__(self, *a, **k))
    return made


class _ModelSeam:
    def __call__(self, inputs, *args, streams: bool = False, **kwargs):
        if not streams:
            return super().__call__(inputs, *args, **kwargs)
        if args or kwargs or self._seams.streams is None:
            raise BadArgument(
                "[model] streams=True needs a model with streams and takes tokens [B, L] alone: "
                "no cache, no embeddings."
            )
        return self._seams.logits(inputs)


class _LayerGate:
    def __call__(self, x, mask=None, cache=None, *args, **kwargs):
        if not isinstance(cache, LayerContext):
            return self._stock_layer(x, mask, cache, *args, **kwargs)
        run, index, seams = cache.run, self._seam_index, self._seams
        last = index == seams.num_layers - 1
        if index >= run.first:
            if index == run.first and run.enters is not None:
                x = run.enters
            if index == seams.cut and run.first <= seams.cut:
                run.cut_hidden = x
                if run.at_cut is not None:
                    x, run.rows = run.at_cut(x, run.rows)
            mask = run.mask(mask, cache.store)
            call = lambda x: self._stock_layer(x, mask, cache, *args, **kwargs)  # noqa: E731
            x = call(x) if seams.around is None else seams.around(call, x, cache, index)
        if last:
            if run.first == seams.num_layers:
                x = run.enters
            run.last_hidden = x
            take = slice(0, run.rows.main) if run.takes_main else run.take
            if take is not None:
                x = x[:, take]
        return x

    def _stock_layer(self, x, mask, cache, *args, **kwargs):
        return super().__call__(x, mask, cache, *args, **kwargs)


class _ScaledGate(_LayerGate):
    """Of ministral3, whose layers take a scale of the queries, made of one offset per batch entry."""

    def __call__(self, x, attn_scale=None, mask=None, cache=None):
        return super().__call__(x, mask, cache, attn_scale)

    def _stock_layer(self, x, mask, cache, attn_scale):
        if isinstance(cache, LayerContext):
            attn_scale = query_scale(self, cache.run.rows.positions, x.dtype)
        return super(_LayerGate, self).__call__(x, attn_scale, mask, cache)


class _TableSeam:
    """Around a table of learned positions: a pass knows the position of each row."""

    def __call__(self, positions):
        run = self._seams.running
        return super().__call__(positions if run is None else in_table(self, run.rows.positions))


class _RopeSeam:
    def __call__(self, x, offset=0, *args, **kwargs):
        if not (isinstance(offset, mx.array) and offset.ndim == 2):
            return super().__call__(x, offset, *args, **kwargs)
        stock = super().__call__
        return self._seams.running.turn(self, stock, x)


class _ProjectionSeam:
    def __call__(self, x):
        run = self._seams.running
        if run is not None and run.merged and id(self) in self._seams.merged:
            y = x @ self._seams.merged[id(self)]
            return y + self.bias if "bias" in self else y
        y = super().__call__(x)
        if run is None or run.rows.stream_of is None:
            return y
        return run.add_lora(y, x, self._seam_projection)
