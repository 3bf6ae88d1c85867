"""Streams in PyTorch, written from the equations (arXiv 2402.11131 and docs/format.md), for tests.

A llama of transformers runs over [tokens | stream 1 of each | stream 2 of each | ...] with a mask that
is filled entry by entry. It shares nothing with the package but the names of the tensors.
"""

import torch
from torch.nn.functional import silu

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FULL = {  # every part of streams at once, but for the value rotation, which has no embeddings
    **{"num_streams": 3, "msa_layers": 2, "lora_rank": 4, "lora_alpha": 6.0},
    **{"lora_targets": list(PROJECTIONS), "main_sees_streams": False, "stream_position": "t+j"},
    **{"init_rank": 5, "value_rotation": 0.0, "prune_rank": 6, "condition_rank": 7},
}
VARIANTS = {
    "every part": {},
    "plain": {"init_rank": 0, "prune_rank": 0, "condition_rank": 0},
    "shared": {"main_sees_streams": True, "condition_rank": 0},
    "value rotation": {"value_rotation": 0.03, "stream_position": "t", "init_rank": 0},
    "few targets": {"lora_targets": ["v_proj", "up_proj"], "num_streams": 2, "msa_layers": 1},
}


def random_streams(model, config: dict, seed: int = 11) -> dict:
    """Stream tensors under their PyTorch names, none of them zero."""
    torch.manual_seed(seed)
    width, g, tensors = model.config.hidden_size, config["num_streams"], {}

    def make(name, *shape):
        tensors[name] = 0.3 * torch.randn(*shape)

    if not config["value_rotation"]:
        make("stream_embeddings.weight", g, width)
    for name, rank in (("stream_init", "init_rank"), ("early_exit", "prune_rank")):
        if config[rank]:
            make(f"{name}.lora_A.weight", config[rank], width)
            make(f"{name}.lora_B.weight", width, config[rank])
    if r := config["condition_rank"]:
        make("condition.embedding.weight", g, r, width)
        make("condition.state.weight", g, r, width)
        make("condition.bias", g, 1, r)
        make("condition.out.weight", g, width, r)
    for i, layer in enumerate(model.model.layers[-config["msa_layers"] :]):
        for path, module in layer.named_modules():
            name = path.rpartition(".")[2]
            if name in config["lora_targets"]:
                make(
                    f"msa_layers.{i}.{name}.lora_A.weight", config["lora_rank"], module.in_features
                )
                make(
                    f"msa_layers.{i}.{name}.lora_B.weight", module.out_features, config["lora_rank"]
                )
    return tensors


def sees(row: int, key: int, length: int, shared: bool) -> bool:
    """Whether a row attends to a key; row r is token r % length, stream r // length (0: main)."""
    (j, t), (k, s) = divmod(row, length), divmod(key, length)
    if k == 0:
        return s <= t
    return s == t and (k <= j or (shared and j == 0))


@torch.no_grad()
def twin(model, tensors: dict, config: dict, tokens: list[int]) -> dict:
    """Logits: `main` [L, V], `streams` [g, L, V], and where there are such parts `exit` [L, V] (the
    early exit at the cut) and `conditioned` [g, L, V] (token t + j stands before stream j's guess)."""
    inner, g, L = model.model, config["num_streams"], len(tokens)
    cut = len(inner.layers) - config["msa_layers"]
    at_host = config["stream_position"] == "t"
    positions = list(range(L))
    positions += [t if at_host else t + j for j in range(1, g + 1) for t in range(L)]
    ids = torch.tensor([tokens])
    hidden = inner.embed_tokens(ids)

    def run(layers, hidden, shared):
        R = hidden.shape[1]
        mask = torch.full((1, 1, R, R), float("-inf"))
        for row in range(R):
            for key in range(R):
                if sees(row, key, L, shared):
                    mask[0, 0, row, key] = 0.0
        where = torch.tensor([positions[:R]])
        turn = inner.rotary_emb(hidden, where)
        for layer in layers:
            out = layer(hidden, attention_mask=mask, position_ids=where, position_embeddings=turn)
            hidden = out[0] if isinstance(out, tuple) else out
        return hidden

    def head(hidden):
        return model.lm_head(inner.norm(hidden))[0]

    hidden = run(inner.layers[:cut], hidden, False)
    found = {}
    if config["prune_rank"]:
        a, b = tensors["early_exit.lora_A.weight"], tensors["early_exit.lora_B.weight"]
        found["exit"] = head(hidden + hidden @ a.T @ b.T)
    begin = hidden
    if config["init_rank"]:
        a, b = tensors["stream_init.lora_A.weight"], tensors["stream_init.lora_B.weight"]
        begin = begin + begin @ a.T @ b.T
    rows = [hidden]
    for j in range(g):
        embedding = 0.0 if config["value_rotation"] else tensors["stream_embeddings.weight"][j]
        rows.append(begin + embedding)
    hooks = gate_lora(inner.layers[cut:], tensors, config, L)
    try:
        last = run(inner.layers[cut:], torch.cat(rows, 1), config["main_sees_streams"])
    finally:
        for hook in hooks:
            hook.remove()
    found["main"] = head(last[:, :L])
    states = [last[:, L + j * L : 2 * L + j * L] for j in range(g)]
    found["streams"] = torch.stack([head(state) for state in states])
    if config["condition_rank"]:
        found["conditioned"] = torch.stack(
            [head(condition(states[j], j, tensors, inner, ids)) for j in range(g)]
        )
    return found


def gate_lora(layers, tensors: dict, config: dict, L: int) -> list:
    """Hooks that add the LoRA to stream rows, and turn their values."""
    scale, hooks = config["lora_alpha"] / config["lora_rank"], []

    def add(i, name):
        def hook(module, inputs, out):
            a = tensors[f"msa_layers.{i}.{name}.lora_A.weight"]
            b = tensors[f"msa_layers.{i}.{name}.lora_B.weight"]
            more = scale * inputs[0][:, L:] @ a.T @ b.T
            return torch.cat([out[:, :L], out[:, L:] + more], 1)

        return hook

    def turn(size):
        def hook(module, inputs, out):
            rows = out[:, L:].reshape(1, config["num_streams"], L, -1, size)
            angle = config["value_rotation"] * torch.arange(1, config["num_streams"] + 1.0)
            whole = torch.complex(rows[..., : size // 2], rows[..., size // 2 :])
            whole = whole * torch.exp(1j * angle)[None, :, None, None, None]
            rows = torch.cat([whole.real, whole.imag], -1)
            return torch.cat([out[:, :L], rows.reshape(1, -1, out.shape[2])], 1)

        return hook

    for i, layer in enumerate(layers):
        for path, module in layer.named_modules():
            name = path.rpartition(".")[2]
            if name in config["lora_targets"]:
                hooks.append(module.register_forward_hook(add(i, name)))
            if name == "v_proj" and config["value_rotation"]:
                hooks.append(module.register_forward_hook(turn(layer.self_attn.head_dim)))
    return hooks


def condition(state, j: int, tensors: dict, inner, ids):
    """h + RMS(h) silu(e A_j + h C_j + d_j) B_j, e and h over their RMS."""
    before = inner.embed_tokens(torch.roll(ids, -(j + 1), dims=1))  # row t: token t + 1 + j
    rms = state.pow(2).mean(-1, keepdim=True).sqrt()
    e = before / before.pow(2).mean(-1, keepdim=True).sqrt()
    inside = e @ tensors["condition.embedding.weight"][j].T
    inside = inside + (state / rms) @ tensors["condition.state.weight"][j].T
    inside = silu(inside + tensors["condition.bias"][j])
    return state + rms * (inside @ tensors["condition.out.weight"][j].T)
