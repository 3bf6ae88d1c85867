"""What a source is, whatever its format: a config, and weights under the names of transformers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from mlx_specstream.errors import BadArgument, BadCheckpoint
from mlx_specstream.model.checkpoint import DESCRIPTION

from . import meta
from .accounting import Tensor, in_kinds
from .families import Part, parts_of
from .folder import check_folder
from .head import TIED, head_and_embedding, untied
from .hf_config import transformers_view
from .nested import clean_names
from .peft_adapter import PeftAdapter
from .safetensors_writer import write_safetensors
from .source import find_source, has_tokenizer, read_config
from .torch_streams import BESIDE, CONFIG, FILE, TorchStreams, is_stream
from .weight_file import Contents, is_pickled, is_weights, look_into, read_tensor, read_tensors
from .weights import find_weights, has_weights

STREAMS_PREFIX = "streams."  # a program may keep its streams in a module of this name


class Shard(NamedTuple):
    """Some tensors of a checkpoint.

    Args:
        path: the file they come from, for lines.
        names: as transformers has them -> as the file has them.
        tensors: the tensors, lazy where the file allows it (True: shapes alone, nothing is read);
            None for a safetensors file that holds just these and can be taken as it is.
    """

    path: Path
    names: dict[str, str]
    tensors: Callable[[bool], dict[str, mx.array]] | None = None


@dataclass
class Checkpoint:
    """A model in any format that is read.

    Args:
        folder: where the generation settings and the licence lie, and the tokenizer.
        config: as transformers writes it.
        files: the weights.
        helper: a folder with the tokenizer, where `folder` has none.
        adapter: of PEFT, merged into the weights on the way.
        from_meta: the files have Meta's names and may be parts of each tensor.
        more: text files that the folder lacks, by name.
        streams: found among the weights, once all shards have been read.
        notes: what was left out, for the user.
        becomes: the names that the head and the embedding get, where these are not their own.
    """

    folder: Path
    config: dict
    files: list[Path]
    helper: Path | None = None
    adapter: PeftAdapter | None = None
    from_meta: bool = False
    more: dict[str, str] = field(default_factory=dict)
    streams: TorchStreams | None = None
    notes: list[str] = field(default_factory=list)
    becomes: dict[str, list[str]] = field(default_factory=dict)

    @cached_property
    def contents(self) -> dict[Path, Contents]:
        return {path: look_into(path) for path in self.files}

    @cached_property
    def names(self) -> dict[str, str]:
        """Tensors of the model: as the files have them -> as transformers has them."""
        every = [name for inside in self.contents.values() for name in inside.tensors]
        return clean_names([n for n in every if not own_name(n)], self.config.get("model_type"))

    @property
    def view(self) -> dict:
        """The config with the defaults of transformers, where it knows the family."""
        view = transformers_view(self.config) or self.config
        return {**view, "model_type": self.config.get("model_type")}

    def settle_head(self) -> None:
        """Find out whether the head is the embedding; where the config is wrong about it, change that."""
        named = isinstance(self.config.get("model_type"), str)  # else it is refused in its turn
        if self.from_meta or not named or not self.view.get(TIED):
            return
        own = {clean: name for name, clean in self.names.items()}
        files = {name: path for path, inside in self.contents.items() for name in inside.tensors}
        tied, self.becomes = head_and_embedding(
            own, self.adapter, lambda name: read_tensor(files[own[name]], own[name])
        )
        if not tied:
            self.config = untied(self.config)
            self.notes.append(
                "the head differs from the embedding, though config.json says that they are one: "
                f"converted as two ({TIED!r} is false in the result)"
            )

    def take_adapter(self, adapter: PeftAdapter | Path) -> Path | None:
        """Merge an adapter of PEFT on the way; the folder of one of mlx-lm is given back."""
        if isinstance(adapter, Path):
            return adapter
        self.adapter = adapter
        # Added tokens make a longer embedding, which the adapter brings along.
        for name, value in adapter.replaced.items():
            if name.endswith(("embed_tokens.weight", "wte.weight")) and value.ndim == 2:
                self.config["vocab_size"] = value.shape[0]
        return None

    def shards(self, scratch: Path) -> Iterator[Shard]:
        """The weights, file by file; `scratch` takes what has to be written on the way."""
        if self.from_meta:
            yield self._joined(scratch)
            return
        self._look_beside(self.contents)
        view = self.view
        for path, inside in self.contents.items():
            new, left = {}, []
            for name, tensor in inside.tensors.items():
                clean = self.names.get(name)
                if clean is None:  # of the streams
                    continue
                own = self.becomes.get(clean)
                parts = parts_of(clean, view) if own is None else list(map(Part, own))
                if not parts:
                    left.append(tensor)
                else:
                    new[name] = parts
            self.notes += [f"{path.name}: not needed: {kind}" for kind in in_kinds(left)]
            names = {part.name: name for name, parts in new.items() for part in parts}
            whole = {name: [Part(name)] for name in inside.tensors}
            changed = self.adapter and any(map(self.adapter.changes, whole))
            if is_pickled(path) or new != whole or changed:
                yield Shard(path, names, self._reader(path, new))
            else:
                yield Shard(path, names)

    def _reader(
        self, path: Path, new: dict[str, list[Part]]
    ) -> Callable[[bool], dict[str, mx.array]]:
        def read(hollow: bool) -> dict[str, mx.array]:
            tensors = read_tensors(path, hollow)
            streams = {own_name(name): value for name, value in tensors.items() if own_name(name)}
            if streams:
                self.streams = self.streams or TorchStreams({}, None)
                self.streams.tensors.update(streams)
            named = {p.name: p.of(tensors[name]) for name, parts in new.items() for p in parts}
            if self.adapter:
                named = {name: self.adapter.apply(name, value) for name, value in named.items()}
            return named

        return read

    def _look_beside(self, found: dict[Path, Contents]) -> None:
        """What lies in the files beside the weights: the streams' description, an optimizer."""
        for path, inside in found.items():
            if CONFIG in inside.values and any(map(own_name, inside.tensors)):
                tensors = self.streams.tensors if self.streams else {}
                about = map(inside.values.get, BESIDE)
                self.streams = TorchStreams(tensors, *about)
            left = [key for key in inside.ignored if key not in BESIDE]
            if left:
                self.notes.append(f"{path.name}: left out: {', '.join(sorted(left)[:8])}")

    def _joined(self, scratch: Path) -> Shard:
        """Meta's parts as one shard; pickled ones become files that can be read piece by piece."""
        params = meta.read_params(self.files[0].parent)
        names = [name for name in look_into(self.files[0]).tensors if name != meta.COMPUTED]

        def read(hollow: bool) -> dict[str, mx.array]:
            parts = []
            for number, path in enumerate(self.files):
                if is_pickled(path) and not hollow:
                    lazy = scratch / f"staged-part-{number:02d}.safetensors"
                    write_safetensors(lazy, read_tensors(path))
                    path = lazy
                parts.append(read_tensors(path, hollow).__getitem__)
            try:
                return dict(meta.joined(names, parts, params))
            except ValueError as error:  # shapes that cannot be joined or turned
                raise BadCheckpoint(f"{self.files[0].parent}: {error}") from None

        return Shard(self.files[0], {meta.translate(name)[0]: name for name in names}, read)


def locate(path: str | Path, revision: str | None = None, code: bool = False) -> Path:
    """The file or folder that a path or hub id means; a repository is downloaded.

    Args:
        code: Python files may come along.

    Raises: BadCheckpoint when there is none.
    """
    given = Path(path).expanduser()
    return given if given.is_file() else find_source(str(path), revision, code)


def open_checkpoint(path: Path, base: str | None = None, code: bool = False) -> Checkpoint:
    """Find out what a local file or folder is.

    Args:
        base: a folder or hub id with what the source lacks: config.json and the tokenizer of a bare
            state dict, config.json of a Meta checkpoint, the tokenizer of a folder without one.
        code: Python files may be downloaded, too.

    Raises: BadCheckpoint when it is nothing that is read.
    """
    if path.is_file():
        return bare(path, base, code)
    check_folder(path)
    if (path / DESCRIPTION).is_file() and not (path / "config.json").is_file():
        raise BadCheckpoint(
            f"{path} is a streams folder: load it with --streams, or write it for PyTorch with "
            "mlx-specstream export"
        )
    if meta.is_meta(path) and not has_weights(path):
        return from_meta(path, base, code)
    if (path / "config.json").is_file() and not has_weights(path):
        loose = [p for p in sorted(path.iterdir()) if is_weights(p) and p.is_file()]
        if len(loose) == 1:
            return bare(loose[0], base or str(path), code)
    checkpoint = Checkpoint(path, read_config(path), find_weights(path))
    if (path / FILE).is_file():
        checkpoint.files.append(path / FILE)
    if base is not None and has_tokenizer(path):
        checkpoint.notes.append(f"{path} lacks nothing, so --base was not used")
    elif base is not None:
        checkpoint.helper = about(base, code)
    return checkpoint


def about(base: str, code: bool) -> Path:
    """The folder of a base, its files looked at."""
    folder = find_source(base, None, code)
    check_folder(folder)
    return folder


def bare(path: Path, base: str | None, code: bool) -> Checkpoint:
    """A state dict in one file, possibly with an optimizer around it."""
    if not is_weights(path):
        raise BadCheckpoint(
            f"{path} is not a folder, and no state dict either (.safetensors, .bin, .pt, .pth, .ckpt)"
        )
    if base is None and not (path.parent / "config.json").is_file():
        raise BadArgument(
            f"{path} is a bare state dict: give the folder with its config.json and tokenizer with "
            "--base"
        )
    folder = about(base or str(path.parent), code)
    return Checkpoint(folder, read_config(folder), [path])


def from_meta(folder: Path, base: str | None, code: bool) -> Checkpoint:
    files, params = meta.meta_files(folder), meta.read_params(folder)
    parts = [look_into(path).tensors for path in files]
    shapes = meta.joined_shapes([{n: t.shape for n, t in p.items()} for p in parts], params["dim"])
    if base is not None:
        known = about(base, code)
        return Checkpoint(known, read_config(known), files, from_meta=True)
    config = meta.config_of(folder, shapes)
    config["torch_dtype"] = kind_of(parts[0])
    more = {"tokenizer_config.json": meta.SENTENCEPIECE}
    return Checkpoint(folder, config, files, from_meta=True, more=more)


def kind_of(tensors: dict[str, Tensor]) -> str:
    """The dtype of a checkpoint whose config does not say it."""
    return next((t.dtype for t in tensors.values() if t.dtype.endswith(("16", "32"))), "bfloat16")


def own_name(name: str) -> str | None:
    """The name of a stream tensor without the modules around it; None for any other tensor."""
    name = name.removeprefix("module.").removeprefix(STREAMS_PREFIX)
    return name if is_stream(name) else None
