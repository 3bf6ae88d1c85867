"""Sources that are no Hugging Face folder: Meta's files, state dicts, adapters, converted folders."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_adapters, load_model
from test_convert import GOLDEN, copy_golden
from test_convert_pickle import call, name, ops, state, storage, tensor, write_legacy, write_zip
from test_convert_streams import add_tokenizer

from mlx_specstream.converters import convert
from mlx_specstream.converters.families import Part, parts_of
from mlx_specstream.converters.meta import config_of, halves
from mlx_specstream.converters.nested import clean_names, find_state
from mlx_specstream.converters.torch_pickle import load_torch, read_state
from mlx_specstream.errors import BadArgument, BadCheckpoint, SpecStreamError, UnsupportedModel
from mlx_specstream.model.architectures import model_classes

SOURCES = Path(__file__).parent / "golden_sources"


def logits(folder, tokens, adapter=None):
    model, _ = load_model(folder, get_model_classes=model_classes)
    if adapter:
        model = load_adapters(model, str(adapter))
        model.eval()
    return np.array(model(mx.array([tokens]))[0].astype(mx.float32))


def assert_reaches(source, folder, adapter=None):
    golden = json.loads((SOURCES / source / "logits.json").read_text())
    expected = np.array(golden["logits"])
    got = logits(folder, golden["tokens"], adapter)
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.fixture
def meta(tmp_path):
    folder = tmp_path / "meta"
    shutil.copytree(SOURCES / "meta", folder)
    add_tokenizer(folder)
    return folder


def test_parts_of_meta(meta, tmp_path):
    assert len(list(meta.glob("consolidated.*.pth"))) == 2
    convert(meta, tmp_path / "out")
    assert_reaches("meta", tmp_path / "out")
    assert not list((tmp_path / "out").glob("staged*"))
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["model_type"], config["intermediate_size"], config["vocab_size"]) == (
        "llama",
        36,
        43,
    )


def test_meta_with_the_config_of_another_folder(meta, tmp_path):
    base = copy_golden(
        tmp_path / "base", "llama", attention_bias=False, head_dim=6, rope_scaling=None
    )
    config = json.loads((base / "config.json").read_text())
    config.pop("rope_parameters")
    (base / "config.json").write_text(json.dumps(config))
    convert(meta, tmp_path / "out", base=base)
    assert_reaches("meta", tmp_path / "out")


def params(**changes):
    def edit(folder):
        path = folder / "params.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (params(dim="24"), "'dim' must be a positive int"),
        (params(moe={"num_experts": 8}), "'moe' is set; only dense"),
        (params(use_scaled_rope=True), "does not say by how much.*--base"),
        (lambda f: (f / "consolidated.00.pth").unlink(), "missing weight files: consolidated.00.pth"),
        (lambda f: shutil.copy(SOURCES / "lora/adapter_model.safetensors", f / "model.safetensors"),
         "config.json is missing"),
    ],
)  # fmt: skip
def test_meta_that_cannot_be_read(change, words, meta, tmp_path):
    change(meta)
    with pytest.raises(SpecStreamError, match=f"(?s){words}") as error:
        convert(meta, tmp_path / "out")
    assert "\n" not in str(error.value)


def test_params_of_meta_and_mistral(tmp_path):
    shapes = {
        "model.embed_tokens.weight": (99, 12),
        "model.layers.0.mlp.gate_proj.weight": (40, 12),
    }
    common = {"dim": 12, "n_layers": 3, "n_heads": 4, "norm_eps": 1e-6}
    (tmp_path / "params.json").write_text(json.dumps({**common, "hidden_dim": 40, "head_dim": 5}))
    got = config_of(tmp_path, shapes)
    assert (got["model_type"], got["head_dim"], got["num_key_value_heads"]) == ("mistral", 5, 4)
    assert got["sliding_window"] is None
    assert got["tie_word_embeddings"] is True
    scaled = {
        "use_scaled_rope": True,
        "rope_scaling_factor": 32,
        "rope_theta": 5e5,
        "n_kv_heads": 2,
    }
    (tmp_path / "params.json").write_text(json.dumps({**common, **scaled}))
    got = config_of(tmp_path, {**shapes, "lm_head.weight": (99, 12)})
    assert (got["model_type"], got["head_dim"], got["num_key_value_heads"]) == ("llama", 3, 2)
    assert (got["rope_scaling"]["factor"], got["rope_theta"]) == (32.0, 5e5)
    assert got["tie_word_embeddings"] is False


def test_rows_of_a_projection_are_turned():
    """Two heads of six: dimension 2d of Meta's is d of transformers', 2d + 1 is d + 3."""
    rows = mx.arange(12).reshape(12, 1)
    assert halves(rows, 2).reshape(-1).tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_of_peft(kind, tmp_path):
    base = json.loads((SOURCES / kind / "logits.json").read_text())["base"]
    folder = copy_golden(tmp_path / "hf", base)
    convert(folder, tmp_path / "out", adapter=SOURCES / kind)
    assert_reaches(kind, tmp_path / "out")
    convert(folder, tmp_path / "base")
    convert(SOURCES / kind, tmp_path / "apart", base=folder)
    assert_reaches(kind, tmp_path / "base", tmp_path / "apart")
    # Into a folder of mlx-lm, and mlx-lm's own kind of adapter: the same.
    convert(tmp_path / "base", tmp_path / "late", adapter=SOURCES / kind)
    assert_reaches(kind, tmp_path / "late")
    convert(tmp_path / "base", tmp_path / "fused", adapter=tmp_path / "apart")
    assert_reaches(kind, tmp_path / "fused")
    with pytest.raises(AssertionError):
        assert_reaches(kind, tmp_path / "base")


def adapter(tmp_path, **changes):
    folder = tmp_path / "adapter"
    shutil.copytree(SOURCES / "lora", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, "'peft_type' must be LORA but is 'IA3'"),
        ({"use_qalora": True}, "'use_qalora' is 'True'"),
        ({"lora_alpha": "x"}, "'lora_alpha' must be a number"),
        ({"alpha_pattern": {"(": 3}}, "broken key"),
    ],
)
def test_adapters_that_cannot_be_merged(changes, words, tmp_path):
    folder = copy_golden(tmp_path / "hf")
    with pytest.raises(SpecStreamError, match=words) as error:
        convert(folder, tmp_path / "out", adapter=adapter(tmp_path, **changes))
    assert "\n" not in str(error.value)


def test_an_adapter_of_another_base(tmp_path):
    folder = copy_golden(tmp_path / "hf", "opt")
    with pytest.raises(BadCheckpoint, match=r"6 of 6 changes have no tensor in the base"):
        convert(folder, tmp_path / "out", adapter=SOURCES / "lora")
    other = copy_golden(tmp_path / "hf2", "llama_bf16")  # smaller heads
    with pytest.raises(BadCheckpoint, match="belongs to another base"):
        convert(other, tmp_path / "out", adapter=SOURCES / "lora")
    assert not (tmp_path / "out").exists()


def test_an_adapter_needs_full_weights(tmp_path):
    folder = copy_golden(tmp_path / "hf", "phi3")
    convert(folder, tmp_path / "q", quantize=True, q_group_size=32)
    convert(folder, tmp_path / "full")
    made = adapter(tmp_path)
    names = {"q_proj": "qkv_proj", "down_proj": "gate_up_proj"}
    weights = mx.load(str(made / "adapter_model.safetensors"))
    weights = {
        key.replace(old, new): (
            mx.zeros((5, 32)) if "lora_A" in key else mx.ones(({"q": 64, "g": 72}[new[0]], 5))
        )
        for key in weights
        for old, new in names.items()
        if old in key
    }
    mx.save_safetensors(str(made / "adapter_model.safetensors"), weights)
    with pytest.raises(BadCheckpoint, match=r"quantised.*--dequantize"):
        convert(tmp_path / "q", tmp_path / "out", adapter=made)
    convert(tmp_path / "full", tmp_path / "out", adapter=made)


def test_a_converted_folder_needs_nothing(tmp_path):
    folder = copy_golden(tmp_path / "hf", "phi3")
    convert(folder, tmp_path / "q", quantize=True, q_group_size=32)
    lines = []
    assert convert(tmp_path / "q", tmp_path / "again", log=lines.append) == tmp_path / "q"
    assert len(lines) == 1
    assert "already; nothing to convert" in lines[0]
    assert not (tmp_path / "again").exists()
    # Asked for something, it does it; and a config that mlx-lm would misread is mended.
    convert(tmp_path / "q", tmp_path / "full", dequantize=True)
    config = json.loads((tmp_path / "full/config.json").read_text())
    rope = {"rope_theta": 3e5, "rope_type": "default"}
    old = {k: v for k, v in config.items() if k not in ("rope_theta", "rope_scaling")}
    (tmp_path / "full/config.json").write_text(json.dumps({**old, "rope_parameters": rope}))
    assert convert(tmp_path / "full", tmp_path / "mended") == tmp_path / "mended"
    assert json.loads((tmp_path / "mended/config.json").read_text())["rope_theta"] == 3e5
    # An adapter of mlx-lm is one already, too.
    convert(SOURCES / "lora", tmp_path / "apart")
    assert convert(tmp_path / "apart", tmp_path / "twice", log=lines.append) == tmp_path / "apart"
    assert "nothing to convert" in lines[-1]


VALUES = np.array([1, -2, 3, 0.5, 7, -9], np.float32)


def nested(**beside):
    """A pickle {"model": {"w": [2, 3]}, ...} with plain values beside."""
    weights = state({"w": tensor(storage("FloatStorage", "0", 6), 0, (2, 3), (3, 1))})[2:-1]
    moment = tensor(storage("FloatStorage", "1", 2), 0, (2,), (1,))
    other = state({"exp_avg": moment})[2:-1]
    return state({"model": weights, "optimizer": other, **{k: ops(v) for k, v in beside.items()}})


@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_a_state_dict_inside_a_training_checkpoint(write, tmp_path):
    stored = {"0": VALUES, "1": np.ones(2, np.float32)}
    if write is write_zip:
        stored = {key: value.tobytes() for key, value in stored.items()}
    path = write(tmp_path / "last.pt", nested(epoch=3, args={"seed": 1}), stored)
    got = load_torch(path)
    assert list(got) == ["w"]
    np.testing.assert_array_equal(np.array(got["w"]), VALUES.reshape(2, 3))
    assert sorted(read_state(path).ignored) == ["args", "epoch", "optimizer"]


def is_str(value):
    return isinstance(value, str)


def test_where_a_state_dict_is_looked_for():
    flat = {"a": "T", "b": "T"}
    assert find_state(flat, is_str).tensors == flat
    assert find_state({"state_dict": {"model": {"module": flat}}}, is_str).tensors == flat
    found = find_state({"model": {**flat, "steps": 7}, "loss": "T"}, is_str)
    assert (found.tensors, found.ignored) == (flat, ["loss", "model.steps"])
    for tree, words in [
        ({"model": flat, "state_dict": flat}, "both state_dict and model"),
        ({"model": {"encoder": flat}}, "'model.encoder' is a dict, not a tensor"),
        ({"model": {}, "epoch": 3}, None),
        ({**flat, "ema": flat}, "'ema' is a dict"),
        ({7: "T"}, "'7' is a str"),
        ([flat], "the pickle is a list"),
    ]:
        if words is None:
            assert find_state(tree, is_str).tensors == {}
            continue
        with pytest.raises(BadCheckpoint, match=words):
            find_state(tree, is_str)


LLAMA = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"]


@pytest.mark.parametrize(
    ("wrap", "family"),
    [
        (lambda n: n, "llama"),
        (lambda n: f"module.{n}", "llama"),
        (lambda n: f"module.model.{n}", "llama"),
        (lambda n: f"model._orig_mod.{n}", "llama"),
        (
            lambda n: f"_fsdp_wrapped_module.{n.replace('layers.0.', 'layers.0._orig_mod.')}",
            "llama",
        ),
        (lambda n: n.removeprefix("model."), "llama"),  # saved by AutoModel, without a head
    ],
)
def test_wrappers_in_names(wrap, family):
    got = clean_names([wrap(n) for n in LLAMA], family)
    assert got == {wrap(n): n for n in LLAMA}


def test_names_that_cannot_be_cleaned():
    gpt2 = ["transformer.wte.weight", "transformer.h.0.attn.c_attn.weight"]
    assert list(clean_names(gpt2, "gpt2").values()) == ["wte.weight", "h.0.attn.c_attn.weight"]
    with pytest.raises(BadCheckpoint, match="would both become 'a'"):
        clean_names(["_orig_mod.a", "a"], None)
    with pytest.raises(BadCheckpoint, match="LoRA inside the model"):
        clean_names(["model.layers.0.q_proj.lora_A.default.weight"], None)


def test_experts_of_a_running_model_are_taken_apart():
    """[experts, rows, columns] of transformers 5 in memory: gate above up."""
    fused = mx.arange(24).reshape(2, 4, 3)
    mixtral = {"model_type": "mixtral", "num_local_experts": 2}
    qwen = {"model_type": "qwen3_moe", "num_experts": 2}
    for config, names in (
        (mixtral, ("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3")),
        (qwen, ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj")),
    ):
        parts = parts_of("model.layers.0.mlp.experts.gate_up_proj", config)
        wanted = [f"model.layers.0.{n.format(e)}.weight" for e in range(2) for n in names]
        assert [part.name for part in parts] == wanted
        columns = [part.of(fused)[:, 0].tolist() for part in parts]
        assert columns == [[0, 3], [6, 9], [12, 15], [18, 21]]
    down = parts_of("model.layers.0.mlp.experts.down_proj", mixtral)
    assert [part.of(fused).shape for part in down] == [(4, 3), (4, 3)]
    with pytest.raises(BadCheckpoint, match=r"config\.json says 2 experts"):
        down[0].of(fused[:1])
    (turned,) = parts_of("model.layers.1.mlp.experts.down_proj", {"model_type": "gpt_oss"})
    assert turned.of(fused).shape == (2, 3, 4)
    (router,) = parts_of("model.layers.0.mlp.gate.weight", mixtral)
    assert router.name == "model.layers.0.block_sparse_moe.gate.weight"
    gpt2 = {"model_type": "gpt2"}
    assert parts_of("h.0.attn.bias", gpt2) == []
    assert parts_of("h.0.attn.c_attn.bias", gpt2) == [Part("h.0.attn.c_attn.bias")]


def test_a_bare_state_dict_needs_a_base(tmp_path):
    hf = copy_golden(tmp_path / "hf", "llama")
    (hf / "model.safetensors").rename(tmp_path / "weights.safetensors")
    with pytest.raises(BadArgument, match=r"bare state dict.*--base"):
        convert(tmp_path / "weights.safetensors", tmp_path / "out")
    convert(tmp_path / "weights.safetensors", tmp_path / "out", base=hf)
    golden = json.loads((GOLDEN / "llama/logits.json").read_text())
    expected = np.array(golden["logits"])
    assert np.abs(logits(tmp_path / "out", golden["tokens"]) - expected).max() < 1e-3
    (tmp_path / "weights.gguf").write_text("x")
    with pytest.raises(BadCheckpoint, match="no state dict either"):
        convert(tmp_path / "weights.gguf", tmp_path / "out2", base=hf)


def test_a_streams_folder_is_no_model(tmp_path):
    (tmp_path / "streams.json").write_text("{}")
    with pytest.raises(BadCheckpoint, match="is a streams folder"):
        convert(tmp_path, tmp_path / "out")


def test_code_beside_the_weights_is_refused(tmp_path):
    """Only the state dict's own neighbours are plain; a class anywhere in the file is not read."""
    canary = tmp_path / "canary"
    pkl = state({"model": ops({}), "args": call(name("os", "system"), f"touch {canary}")})
    with pytest.raises(BadCheckpoint, match=r"os\.system"):
        load_torch(write_zip(tmp_path / "a.pt", pkl, {}))
    assert not canary.exists()


def test_hybrid_models_are_refused_for_streams():
    from mlx_specstream.model.support import check_supported

    small = {
        "vocab_size": 61,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "model_type": "qwen3_next",
    }
    small |= {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
    small |= {"linear_value_head_dim": 8, "linear_conv_kernel_dim": 4, "num_experts": 2}
    small |= {"num_experts_per_tok": 1, "moe_intermediate_size": 20, "mlp_only_layers": []}
    small |= {"decoder_sparse_step": 1, "shared_expert_intermediate_size": 24, "rms_norm_eps": 1e-6}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 36}
    small |= {"rope_theta": 1e4, "partial_rotary_factor": 0.5, "max_position_embeddings": 64}
    small |= {"head_dim": 8, "norm_topk_prob": True, "full_attention_interval": 4}
    model, args = model_classes(small)
    with pytest.raises(UnsupportedModel, match="recurrent or hybrid layers"):
        check_supported(model(args.from_dict(small)))
