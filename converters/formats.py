"""What a source is, whatever its format: a config, and weights under the names of transformers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from mlx_specstream.errors import BadArgument, BadCheckpoint
from mlx_specstream.model.checkpoint import DESCRIPTION

from . import meta
from .families import Part, parts_of
from .folder import check_folder
from .hf_config import transformers_view
from .nested import clean_names
from .peft_adapter import PeftAdapter
from .safetensors_header import check_safetensors, read_header
from .safetensors_writer import write_safetensors
from .source import find_source, read_config
from .torch_pickle import describe_torch, load_torch, read_state
from .torch_streams import BASE, CONFIG, FILE, TRAINING, TorchStreams, is_stream
from .weights import find_weights, has_weights

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
STREAMS_PREFIX = "streams."  # a program may keep its streams in a module of this name
HEAD = "lm_head.weight"


class Shard(NamedTuple):
    """Some tensors of a checkpoint.

    Args:
        path: the file they come from, for lines.
        names: as transformers has them.
        tensors: the tensors, lazy where the file allows it (True: shapes alone, nothing is read);
            None for a safetensors file that holds just these and can be taken as it is.
    """

    path: Path
    names: set[str]
    tensors: Callable[[bool], dict[str, mx.array]] | None = None


@dataclass
class Checkpoint:
    """A model in any format that is read.

    Args:
        folder: where the tokenizer, generation settings and licence lie.
        config: as transformers writes it.
        files: the weights.
        adapter: of PEFT, merged into the weights on the way.
        from_meta: the files have Meta's names and may be parts of each tensor.
        more: text files that the folder lacks, by name.
        streams: found among the weights, once all shards have been read.
        notes: what was left out, for the user.
    """

    folder: Path
    config: dict
    files: list[Path]
    adapter: PeftAdapter | None = None
    from_meta: bool = False
    more: dict[str, str] = field(default_factory=dict)
    streams: TorchStreams | None = None
    notes: list[str] = field(default_factory=list)

    def take_adapter(self, adapter: PeftAdapter | Path) -> Path | None:
        """Merge an adapter of PEFT on the way; the folder of one of mlx-lm is given back."""
        if isinstance(adapter, Path):
            return adapter
        self.adapter = adapter
        # Added tokens make a longer embedding, which the adapter brings along.
        for name, value in adapter.replaced.items():
            if name.endswith(("embed_tokens.weight", "wte.weight")):
                self.config["vocab_size"] = value.shape[0]
        return None

    def shards(self, scratch: Path) -> Iterator[Shard]:
        """The weights, file by file; `scratch` takes what has to be written on the way."""
        if self.from_meta:
            yield self._joined(scratch)
            return
        names = {path: names_in(path) for path in self.files}
        self._look_beside(names)
        every = [name for inside in names.values() for name in inside]
        family = self.config.get("model_type")
        base = clean_names([n for n in every if not own_name(n)], family)
        view = {**(transformers_view(self.config) or self.config), "model_type": family}
        for path, inside in names.items():
            new = {}
            for name in inside:
                clean = base.get(name)
                if clean is None:  # of the streams
                    continue
                parts = parts_of(clean, view)
                if not parts or (view.get("tie_word_embeddings") and clean == HEAD):
                    self.notes.append(f"{path.name}: {name!r} is not needed and was left out")
                else:
                    new[name] = parts
            as_it_is = path.suffix == ".safetensors" and new == {n: [Part(n)] for n in inside}
            if as_it_is and not (self.adapter and any(map(self.adapter.changes, inside))):
                yield Shard(path, set(inside))
            else:
                names_here = {part.name for parts in new.values() for part in parts}
                yield Shard(path, names_here, self._reader(path, new))

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

    def _look_beside(self, names: dict[Path, list[str]]) -> None:
        """What lies in the files beside the weights: the streams' description, an optimizer."""
        for path, inside in names.items():
            values = values_in(path)
            about = [values.get(key) for key in (CONFIG, BASE, TRAINING)]
            if about[0] is not None and any(map(own_name, inside)):
                tensors = self.streams.tensors if self.streams else {}
                self.streams = TorchStreams(tensors, *about)
            if path.suffix in PICKLES:
                left = [
                    key for key in read_state(path).ignored if key not in (CONFIG, BASE, TRAINING)
                ]
                if left:
                    self.notes.append(f"{path.name}: left out: {', '.join(sorted(left)[:8])}")

    def _joined(self, scratch: Path) -> Shard:
        """Meta's parts as one shard; pickled ones become files that can be read piece by piece."""
        params = meta.read_params(self.files[0].parent)
        names = names_in(self.files[0])

        def read(hollow: bool) -> dict[str, mx.array]:
            parts = []
            for number, path in enumerate(self.files):
                if path.suffix in PICKLES and not hollow:
                    lazy = scratch / f"staged-part-{number:02d}.safetensors"
                    write_safetensors(lazy, load_torch(path))
                    parts.append(mx.load(str(lazy)).__getitem__)
                else:
                    parts.append(read_tensors(path, hollow).__getitem__)
            try:
                return dict(meta.joined(names, parts, params))
            except ValueError as error:  # shapes that cannot be joined or turned
                raise BadCheckpoint(f"{self.files[0].parent}: {error}") from None

        new = {meta.translate(name)[0] for name in names if name != meta.COMPUTED}
        return Shard(self.files[0], new, read)


def open_checkpoint(
    path: str,
    base: str | None = None,
    revision: str | None = None,
    code: bool = False,
) -> Checkpoint:
    """Find out what a path or hub id is.

    Args:
        base: a folder or hub id with what the source lacks: config.json and the tokenizer of a bare
            state dict, config.json of a Meta checkpoint.
        code: Python files may be downloaded, too.

    Raises: BadCheckpoint when it is nothing that is read.
    """
    given = Path(path).expanduser()
    if given.is_file():
        return bare(given, base, code)
    folder = find_source(path, revision, code)
    check_folder(folder)
    if (folder / DESCRIPTION).is_file() and not (folder / "config.json").is_file():
        raise BadCheckpoint(
            f"{folder} is a streams folder: load it with --streams, or write it for PyTorch with "
            "mlx-specstream export"
        )
    if meta.is_meta(folder) and not has_weights(folder):
        return from_meta(folder, base, code)
    if (folder / "config.json").is_file() and not has_weights(folder):
        loose = [p for p in sorted(folder.iterdir()) if p.suffix in PICKLES and p.is_file()]
        if len(loose) == 1:
            return bare(loose[0], base or str(folder), code)
    config = read_config(folder)
    files = find_weights(folder)
    if (folder / FILE).is_file():
        files.append(folder / FILE)
    return Checkpoint(folder, config, files)


def bare(path: Path, base: str | None, code: bool) -> Checkpoint:
    """A state dict in one file, possibly with an optimizer around it."""
    if path.suffix not in (*PICKLES, ".safetensors"):
        raise BadCheckpoint(
            f"{path} is not a folder, and no state dict either (.safetensors, {', '.join(PICKLES)})"
        )
    if base is None and not (path.parent / "config.json").is_file():
        raise BadArgument(
            f"{path} is a bare state dict: give the folder with its config.json and tokenizer with "
            "--base"
        )
    folder = path.parent if base is None else find_source(base, None, code)
    check_folder(folder)
    return Checkpoint(folder, read_config(folder), [path])


def from_meta(folder: Path, base: str | None, code: bool) -> Checkpoint:
    files, params = meta.meta_files(folder), meta.read_params(folder)
    parts = [{n: t.shape for n, t in read_tensors(path, True).items()} for path in files]
    if not all(part.keys() == parts[0].keys() for part in parts):
        raise BadCheckpoint(f"{folder}: the parts do not hold the same tensors")
    shapes = meta.joined_shapes(parts, params["dim"])
    about = folder if base is None else find_source(base, None, code)
    check_folder(about)
    config = meta.config_of(folder, shapes) if base is None else read_config(about)
    kind = {mx.float32: "float32", mx.float16: "float16"}
    first = next(iter(read_tensors(files[0], True).values()))
    config.setdefault("torch_dtype", kind.get(first.dtype, "bfloat16"))
    more = {} if base else {"tokenizer_config.json": meta.SENTENCEPIECE}
    return Checkpoint(about, config, files, from_meta=True, more=more)


def own_name(name: str) -> str | None:
    """The name of a stream tensor without the modules around it; None for any other tensor."""
    name = name.removeprefix("module.").removeprefix(STREAMS_PREFIX)
    return name if is_stream(name) else None


def names_in(path: Path) -> list[str]:
    if path.suffix in PICKLES:
        return list(read_state(path).tensors)
    return sorted(check_safetensors(path))


def values_in(path: Path) -> dict:
    """What a file says beside its tensors."""
    return read_state(path).values if path.suffix in PICKLES else read_header(path).metadata


def read_tensors(path: Path, hollow: bool) -> dict[str, mx.array]:
    """The tensors of a file; hollow ones have shape and dtype alone."""
    if path.suffix in PICKLES:
        return describe_torch(path) if hollow else load_torch(path)
    check_safetensors(path)
    return mx.load(str(path))  # lazy anyway
