"""Inputs that are nearly right, and what must not happen to them quietly."""

import json
import os

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_adapters, load_model
from test_convert import copy_golden

from mlx_specstream.converters import convert
from mlx_specstream.converters.families import Part
from mlx_specstream.converters.inspection import inspect
from mlx_specstream.converters.peft_adapter import scale_of
from mlx_specstream.errors import BadCheckpoint, SpecStreamError

LAYER = "model.layers.1.self_attn.q_proj"


def quantised_with_adapter(tmp_path):
    """(a 4-bit model folder, a LoRA of one of its layers in mlx-lm's form)."""
    base = tmp_path / "q4"
    convert(copy_golden(tmp_path / "hf", "phi3"), base, quantize=True, q_group_size=32, q_bits=4)
    model, _ = load_model(base)
    layer = model.layers[1].self_attn.o_proj
    d_out, d_in = layer.weight.shape[0], layer.scales.shape[1] * 32
    adapter = tmp_path / "lora"
    adapter.mkdir()
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(d_in, 3)), rng.normal(size=(3, d_out))
    name = "model.layers.1.self_attn.o_proj"
    tensors = {f"{name}.lora_a": a, f"{name}.lora_b": 0.05 * b}
    mx.save_safetensors(
        str(adapter / "adapters.safetensors"),
        {k: mx.array(v.astype(np.float32)) for k, v in tensors.items()},
    )
    write_config(adapter, scale=1.5)
    return base, adapter


def write_config(adapter, **changes):
    parameters = {"rank": 3, "scale": 1.5, "dropout": 0.0, "keys": ["self_attn.o_proj"]} | changes
    about = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}
    (adapter / "adapter_config.json").write_text(json.dumps(about))


def test_an_adapter_on_a_quantised_base_is_not_rounded_on_the_way(tmp_path):
    base, adapter = quantised_with_adapter(tmp_path)
    convert(base, tmp_path / "out", adapter=adapter, dequantize=True, dtype="float32")
    tokens = mx.array([[3, 7, 11, 2]])
    want = load_adapters(load_model(base)[0], str(adapter))(tokens)
    got = load_model(tmp_path / "out")[0](tokens)
    plain = load_model(base)[0](tokens)
    assert float(mx.abs(want - plain).max()) > 1e-2, "the adapter does something"
    assert float(mx.abs(got - want).max()) < 1e-4 * float(mx.abs(want).max())


@pytest.mark.parametrize("scale", ["2", None, [1], float("nan")])
def test_a_scale_that_is_no_number(tmp_path, scale):
    base, adapter = quantised_with_adapter(tmp_path)
    write_config(adapter, scale=scale)
    with pytest.raises(BadCheckpoint, match="does not fit the base"):
        convert(base, tmp_path / "out", adapter=adapter)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "alpha", [pytest.param(10**400, id="huge"), float("nan"), float("inf"), "4", True, None]
)
def test_an_alpha_that_is_no_number(alpha):
    with pytest.raises(BadCheckpoint, match="lora_alpha"):
        scale_of({"lora_alpha": alpha}, {}, LAYER, 4)
    assert scale_of({"lora_alpha": 6}, {}, LAYER, 4) == 1.5


def test_a_damaged_folder_in_mlx_lm_s_layout_is_not_called_good(tmp_path):
    good = tmp_path / "good"
    convert(copy_golden(tmp_path / "hf"), good)
    lines = []
    assert convert(good, tmp_path / "a", log=lines.append) == good
    assert "nothing to convert" in lines[-1]
    config = json.loads((good / "config.json").read_text())
    for change in ({"num_hidden_layers": 9000}, {"hidden_size": 48}, {"hidden_size": 1 << 40}):
        (good / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(BadCheckpoint):
            convert(good, tmp_path / "a")
    (good / "config.json").write_text(json.dumps(config))
    (good / "tokenizer.json").unlink()
    with pytest.raises(BadCheckpoint, match="tokenizer"):
        convert(good, tmp_path / "a")


def test_links_and_pipes_where_streams_are_expected(tmp_path):
    folder, outside = tmp_path / "s", tmp_path / "outside.safetensors"
    folder.mkdir()
    mx.save_safetensors(str(outside), {"stream_embeddings.weight": mx.ones((2, 3))})
    (folder / "pytorch_streams.safetensors").symlink_to(outside)
    with pytest.raises(BadCheckpoint, match="link out of its folder"):
        convert(folder, tmp_path / "out")
    (folder / "pytorch_streams.safetensors").unlink()
    os.mkfifo(folder / "pytorch_streams.safetensors")
    assert inspect(folder)["safe"] == "no"  # and does not wait for somebody to write
    loop = copy_golden(tmp_path / "loop")
    (loop / "LICENSE").symlink_to("LICENSE")
    with pytest.raises(BadCheckpoint, match="leads nowhere"):
        convert(loop, tmp_path / "out")


def test_experts_of_another_shape():
    for part in (Part("x", expert=0, of_experts=2, half=0), Part("x", turned=True)):
        with pytest.raises(BadCheckpoint, match="shape"):
            part.of(mx.ones(7))


@pytest.mark.parametrize("factor", [{"a": 1}, float("nan")])
def test_rope_settings_that_make_no_sense(tmp_path, factor):
    folder = copy_golden(tmp_path / "hf", partial_rotary_factor=factor)
    with pytest.raises(BadCheckpoint, match=r"config\.json"):
        convert(folder, tmp_path / "out")


def test_a_rank_that_no_tensor_bears_out(tmp_path):
    """mlx-lm begins what the file lacks anew, random numbers of any rank, times zero."""
    base, adapter = quantised_with_adapter(tmp_path)
    write_config(adapter, rank=1 << 21)
    about = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**about, "fine_tune_type": "dora"}))
    d_out = load_model(base)[0].layers[1].self_attn.o_proj.weight.shape[0]
    magnitude = {"model.layers.1.self_attn.o_proj.m": mx.ones(d_out)}
    mx.save_safetensors(str(adapter / "adapters.safetensors"), magnitude)
    mx.reset_peak_memory()
    with pytest.raises(BadCheckpoint, match="does not fit the base: it holds no update"):
        convert(base, tmp_path / "out", adapter=adapter, dequantize=True)
    assert mx.get_peak_memory() < 64 << 20


@pytest.mark.parametrize("kind", [{"rope_type": "yarn"}, 7, None, ["llama"]])
def test_a_model_type_that_is_no_name(kind, tmp_path):
    folder = copy_golden(tmp_path / "hf", model_type=kind)
    with pytest.raises(SpecStreamError, match="model_type"):
        convert(folder, tmp_path / "out")
    assert inspect(folder)["safe"] == "no"


def test_rope_settings_make_no_warnings(tmp_path, recwarn):
    folder = copy_golden(tmp_path / "hf", rope_parameters={"rope_type": "default", "rope_theta": 0})
    with pytest.raises(BadCheckpoint):
        convert(folder, tmp_path / "out")
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]
