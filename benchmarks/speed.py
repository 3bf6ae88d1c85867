"""Wall clock of whole answers, prompt included: mlx_lm.generate against ours, interleaved.

    python benchmarks/speed.py --model M --streams S --prompts 100 --repeats 9 \
        --out benchmarks/results/speed.json

One repeat runs every prompt once in each way, prompt by prompt; the ratio of a repeat is sum over
sum. Printed: the median ratio and its range over the repeats, tokens per pass, and the cost of a
pass (tokens per pass / speed-up). ``planned`` is what users get: copies, streams and plain decoding,
weighed with the row costs measured at the start (``mlx-specstream tune``).
"""

import mlx_specstream  # first: it finds a fast BLAS before mlx loads  # isort: skip
import argparse
import json
import statistics
import time
from pathlib import Path

from machine import about_machine, arguments
from mlx_lm import load as load_stock
from mlx_lm import stream_generate as stock_stream_generate
from tasks import FORMS, valid_sample

from mlx_specstream.measure.rows import measure_costs
from mlx_specstream.model.seams import seams_of

WAYS = {
    "plain": {"use_streams": False},
    "planned": {},
    "planned, no copies": {"copies": False},
    "copies": {"use_streams": False, "copies": True},
}


def seconds(generate, *args, **kwargs) -> tuple[float, list]:
    tic = time.perf_counter()
    out = list(generate(*args, **kwargs))
    return time.perf_counter() - tic, out


def options(way: str) -> dict:
    """``best:8`` or ``best:8 copies`` are fixed trees, anything else is in WAYS."""
    if way in WAYS:
        return WAYS[way]
    tree, _, copies = way.partition(" ")
    tree, _, inline = tree.partition("/")
    return {"tree": tree, "copies": bool(copies), "placement": inline or None}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--streams", required=True)
    parser.add_argument("--tasks", nargs="+", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--prompts", type=int, default=100, help="per task")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--ways", nargs="+", default=["plain", "planned", "best:8"])
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)

    stock, tokenizer = load_stock(args.model)
    model, _ = mlx_specstream.load(args.model, streams=args.streams)
    seams = seams_of(model)
    seams.kept["costs"] = measure_costs(
        seams, rows=(1, 2, 3, 4, 6, 8, 12, 16), contexts=(64, 192), repeats=4
    )
    results = {
        "machine": about_machine(),
        "arguments": arguments(args),
        "costs": seams.kept["costs"].to_json(),
        "tasks": {},
    }
    for task in args.tasks:
        prompts = [tokenizer.bos_token + p for p in valid_sample(task, args.prompts)]
        taken = {way: [] for way in [None, *args.ways]}
        for repeat in range(args.repeats + 1):  # the first warms up
            sums = dict.fromkeys(taken, 0.0)
            generated, passes, same = 0, dict.fromkeys(args.ways, 0), dict.fromkeys(args.ways, 0)
            for prompt in prompts:
                taken_now, said = seconds(
                    stock_stream_generate, stock, tokenizer, prompt, max_tokens=args.max_tokens
                )
                sums[None] += taken_now
                generated += len(said)
                for way in args.ways:
                    taken_now, out = seconds(
                        mlx_specstream.stream_generate,
                        model,
                        tokenizer,
                        prompt,
                        max_tokens=args.max_tokens,
                        **options(way),
                    )
                    sums[way] += taken_now
                    passes[way] += out[-1].passes
                    same[way] += [r.token for r in out] == [r.token for r in said]
            if repeat:
                for way, value in sums.items():
                    taken[way].append(value)
        plain = statistics.median(taken[None])
        rows = results["tasks"][task] = {
            "generated_tokens": generated,
            "mlx_lm_seconds": taken[None],
            "mlx_lm_tokens_per_second": generated / plain,
            "traces": len(seams.kept["buckets"]),
            "ways": {},
        }
        print(f"{task} mlx_lm.generate: {generated / plain:.1f} tokens per second")
        for way in args.ways:
            ratios = sorted(a / b for a, b in zip(taken[None], taken[way], strict=True))
            speedup = statistics.median(ratios)
            per_pass = (generated - len(prompts)) / max(1, passes[way])
            rows["ways"][way] = {
                "seconds": taken[way],
                "speedup": speedup,
                "speedup_range": [ratios[0], ratios[-1]],
                "tokens_per_pass": per_pass,
                "pass_cost": per_pass / speedup,
                "identical": same[way],
                "of": len(prompts),
            }
            print(
                f"{task} {way}: {speedup:.2f}x ({ratios[0]:.2f}..{ratios[-1]:.2f}), "
                f"{per_pass:.2f} tokens per pass, pass cost {per_pass / speedup:.2f}, "
                f"identical {same[way]}/{len(prompts)}",
                flush=True,
            )
        Path(args.out).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
