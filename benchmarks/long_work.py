"""Memory over a long answer, ours beside mlx-lm's own loop; and what sliding windows keep.

    python benchmarks/long_work.py --model M --streams S --tokens 10000 \
        --out benchmarks/results/long_work.json

Every way is a process of its own, and end-of-text is ignored. After the first token and after every
1,000: active memory, the peak since the last mark, MLX's buffer cache, the process' own peak. The
ratio is our highest peak over mlx-lm's, with what the first token needed and behind it; beside it the
same without the bytes of streams and of their merged weights, which stay the same. Then a small
random gemma3_text with sliding windows: how many rows each layer stores at the end, here and with
mlx-lm, and how many it may.
"""

import mlx_specstream  # first: it finds a fast BLAS before mlx loads  # isort: skip
import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import mlx_lm
from machine import about_machine, arguments
from mlx.utils import tree_flatten
from mlx_lm.models import gemma3_text
from never_slower import random_streams
from tasks import FORMS, valid_sample

from mlx_specstream.config import StreamConfig
from mlx_specstream.decode.compiling import compile_from_now_on
from mlx_specstream.model.cache import make_prompt_cache
from mlx_specstream.model.seams import attach, seams_of
from mlx_specstream.model.window import SLACK

TARGET = 1.02  # of mlx-lm's peak
MARK = 1000  # tokens
WINDOW = 64
GEMMA = {
    "model_type": "gemma3_text",
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "rms_norm_eps": 1e-5,
    "vocab_size": 4096,
    "sliding_window": WINDOW,
    "sliding_window_pattern": 3,
    "query_pre_attn_scalar": 24,
}


def mark(tokens: int, tic: float) -> dict:
    """Bytes now; the peak begins anew."""
    found = {
        "tokens": tokens,
        "seconds": round(time.perf_counter() - tic, 3),
        "active": mx.get_active_memory(),
        "peak": mx.get_peak_memory(),
        "cache": mx.get_cache_memory(),
        "process_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024),
    }
    mx.reset_peak_memory()
    return found


def followed(responses, label: str) -> tuple[list[dict], int]:
    """A mark after the first token, after every MARK and at the end; the passes."""
    tic, marks, count, passes = time.perf_counter(), [], 0, 0
    for response in responses:
        count, passes = count + 1, getattr(response, "passes", count)
        if count == 1 or count % MARK == 0:
            marks.append(mark(count, tic))
            now = marks[-1]
            print(
                f"{label}, {count} tokens: active {now['active'] / 1e6:.1f} MB, peak "
                f"{now['peak'] / 1e6:.1f} MB, buffer cache {now['cache'] / 1e6:.1f} MB, process "
                f"{now['process_peak'] / 1e6:.0f} MB, {now['seconds']:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    if count % MARK and count > 1:
        marks.append(mark(count, tic))
    return marks, passes


def options_of(way: str) -> dict:
    known = {"plain": {"use_streams": False}, "planned": {}, "no copies": {"copies": False}}
    return known.get(way, {"tree": way})


def child(args) -> dict:
    """One long answer."""
    more = 0
    if args.child == "mlx_lm":
        model, tokenizer = mlx_lm.load(args.model)
        generate, options = mlx_lm.stream_generate, {}
    else:
        model, tokenizer = mlx_specstream.load(args.model, streams=args.streams)
        compile_from_now_on(seams_of(model))
        generate, options = mlx_specstream.stream_generate, options_of(args.child)
        streams = seams_of(model).streams.parameters()
        mx.eval(streams)
        more = sum(array.nbytes for _, array in tree_flatten(streams))
    tokenizer.eos_token_ids = set()
    mx.eval(model.parameters())
    start = mark(0, time.perf_counter())
    prompt = tokenizer.bos_token + valid_sample(args.task, 1)[0]
    responses = generate(model, tokenizer, prompt, max_tokens=args.tokens, **options)
    marks, passes = followed(responses, args.child)
    merged = 0
    if args.child != "mlx_lm":
        merged = sum(array.nbytes for array in seams_of(model).merged.values())
    return {"streams": more, "merged": merged, "start": start, "marks": marks, "passes": passes}


def windows(args, tokenizer) -> dict:
    """Rows that each layer of a model with sliding windows stores after a long answer."""
    mx.random.seed(0)
    model = gemma3_text.Model(gemma3_text.ModelArgs.from_dict(GEMMA))
    model.eval()
    prompt, tokens = list(range(3, 43)), {}
    stock_cache = model.make_cache()
    tokens["mlx_lm"] = [
        r.token
        for r in mlx_lm.stream_generate(
            model, tokenizer, prompt, max_tokens=args.window_tokens, prompt_cache=stock_cache
        )
    ]
    attach(model, random_streams(model, StreamConfig(num_streams=3, msa_layers=2, lora_rank=4)))
    cache = make_prompt_cache(model)
    tokens["ours"] = [
        r.token
        for r in mlx_specstream.stream_generate(
            model,
            tokenizer,
            prompt,
            max_tokens=args.window_tokens,
            prompt_cache=cache,
            tree="best:8",
            copies=True,
        )
    ]
    layers = []
    for ours, theirs in zip(cache, stock_cache, strict=True):
        window = getattr(ours, "window", None)
        most = None if window is None else window + SLACK + ours.step
        layers.append(
            {
                "window": window,
                "positions": ours.offset,
                "rows_stored": ours.size(),
                "rows_allocated": ours.keys.shape[2],
                "rows_allowed": most,
                "mlx_lm_rows_allocated": theirs.keys.shape[2],
            }
        )
        print(f"gemma3_text, layer {len(layers) - 1}: {layers[-1]}", flush=True)
    sliding = [isinstance(c, mlx_lm.models.cache.RotatingKVCache) for c in stock_cache]
    bounded = all(
        not slides or (row["window"] and row["rows_allocated"] <= row["rows_allowed"])
        for slides, row in zip(sliding, layers, strict=True)
    )
    same = tokens["ours"] == tokens["mlx_lm"]
    print(f"gemma3_text: sliding layers bounded: {bounded}, same text: {same}", flush=True)
    return {"layers": layers, "bounded": bounded, "same_text": same}


def run(args, way: str) -> dict:
    command = [sys.executable, __file__, "--child", way, "--model", args.model]
    command += ["--streams", args.streams, "--task", args.task]
    command += ["--tokens", str(args.tokens), "--out", "-"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--streams", required=True)
    parser.add_argument("--task", default="e2e", choices=list(FORMS))
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--window-tokens", type=int, default=2_000)
    parser.add_argument("--ways", nargs="+", default=["plain", "planned", "no copies", "best:8"])
    parser.add_argument("--out", required=True)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args)))
        return
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    about = arguments(args)
    del about["child"]
    results = {"machine": about_machine(), "arguments": about, "target": TARGET, "ways": {}}
    for way in ["mlx_lm", *args.ways]:
        row = results["ways"][way] = run(args, way)
        row["peak"] = max(m["peak"] for m in row["marks"])
        row["peak_later"] = max(m["peak"] for m in row["marks"][1:])
        Path(args.out).write_text(json.dumps(results, indent=1) + "\n")
    theirs = results["ways"]["mlx_lm"]
    for way in args.ways:
        row, last = results["ways"][way], results["ways"][way]["marks"][-1]
        ours = row["streams"] + row["merged"]
        for key in ("peak", "peak_later"):
            row[f"{key}_ratio"] = row[key] / theirs[key]
            row[f"{key}_ratio_without_streams"] = (row[key] - ours) / theirs[key]
        print(
            f"{way}: peak {row['peak'] / 1e6:.1f} MB, {row['peak_ratio']:.3f} of mlx-lm's; behind the "
            f"first token {row['peak_later'] / 1e6:.1f} MB, {row['peak_later_ratio']:.3f}, and "
            f"{row['peak_later_ratio_without_streams']:.3f} without the {ours / 1e6:.1f} MB of streams "
            f"(target {TARGET}); {last['tokens'] / max(1, row['passes']):.2f} tokens per pass, "
            f"{last['tokens'] / last['seconds']:.1f} tokens per second",
            flush=True,
        )
    tokenizer = mlx_lm.load(args.model)[1]
    tokenizer.eos_token_ids = set()
    results["windows"] = windows(args, tokenizer)
    Path(args.out).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
