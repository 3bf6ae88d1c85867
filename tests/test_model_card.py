"""What the card of a result says about how it was made, and how it is loaded."""

import json
from pathlib import Path

import mlx.core as mx
import pytest
from test_cli import run
from test_convert import copy_golden
from test_convert_sources import SOURCES, adapter

from mlx_specstream.converters import convert, model_card
from mlx_specstream.converters.export import export

STREAMS = Path(__file__).resolve().parents[1] / "examples/streams/e2e-sql-14m"


def card(folder):
    return (folder / "README.md").read_text()


def test_a_merged_adapter_is_named(tmp_path):
    convert(copy_golden(tmp_path / "hf"), tmp_path / "out", adapter=adapter(tmp_path))
    assert "- adapter merged into the weights: adapter\n" in card(tmp_path / "out")
    assert str(tmp_path) not in card(tmp_path / "out")
    convert(tmp_path / "hf", tmp_path / "plain")
    assert "adapter" not in card(tmp_path / "plain")


def test_dequantised_weights_say_so(tmp_path):
    convert(copy_golden(tmp_path / "hf", "phi3"), tmp_path / "q", quantize=True, q_group_size=32)
    convert(tmp_path / "q", tmp_path / "out", dequantize=True)
    said = "- weights dequantised from: group_size 32, bits 4, mode affine\n"
    assert said in card(tmp_path / "out")
    assert "quantisation:" not in card(tmp_path / "out")
    convert(tmp_path / "hf", tmp_path / "plain", dequantize=True)
    assert "dequantised" not in card(tmp_path / "plain")


def test_an_adapter_kept_apart(tmp_path):
    convert(adapter(tmp_path, base_model_name_or_path="someone/base"), tmp_path / "out")
    text = card(tmp_path / "out")
    assert "base_model: someone/base\n" in text
    for line in ("source: adapter", "base: someone/base", "kind: LoRA", "rank: 5; the scales"):
        assert f"- {line}" in text
    assert "adapter_path=" in text
    assert "It loads with `mlx_lm.load`" not in text
    convert(tmp_path / "adapter", tmp_path / "based", base=copy_golden(tmp_path / "hf"))
    assert "- base: hf\n" in card(tmp_path / "based")
    assert "base_model" not in card(tmp_path / "based")  # a folder has no address
    trained = adapter(tmp_path / "two", base_model_name_or_path="/home/somebody/secret/base")
    convert(trained, tmp_path / "out2")
    assert "- base: base\n" in card(tmp_path / "out2")
    assert "secret" not in card(tmp_path / "out2")


def test_streams_alone(tmp_path):
    export(STREAMS, tmp_path / "torch")
    convert(tmp_path / "torch", tmp_path / "out")
    text, about = card(tmp_path / "out"), json.loads((STREAMS / "streams.json").read_text())
    config = about["config"]
    said = f"- streams: {config['num_streams']} streams over the top {config['msa_layers']} layers"
    assert said in text
    assert "- source: torch\n" in text
    assert f"- they belong to: a 'llama' of {about['base']['num_layers']} layers\n" in text
    assert "streams=" in text
    assert "It loads with `mlx_lm.load`" not in text


def test_a_class_that_mlx_lm_lacks(tmp_path):
    convert(copy_golden(tmp_path / "hf", "opt"), tmp_path / "out")
    assert "`mlx_lm.load`" not in card(tmp_path / "out")
    assert "It loads with `mlx_specstream.load`" in card(tmp_path / "out")
    assert "mlx-lm itself lacks this architecture" in card(tmp_path / "out")


def test_a_state_dict_and_the_folder_of_its_config(tmp_path):
    base = copy_golden(tmp_path / "base", "phi3")
    tensors = mx.load(str(base / "model.safetensors"))
    mx.save_safetensors(str(tmp_path / "last.safetensors"), tensors)
    convert(tmp_path / "last.safetensors", tmp_path / "out", base=base)
    assert "- source: last.safetensors\n" in card(tmp_path / "out")
    assert "- config.json and tokenizer from: base\n" in card(tmp_path / "out")


@pytest.mark.parametrize("path", ["/a/b/c", "~/c", "./a/c", "a/b/c"])
def test_a_path_is_told_by_its_name(path):
    assert model_card.told(path) == "c"
    assert model_card.told("someone/model") == "someone/model"


def test_a_dry_run_writes_no_card(tmp_path, capsys):
    argv = ["--hf-path", SOURCES / "lora", "--mlx-path", tmp_path / "out", "--dry-run"]
    assert run(capsys, "convert", *argv)[0] == 0
    assert not (tmp_path / "out").exists()
