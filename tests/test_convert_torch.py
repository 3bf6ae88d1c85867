"""Conversions against PyTorch itself, where it is installed: every architecture from every format.

pip install -e '.[test,torch]'
"""

import shutil

import mlx.core as mx
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install -e '.[torch]'")

import torch_sources as sources  # noqa: E402
import torch_twin  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from test_convert_streams import assert_same, our_logits  # noqa: E402
from torch_models import LENGTH, MODELS, SHAPE, build, logits_of  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from mlx_specstream import load  # noqa: E402
from mlx_specstream.converters import convert  # noqa: E402
from mlx_specstream.converters.hf_config import normalise  # noqa: E402
from mlx_specstream.errors import BadCheckpoint, UnsupportedModel  # noqa: E402
from mlx_specstream.model.architectures import model_classes  # noqa: E402

TOKENS = [int(x) for x in np.random.default_rng(5).integers(3, SHAPE["vocab_size"], LENGTH)]
NAMES = [name for name in MODELS if name != "llama_bf16"]
FEW = ("sharded safetensors", "state_dict() in a .pt")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
pytestmark = pytest.mark.filterwarnings("ignore")  # of other people's libraries


def ours(folder, adapter=None):
    """Logits [L, V] of a converted folder."""
    from mlx_lm.utils import load_adapters, load_model

    model, _ = load_model(folder, get_model_classes=model_classes)
    if adapter:
        model = load_adapters(model, str(adapter))
        model.eval()
    return np.array(model(mx.array([TOKENS]))[0].astype(mx.float32))


def assert_same_logits(got, expected):
    expected = np.array(expected.detach())
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "hf"
    made.mkdir()
    sources.add_tokenizer(made)
    return made


@pytest.mark.parametrize("name", NAMES)
def test_formats(name, folder, tmp_path):
    """Each architecture, and a few of them from each format: the same logits as transformers."""
    model = build(name, folder)
    expected = logits_of(model, TOKENS)
    formats = sources.FORMATS if name in ("llama", "opt", "gpt2") else FEW
    for number, write in enumerate(map(sources.FORMATS.get, formats)):
        source = tmp_path / f"hf{number}"
        shutil.copytree(folder, source)
        path = write(model, source)
        convert(path, tmp_path / f"out{number}", dtype="float32")
        assert_same_logits(ours(tmp_path / f"out{number}"), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["llama", "qwen3", "opt"])
def test_precisions_and_heads(name, tied, dtype, folder, tmp_path):
    model = build(name, folder, tie_word_embeddings=tied)
    with torch.no_grad():  # rope's tables would be rounded, too, by ``to``
        for value in model.parameters():
            value.copy_(value.to(DTYPES[dtype]).float())
    expected = logits_of(model, TOKENS)
    model.to(DTYPES[dtype])
    for number, write in enumerate((sources.safetensors, sources.pickled)):
        source = tmp_path / f"hf{number}"
        shutil.copytree(folder, source)
        convert(write(model, source), tmp_path / f"q{number}")
        stored = mx.load(str(tmp_path / f"q{number}" / "model.safetensors"))
        assert {str(v.dtype) for v in stored.values()} == {f"mlx.core.{dtype}"}
        assert any("lm_head" in key for key in stored) is not tied
        convert(source, tmp_path / f"out{number}", dtype="float32")
        assert_same_logits(ours(tmp_path / f"out{number}"), expected)


# As published: width, layers, heads, width of the embedding.
OPT = {
    "125m": (768, 12, 12, 768),
    "350m": (1024, 24, 16, 512),
    "1.3b": (2048, 24, 32, 2048),
    "6.7b": (4096, 32, 32, 4096),
}


@pytest.mark.parametrize("size", OPT)
def test_shapes_of_the_published_opt(size):
    """Every parameter has the shape that transformers gives it; nothing is computed."""
    width, layers, heads, narrow = OPT[size]
    config = {"model_type": "opt", "hidden_size": width, "num_hidden_layers": layers}
    config |= {"num_attention_heads": heads, "ffn_dim": 4 * width, "word_embed_proj_dim": narrow}
    config |= {"vocab_size": 50272, "max_position_embeddings": 2048}
    config |= {"do_layer_norm_before": size != "350m"}
    settings = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model("opt", **settings))
    model_class, args_class = model_classes(config)
    model = model_class(args_class.from_dict(normalise(config)[0]))
    hollow = {name: mx.zeros(tuple(v.shape)) for name, v in theirs.state_dict().items()}
    wanted = {name: value.shape for name, value in model.sanitize(hollow).items()}
    assert {name: value.shape for name, value in tree_flatten(model.parameters())} == wanted


@pytest.mark.parametrize("parts", [1, 2])
def test_meta(parts, folder, tmp_path):
    model = build("llama_plain", folder)
    (folder / "config.json").unlink()
    sources.write_meta(model, folder, parts)
    lines = []
    convert(folder, tmp_path / "out", dtype="float32", log=lines.append)
    assert_same_logits(ours(tmp_path / "out"), logits_of(model, TOKENS))
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {
        ".json",
        ".md",
        ".safetensors",
    }


LORA = {"target_modules": ["q_proj", "down_proj"]}
ADAPTERS = {
    "lora": ("llama", LORA),
    "rslora": ("qwen3", {**LORA, "use_rslora": True}),
    "dora": ("opt", {"target_modules": ["q_proj", "out_proj", "fc1"], "use_dora": True}),
    "patterns": (
        "llama",
        {**LORA, "alpha_pattern": {"q_proj": 11}, "rank_pattern": {"layers.1.self_attn.q_proj": 3}},
    ),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}),
    "conv1d dora": (
        "gpt2",
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True},
    ),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "v_proj"]}),
    "embedding dora": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "bias of B": ("opt", {"target_modules": ["q_proj"], "lora_bias": True}),
    "biases": ("opt", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "head": ("llama", {**LORA, "modules_to_save": ["lm_head", "norm"]}),
    # The base of these has one tensor for both.
    "head, tied": ("qwen2", {**LORA, "modules_to_save": ["lm_head"]}),
    "LoRA of the head, tied": ("qwen2", {"target_modules": ["q_proj", "lm_head"]}),
    "embedding, tied": ("qwen2", {"target_modules": ["q_proj", "embed_tokens"]}),
    "both, tied": ("qwen2", {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
}
MERGED_ONLY = ("embedding", "embedding dora", "bias of B", "biases", "head")
MERGED_ONLY += tuple(kind for kind in ADAPTERS if kind.endswith(", tied"))


@pytest.mark.parametrize("kind", ADAPTERS)
def test_peft(kind, folder, tmp_path):
    """An adapter of PEFT merged, and kept apart as mlx-lm's own kind: the same logits as PEFT."""
    name, settings = ADAPTERS[kind]
    model = build(name, folder)
    model.save_pretrained(folder)
    plain = logits_of(model, TOKENS)
    adapted = sources.write_peft(model, tmp_path / "lora", **settings)
    expected = logits_of(adapted, TOKENS)
    assert (expected - plain).abs().max() > 0.05 * plain.abs().max()
    convert(folder, tmp_path / "out", adapter=tmp_path / "lora")
    assert_same_logits(ours(tmp_path / "out"), expected)
    if kind in MERGED_ONLY:
        with pytest.raises(UnsupportedModel, match="merge it"):
            convert(tmp_path / "lora", tmp_path / "apart", base=folder)
        return
    convert(tmp_path / "lora", tmp_path / "apart", base=folder)
    convert(folder, tmp_path / "base")
    assert_same_logits(ours(tmp_path / "base", tmp_path / "apart"), expected)
    convert(tmp_path / "base", tmp_path / "again", adapter=tmp_path / "apart")  # and then fused
    assert_same_logits(ours(tmp_path / "again"), expected)


@pytest.mark.parametrize("write", [sources.safetensors, sources.pickled])
def test_a_head_that_differs_from_the_embedding(write, folder, tmp_path):
    """config.json says that they are one; transformers believes the tensors."""
    model = build("qwen2", folder, tie_word_embeddings=False)
    write(model, folder)
    config = AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = True
    config.save_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    expected = logits_of(theirs, TOKENS)
    convert(folder, tmp_path / "out")
    assert_same_logits(ours(tmp_path / "out"), expected)
    assert_same_logits(ours(tmp_path / "out"), logits_of(model, TOKENS))


def test_peft_of_another_base(folder, tmp_path):
    model = build("llama", folder)
    model.save_pretrained(folder)
    sources.write_peft(model, tmp_path / "lora", **LORA)
    other = tmp_path / "other"
    other.mkdir()
    sources.add_tokenizer(other)
    build("llama_plain", other, hidden_size=32).save_pretrained(other)
    with pytest.raises(BadCheckpoint, match="belongs to another base"):
        convert(other, tmp_path / "out", adapter=tmp_path / "lora")


def mixed_safetensors(model, tensors, config, folder):
    """One file with base and streams."""
    whole = {**sources.state_of(model, folder), **tensors}
    sources.save_streams(whole, config, folder / "model.safetensors")
    return folder


def mixed_pickle(model, tensors, config, folder):
    return sources.save_training(model, tensors, config, folder)


def beside(model, tensors, config, folder):
    """The streams in a file of their own beside the base."""
    model.save_pretrained(folder)
    sources.save_streams(tensors, config, folder / "pytorch_streams.safetensors")
    return folder


@pytest.mark.parametrize("write", [mixed_safetensors, mixed_pickle, beside])
@pytest.mark.parametrize("variant", torch_twin.VARIANTS)
def test_streams_of_pytorch(variant, write, folder, tmp_path):
    config = {**torch_twin.FULL, **torch_twin.VARIANTS[variant]}
    model = build("llama_plain", folder)
    tensors = torch_twin.random_streams(model, config)
    expected = torch_twin.twin(model, tensors, config, TOKENS)
    source = write(model, tensors, config, folder)
    convert(source, tmp_path / "out", dtype="float32")
    loaded, _ = load(tmp_path / "out")
    assert_same(our_logits(loaded, TOKENS), expected)
