"""Heads that config.json calls the embedding, and that are not: as transformers 5 and PEFT see them."""

import json

import mlx.core as mx
import numpy as np
import pytest
from test_convert import GOLDEN, copy_golden, logits
from test_convert_pickle import state, storage, tensor, write_zip

from mlx_specstream.converters import convert
from mlx_specstream.errors import UnsupportedModel

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
PEFT = "base_model.model."
TOKENS = [3, 7, 11, 2]


def tied_folder(tmp_path, change):
    """A golden model that is said to be tied; `change` gets its tensors."""
    folder = copy_golden(tmp_path / "hf", tie_word_embeddings=True)
    path = folder / "model.safetensors"
    tensors = {key: np.array(value) for key, value in mx.load(str(path)).items()}
    change(tensors)
    mx.save_safetensors(str(path), {k: mx.array(v) for k, v in tensors.items()}, {"format": "pt"})
    return folder, tensors


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def same_as(folder, tensors, tmp_path, **parts):
    """Whether the result is the model of these tensors, converted as an untied one."""
    other = copy_golden(tmp_path / "untied", "llama", tie_word_embeddings=False)
    arrays = {k: mx.array(v) for k, v in (tensors | parts).items()}
    mx.save_safetensors(str(other / "model.safetensors"), arrays, {"format": "pt"})
    convert(other, tmp_path / "untied-mlx")
    want = logits(tmp_path / "untied-mlx", TOKENS)
    return np.abs(logits(folder, TOKENS) - want).max() < 1e-4 * np.abs(want).max()


def pickled(folder, tensors):
    """The safetensors file becomes PyTorch's."""
    (folder / "model.safetensors").unlink()
    views, storages = {}, {}
    for number, (name, value) in enumerate(tensors.items()):
        strides = [step // 4 for step in value.strides]
        where = storage("FloatStorage", str(number), value.size)
        views[name] = tensor(where, 0, value.shape, tuple(strides))
        storages[str(number)] = np.ascontiguousarray(value, dtype=np.float32).tobytes()
    write_zip(folder / "pytorch_model.bin", state(views), storages)


@pytest.mark.parametrize("kind", ["safetensors", "pickled"])
def test_a_head_of_its_own_stays(kind, tmp_path):
    lines = []
    folder, tensors = tied_folder(tmp_path, lambda tensors: None)
    if kind == "pickled":
        pickled(folder, tensors)
    convert(folder, tmp_path / "out", log=lines.append)
    golden = json.loads((GOLDEN / "llama/logits.json").read_text())
    expected = np.array(golden["logits"])
    difference = np.abs(logits(tmp_path / "out", golden["tokens"]) - expected).max()
    assert difference <= 1e-4 * np.abs(expected).max()
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False
    assert any("the head differs from the embedding" in line for line in lines)


@pytest.mark.parametrize("name", ["mistral", "gemma3_text", "opt", "smollm3"])
def test_every_class_that_can_have_a_head(name, tmp_path):
    """`mistral` is called otherwise in its config, gemma3's class looks at the weights."""
    folder = copy_golden(tmp_path / "hf", name, tie_word_embeddings=True)
    tensors = mx.load(str(folder / "model.safetensors"))
    embedding = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    tensors[HEAD] = tensors[embedding][::-1]
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "pt"})
    convert(folder, tmp_path / "out")
    got = mx.load(str(tmp_path / "out/model.safetensors"))
    assert mx.array_equal(got[HEAD], tensors[HEAD])
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False
    assert np.isfinite(logits(tmp_path / "out", TOKENS)).all()


def test_a_copy_of_the_embedding_is_dropped(tmp_path):
    lines = []
    folder, _ = tied_folder(tmp_path, lambda t: t.update({HEAD: t[EMBEDDING]}))
    convert(folder, tmp_path / "out", log=lines.append)
    assert HEAD not in mx.load(str(tmp_path / "out/model.safetensors"))
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is True
    assert not any("differs" in line for line in lines)


def test_a_head_alone_is_the_embedding_too(tmp_path):
    """As `safetensors.torch.save_model` leaves out one of two names of a tensor."""
    folder, tensors = tied_folder(tmp_path, lambda t: t.pop(EMBEDDING))
    convert(folder, tmp_path / "out")
    head = tensors[HEAD]
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is True
    assert same_as(tmp_path / "out", tensors, tmp_path, **{EMBEDDING: head})


def test_a_class_without_a_head_is_refused(tmp_path):
    folder = copy_golden(tmp_path / "hf", "gemma2")
    tensors = mx.load(str(folder / "model.safetensors"))
    tensors[HEAD] = tensors[EMBEDDING] * 2
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "pt"})
    with pytest.raises(UnsupportedModel, match=r"differs from the embedding.*'gemma2'"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


RNG = np.random.default_rng(4)
A, B = (RNG.normal(size=size).astype(np.float32) for size in ((2, 24), (43, 2)))


def write_adapter(tmp_path, tensors, **settings):
    folder = tmp_path / "lora"
    folder.mkdir()
    about = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    arrays = {PEFT + k: mx.array(np.ascontiguousarray(v)) for k, v in tensors.items()}
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), arrays)
    return folder


def lora(name, turned=False):
    part = "lora_embedding_{}" if turned else "lora_{}.weight"
    a, b = (B.T, A.T) if turned else (A, B)  # of an embedding, A has a column per token
    return {f"{name}.{part.format('A')}": a, f"{name}.{part.format('B')}": b}


CHANGES = {
    "a new head": ({HEAD: B @ A}, {HEAD: B @ A}),
    "LoRA of the head": (lora("lm_head"), {HEAD: 1.5 * B @ A}),
    "a new embedding": ({EMBEDDING: B @ A}, {EMBEDDING: B @ A}),
    "LoRA of the embedding": (lora("model.embed_tokens", True), {EMBEDDING: 1.5 * B @ A}),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_an_adapter_of_one_of_two(kind, tmp_path):
    """PEFT's running model changes the one that was trained; the other one stays the base's."""
    brought, expected = CHANGES[kind]
    folder, tensors = tied_folder(tmp_path, lambda t: t.pop(HEAD))
    adapter = write_adapter(tmp_path, brought)
    convert(folder, tmp_path / "out", adapter=adapter)
    base = tensors[EMBEDDING]
    parts = {HEAD: base, EMBEDDING: base}
    for name, value in expected.items():
        parts[name] = parts[name] + value if "LoRA" in kind else value
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False
    assert same_as(tmp_path / "out", tensors, tmp_path, **parts)
    with pytest.raises(UnsupportedModel, match="merge it into its base with --adapter"):
        convert(adapter, tmp_path / "apart", base=folder)


TOGETHER = {
    "the same twice": ({HEAD: B @ A, EMBEDDING: B @ A}, {}),
    "tied by PEFT": (lora("lm_head") | lora("model.embed_tokens", True), {"ensure_weight_tying": True}),
    "more tokens": ({EMBEDDING: np.concatenate([B @ A, A])}, {}),
}  # fmt: skip


@pytest.mark.parametrize("kind", TOGETHER)
def test_an_adapter_of_both(kind, tmp_path):
    brought, settings = TOGETHER[kind]
    folder, _ = tied_folder(tmp_path, lambda t: t.pop(HEAD))
    convert(folder, tmp_path / "out", adapter=write_adapter(tmp_path, brought, **settings))
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is True
    assert HEAD not in mx.load(str(tmp_path / "out/model.safetensors"))
