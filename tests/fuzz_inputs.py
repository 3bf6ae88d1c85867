"""What the fuzzer feeds to readers: good files, and ways to damage them."""

import json
import pickle
import pickletools
import random
import struct
from functools import cache
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import numpy as np
import test_convert_pickle as pickles

GOLDEN = Path(__file__).parent / "golden"
STREAMS = Path(__file__).parents[1] / "examples/streams/e2e-sql-14m/streams.json"


# Good inputs.


def pickle_seeds() -> list[bytes]:
    found = [pickles.plain(), pickles.plain(7, (7,), (1,), kind="BFloat16Storage")]
    found += list(pickles.hostile("true").values())
    found.append(pickles.state({"model": pickles.ops({"a": 1, "b": [1, (2.5, None)]})}))
    beside = [pickle.dumps(value, 2)[2:-1] for value in pickles.BESIDE.values()]
    found.append(pickles.state({str(i): value for i, value in enumerate(beside)}))
    return found


def torch_seeds(folder: Path) -> list[bytes]:
    path = folder / "seed.bin"
    values = np.arange(24, dtype=np.float32).tobytes()
    where = pickles.storage("FloatStorage", "0", 24)
    views = {
        "rows": pickles.tensor(where, 0, (4, 6), (6, 1)),
        "columns": pickles.tensor(where, 0, (6, 4), (1, 6)),
        "part": pickles.tensor(where, 7, (2, 3), (6, 2)),
    }
    writers = (
        lambda: pickles.write_zip(path, pickles.state(views), {"0": values}),
        lambda: pickles.write_zip(path, pickles.plain(), {"0": values}, b"big"),
        lambda: pickles.legacy_file(path),
    )
    found = []
    for write in writers:
        write()
        found.append(path.read_bytes())
    return found


def header_seeds() -> list[bytes]:
    table = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b.weight": {"dtype": "BF16", "shape": [5], "data_offsets": [24, 34]},
        "c": {"dtype": "U8", "shape": [], "data_offsets": [34, 35]},
        "d": {"dtype": "I64", "shape": [0, 7], "data_offsets": [35, 35]},
    }
    text = json.dumps(table).encode()
    return [struct.pack("<Q", len(text)) + text + bytes(35)]


def index_seeds() -> list[bytes]:
    files = [f"model-{i:05d}-of-00002.safetensors" for i in (1, 2)]
    return [
        json.dumps({"metadata": {}, "weight_map": dict(zip("ab", files, strict=True))}).encode()
    ]


def config_seeds() -> list[bytes]:
    more = [{"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, {"model_file": "evil.py"}, {}]
    found = []
    for i, path in enumerate(sorted(GOLDEN.glob("*/config.json"))):
        found.append(json.dumps({**json.loads(path.read_text()), **more[i % 3]}).encode())
    return found


def adapter_seeds() -> list[bytes]:
    lora = {
        "peft_type": "LORA",
        "r": 3,
        "lora_alpha": 6,
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 2, "k_proj": 1.5},
        "target_modules": ["q_proj", "k_proj"],
        "base_model_name_or_path": "someone/model",
    }
    return [json.dumps(lora).encode()]


def adapter_weights(path: Path) -> None:
    """The tensors that the settings above belong to."""
    name = "base_model.model.model.layers.0.self_attn.{}_proj.lora_{}.weight"
    shapes = {"A": (3, 7), "B": (5, 3)}
    tensors = {name.format(p, k): mx.zeros(shapes[k]) for p in "qk" for k in "AB"}
    mx.save_safetensors(str(path), tensors)


def meta_seeds() -> list[bytes]:
    llama = {"dim": 24, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5}
    more = {"rope_theta": 1e6, "use_scaled_rope": True, "rope_scaling_factor": 8.0}
    mistral = {"hidden_dim": 36, "head_dim": 6, "sliding_window": 9, "vocab_size": 43}
    return [json.dumps(x).encode() for x in (llama, {**llama, **more}, {**llama, **mistral})]


META_SHAPES = {
    "model.embed_tokens.weight": (43, 24),
    "model.layers.0.mlp.gate_proj.weight": (36, 24),
}


def description_seeds() -> list[bytes]:
    return [STREAMS.read_bytes()]


# Mutations.

TOKENS = [
    *(b"\0 \xff \x7f \x80 { } [ ] ( ) , : . t R Q u s e q r j b c \x93 \x94 \x81 \x85 2 0".split()),
    *(b"../ / -1 -0 1e999 NaN true null 0 2147483648 18446744073709551616".split()),
    *(b"PK\x01\x02 PK\x05\x06 PK\x06\x06 \xff\xff\xff\xff \xff\xff\xff\x7f \x8a \x8b".split()),
]
VALUES = [
    *(None, True, False, 0, -1, 1, 3, 2**31, 2**63, -(2**70), 0.5, -1.0, 1e308, float("nan")),
    *("", "x", "../../x", "/etc/passwd", "\x00", "\ud800", "llama", "default", "yarn", "longrope"),
    *([], {}, [[]], [0], ["a"], {"a": 1}, {"rope_type": "yarn"}, {"rope_type": "llama3"}),
]


def mutate(data: bytes, others: list[bytes], random: random.Random) -> bytes:
    """One to eight changes; JSON is changed as values half of the time."""
    if data[:1] == b"{" and random.random() < 0.5:
        return mutate_json(data, random)
    if data[:1] == b"\x80" and random.random() < 0.5:
        return mutate_pickle(data, random)
    data = bytearray(data)
    if random.random() < 0.3 and (begin := data.find(b"{", 8)) == 8:  # a safetensors header
        text = mutate_json(bytes(data[8:].rstrip(b"\0")), random)
        return struct.pack("<Q", len(text)) + text + bytes(35)
    for _ in range(random.choice((1, 1, 2, 3, 8))):
        at = random.randrange(len(data) + 1)
        kind = random.randrange(6)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << random.randrange(8)
        elif kind == 1:
            data[at:at] = random.choice(TOKENS)
        elif kind == 2:
            token = random.choice(TOKENS)
            data[at : at + len(token)] = token
        elif kind == 3:
            del data[at : at + random.choice((1, 2, 4, 40))]
        elif kind == 4:
            part = data[at : at + random.choice((2, 8, 60))]
            data[at:at] = part * random.choice((1, 2, 30))
        else:
            other = random.choice(others)
            begin = random.randrange(len(other))
            data[at:at] = other[begin : begin + random.choice((3, 20, 200))]
    return bytes(data)


def mutate_pickle(data: bytes, random: random.Random) -> bytes:
    """Opcodes with their arguments are dropped, repeated and moved."""
    steps = opcodes(data)
    for _ in range(random.choice((1, 1, 2, 4))):
        at, other = random.randrange(len(steps)), random.randrange(len(steps))
        change = random.randrange(4)
        if change == 0:
            del steps[at : at + random.choice((1, 1, 3))]
        elif change == 1:
            steps[at:at] = steps[other : other + random.choice((1, 3, 20))]
        elif change == 2:
            steps[at], steps[other] = steps[other], steps[at]
        else:
            steps[at] = random.choice(TOKENS)
        if not steps:
            break
    return b"".join(steps)


@cache
def bounds(data: bytes) -> tuple[int, ...]:
    """Where each opcode of the first pickle begins, and where the last one ends."""
    begins = [position for _, _, position in pickletools.genops(data)]
    return (*begins, begins[-1] + 1)


def opcodes(data: bytes) -> list[bytes]:
    places = bounds(data)
    parts = [data[i:j] for i, j in pairwise(places)]
    return [*parts, data[places[-1] :]]


def mutate_json(data: bytes, random: random.Random) -> bytes:
    """Values anywhere in an object are replaced, dropped or moved to another key."""
    try:
        value = json.loads(data)
    except ValueError:
        return data[: random.randrange(len(data) + 1)]
    for _ in range(random.choice((1, 1, 2, 4))):
        places = [(value, key) for key in value] if isinstance(value, dict) else []
        for inside, key in list(places):
            deeper = inside[key]
            if isinstance(deeper, dict):
                places += [(deeper, k) for k in deeper]
            elif isinstance(deeper, list):
                places += [(deeper, i) for i in range(len(deeper))]
        if not places:
            break
        inside, key = random.choice(places)
        other, name = random.choice(places)
        change = random.randrange(3)
        if change == 0:
            inside[key] = json.loads(json.dumps(random.choice(VALUES)))
        elif change == 1 and isinstance(inside, dict):
            del inside[key]
        else:
            inside[key] = json.loads(json.dumps(other[name]))
    return json.dumps(value).encode()
