"""Adapters and streams without their base, sources that lack a file, and what --base is for."""

import json
import shutil
import time
from pathlib import Path

import mlx.core as mx
import pytest
from test_cli import fails, run
from test_convert import copy_golden
from test_convert_sources import SOURCES, adapter, assert_reaches

from mlx_specstream.converters import convert
from mlx_specstream.converters.families import PREFIX
from mlx_specstream.converters.peft_adapter import read_peft
from mlx_specstream.errors import BadCheckpoint, SpecStreamError

ROOT = Path(__file__).resolve().parents[1]
STREAMS = ROOT / "examples/streams/e2e-sql-14m"


def command(capsys, source, target, *options):
    return run(capsys, "convert", "--hf-path", source, "--mlx-path", target, *options)


def test_an_adapter_beside_the_config_of_its_base(tmp_path):
    """As some training programs save it."""
    folder = adapter(tmp_path)
    shutil.copy(SOURCES.parent / "golden/llama/config.json", folder)
    convert(copy_golden(tmp_path / "hf"), tmp_path / "base")
    convert(folder, tmp_path / "apart", base=tmp_path / "hf")
    assert_reaches("lora", tmp_path / "base", tmp_path / "apart")


def test_an_adapter_of_another_base_is_noticed_apart_too(tmp_path, capsys):
    for other in ("llama_bf16", "opt"):
        base = copy_golden(tmp_path / other, other)
        argv = ["--hf-path", SOURCES / "lora", "--mlx-path", tmp_path / "out", "--base", base]
        assert "adapter does not fit the base" in fails(capsys, "convert", *argv)
    folder = adapter(tmp_path, base_model_name_or_path=str(base))  # where it was trained
    with pytest.raises(BadCheckpoint, match="does not fit the base"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_the_hub(tmp_path, monkeypatch):
    def download(repo, revision=None, allow_patterns=None):
        assert (repo, revision) == ("someone/lora", "v3")
        assert "adapter_model.*" in allow_patterns
        return str(SOURCES / "lora")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    names = ["adapter_config.json", "adapter_model.safetensors"]
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda *a, **k: names)
    monkeypatch.chdir(tmp_path)
    convert("someone/lora", "apart", revision="v3")
    assert (tmp_path / "apart/adapters.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "word"), [(("-q",), "quantize"), (("--dtype", "float16"), "dtype")]
)
def test_what_only_a_model_can_have_is_refused(options, word, tmp_path, capsys):
    argv = ["--hf-path", SOURCES / "lora", "--mlx-path", tmp_path / "out", *options]
    assert f"'{word}' is for a model" in fails(capsys, "convert", *argv)
    assert list(tmp_path.iterdir()) == []


def test_dry_runs_of_adapters_and_streams(tmp_path, capsys):
    code, out, _ = command(capsys, SOURCES / "lora", tmp_path / "out", "--dry-run")
    made = "adapters.safetensors: model.layers.0.self_attn.q_proj.lora_a [24, 5] float32 <- lora"
    assert (code, made in out.splitlines()) == (0, True)
    source = tmp_path / "torch"
    assert run(capsys, "export", "--model", STREAMS, "--out", source)[0] == 0
    code, out, _ = command(capsys, source, tmp_path / "out", "--dry-run")
    tensors = mx.load(str(STREAMS / "streams.safetensors"))
    said = {line.split()[1]: line for line in out.splitlines()}
    assert said.keys() == tensors.keys()
    shape = list(tensors["embeddings"].shape)
    assert f"streams.safetensors: embeddings {shape} float32 <- torch" in said.values()
    assert not (tmp_path / "out").exists()


def test_a_dry_run_names_what_the_file_has(tmp_path, capsys):
    """Meta's names, and streams among the weights."""
    source = tmp_path / "meta"
    shutil.copytree(SOURCES / "meta", source)
    code, out, _ = command(capsys, source, tmp_path / "out", "--dry-run")
    assert code == 0
    name = "model.layers.1.self_attn.q_proj.weight [24, 24] float32"
    was = "consolidated.00.pth: layers.1.attention.wq.weight as"
    assert f"{name} <- {was} {name}" in out.splitlines()
    code, out, _ = command(capsys, SOURCES / "streams", tmp_path / "out", "--dry-run")
    assert code == 0
    made = [line for line in out.splitlines() if line.startswith("streams: ")]
    convert(with_streams(tmp_path), tmp_path / "real")
    stored = mx.load(str(tmp_path / "real/streams/streams.safetensors"))
    expected = {f"streams: {k} {list(v.shape)} float32" for k, v in stored.items()}
    assert {line.split(" <- ")[0] for line in made} == expected


def with_streams(tmp_path):
    """A PyTorch checkpoint that was trained with streams, and a tokenizer."""
    source = tmp_path / "hf"
    shutil.copytree(SOURCES / "streams", source)
    for path in copy_golden(tmp_path / "other").glob("tokenizer*"):
        shutil.copy(path, source)
    return source


def test_the_tokenizer_of_another_folder(tmp_path):
    folder, base = copy_golden(tmp_path / "hf"), copy_golden(tmp_path / "base")
    (base / "LICENSE").write_text("of the base")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(BadCheckpoint, match=r"tokenizer is missing.*--base"):
        convert(folder, tmp_path / "out")
    lines = []
    convert(folder, tmp_path / "out", base=base, report=True, log=lines.append)
    assert "100.0%" in lines[-2]
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert not (tmp_path / "out/LICENSE").exists()
    assert not any("--base" in line for line in lines)
    convert(base, tmp_path / "out2", base=folder, log=lines.append)
    assert any("lacks nothing, so --base was not used" in line for line in lines)


def test_streams_for_a_base_that_is_not_converted_yet(tmp_path):
    """A pickled checkpoint of transformers as --base: its fingerprint is that of the conversion."""
    source = with_streams(tmp_path)
    convert(source, tmp_path / "whole")
    whole = json.loads((tmp_path / "whole/streams/streams.json").read_text())
    from mlx_specstream.converters.export import export

    export(tmp_path / "whole/streams", tmp_path / "torch")
    convert(tmp_path / "torch", tmp_path / "again", base=source)
    again = json.loads((tmp_path / "again/streams.json").read_text())
    assert again["base"] == whole["base"]


def test_adapters_that_changed_their_base_are_refused(tmp_path):
    for begin in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga"):
        folder = adapter(tmp_path, init_lora_weights=begin)
        with pytest.raises(SpecStreamError, match=f"'{begin}', which changed the base"):
            convert(folder, tmp_path / "out")
        shutil.rmtree(folder)
    for begin in (True, "gaussian", "eva"):
        read_peft(adapter(tmp_path, init_lora_weights=begin), "llama")
        shutil.rmtree(tmp_path / "adapter")


def renamed_adapter(tmp_path, prefix, **changes):
    """The golden adapter with the modules of another family."""
    folder = adapter(tmp_path, **changes)
    path = folder / "adapter_model.safetensors"
    old = mx.load(str(path))
    inner = "base_model.model."
    mx.save_safetensors(
        str(path), {n.replace(f"{inner}model.", f"{inner}{prefix}"): v for n, v in old.items()}
    )
    return folder


def test_an_alpha_of_its_own_is_for_the_name_that_peft_saw(tmp_path):
    own = {"transformer.layers.1.self_attn.q_proj": 15, "layers.2.self_attn.q_proj": 20}
    folder = renamed_adapter(
        tmp_path, PREFIX["gpt2"], alpha_pattern=own, lora_alpha=10, use_rslora=False
    )
    scales = {name: u.scale for name, u in read_peft(folder, "gpt2").updates.items()}
    assert scales["layers.0.self_attn.q_proj"] == 10 / 5
    assert scales["layers.1.self_attn.q_proj"] == 15 / 5
    assert scales["layers.2.self_attn.q_proj"] == 20 / 5


@pytest.mark.parametrize(
    "key",
    [
        ".*.*.*.*.*x",
        ".{0,400}.{0,400}.{0,400}x",
        "(a+)+x",
        "(.*|.+)*x",
        "a" * 200_000,
    ],
)
def test_patterns_that_could_match_for_ever(key, tmp_path):
    folder = adapter(tmp_path, alpha_pattern={key: 1})
    path = folder / "adapter_model.safetensors"
    long = "base_model.model." + "a." * 220 + "q"
    shapes = {"lora_A": (2, 6), "lora_B": (4, 2)}
    mx.save_safetensors(str(path), {f"{long}.{k}.weight": mx.ones(v) for k, v in shapes.items()})
    began = time.process_time()
    with pytest.raises(BadCheckpoint, match="match for ever"):
        read_peft(folder, "llama")
    assert time.process_time() - began < 2
