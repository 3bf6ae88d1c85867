"""Peak memory and time of conversions of a large random checkpoint.

    python benchmarks/convert_memory.py --out benchmarks/results/convert_memory.json

A llama with the layers of a 7B model, as many as fill ``--gigabytes``, in bfloat16, in shards. Every
conversion runs in a process of its own; its peak is the largest resident set that the system saw,
mapped files, interpreter and libraries included. The bound is 1.3 times the largest shard of the
source plus the largest shard of the result. Disk: three times the checkpoint.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

import mlx.core as mx
import numpy as np
from machine import about_machine, arguments

from mlx_specstream.converters.safetensors_writer import write_safetensors

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import test_convert_pickle as pickles
from test_convert import TOKENIZER

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "vocab_size": 32000,
}
LAYER = {
    **{f"self_attn.{x}_proj": (4096, 4096) for x in "qkvo"},
    **{f"mlp.{x}_proj": (11008, 4096) for x in ("gate", "up")},
    "mlp.down_proj": (4096, 11008),
    "input_layernorm": (4096,),
    "post_attention_layernorm": (4096,),
}
OUTSIDE = {"model.embed_tokens": (32000, 4096), "model.norm": (4096,), "lm_head": (32000, 4096)}
CASES = {
    "safetensors": ("safetensors", []),
    "safetensors, float16": ("safetensors", ["--dtype", "float16"]),
    "safetensors, 4 bits": ("safetensors", ["-q"]),
    "pickled": ("pickled", []),
    "pickled, 4 bits": ("pickled", ["-q"]),
}
Shapes = dict[str, tuple[int, ...]]


def shapes_of(gigabytes: float) -> tuple[int, Shapes]:
    """How many layers, and every tensor."""
    size = lambda shapes: sum(2 * int(np.prod(shape)) for shape in shapes.values())  # noqa: E731
    layers = max(1, round((gigabytes * 1e9 - size(OUTSIDE)) / size(LAYER)))
    found = {f"{name}.weight": shape for name, shape in OUTSIDE.items()}
    for i in range(layers):
        found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in LAYER.items()}
    return layers, found


def shards(shapes: Shapes, largest: float) -> Iterator[Shapes]:
    shard, size = {}, 0
    for name, shape in shapes.items():
        more = 2 * int(np.prod(shape))
        if size + more > largest * 1e9 and shard:
            yield shard
            shard, size = {}, 0
        shard[name], size = shape, size + more
    yield shard


class Numbers:
    """Random bfloat16 numbers, cheaply: pieces of one block, each from a place of its own."""

    def __init__(self):
        self.random = np.random.default_rng(7)
        block = (self.random.standard_normal(1 << 26) * 0.02).astype(np.float32)
        self.block = (block.view(np.uint32) >> 16).astype(np.uint16)

    def take(self, shape: tuple[int, ...]) -> np.ndarray:
        begin = int(self.random.integers(len(self.block)))
        return np.resize(np.roll(self.block, begin), shape)


def write_checkpoint(folder: Path, kind: str, gigabytes: float, largest: float) -> None:
    folder.mkdir()
    numbers = Numbers()
    layers, shapes = shapes_of(gigabytes)
    parts = list(shards(shapes, largest))
    for i, part in enumerate(parts):
        tail = f"{i + 1:05d}-of-{len(parts):05d}"
        if kind == "pickled":
            write_pickled(folder / f"pytorch_model-{tail}.bin", part, numbers)
        else:
            arrays = {n: mx.array(numbers.take(s)).view(mx.bfloat16) for n, s in part.items()}
            write_safetensors(folder / f"model-{tail}.safetensors", arrays)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    text = '{"tokenizer_class": "PreTrainedTokenizerFast"}\n'
    (folder / "tokenizer_config.json").write_text(text)


def write_pickled(path: Path, shapes: Shapes, numbers: Numbers) -> None:
    """As torch.save writes a state dict."""
    entries = {}
    for key, (name, shape) in enumerate(shapes.items()):
        count = int(np.prod(shape))
        where = pickles.storage("BFloat16Storage", str(key), count)
        stride = (shape[1], 1) if len(shape) == 2 else (1,)
        entries[name] = pickles.tensor(where, 0, shape, stride)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("shard/data.pkl", pickles.state(entries))
        for key, shape in enumerate(shapes.values()):
            with archive.open(f"shard/data/{key}", "w", force_zip64=True) as entry:
                entry.write(numbers.take(shape).tobytes())


def convert(source: Path, target: Path, options: list[str]) -> dict:
    """Peak bytes and seconds of one conversion."""
    argv = ["convert", "--hf-path", str(source), "--mlx-path", str(target), *options]
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "mlx_specstream", *argv])
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"the conversion failed: {argv}")
    unit = 1 if sys.platform == "darwin" else 1 << 10
    return {
        "peak_bytes": used.ru_maxrss * unit,
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
    }


def sizes(folder: Path) -> list[int]:
    files = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    return sorted((path.stat().st_size for path in files), reverse=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=6.0, help="of the checkpoint")
    parser.add_argument("--shard", type=float, default=2.2, help="gigabytes of a file, at most")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument(
        "--folder", help="where there is room (default: the system's temporary one)"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    about = {key: value for key, value in arguments(args).items() if key != "folder"}
    results = {"machine": about_machine(), "arguments": about, "cases": {}}
    with tempfile.TemporaryDirectory(dir=args.folder) as room:
        room = Path(room)
        for kind in dict.fromkeys(CASES[case][0] for case in args.cases):
            source = room / kind
            # In a process of its own: Linux counts what a parent holds as its children's peak.
            make = get_context("spawn").Process(
                target=write_checkpoint, args=(source, kind, args.gigabytes, args.shard)
            )
            make.start()
            make.join()
            if make.exitcode:
                raise SystemExit("the checkpoint could not be written")
            for case in args.cases:
                if CASES[case][0] == kind:
                    used = convert(source, room / "out", CASES[case][1])
                    largest, result = sizes(source)[0], sizes(room / "out")[0]
                    bound = 1.3 * largest + result
                    row = {
                        "source_bytes": sum(sizes(source)),
                        "largest_shard": largest,
                        "largest_result_shard": result,
                        "bound_bytes": int(bound),
                        **used,
                        "within_bound": used["peak_bytes"] < bound,
                    }
                    results["cases"][case] = row
                    print(
                        f"{case}: peak {row['peak_bytes'] / 1e9:.2f} GB, bound {bound / 1e9:.2f} GB, "
                        f"{row['seconds']} s"
                    )
                    shutil.rmtree(room / "out")
            shutil.rmtree(source)
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    if not all(row["within_bound"] for row in results["cases"].values()):
        raise SystemExit("a conversion took more than the bound")


if __name__ == "__main__":
    main()
