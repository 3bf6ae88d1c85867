"""Is greedy output with streams token-identical to mlx_lm.generate's, prompt by prompt?

    python benchmarks/identity.py --model M --streams S --prompts 200 \
        --trees best:32 cartesian:2 --out benchmarks/results/identity.json

Also compares the passes of every answer with those of the replay (measure/simulate.py). The result
file holds ids and counts, no text.
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

from mlx_specstream.decode.plan import placements
from mlx_specstream.decode.tree import TreeShape
from mlx_specstream.measure.simulate import guesses_by_count, replay
from mlx_specstream.model.seams import seams_of


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--streams", required=True)
    parser.add_argument("--tasks", nargs="+", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--prompts", type=int, default=200, help="per task")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--trees", nargs="+", default=["best:32", "cartesian:2"])
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)

    stock, tokenizer = load_stock(args.model)
    model, _ = mlx_specstream.load(args.model, streams=args.streams)
    stop = tokenizer.eos_token_ids
    shapes = [TreeShape.parse(tree) for tree in args.trees]
    seams = seams_of(model)
    counts = {shape: shape.candidates(seams.vocabulary_size) for shape in shapes}
    results = {"machine": about_machine(), "arguments": arguments(args), "tasks": {}}
    for task in args.tasks:
        prompts = [
            tokenizer.encode(tokenizer.bos_token + text, add_special_tokens=False)
            for text in valid_sample(task, args.prompts)
        ]
        expected, guesses = [], []
        for prompt in prompts:
            said = stock_stream_generate(stock, tokenizer, prompt, max_tokens=args.max_tokens)
            expected.append([r.token for r in said])
            guesses.append(guesses_by_count(seams, prompt, expected[-1], {*counts.values()}))
        rows = results["tasks"][task] = {
            "prompts_sha256": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
            "generated_tokens": sum(map(len, expected)),
            "runs": [],
        }
        for shape in shapes:
            simulated = [
                replay(g[counts[shape]], tokens, shape, args.max_tokens, stop).passes
                for g, tokens in zip(guesses, expected, strict=True)
            ]
            for placement in placements(seams.streams.config):
                same, passes, tic = 0, [], time.perf_counter()
                for prompt, tokens in zip(prompts, expected, strict=True):
                    out = list(
                        mlx_specstream.stream_generate(
                            model,
                            tokenizer,
                            prompt,
                            max_tokens=args.max_tokens,
                            tree=str(shape),
                            placement=placement,
                        )
                    )
                    same += [r.token for r in out] == tokens
                    passes.append(out[-1].passes)
                run = {
                    "tree": str(shape),
                    "placement": placement,
                    "identical": same,
                    "passes_as_simulated": sum(map(int.__eq__, passes, simulated)),
                    "of": len(prompts),
                    "tokens_per_pass": sum(len(t) - 1 for t in expected) / max(1, sum(passes)),
                    "seconds": time.perf_counter() - tic,
                    "passes": passes,
                }
                rows["runs"].append(run)
                print(task, {k: v for k, v in run.items() if k != "passes"}, flush=True)
    Path(args.out).write_text(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
