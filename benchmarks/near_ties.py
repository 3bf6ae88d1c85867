"""Where arithmetic depends on the rows of a pass: how often does text change, and what a guard saves.

    python benchmarks/near_ties.py --model M --streams S --prompts 50 \
        --convert /path/to/hf-model --out benchmarks/results/near_ties.json

On a CPU a pass of many rows computes what a pass of one row does; on a GPU other kernels run and the
last bits differ. Here noise is put into every pass of more than one row: on its logits, relative to the
largest logit of a row (2^-9 is half a step of bfloat16), and on the K/V that it writes, relative to
their RMS. The noise depends on the number of rows and the position alone, so equal passes agree, and a
pass of one row has none: plain decoding and the prompt are as they were. Reported for every noise and
guard: answers identical to plain decoding, where the first difference is and how close plain decoding's
two best logits were there, passes that repeat a near-tie, tokens per pass.

``--convert`` adds the real thing without noise: 16-bit and 4-bit copies of a model, each against
mlx_lm.stream_generate on a stock copy of itself.
"""

import mlx_specstream  # first: it finds a fast BLAS before mlx loads  # isort: skip
import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import mlx.core as mx
import numpy as np
from machine import about_machine, arguments
from mlx_lm import load as load_stock
from mlx_lm import stream_generate as stock_stream_generate
from tasks import FORMS, valid_sample

from mlx_specstream.converters import convert
from mlx_specstream.decode.record import Record
from mlx_specstream.model.cache import LayerContext
from mlx_specstream.model.seams import Seams, seams_of

NOISES = {  # name -> (of logits, of K/V)
    "none": (0.0, 0.0),
    "2^-11": (2.0**-11, 0.0),
    "2^-9": (2.0**-9, 0.0),
    "2^-9, K/V too": (2.0**-9, 2.0**-9),
}
CONVERSIONS = {
    "bf16": {"dtype": "bfloat16"},
    "4-bit": {"quantize": True, "q_bits": 4},
    "4-bit, bf16": {"quantize": True, "q_bits": 4, "dtype": "bfloat16"},
}


def noise(rows: int, salt: int, positions: mx.array, width: int) -> mx.array:
    """Normal noise [r, width] that depends on (rows, salt, position) alone."""
    first = mx.full(positions.shape, rows * 0x9E3779B1 + salt * 0x85EBCA77 & 0xFFFFFFFF, mx.uint32)
    keys = mx.stack([first, positions.astype(mx.uint32)], axis=-1)
    return mx.vmap(lambda key: mx.random.normal((width,), key=key))(keys)


@contextmanager
def noisy(of_logits: float, of_kv: float) -> Iterator[None]:
    """Inside, passes of several rows compute a little differently from passes of one."""
    forward, update = Seams.forward, LayerContext.update_and_fetch
    generate = import_module("mlx_specstream.generate")
    last_rows = generate.last_rows

    def noisy_forward(self, run, tokens=None, stores=None):
        run.noisy = tokens is not None and tokens.shape[1] > 1
        positions = run.rows.positions[0]
        logits = forward(self, run, tokens, stores)
        if not run.noisy or not of_logits:
            return logits
        size = mx.abs(logits).max(axis=-1, keepdims=True)
        more = noise(tokens.shape[1], 0, positions[: logits.shape[1]], logits.shape[2])
        return logits + (of_logits * size * more).astype(logits.dtype)

    def noisy_update(self, keys, values):
        if getattr(self.run, "noisy", False) and of_kv:
            layer, positions = self.run.contexts.index(self), self.run.rows.positions[0]
            both = []
            for salt, x in enumerate((keys, values)):
                _, K, R, D = x.shape
                rms = mx.sqrt(mx.square(x).mean(axis=(1, 3), keepdims=True))
                more = noise(R, 2 * layer + salt + 1, positions, K * D)
                more = more.reshape(1, R, K, D).transpose(0, 2, 1, 3)
                both.append(x + (of_kv * rms * more).astype(x.dtype))
            keys, values = both
        return update(self, keys, values)

    Seams.forward, LayerContext.update_and_fetch = noisy_forward, noisy_update
    if of_logits or of_kv:
        generate.last_rows = lambda seams, length: 1  # as on a GPU: a prompt ends in a pass of one
    try:
        yield
    finally:
        Seams.forward, LayerContext.update_and_fetch = forward, update
        generate.last_rows = last_rows


class Plain:
    """What plain decoding said, and the gap between its two best logits at every token."""

    def __init__(self, stock, tokenizer, prompts: list[str], max_tokens: int):
        self.tokens, self.gaps = [], []
        for prompt in prompts:
            tokens, gaps = [], []
            for r in stock_stream_generate(stock, tokenizer, prompt, max_tokens=max_tokens):
                tokens.append(r.token)
                best = np.sort(np.array(r.logprobs.astype(mx.float32)))[-2:]
                gaps.append(float(best[1] - best[0]))
            self.tokens.append(tokens)
            self.gaps.append(gaps)

    def closer_than(self, guard: float) -> float:
        """Share of tokens whose choice was that close."""
        return float(np.mean([gap < guard for gaps in self.gaps for gap in gaps]))


def largest_logit(stock, tokenizer, prompts, plain: Plain) -> float:
    """Mean of the largest |logit| over the rows of the answers: noise is relative to it."""
    sizes = []
    for prompt, answer in zip(prompts, plain.tokens, strict=True):
        text = tokenizer.encode(prompt, add_special_tokens=False) + answer
        logits = stock(mx.array([text]))[0, -len(answer) - 1 : -1]
        sizes.append(float(mx.abs(logits).max(axis=-1).astype(mx.float32).mean()))
    return float(np.mean(sizes))


def against_plain(model, tokenizer, prompts, plain: Plain, **options) -> dict:
    record, first, gaps, generated = Record(), [], [], 0
    for prompt, said, gap in zip(prompts, plain.tokens, plain.gaps, strict=True):
        out = mlx_specstream.stream_generate(
            model, tokenizer, prompt, copies=False, record=record, **options
        )
        tokens = [r.token for r in out]
        generated += len(tokens) - 1
        if tokens != said:
            pairs = enumerate(zip(tokens, said, strict=False))
            at = next((i for i, (a, b) in pairs if a != b), min(len(tokens), len(said)))
            first.append(at)
            gaps.append(round(gap[at], 5) if at < len(gap) else None)
    return {
        "identical": len(prompts) - len(first),
        "of": len(prompts),
        "first_difference_at": first,
        "gap_there": gaps,
        "passes": len(record.passes),
        "rechecks": sum(p.recheck for p in record.passes),
        "tokens_per_pass": round(generated / max(1, len(record.passes)), 4),
    }


def said(row: dict) -> str:
    widest = max((g for g in row["gap_there"] if g is not None), default=0.0)
    return (
        f"identical {row['identical']}/{row['of']}, widest gap that fell {widest:.4f}, "
        f"{row['rechecks']} rechecks in {row['passes']} passes, "
        f"{row['tokens_per_pass']:.2f} tokens per pass"
    )


def noise_study(args, stock, model, tokenizer, task: str, options: dict) -> dict:
    prompts = [tokenizer.bos_token + p for p in valid_sample(task, args.prompts)]
    plain = Plain(stock, tokenizer, prompts, args.max_tokens)
    size = largest_logit(stock, tokenizer, prompts, plain)
    found = {
        "tokens": sum(map(len, plain.tokens)),
        "largest_logit": size,
        "closer_than": {str(g): plain.closer_than(g) for g in args.guards},
        "runs": [],
    }
    print(f"{task}: the largest logit is {size:.1f} on average", flush=True)
    for name in args.noises:
        of_logits, of_kv = NOISES[name]
        seams_of(model).kept.pop("buckets", None)  # compiled with other noise
        for guard in args.guards:
            with noisy(of_logits, of_kv):
                row = against_plain(model, tokenizer, prompts, plain, guard=guard, **options)
            sigma = of_logits * size
            row = {
                "noise": name,
                "of_logits": of_logits,
                "of_kv": of_kv,
                "noise_in_logits": sigma,
                "guard": guard,
                "guard_over_noise": guard / sigma if sigma else None,
                **row,
            }
            found["runs"].append(row)
            times = f" ({guard / sigma:.1f} x noise)" if sigma else ""
            print(f"{task}, noise {name}, guard {guard}{times}: {said(row)}", flush=True)
    seams_of(model).kept.pop("buckets", None)
    return found


def conversion_study(args, name: str, folder: Path, options: dict) -> dict:
    path = str(convert(args.convert, str(folder / name.replace(", ", "-")), **CONVERSIONS[name]))
    stock, tokenizer = load_stock(path)
    model, _ = mlx_specstream.load(path, streams=args.streams)
    found = {}
    for task in args.tasks:
        texts = valid_sample(task, args.prompts)[: args.convert_prompts]
        prompts = [tokenizer.bos_token + p for p in texts]
        plain = Plain(stock, tokenizer, prompts, args.max_tokens)
        found[task] = {
            "closer_than": {str(g): plain.closer_than(g) for g in args.convert_guards},
            "runs": [],
        }
        for guard in args.convert_guards:
            row = against_plain(model, tokenizer, prompts, plain, guard=guard, **options)
            found[task]["runs"].append({"guard": guard, **row})
            print(f"{name}, {task}, guard {guard}: {said(row)}", flush=True)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--streams", required=True)
    parser.add_argument("--tasks", nargs="+", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--prompts", type=int, default=50, help="per task")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--tree", default="best:8")
    parser.add_argument("--noises", nargs="*", default=list(NOISES), choices=list(NOISES))
    parser.add_argument("--guards", type=float, nargs="+", default=[0.0, 0.02, 0.05, 0.1, 0.2])
    parser.add_argument("--convert", help="Hugging Face folder of the same model")
    parser.add_argument("--conversions", nargs="+", default=["bf16", "4-bit"], choices=CONVERSIONS)
    parser.add_argument("--convert-prompts", type=int, default=20, help="per task, at most")
    parser.add_argument("--convert-guards", type=float, nargs="+", default=[0.0, 0.1])
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)

    options = {"max_tokens": args.max_tokens, "tree": args.tree, "placement": "deferred"}
    about = arguments(args)
    about["convert"] = Path(args.convert).name if args.convert else None
    results = {"machine": about_machine(), "arguments": about, "noise": {}, "converted": {}}
    if args.noises:
        stock, tokenizer = load_stock(args.model)
        model, _ = mlx_specstream.load(args.model, streams=args.streams)
        for task in args.tasks:
            results["noise"][task] = noise_study(args, stock, model, tokenizer, task, options)
            Path(args.out).write_text(json.dumps(results) + "\n")
    if args.convert:
        with tempfile.TemporaryDirectory() as folder:
            for name in args.conversions:
                results["converted"][name] = conversion_study(args, name, Path(folder), options)
                Path(args.out).write_text(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
