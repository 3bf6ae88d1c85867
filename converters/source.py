"""The Hugging Face folder to convert: where it is, what it may not ask for, what is copied."""

import contextlib
import shutil
from fnmatch import fnmatch
from pathlib import Path

from mlx_specstream.errors import BadCheckpoint, UnsupportedModel
from mlx_specstream.hub import resolve

from .plausible import check_plausible
from .weights import read_json

CONFIG_FILES = ("config.json", "generation_config.json", "hf_quant_config.json")
VOCABULARY_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v*",  # Mistral's SentencePiece files
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "*.tiktoken",
    "tiktoken.model",
)
TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "merges.txt",
)
OTHER_FILES = (
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)  # a licence travels with its weights
CARD = "README.md"  # not copied: the result gets one of its own
NEEDED_FILES = (*CONFIG_FILES, *TOKENIZER_FILES)
STREAMS_FILES = ("streams.json", "streams.safetensors", "streams/*", "pytorch_streams.safetensors")
CODE_FILES = ("*.py",)  # copied on request only
# Many repositories hold the weights several times: the first kind that is there is taken.
WEIGHT_FILES = (
    ("model*.safetensors", "model.safetensors.index.json"),
    ("pytorch_model*.bin", "pytorch_model.bin.index.json"),
    ("consolidated*.safetensors", "params.json"),
    ("consolidated*.pth", "params.json"),
)
ADAPTER_FILES = ("adapter_config.json", "adapter_model.*", "adapters.safetensors")
BARE_FILES = ("*.pt", "*.pth", "*.ckpt")  # of research


def find_source(hf_path: str, revision: str | None = None, code: bool = False) -> Path:
    """A local folder as it is, or a Hub id after its download.

    Raises: BadCheckpoint when there is no such folder or the download fails.
    """
    return resolve(hf_path, lambda repo: download(repo, revision, code))


def download(repo: str, revision: str | None, code: bool) -> str:
    from huggingface_hub import list_repo_files, snapshot_download

    wanted = [*NEEDED_FILES, *STREAMS_FILES, *OTHER_FILES, CARD, *(CODE_FILES if code else ())]
    try:
        names = list_repo_files(repo, revision=revision)
        kinds = [kind for kind in WEIGHT_FILES if any(fnmatch(name, kind[0]) for name in names)]
        wanted += kinds[0] if kinds else (*ADAPTER_FILES, *BARE_FILES)
        return snapshot_download(repo, revision=revision, allow_patterns=wanted)
    except Exception as online:
        # Offline, or the Hub is down: an earlier download will do, if need be one by `generate`. It
        # holds one kind of weights.
        for kind in (*WEIGHT_FILES, ADAPTER_FILES[1:], BARE_FILES, STREAMS_FILES):
            for rest in (wanted, NEEDED_FILES):
                with contextlib.suppress(Exception):
                    folder = snapshot_download(
                        repo,
                        revision=revision,
                        allow_patterns=[*rest, *ADAPTER_FILES[:1], *kind],
                        local_files_only=True,
                    )
                    if any(any(Path(folder).glob(pattern)) for pattern in kind):
                        return folder
        raise online from None


def find_adapter(path: str) -> Path:
    """The folder of an adapter, local or from the Hub. Raises: as `find_source`."""

    def bring(repo: str) -> str:
        from huggingface_hub import snapshot_download

        wanted = [*ADAPTER_FILES, *TOKENIZER_FILES, *OTHER_FILES]
        return snapshot_download(repo, allow_patterns=wanted)

    return resolve(path, bring)


def read_config(folder: Path) -> dict:
    """config.json of a model folder. Raises: BadCheckpoint when it is missing or damaged."""
    from mlx_lm.utils import load_config

    if not (folder / "config.json").is_file():
        raise BadCheckpoint(f"{folder}: not a model folder, config.json is missing")
    for name in CONFIG_FILES:
        if (folder / name).is_file():
            check_plausible(read_json(folder / name))  # mlx-lm trusts these to be objects
    return load_config(folder)


def check_remote_code(config: dict, trusted: bool) -> list[str]:
    """Refuse a model that Python files of its own define; they are never run.

    Returns: a note where the files are only an older copy of code that the libraries hold.
    Raises: UnsupportedModel naming the file, unless `trusted`.
    """
    model_file = config.get("model_file")
    if model_file is not None:
        if not isinstance(model_file, str) or Path(model_file).name != model_file:
            raise BadCheckpoint(
                f"config.json: 'model_file' must be a file name of the folder, not {model_file!r}"
            )
        if not trusted:
            raise UnsupportedModel(
                f"config.json wants to run the Python file {model_file!r}; it was not run. Pass "
                "--trust-remote-code if you trust the model's author"
            )
    auto_map = config.pop("auto_map", None)  # gone, so that nobody asks about it later
    if not auto_map:
        return []
    entry = auto_map.get("AutoModelForCausalLM") if isinstance(auto_map, dict) else str(auto_map)
    if entry and not trusted and not is_stock(str(entry), config.get("model_type")):
        raise UnsupportedModel(
            f"config.json defines the model by Python code of its own ({entry}); it was not run. "
            f"Pass --trust-remote-code to convert it as a plain {config.get('model_type')!r} "
            "(the code is not run then either)"
        )
    return ["config.json names Python code ('auto_map'): it is not run, mlx-lm's class is used"]


def is_stock(entry: str, model_type) -> bool:
    """Whether remote code is a copy of transformers' own class, or what mlx-lm's was written for.

    `entry` looks like `modeling_phi3.Phi3ForCausalLM`. A model type that transformers lacks and
    mlx-lm has was written from the remote code.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    own = entry.rpartition(".")[2]
    return isinstance(model_type, str) and own == NAMES.get(model_type, own)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a vocabulary, in any of its forms."""
    return any(any(folder.glob(pattern)) for pattern in VOCABULARY_FILES)


def copy_files(folder: Path, target: Path, code: bool = False) -> None:
    """Copy the tokenizer, generation settings and licence byte for byte, and nothing else."""
    copy_matching(folder, target, (*OTHER_FILES, *(CODE_FILES if code else ())))
    copy_tokenizer(folder, target)


def copy_tokenizer(folder: Path, target: Path) -> None:
    copy_matching(folder, target, TOKENIZER_FILES)


def copy_matching(folder: Path, target: Path, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        for path in sorted(folder.glob(pattern)):
            if path.is_file():
                copy = target / path.relative_to(folder)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, copy)  # contents only: the source may be read-only
