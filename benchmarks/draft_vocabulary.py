"""What a draft vocabulary costs in tokens per pass and saves in the head of the streams.

    python benchmarks/draft_vocabulary.py --model M --streams S --data self-text \
        --sizes 256 512 1024 2048 --out benchmarks/results/draft_vocabulary.json

The vocabulary of each size is chosen from the completions in ``--data`` (train.jsonl) as
``mlx-specstream draft-vocabulary`` does it. Tokens per pass are replayed exactly over the base's
answers to validation prompts; the times are medians of interleaved runs on the streams' rows of one
pass, compiled unless ``MLX_DISABLE_COMPILE`` is set.
"""

import mlx_specstream  # first: it finds a fast BLAS before mlx loads  # isort: skip
import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
from machine import about_machine, arguments
from tasks import FORMS, valid_sample

from mlx_specstream.decode.draft import guesses_from
from mlx_specstream.decode.tree import TreeShape
from mlx_specstream.measure.simulate import guesses_along, replay, tokens_per_pass
from mlx_specstream.model.draft_head import DraftHead
from mlx_specstream.model.projections import embedding_of, weight_shape
from mlx_specstream.model.seams import seams_of
from mlx_specstream.train.data import read_examples
from mlx_specstream.train.vocabulary import choose_draft_vocabulary, completion_counts

ROWS = 4  # streams of one pass


def head_times(seams, vocabularies: dict[str, mx.array | None], repeats: int) -> dict[str, dict]:
    """Milliseconds of the head, and of head and guesses, on ROWS rows; medians, interleaved."""
    width = weight_shape(embedding_of(seams.model))[1]
    dtype = seams.model(mx.array([[1]])).dtype
    hidden = mx.random.normal((1, ROWS, width)).astype(dtype)
    runs = {}
    for name, tokens in vocabularies.items():
        head = seams.head if tokens is None else DraftHead(seams.model, seams.head, tokens)

        def guess(x, head=head, tokens=tokens):
            return list(guesses_from(head(x)[0], 31, tokens))

        runs[name] = {"head_ms": mx.compile(head), "head_and_guesses_ms": mx.compile(guess)}
    taken = {name: {kind: [] for kind in kinds} for name, kinds in runs.items()}
    for repeat in range(repeats + 3):  # the first ones warm up
        for name, kinds in runs.items():
            for kind, run in kinds.items():
                tic = time.perf_counter()
                mx.eval(run(hidden))
                if repeat >= 3:
                    taken[name][kind].append(1e3 * (time.perf_counter() - tic))
    return {
        name: {kind: round(statistics.median(ms), 4) for kind, ms in kinds.items()}
        for name, kinds in taken.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--streams", required=True)
    parser.add_argument("--data", required=True, help="folder with train.jsonl[.gz] to count in")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--trees", nargs="+", default=["best:8", "best:32"])
    parser.add_argument("--prompts", type=int, default=200, help="per task")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=300, help="of the timings")
    parser.add_argument("--out")
    args = parser.parse_args()
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)

    model, tokenizer = mlx_specstream.load(args.model, streams=args.streams)
    seams, stop = seams_of(model), tokenizer.eos_token_ids
    examples, _ = read_examples(Path(args.data), "train", tokenizer, sys.maxsize)
    counts = completion_counts(examples, seams.vocabulary_size)
    vocabularies = {
        str(size): mx.array(choose_draft_vocabulary(counts, size, stop)) for size in args.sizes
    }
    vocabularies["all"] = None
    shapes = [TreeShape.parse(tree) for tree in args.trees]
    count = max(shape.candidates(seams.vocabulary_size) for shape in shapes)
    results = {
        "machine": about_machine(),
        "arguments": {**arguments(args), "data": os.path.basename(args.data.rstrip("/"))},
        "compiled": "MLX_DISABLE_COMPILE" not in os.environ,
        "vocabulary": seams.vocabulary_size,
        "completion_tokens": int(counts.sum()),
        "sizes": {
            name: {
                "tokens": seams.vocabulary_size if ids is None else ids.size,
                "covers": 1.0
                if ids is None
                else round(float(counts[np.array(ids)].sum() / counts.sum()), 5),
            }
            for name, ids in vocabularies.items()
        },
        "tasks": {},
    }
    seams.draft_vocabulary = None
    for name, times in head_times(seams, vocabularies, args.repeats).items():
        results["sizes"][name].update(times)
        print(f"{name}: {results['sizes'][name]}", flush=True)
    for task in FORMS:
        prompts, answers = [], []
        for prompt in valid_sample(task, args.prompts):
            prompt = tokenizer.encode(tokenizer.bos_token + prompt, add_special_tokens=False)
            said = mlx_specstream.stream_generate(
                model, tokenizer, prompt, max_tokens=args.max_tokens, use_streams=False
            )
            prompts.append(prompt)
            answers.append([r.token for r in said])
        rows = results["tasks"][task] = {
            "prompts": len(prompts),
            "generated_tokens": sum(map(len, answers)),
            "sizes": {},
        }
        for name, ids in vocabularies.items():
            seams.draft_vocabulary = ids
            guesses = [
                guesses_along(seams, prompt, answer, min(count, seams.vocabulary_size))
                for prompt, answer in zip(prompts, answers, strict=True)
            ]
            held = 1.0 if ids is None else np.isin(np.concatenate(answers), np.array(ids)).mean()
            row = rows["sizes"][name] = {"answers_covered": round(float(held), 5)}
            for shape in shapes:
                runs = [
                    replay(gs, a, shape, args.max_tokens, stop)
                    for gs, a in zip(guesses, answers, strict=True)
                ]
                row[str(shape)] = round(tokens_per_pass(runs), 4)
            print(f"{task} {name}: {row}", flush=True)
    if args.out:
        with open(args.out, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
