"""Checkpoints in every format that users come with, written by PyTorch, transformers and PEFT."""

import json
import logging
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

logging.getLogger("transformers").setLevel(logging.ERROR)
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [],
    "pre_tokenizer": {"type": "Whitespace"},
    "model": {"type": "WordLevel", "vocab": {"<unk>": 0, "a": 1, "b": 2}, "unk_token": "<unk>"},
}


def add_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


def state_of(model, folder: Path) -> dict:
    """Tensors as transformers names them on disk, tied ones twice as in a plain state dict."""
    model.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = model.get_input_embeddings().weight.data
    return state


def safetensors(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def sharded(model, folder: Path) -> Path:
    model.save_pretrained(folder, max_shard_size="9KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def pickled(model, folder: Path) -> Path:
    torch.save(state_of(model, folder), folder / "pytorch_model.bin")
    return folder


def legacy(model, folder: Path) -> Path:
    state = state_of(model, folder)
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    return folder


def pickled_shards(model, folder: Path) -> Path:
    state, table = state_of(model, folder), {}
    for part in range(3):
        name = f"pytorch_model-{part + 1:05d}-of-00003.bin"
        some = dict(list(state.items())[part::3])
        torch.save(some, folder / name, _use_new_zipfile_serialization=part != 1)
        table |= dict.fromkeys(some, name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": table}))
    return folder


def bare(model, folder: Path) -> Path:
    torch.save(state_of(model, folder), folder / "final.pth")
    return folder / "final.pth"


def training(model, folder: Path) -> Path:
    """As a training program saves itself: behind DataParallel, with an optimizer and counters."""
    state = {f"module.{name}": value for name, value in state_of(model, folder).items()}
    moments = {0: {"step": torch.tensor(7.0), "exp_avg": torch.randn(5, 3)}}
    optimizer = {"state": moments, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.95)}]}
    whole = {"model": state, "optimizer": optimizer, "epoch": 3}
    whole |= {"args": Namespace(lr=1e-3, out=Path("/tmp")), "best": np.float64(1.5)}
    whole |= {"dtype": torch.bfloat16, "device": torch.device("cpu"), "rng": np.random.get_state()}
    torch.save(whole, folder / "checkpoint_last.pt")
    return folder


def lightning(model, folder: Path) -> Path:
    """A compiled model inside a module, as PyTorch Lightning names it."""
    state = {f"model._orig_mod.{name}": v for name, v in state_of(model, folder).items()}
    torch.save({"state_dict": state, "global_step": 12}, folder / "last.ckpt")
    return folder / "last.ckpt"


def state_dict(model, folder: Path) -> Path:
    """What a running model holds, under the names of a running model."""
    torch.save(model.state_dict(), folder / "state.pt")
    return folder / "state.pt"


FORMATS = {
    "safetensors": safetensors,
    "sharded safetensors": sharded,
    ".bin": pickled,
    ".bin before PyTorch 1.6": legacy,
    "sharded .bin": pickled_shards,
    "bare .pth": bare,
    "state_dict() in a .pt": state_dict,
    "training .pt": training,
    "Lightning .ckpt": lightning,
}


def write_meta(model, folder: Path, parts: int) -> Path:
    """A llama of transformers as Meta publishes it: Meta's names, turned rows, cut into parts.

    Written from Meta's description of its layout: column-parallel matrices are cut by rows,
    row-parallel ones and the embedding by columns; rope turns neighbours.
    """
    config, state = model.config, model.state_dict()
    size = config.hidden_size // config.num_attention_heads

    def neighbours(weight):  # rows [H * D, E]: dimension d and d + D / 2 become 2d and 2d + 1
        order = [i + half * size // 2 for i in range(size // 2) for half in (0, 1)]
        return weight.reshape(-1, size, weight.shape[1])[:, order].reshape(weight.shape)

    whole = {
        "tok_embeddings.weight": (state["model.embed_tokens.weight"], 1),
        "norm.weight": (state["model.norm.weight"], None),
        "output.weight": (state["lm_head.weight"], 0),
    }
    for i in range(config.num_hidden_layers):
        old, new = f"model.layers.{i}.", f"layers.{i}."
        whole |= {
            f"{new}attention.wq.weight": (neighbours(state[f"{old}self_attn.q_proj.weight"]), 0),
            f"{new}attention.wk.weight": (neighbours(state[f"{old}self_attn.k_proj.weight"]), 0),
            f"{new}attention.wv.weight": (state[f"{old}self_attn.v_proj.weight"], 0),
            f"{new}attention.wo.weight": (state[f"{old}self_attn.o_proj.weight"], 1),
            f"{new}feed_forward.w1.weight": (state[f"{old}mlp.gate_proj.weight"], 0),
            f"{new}feed_forward.w2.weight": (state[f"{old}mlp.down_proj.weight"], 1),
            f"{new}feed_forward.w3.weight": (state[f"{old}mlp.up_proj.weight"], 0),
            f"{new}attention_norm.weight": (state[f"{old}input_layernorm.weight"], None),
            f"{new}ffn_norm.weight": (state[f"{old}post_attention_layernorm.weight"], None),
        }
    for part in range(parts):
        mine = {
            name: value.clone() if axis is None else value.chunk(parts, axis)[part].clone()
            for name, (value, axis) in whole.items()
        }
        mine["rope.freqs"] = torch.ones(size // 2)
        torch.save(mine, folder / f"consolidated.{part:02d}.pth")
    params = {
        **{"dim": config.hidden_size, "n_layers": config.num_hidden_layers, "vocab_size": -1},
        **{"n_heads": config.num_attention_heads, "n_kv_heads": config.num_key_value_heads},
        **{"norm_eps": config.rms_norm_eps, "rope_theta": 10000.0, "multiple_of": 256},
    }
    (folder / "params.json").write_text(json.dumps(params))
    return folder


def write_peft(model, folder: Path, seed: int = 3, **settings):
    """An adapter with random weights; returns PEFT's model, whose logits are those to reach."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    adapted = get_peft_model(model, LoraConfig(r=5, lora_alpha=7, **settings)).eval()
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                value.add_(0.2 * torch.randn_like(value))
    adapted.save_pretrained(folder)
    about = json.loads((folder / "adapter_config.json").read_text())
    about["base_model_name_or_path"] = None  # of this machine
    (folder / "adapter_config.json").write_text(json.dumps(about, indent=1))
    return adapted


def save_training(model, tensors: dict, config: dict, folder: Path) -> Path:
    """Base and streams in one training checkpoint: streams in a module of their own, DataParallel."""
    state = state_of(model, folder) | {f"streams.{name}": v for name, v in tensors.items()}
    state = {f"module.{name}": value for name, value in state.items()}
    whole = {"model": state, "stream_config": json.dumps(config), "step": 9}
    torch.save(whole, folder / "checkpoint.pt")
    return folder / "checkpoint.pt"


def save_streams(tensors: dict, config: dict, path: Path) -> None:
    save_file(tensors, path, metadata={"stream_config": json.dumps(config)})
