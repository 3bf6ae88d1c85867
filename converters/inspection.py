"""What a file or folder is, told without running or converting anything."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from mlx_specstream.errors import BadCheckpoint, SpecStreamError
from mlx_specstream.model.checkpoint import (
    DESCRIPTION,
    WEIGHTS,
    compare,
    find_streams,
    fingerprint,
    read_description,
)

from .accounting import Tensor
from .apart import is_adapter
from .folder import check_folder
from .formats import Checkpoint, open_checkpoint, own_name
from .mlx_adapter import WEIGHTS as MLX_ADAPTER
from .model_card import streams_in_words
from .new_folder import scratch_folder
from .peft_adapter import WEIGHTS as PEFT_ADAPTER
from .safetensors_header import read_header
from .source import check_remote_code, find_source
from .staging import staged_model
from .torch_streams import FILE
from .weight_file import look_into
from .weights import read_json

SIZE_KEYS = ("hidden_size", "n_embd", "vocab_size", "num_attention_heads", "num_key_value_heads")


class Report(dict):
    """label -> value, in the order of the telling; `problems` says why something is not safe."""

    def __init__(self, path: str):
        super().__init__(path=path)
        self.problems: list[str] = []

    def attempt(self, look, *args) -> None:
        """Let `look(self, *args)` tell its part; what it refuses becomes a problem."""
        try:
            look(self, *args)
        except (SpecStreamError, OSError) as error:
            self.problems.append(" ".join(str(error).split()))


def inspect(path: str | Path, revision: str | None = None) -> Report:
    """Describe a model folder, a streams folder, an adapter folder or one file of weights.

    Args:
        path: of it, or the id of a repository of the Hub, which is downloaded as for a conversion.
        revision: of the repository.

    Raises: BadCheckpoint when there is nothing to describe. What is damaged or unsafe about it is
    told in the report.
    """
    report, path = Report(str(path)), Path(path).expanduser()
    if not path.exists():
        # Its code comes along to be told of; it is never run.
        path = find_source(report["path"], revision, code=True)
        report["downloaded to"] = str(path)
    if path.is_file():
        report.attempt(tell_file, path)
    elif not path.is_dir():
        raise BadCheckpoint(f"{path} is neither a file nor a folder")
    elif is_adapter(path):
        report.attempt(checked(tell_adapter), path)
    elif any((path / name).exists() for name in ("config.json", "params.json")):
        report["kind"] = "model folder"
        report.attempt(tell_model, path)
    elif (path / FILE).exists():
        report.attempt(checked(tell_file, FILE), path)
    elif (path / DESCRIPTION).exists():
        report.attempt(checked(lambda report, path: tell_streams(report, path, None)), path)
    else:
        raise BadCheckpoint(
            f"{path}: neither a model (config.json), an adapter (adapter_config.json) nor streams "
            f"({DESCRIPTION})"
        )
    report["safe"] = "no" if report.problems else "yes"
    return report


def checked(tell: Callable, name: str = "") -> Callable:
    """`tell` about a folder, or a file in it, once nothing is wrong with the folder: a pipe would
    be waited for."""

    def run(report: Report, folder: Path) -> None:
        check_folder(folder)
        tell(report, folder / name)

    return run


def tell_file(report: Report, path: Path) -> None:
    inside = look_into(path)
    streams = all(map(own_name, inside.tensors)) and inside.tensors
    report["kind"] = f"{inside.kind} file" + (" of streams, for PyTorch" if streams else "")
    report["size"] = megabytes(path.stat().st_size)
    if inside.kind == "safetensors" and inside.values:
        report["metadata"] = ", ".join(f"{k}={v}" for k, v in inside.values.items())[:200]
    if inside.ignored:
        report["beside the tensors"] = ", ".join(inside.ignored)[:200]
    if inside.unused:
        report["bytes of no tensor"] = str(inside.unused)
    tell_tensors(report, inside.tensors.values())


def tell_tensors(report: Report, tensors: Collection[Tensor]) -> None:
    numbers = Counter()
    for tensor in tensors:
        numbers[tensor.dtype] += math.prod(tensor.shape)
    report["tensors"] = str(len(tensors))
    report["numbers"] = ", ".join(f"{count:,} {dtype}" for dtype, count in numbers.items())
    if streams := sum(own_name(tensor.name) is not None for tensor in tensors):
        report["stream tensors"] = str(streams)


def tell_model(report: Report, folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    original, files = checkpoint.config, checkpoint.files
    report["architecture"] = str(original.get("model_type"))
    text = original.get("text_config")
    text = {**original, **(text if isinstance(text, dict) else {})}
    layers = text.get("num_hidden_layers", text.get("n_layer"))
    sizes = [f"{key} {text[key]}" for key in SIZE_KEYS if key in text]
    report["sizes"] = ", ".join([f"{layers} layers", *sizes])
    if isinstance(quantization := original.get("quantization"), dict):
        plain = [f"{k} {v}" for k, v in quantization.items() if not isinstance(v, dict)]
        report["quantisation"] = ", ".join(plain)
    code = sorted(path.name for path in folder.glob("*.py"))
    if code:
        report["python files"] = f"{', '.join(code)} (never run)"
    for note in check_remote_code(original, False):
        report["note"] = note
    found = [look_into(path) for path in files]
    kinds = " and ".join(sorted({inside.kind for inside in found}))
    size = megabytes(sum(path.stat().st_size for path in files))
    report["weights"] = f"{len(files)} files, {kinds}, {size}"
    tell_tensors(report, [tensor for inside in found for tensor in inside.tensors.values()])
    base = None
    if kinds == "safetensors":
        base = base_of(checkpoint)
        report["fingerprint"] = digest(base)
    else:
        report["fingerprint"] = "not known before the pickled weights are converted"
    if (streams := find_streams(folder)) is not None:
        tell_streams(report, streams, base)


def base_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The fingerprint of a model; only the few tensors that it samples are read."""
    with scratch_folder() as room, staged_model(checkpoint, room) as model:
        return fingerprint(model)


def digest(base: dict[str, Any]) -> str:
    """A fingerprint in 16 characters: the same weights, whatever the folder is called."""
    text = json.dumps(base, sort_keys=True)
    return f"{hashlib.sha256(text.encode()).hexdigest()[:16]}, {base.get('model_type', '?')}"


def tell_streams(report: Report, folder: Path, base: dict[str, Any] | None) -> None:
    description = read_description(folder)
    config, training = description["config"], description.get("training")
    header = read_header(folder / WEIGHTS)
    report.setdefault("kind", "streams folder")
    count = sum(math.prod(t.shape) for t in header.tensors.values())
    report["streams"] = f"{streams_in_words(config)}, {count:,} numbers"
    report["streams are lossless"] = "no" if config.main_sees_streams else "yes"
    report["trained on"] = digest(description["base"])
    if isinstance(training, dict) and "steps" in training:
        report["training"] = f"{training['steps']} steps"
    if base is not None:
        kind, why = compare(description["base"], base)
        report["match"] = f"{kind}: {why}"


def tell_adapter(report: Report, folder: Path) -> None:
    config = read_json(folder / "adapter_config.json")
    base = config.get("base_model_name_or_path") or config.get("model")
    for path in (folder / name for name in (*PEFT_ADAPTER, MLX_ADAPTER)):
        if path.is_file():
            tell_file(report, path)
    report["kind"] = f"{'PEFT' if 'peft_type' in config else 'mlx-lm'} adapter folder"
    report["base"] = str(base)[:200]
    for key in ("r", "lora_alpha", "use_rslora", "use_dora", "fine_tune_type", "num_layers"):
        if config.get(key) is not None:
            report[key] = str(config[key])[:60]


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
