"""Write tests/golden and tests/golden_sources: tiny random models and the logits to reach.

    pip install -e '.[torch]' && python tests/make_golden.py [name ...]

The stored files come from transformers 5.23.0, torch 2.15.0 and PEFT 0.21.2 on a CPU; the tests that
read them need none of these.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import torch_sources
import torch_twin
from torch_models import LENGTH, MODELS, SHAPE, build, logits_of, pack_experts, save_packed

GOLDEN = Path(__file__).parent / "golden"
SOURCES = Path(__file__).parent / "golden_sources"
LIVE_ONLY = ("llama_plain", "qwen3_moe", "mamba", "qwen3_next", "opt_untied")
WRITTEN = [name for name in MODELS if name not in LIVE_ONLY]


def save(name: str, model, packed: dict) -> None:
    folder = GOLDEN / name
    if packed:
        save_packed(model, packed, folder)
        return
    if name == "qwen2":  # two pickled shards with an index: one of today, one of before 1.6
        state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
        halves = [dict(list(state.items())[i::2]) for i in range(2)]
        names = [f"pytorch_model-0000{i + 1}-of-00002.bin" for i in range(2)]
        for zipped, half, file in zip((True, False), halves, names, strict=True):
            torch.save(half, folder / file, _use_new_zipfile_serialization=zipped)
        where = {key: file for half, file in zip(halves, names, strict=True) for key in half}
        index = {"metadata": {}, "weight_map": where}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        model.config.architectures = ["Qwen2ForCausalLM"]
        model.config.save_pretrained(folder)
    else:
        model = model.bfloat16() if name.endswith("bf16") else model
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)


def write(name: str) -> None:
    folder = GOLDEN / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model = build(name, folder)
    packed = pack_experts(model) if name == "gpt_oss" else {}
    tokens = torch.randint(3, SHAPE["vocab_size"], (LENGTH,))
    logits = logits_of(model, tokens.tolist())
    save(name, model, packed)
    rows = [[round(x, 5) for x in row] for row in logits.tolist()]
    (folder / "logits.json").write_text(json.dumps({"tokens": tokens.tolist(), "logits": rows}))
    print(f"{name}: largest logit {logits.abs().max():.3f}, {logits.std():.3f} spread")


def rounded(rows):
    return [rounded(row) if isinstance(row, list) else round(row, 5) for row in rows]


def write_source(name: str) -> None:
    """A source that is no Hugging Face folder. Adapters are for the model of tests/golden."""
    folder = SOURCES / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    torch.manual_seed(len(name))
    tokens = torch.randint(3, SHAPE["vocab_size"], (LENGTH // 2,)).tolist()
    if name in ADAPTERS:
        base, settings = ADAPTERS[name]
        adapted = torch_sources.write_peft(build_again(base), folder, **settings)
        (folder / "README.md").unlink()
        found = {"base": base, "logits": logits_of(adapted, tokens)}
    else:
        model = build("llama_plain", folder)
        if name == "meta":
            torch_sources.write_meta(model, folder, 2)
            (folder / "config.json").unlink()
            found = {"logits": logits_of(model, tokens)}
        else:
            config = {**torch_twin.FULL, **torch_twin.VARIANTS[STREAMS[name]]}
            tensors = torch_twin.random_streams(model, config)
            torch_sources.save_training(model, tensors, config, folder)
            found = torch_twin.twin(model, tensors, config, tokens)
    found = {k: rounded(v.tolist()) if torch.is_tensor(v) else v for k, v in found.items()}
    (folder / "logits.json").write_text(json.dumps({"tokens": tokens, **found}))
    print(name)


def build_again(name: str):
    """The model of tests/golden/{name} (its config.json there is left alone)."""
    with tempfile.TemporaryDirectory() as folder:
        return build(name, Path(folder))


ADAPTERS = {
    "lora": ("llama", {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
    "dora": ("opt", {"target_modules": ["q_proj", "out_proj", "fc1"], "use_dora": True}),
}
STREAMS = {"streams": "every part", "streams_shared": "shared"}


if __name__ == "__main__":
    for chosen in sys.argv[1:] or [*WRITTEN, "meta", *ADAPTERS, *STREAMS]:
        (write if chosen in MODELS else write_source)(chosen)
