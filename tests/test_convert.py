"""Whole conversions: the logits are those that transformers computes, files and types as asked."""

import json
import os
import shutil
import sys
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_specstream.converters import convert
from mlx_specstream.model.architectures import model_classes

GOLDEN = Path(__file__).parent / "golden"
MODELS = sorted(path.name for path in GOLDEN.iterdir())
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None,
    "decoder": None,
    "model": {"type": "WordLevel", "vocab": {"<unk>": 0, "a": 1, "b": 2}, "unk_token": "<unk>"},
}


def copy_golden(folder, name="llama", **changes):
    """Copy a golden model, give it a tokenizer, change its config; returns the folder."""
    shutil.copytree(GOLDEN / name, folder)
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    text = '{"tokenizer_class": "PreTrainedTokenizerFast"}\n'
    (folder / "tokenizer_config.json").write_text(text)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    return partial(copy_golden, tmp_path / "hf")


@pytest.fixture
def data():
    root = Path(__file__).parents[1]
    folder = Path(os.environ.get("SPECSTREAM_DATA", root.parent / "shared"))
    if not (folder / "models").is_dir():
        pytest.skip(f"no shared models in {folder}; set SPECSTREAM_DATA")
    return folder / "models"


def logits(folder, tokens):
    from mlx_lm.utils import load_model

    model, _ = load_model(folder, get_model_classes=model_classes)
    return np.array(model(mx.array([tokens]))[0].astype(mx.float32))  # [L, V]


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_transformers(name, checkpoint, tmp_path):
    target = tmp_path / "out"
    assert convert(checkpoint(name), target, dtype="float32") == target
    golden = json.loads((GOLDEN / name / "logits.json").read_text())
    expected = np.array(golden["logits"])
    difference = np.abs(logits(target, golden["tokens"]) - expected).max()
    assert difference <= 1e-4 * np.abs(expected).max()


def test_the_comparison_would_notice(checkpoint, tmp_path):
    convert(checkpoint("llama"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    golden = json.loads((GOLDEN / "llama" / "logits.json").read_text())
    expected = np.array(golden["logits"])
    for lost in ({"rope_theta": 1e4}, {"rope_scaling": None}):
        (tmp_path / "out" / "config.json").write_text(json.dumps({**config, **lost}))
        difference = np.abs(logits(tmp_path / "out", golden["tokens"]) - expected).max()
        assert difference > 1e-2 * np.abs(expected).max()


def test_shared_pickled_model_tells_its_story(data, tmp_path):
    import mlx_lm

    convert(data / "babyllama-0.9m", tmp_path / "q")
    model, tokenizer = mlx_lm.load(str(tmp_path / "q"))
    text = mlx_lm.generate(model, tokenizer, prompt=[tokenizer.bos_token_id], max_tokens=60)
    assert text.startswith("Once upon a time, there was a little girl named Lily.")


def test_shared_safetensors_model(data, tmp_path):
    import mlx_lm

    lines = []
    convert(data / "e2e-sql-14m", tmp_path / "q", log=lines.append)
    model, tokenizer = mlx_lm.load(str(tmp_path / "q"))
    assert lines[-1] == f"wrote {tmp_path / 'q'}"
    assert model.args.rope_theta == 10000.0
    assert tokenizer.chat_template == (data / "e2e-sql-14m/chat_template.jinja").read_text()


def test_files_and_types(checkpoint, tmp_path):
    folder = checkpoint("llama_bf16")
    (folder / "LICENSE.txt").write_text("mine")
    (folder / "modeling.py").write_text("raise SystemExit")
    os.umask(mask := os.umask(0))
    convert(folder, tmp_path / "new" / "out")
    out = tmp_path / "new" / "out"
    for name in ("tokenizer.json", "tokenizer_config.json", "LICENSE.txt"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    assert not (out / "modeling.py").exists()
    assert out.stat().st_mode & 0o777 == 0o777 & ~mask
    weights = mx.load(str(out / "model.safetensors"))
    assert {value.dtype for value in weights.values()} == {mx.bfloat16}
    convert(folder, tmp_path / "half", dtype="float16")
    weights = mx.load(str(tmp_path / "half" / "model.safetensors"))
    assert {value.dtype for value in weights.values()} == {mx.float16}


def test_quantise_and_back(checkpoint, tmp_path):
    lines = []
    folder = checkpoint("phi3")  # rows of 32, one group
    convert(folder, tmp_path / "q", quantize=True, q_bits=8, q_group_size=32, log=lines.append)
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert (config["quantization"]["bits"], config["quantization"]["group_size"]) == (8, 32)
    assert any("bits per weight" in line for line in lines)
    recipe = {"quantize": True, "quant_predicate": "mixed_3_6", "q_group_size": 32}
    convert(folder, tmp_path / "mixed", **recipe)
    config = json.loads((tmp_path / "mixed" / "config.json").read_text())
    assert {v["bits"] for v in config["quantization"].values() if isinstance(v, dict)} == {3, 6}
    convert(tmp_path / "mixed", tmp_path / "back", dequantize=True)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert "quantization" not in config
    assert "quantization_config" not in config


def test_the_source_is_never_written(checkpoint, tmp_path):
    folder = checkpoint("qwen2")
    before = {path: path.read_bytes() for path in folder.rglob("*")}
    for path in [*before, folder]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    convert(folder, tmp_path / "q")
    assert {path.name for path in (tmp_path / "q").glob("*.safetensors")} == {"model.safetensors"}
    folder.chmod(0o755)
    assert {path: path.read_bytes() for path in folder.rglob("*")} == before


def test_hub_downloads_one_kind_of_weights_and_no_code(checkpoint, tmp_path, monkeypatch):
    wanted, folder = [], checkpoint()
    names = ["model.safetensors", "pytorch_model.bin", "modeling.py"]
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda *a, **k: names)

    def download(repo, revision, allow_patterns):
        wanted.append((repo, revision, allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    convert("owner/name", tmp_path / "q", revision="v2")
    repo, revision, patterns = wanted[0]
    assert (repo, revision) == ("owner/name", "v2")
    assert "model*.safetensors" in patterns
    assert not {"pytorch_model*.bin", "*.py"} & set(patterns)


def test_the_name_is_the_function():
    import mlx_specstream.converters.conversion as module

    assert module.convert is convert
    assert "torch" not in sys.modules
