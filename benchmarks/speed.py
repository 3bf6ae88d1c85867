"""Wall clock of whole answers, prompt included: mlx_lm.generate against ours, interleaved.

    python benchmarks/speed.py --model M --streams S --prompts 100 --pairs 10 \
        --out benchmarks/results/speed.json

Every prompt runs once in each way, in an order of its own, so that a slow moment of the machine falls on
all, and no way always comes behind the same other one. The prompts are split into ``--pairs`` groups; the
ratio of a group is sum over sum. Printed: the median ratio of the groups and their quartiles, the ratio
over all, tokens per pass, and the cost of a pass (tokens per pass / speed-up). Other prompts warm up
compiled code first. ``planned`` is what users get: copies, streams and plain decoding, weighed with the
row costs measured at the start (``mlx-specstream tune``).
"""

import mlx_specstream  # first: it finds a fast BLAS before mlx loads  # isort: skip
import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
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


def seconds(generate, *args, **kwargs) -> tuple[float, list, float]:
    """Seconds of an answer, its responses, seconds to the first."""
    tic, out, first = time.perf_counter(), [], 0.0
    for response in generate(*args, **kwargs):
        first = first or time.perf_counter() - tic
        out.append(response)
    return time.perf_counter() - tic, out, first


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
    parser.add_argument("--pairs", type=int, default=10, help="groups of prompts")
    parser.add_argument("--warm-up", type=int, default=15, help="prompts that are not timed")
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
        every = valid_sample(task, args.prompts + args.warm_up)
        every = [tokenizer.bos_token + p for p in every]
        prompts, others = every[: args.prompts], every[args.prompts :]
        ways = [None, *args.ways]
        taken = {way: [] for way in ways}  # seconds of each prompt
        generated, first = [], {way: [] for way in ways}
        passes, same = dict.fromkeys(args.ways, 0), dict.fromkeys(args.ways, 0)
        for index, prompt in enumerate(others + prompts):
            said = {}
            for way in random.Random(index).sample(ways, len(ways)):
                generate = mlx_specstream.stream_generate if way else stock_stream_generate
                now, out, begun = seconds(
                    generate,
                    model if way else stock,
                    tokenizer,
                    prompt,
                    max_tokens=args.max_tokens,
                    **(options(way) if way else {}),
                )
                if index < len(others):
                    continue
                taken[way].append(now)
                first[way].append(begun)
                said[way] = [r.token for r in out]
                if way is not None:
                    passes[way] += out[-1].passes
            if said:
                generated.append(len(said[None]))
                for way in args.ways:
                    same[way] += said[way] == said[None]
        rows = results["tasks"][task] = {
            "generated_tokens": generated,
            "seconds": {way or "mlx_lm": t for way, t in taken.items()},
            "first_token_seconds": {way or "mlx_lm": t for way, t in first.items()},
            "traces": len(seams.kept.get("buckets", ())),
            "ways": {},
        }
        total = sum(generated)
        print(f"{task} mlx_lm.generate: {total / sum(taken[None]):.1f} tokens per second")
        for way in args.ways:
            groups = [
                sum(taken[None][g :: args.pairs]) / sum(taken[way][g :: args.pairs])
                for g in range(args.pairs)
            ]
            low, speedup, high = (float(q) for q in np.quantile(groups, [0.25, 0.5, 0.75]))
            # Without the prompt: what the decode loop itself gains.
            decoding = (sum(taken[None]) - sum(first[None])) / (sum(taken[way]) - sum(first[way]))
            per_pass = (total - len(prompts)) / max(1, passes[way])
            rows["ways"][way] = {
                "pair_ratios": groups,
                "speedup": speedup,
                "speedup_quartiles": [low, high],
                "speedup_over_all": sum(taken[None]) / sum(taken[way]),
                "speedup_after_first_token": decoding,
                "tokens_per_pass": per_pass,
                "pass_cost": per_pass / speedup,
                "pass_cost_after_first_token": per_pass / decoding,
                "identical": same[way],
                "of": len(prompts),
            }
            print(
                f"{task} {way}: {speedup:.2f}x ({low:.2f}..{high:.2f}), after the first token "
                f"{decoding:.2f}x; {per_pass:.2f} tokens per pass, pass cost "
                f"{per_pass / speedup:.2f} ({per_pass / decoding:.2f} after the first token), "
                f"identical {same[way]}/{len(prompts)}",
                flush=True,
            )
        Path(args.out).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
