"""Write training data in which the base model itself completes the prompts of a task: greedily, some drawn.

Streams predict what the base will say, so its own text teaches them more than the reference
answers do. ``mlx-specstream train --self-distill`` does this for one data folder; here prompts of
several tasks are mixed. A killed run goes on where it stopped. The output holds text derived from the
task data and is not meant to be committed.

    python benchmarks/self_text.py --model M --out DIR --rows 6500 --drawn 1.0 1000 --drawn 0.7 500
"""

import mlx_specstream  # first: it finds a fast BLAS before mlx loads  # noqa: F401  # isort: skip
import argparse
import json
import random
import time
from pathlib import Path

from mlx_lm import load
from tasks import FORMS, distinct_prompts

from mlx_specstream.train.answers import SelfDistill, answers


def complete(model, tokenizer, prompts: list[str], max_tokens: int, out: Path, temperature=0.0):
    """(prompt, completion) pairs; answers that do not end within ``max_tokens`` are dropped."""
    bos = tokenizer.bos_token_id
    tokens = [[bos, *tokenizer.encode(p, add_special_tokens=False)] for p in prompts]
    how = SelfDistill(max_tokens=max_tokens, batch_size=64, temperature=temperature)
    length = max_tokens + max(map(len, tokens))
    return [
        (prompt, tokenizer.decode(ids[:-1]).strip(" "))
        for prompt, ids in zip(
            prompts, answers(model, tokenizer, tokens, how, out, length, print), strict=True
        )
        if len(ids) > 1 and ids[-1] in tokenizer.eos_token_ids
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--rows", type=int, default=8000, help="train prompts per task")
    parser.add_argument(
        "--drawn",
        type=float,
        nargs=2,
        action="append",
        default=[],
        metavar=("T", "N"),
        help="N more prompts per task, answered at temperature T; of those before where there are no others",
    )
    parser.add_argument("--valid-rows", type=int, default=100)
    parser.add_argument("--max-tokens", type=int, default=96)
    args = parser.parse_args()

    model, tokenizer = load(args.model)
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    for split, count in (("valid", args.valid_rows), ("train", args.rows)):
        pairs = []
        for task in FORMS:
            prompts = distinct_prompts(task, "train")
            random.Random(task).shuffle(prompts)
            free = prompts[: len(prompts) - args.valid_rows]  # the last ones are for validation
            chosen = prompts[-count:] if split == "valid" else free[:count]
            asks, at = [(chosen, 0.0)], len(chosen)
            for temperature, more in args.drawn if split == "train" else []:
                asks.append(([free[(at + k) % len(free)] for k in range(int(more))], temperature))
                at += int(more)
            for some, temperature in asks:
                answered = args.out / "answers"
                pairs += complete(model, tokenizer, some, args.max_tokens, answered, temperature)
        random.Random(3).shuffle(pairs)
        with open(args.out / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for prompt, completion in pairs:
                row = {"prompt": prompt, "completion": completion}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        print(f"{split}: {len(pairs)} rows, {time.perf_counter() - start:.0f} s so far", flush=True)


if __name__ == "__main__":
    main()
