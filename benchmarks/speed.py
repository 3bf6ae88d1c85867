"""Wall clock of whole answers, prompt included: mlx_lm.generate against streams, interleaved.

    python benchmarks/speed.py --model M --streams S --prompts 40 --repeats 5 \
        --trees best:8 best:16 best:32 --out benchmarks/results/speed.json

One repeat runs every prompt once on each side, prompt by prompt; the ratio of a repeat is sum over
sum. Printed: the median ratio and the range of the repeats.
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


def seconds(generate, *args, **kwargs) -> tuple[float, list]:
    tic = time.perf_counter()
    out = list(generate(*args, **kwargs))
    return time.perf_counter() - tic, out


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--streams", required=True)
    parser.add_argument("--prompts", type=int, default=40, help="per task")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--trees", nargs="+", default=["best:8", "best:16", "best:32"])
    parser.add_argument("--placement", default="deferred")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)

    stock, tokenizer = load_stock(args.model)
    model, _ = mlx_specstream.load(args.model, streams=args.streams)
    results = {"machine": about_machine(), "arguments": arguments(args), "tasks": {}}
    for task in FORMS:
        prompts = [tokenizer.bos_token + p for p in valid_sample(task, args.prompts)]
        taken = {tree: [] for tree in [None, *args.trees]}
        for repeat in range(args.repeats + 1):  # the first warms up
            sums = dict.fromkeys(taken, 0.0)
            generated, passes = 0, dict.fromkeys(args.trees, 0)
            for prompt in prompts:
                taken_now, out = seconds(
                    stock_stream_generate, stock, tokenizer, prompt, max_tokens=args.max_tokens
                )
                sums[None] += taken_now
                generated += len(out)
                for tree in args.trees:
                    taken_now, out = seconds(
                        mlx_specstream.stream_generate,
                        model,
                        tokenizer,
                        prompt,
                        max_tokens=args.max_tokens,
                        tree=tree,
                        placement=args.placement,
                    )
                    sums[tree] += taken_now
                    passes[tree] += out[-1].passes
            if repeat:
                for tree, value in sums.items():
                    taken[tree].append(value)
        plain = statistics.median(taken[None])
        rows = results["tasks"][task] = {
            "generated_tokens": generated,
            "mlx_lm_seconds": taken[None],
            "mlx_lm_tokens_per_second": generated / plain,
            "trees": {},
        }
        print(f"{task} mlx_lm.generate: {generated / plain:.1f} tokens per second")
        for tree in args.trees:
            ratios = sorted(a / b for a, b in zip(taken[None], taken[tree], strict=True))
            rows["trees"][tree] = {
                "seconds": taken[tree],
                "speedup": statistics.median(ratios),
                "speedup_range": [ratios[0], ratios[-1]],
                "tokens_per_pass": (generated - len(prompts)) / passes[tree],
            }
            print(
                f"{task} {tree}: {statistics.median(ratios):.2f}x ({ratios[0]:.2f}..{ratios[-1]:.2f}), "
                f"{rows['trees'][tree]['tokens_per_pass']:.2f} tokens per pass",
                flush=True,
            )
    with open(args.out, "w") as file:
        json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
