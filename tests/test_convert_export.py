"""The way back to Hugging Face's form: bit by bit what came in, or a refusal."""

import json

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from test_cli import run
from test_convert import GOLDEN, copy_golden
from test_convert_streams import add_tokenizer, bits

from mlx_specstream.converters import convert
from mlx_specstream.converters.export import check_gives_back, export
from mlx_specstream.converters.staging import load_staged
from mlx_specstream.converters.torch_pickle import load_torch
from mlx_specstream.errors import BadArgument, UnsupportedModel
from mlx_specstream.model.architectures import model_classes

MODELS = sorted(path.name for path in GOLDEN.iterdir())


def tensors_of(folder):
    found = {}
    for path in [*folder.glob("model*.safetensors"), *folder.glob("pytorch_model-*.bin")]:
        found |= load_torch(path) if path.suffix == ".bin" else mx.load(str(path))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_bit_equal(name, tmp_path):
    folder = copy_golden(tmp_path / "hf", name)
    convert(folder, tmp_path / "mlx")
    export(tmp_path / "mlx", tmp_path / "back")
    got, expected = bits(tensors_of(tmp_path / "back")), bits(tensors_of(folder))
    expected.pop("lm_head.weight", None) if "lm_head.weight" not in got else None
    if name == "gpt2":  # the file of today has a prefix that the published ones have not
        expected = {key.removeprefix("transformer."): value for key, value in expected.items()}
    assert got == expected
    # And what came back converts again, to the same folder.
    convert(tmp_path / "back", tmp_path / "again")
    assert bits(tensors_of(tmp_path / "again")) == bits(tensors_of(tmp_path / "mlx"))


def test_convolutions_are_turned_back(tmp_path):
    """mlx-lm takes them either way round, transformers does not."""
    config = {"model_type": "mamba", "vocab_size": 43, "hidden_size": 24, "intermediate_size": 48}
    config |= {"state_size": 6, "num_hidden_layers": 2, "conv_kernel": 4, "time_step_rank": 5}
    config |= {"use_bias": False, "use_conv_bias": True, "tie_word_embeddings": True}
    model_class, args_class = model_classes(config)
    weights = dict(tree_flatten(model_class(args_class.from_dict(config)).parameters()))
    folder = tmp_path / "mlx"
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    (folder / "config.json").write_text(json.dumps(config))
    add_tokenizer(folder)
    lines = []
    export(folder, tmp_path / "back", log=lines.append)
    back = tensors_of(tmp_path / "back")
    assert back["backbone.layers.1.mixer.conv1d.weight"].shape == (48, 1, 4)
    assert any("nobody has held the way back of 'mamba'" in line for line in lines)
    convert(tmp_path / "back", tmp_path / "again")
    assert bits(tensors_of(tmp_path / "again")) == bits(weights)


def test_large_models_are_written_in_shards(tmp_path, monkeypatch):
    folder = copy_golden(tmp_path / "hf")
    convert(folder, tmp_path / "mlx")

    def two(weights):
        names = list(weights)
        half = len(names) // 2
        return [{n: weights[n] for n in part} for part in (names[:half], names[half:])]

    monkeypatch.setattr("mlx_lm.utils.make_shards", two)
    export(tmp_path / "mlx", tmp_path / "back")
    table = json.loads((tmp_path / "back/model.safetensors.index.json").read_text())["weight_map"]
    assert set(table.values()) == {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    assert bits(tensors_of(tmp_path / "back")) == bits(tensors_of(folder))


def test_quantised_weights_are_dequantised_on_request(tmp_path):
    folder = copy_golden(tmp_path / "hf", "phi3")
    convert(folder, tmp_path / "q", quantize=True, q_group_size=32)
    with pytest.raises(BadArgument, match=r"quantised.*add --dequantize"):
        export(tmp_path / "q", tmp_path / "back")
    assert not (tmp_path / "back").exists()
    export(tmp_path / "q", tmp_path / "back", dequantize=True)
    assert "quantization" not in (tmp_path / "back/config.json").read_text()
    assert {v.dtype for v in tensors_of(tmp_path / "back").values()} == {mx.float32}


def test_a_class_that_changes_its_weights_has_no_way_back(tmp_path, monkeypatch):
    folder = copy_golden(tmp_path / "hf", "qwen3")
    convert(folder, tmp_path / "mlx")
    model, config = load_staged(tmp_path / "mlx", False)

    class Changing(type(model)):
        def sanitize(self, weights):
            return {k: v + 1 if k.endswith("q_norm.weight") else v for k, v in weights.items()}

    weights = dict(tree_flatten(model.parameters()))
    check_gives_back(dict(weights), dict(weights), config)
    classes = "mlx_specstream.converters.export.model_classes"
    monkeypatch.setattr(classes, lambda config: (Changing, model_classes(config)[1]))
    with pytest.raises(UnsupportedModel, match=r"'qwen3' has no way back.*q_norm"):
        check_gives_back(dict(weights), dict(weights), config)


def test_export_by_command(capsys, tmp_path):
    folder = copy_golden(tmp_path / "hf")
    convert(folder, tmp_path / "mlx")
    code, out, _ = run(capsys, "export", "--model", tmp_path / "mlx", "--out", tmp_path / "back")
    assert (code, out.strip()) == (0, str(tmp_path / "back"))
    code, out, err = run(capsys, "export", "--model", tmp_path / "mlx", "--out", tmp_path / "back")
    assert code == 2
    assert "already exists" in err
    assert (tmp_path / "back/tokenizer.json").read_bytes() == (
        folder / "tokenizer.json"
    ).read_bytes()


def large_folder(tmp_path):
    """A model of 12 layers and 40 MB, converted."""
    config = {"model_type": "llama", "vocab_size": 43, "hidden_size": 256, "num_hidden_layers": 12}
    config |= {"intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 2}
    config |= {"rms_norm_eps": 1e-6, "tie_word_embeddings": False}
    model_class, args_class = model_classes(config)
    weights = dict(tree_flatten(model_class(args_class.from_dict(config)).parameters()))
    folder = tmp_path / "mlx"
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    add_tokenizer(folder)
    return folder


def test_memory_holds_a_few_tensors(tmp_path):
    folder = large_folder(tmp_path)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    export(folder, tmp_path / "back")
    whole = (folder / "model.safetensors").stat().st_size
    assert whole > 30 << 20
    assert mx.get_peak_memory() - before < whole / 5
