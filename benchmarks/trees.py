"""Tokens per pass of many trees, replayed exactly from one teacher-forced pass per prompt.

    python benchmarks/trees.py --model M --streams S --prompts 200 --check best:32 \
        --out benchmarks/results/trees.json

``--check`` decodes for real with these trees too and compares the passes prompt by prompt.
"""

import mlx_specstream  # first: it finds a fast BLAS before mlx loads  # isort: skip
import argparse
import json
from pathlib import Path

import numpy as np
from machine import about_machine, arguments
from tasks import FORMS, valid_sample

from mlx_specstream.decode.tree import TreeShape
from mlx_specstream.measure.simulate import (
    acceptance_by_depth,
    guesses_by_count,
    replay,
    tokens_per_pass,
)
from mlx_specstream.model.seams import seams_of

SIZES = (3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64)
TREES = ["chain", "cartesian:2", "cartesian:3", "cartesian:4", *(f"best:{n}" for n in SIZES)]


def accuracy(all_guesses, answers, streams: int, ranks=(1, 2, 4, 8)) -> dict:
    """Share of host rows at which stream j has the base's token among its first r guesses."""
    hits = np.zeros((streams, len(ranks)))
    total = np.zeros(streams)
    for guesses, answer in zip(all_guesses, answers, strict=True):
        for i, guess in enumerate(guesses):
            for j in range(streams):
                if i + 1 + j < len(answer):
                    where = np.flatnonzero(guess.tokens[j] == answer[i + 1 + j])
                    rank = where[0] if len(where) else 1 << 30
                    hits[j] += [rank < r for r in ranks]
                    total[j] += 1
    shares = hits / np.maximum(total, 1)[:, None]
    return {f"top{r}": shares[:, k].round(4).tolist() for k, r in enumerate(ranks)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--streams", required=True)
    parser.add_argument("--prompts", type=int, default=200, help="per task")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--trees", nargs="+", default=TREES)
    parser.add_argument("--check", nargs="*", default=[])
    parser.add_argument("--out")
    args = parser.parse_args()
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)

    model, tokenizer = mlx_specstream.load(args.model, streams=args.streams)
    seams, stop = seams_of(model), tokenizer.eos_token_ids
    g = seams.streams.config.num_streams
    shapes = [TreeShape.parse(t) for t in args.trees]
    counts = {s: s.candidates(seams.vocabulary_size) for s in shapes}
    most = max(counts.values())
    results = {"machine": about_machine(), "arguments": arguments(args), "tasks": {}}
    for task in FORMS:
        answers, guesses, prompts = [], [], []
        for prompt in valid_sample(task, args.prompts):
            prompt = tokenizer.encode(tokenizer.bos_token + prompt, add_special_tokens=False)
            said = mlx_specstream.stream_generate(
                model, tokenizer, prompt, max_tokens=args.max_tokens, use_streams=False
            )
            prompts.append(prompt)
            answers.append([r.token for r in said])
            guesses.append(guesses_by_count(seams, prompt, answers[-1], set(counts.values())))
        rows = results["tasks"][task] = {
            "prompts": len(prompts),
            "generated_tokens": sum(map(len, answers)),
            "accuracy": accuracy([gs[most] for gs in guesses], answers, g),
            "trees": {},
        }
        for name, values in rows["accuracy"].items():
            print(f"{task} accuracy {name} of stream 1..{g}: {values}")
        for shape in shapes:
            runs = [
                replay(gs[counts[shape]], a, shape, args.max_tokens, stop)
                for gs, a in zip(guesses, answers, strict=True)
            ]
            row = rows["trees"][str(shape)] = {
                "tokens_per_pass": round(tokens_per_pass(runs), 4),
                "nodes": max(n for r in runs for n in r.nodes),
                "accepted_at_least": [round(x, 4) for x in acceptance_by_depth(runs, g)],
            }
            if str(shape) in args.check:
                same = 0
                for prompt, run in zip(prompts, runs, strict=True):
                    *_, last = mlx_specstream.stream_generate(
                        model, tokenizer, prompt, max_tokens=args.max_tokens, tree=str(shape)
                    )
                    same += last.passes == run.passes and last.generation_tokens == run.tokens
                row["real_decoder_agrees"] = same
            print(f"{task} {shape}: {row}", flush=True)
    if args.out:
        with open(args.out, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
