"""The same model in every format, converted: the same greedy text.

    pip install -e . && python benchmarks/same_text.py --data SHARED --out benchmarks/results/same_text.json

The models of `SPECSTREAM_DATA/models` are written in each format by this script, byte by byte and
without PyTorch, converted, and asked for a text with mlx-lm. The text as it is converted
directly counts; it is compared token by token. 16-bit forms are compared with one another, since
rounding may change the text.
"""

import mlx_specstream  # noqa: F401  before mlx: it picks the BLAS  # isort: skip
import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
from machine import about_machine

from mlx_specstream import load
from mlx_specstream.converters import convert
from mlx_specstream.converters.export import export

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from plain_sources import FORMATS, Tensors

PROMPTS = {
    "babyllama-0.9m": "Once upon a time",
    "e2e-sql-14m": "<s>MR: name[The Phoenix], food[Italian], area[riverside]\nText:",
}


def greedy(folder: Path, prompt: str, count: int) -> list[int]:
    """mlx-lm's own greedy tokens, past an end of sequence, so that texts are long."""
    from mlx_lm.generate import generate_step

    model, tokenizer = load(folder, streams=False)
    steps = generate_step(mx.array(tokenizer.encode(prompt)), model, max_tokens=count)
    return [int(token) for token, _ in steps]


def weights_of(folder: Path) -> Tensors:
    """As transformers names them."""
    (path,) = folder.glob("*.safetensors")
    return mx.load(str(path))


def compare(source: Path, prompt: str, count: int, room: Path) -> dict:
    """format -> whether its text is the same, in each precision."""
    about = [p for p in source.iterdir() if p.suffix not in (".bin", ".safetensors")]
    direct = convert(source, room / "direct", dtype="float32")
    tensors, rows = weights_of(direct), {}
    expected = {"float32": greedy(direct, prompt, count)}
    for dtype in ("float32", "bfloat16", "float16"):
        cast = {name: value.astype(getattr(mx, dtype)) for name, value in tensors.items()}
        mx.eval(cast)
        for label, write in FORMATS.items():
            folder = room / "hf"
            folder.mkdir()
            for path in about:
                shutil.copy(path, folder)
            target = convert(write(folder, dict(cast)), room / "out", dtype=dtype)
            text = greedy(target, prompt, count)
            same = text == expected.setdefault(dtype, text)
            rows.setdefault(label, {})[dtype] = same
            print(f"{source.name}, {label}, {dtype}: {'same' if same else 'DIFFERS'}", flush=True)
            shutil.rmtree(folder)
            shutil.rmtree(target)
    again = convert(export(direct, room / "back"), room / "again")
    rows["exported and back"] = {"float32": greedy(again, prompt, count) == expected["float32"]}
    alike = {
        dtype: int(np.argmin([*map(int.__eq__, text, expected["float32"]), 0]))
        for dtype, text in expected.items()
    }
    return {"tokens": count, "formats": rows, "tokens_as_in_float32": alike}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("SPECSTREAM_DATA", "../shared"))
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results = {"machine": about_machine(), "models": {}}
    for name, prompt in PROMPTS.items():
        with tempfile.TemporaryDirectory() as room:
            source = Path(args.data) / "models" / name
            results["models"][name] = compare(source, prompt, args.tokens, Path(room))
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    every = [
        same
        for m in results["models"].values()
        for f in m["formats"].values()
        for same in f.values()
    ]
    print(f"{sum(every)} of {len(every)} the same")
    if not all(every):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
