"""Is greedy output with streams token-identical to mlx_lm.generate's? Counts prompts, not averages.

    python benchmarks/identity.py --model M --streams S --prompts 200 \
        --trees best:32 cartesian:3 --placements deferred inline --out benchmarks/results/identity.json

The result file holds ids and counts, no text.
"""

import mlx_specstream  # first: it finds a fast BLAS before mlx loads  # isort: skip
import argparse
import hashlib
import json
import time
from pathlib import Path

from machine import about_machine, arguments
from mlx_lm import load as load_stock
from mlx_lm import stream_generate as stock_stream_generate
from tasks import FORMS, valid_sample


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--streams", required=True)
    parser.add_argument("--prompts", type=int, default=200, help="per task")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--trees", nargs="+", default=["best:32", "cartesian:3"])
    parser.add_argument("--placements", nargs="+", default=["deferred", "inline"])
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)

    stock, tokenizer = load_stock(args.model)
    model, _ = mlx_specstream.load(args.model, streams=args.streams)
    results = {"machine": about_machine(), "arguments": arguments(args), "tasks": {}}
    for task in FORMS:
        prompts = [tokenizer.bos_token + p for p in valid_sample(task, args.prompts)]
        expected = [
            [
                r.token
                for r in stock_stream_generate(stock, tokenizer, p, max_tokens=args.max_tokens)
            ]
            for p in prompts
        ]
        rows = results["tasks"][task] = {
            "prompts_sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
            "generated_tokens": sum(map(len, expected)),
            "runs": [],
        }
        for tree in args.trees:
            for placement in args.placements:
                same, passes, tic = 0, [], time.perf_counter()
                for prompt, tokens in zip(prompts, expected, strict=True):
                    out = list(
                        mlx_specstream.stream_generate(
                            model,
                            tokenizer,
                            prompt,
                            max_tokens=args.max_tokens,
                            tree=tree,
                            placement=placement,
                        )
                    )
                    same += [r.token for r in out] == tokens
                    passes.append(out[-1].passes)
                total = sum(len(t) - 1 for t in expected) / max(1, sum(passes))
                seconds = time.perf_counter() - tic
                rows["runs"].append(
                    {
                        "tree": tree,
                        "placement": placement,
                        "identical": same,
                        "of": len(prompts),
                        "tokens_per_pass": total,
                        "seconds": seconds,
                        "passes": passes,
                    }
                )
                print(
                    f"{task} {tree} {placement}: {same} of {len(prompts)} identical, "
                    f"{total:.3f} tokens per pass, {seconds:.0f} s",
                    flush=True,
                )
    with open(args.out, "w") as file:
        json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
