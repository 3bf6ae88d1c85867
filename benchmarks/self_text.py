"""Write training data in which the base model itself completes the prompts of a task (greedily).

Streams predict what the base will say, so its own text teaches them more than the reference
answers do. Uses mlx-lm's batched generation; deterministic. The output holds text derived from the
task data and is not meant to be committed.

    python benchmarks/self_text.py --model M --out DIR --rows 8000
"""

import argparse
import json
import random
import time
from pathlib import Path

from mlx_lm import load
from mlx_lm.generate import batch_generate
from tasks import FORMS, distinct_prompts


def complete(model, tokenizer, prompts: list[str], max_tokens: int) -> list[tuple[str, str]]:
    """(prompt, completion) pairs; answers that do not end within ``max_tokens`` are dropped."""
    bos = tokenizer.bos_token_id
    tokens = [[bos, *tokenizer.encode(p, add_special_tokens=False)] for p in prompts]
    out = batch_generate(
        model,
        tokenizer,
        tokens,
        max_tokens=max_tokens,
        return_token_ids=True,
        completion_batch_size=64,
        prefill_batch_size=16,
    )
    return [
        (prompt, tokenizer.decode(ids).strip(" "))
        for prompt, ids in zip(prompts, out.token_ids, strict=True)
        if 0 < len(ids) < max_tokens
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--rows", type=int, default=8000, help="train prompts per task")
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
            pairs += complete(model, tokenizer, chosen, args.max_tokens)
        random.Random(3).shuffle(pairs)
        with open(args.out / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for prompt, completion in pairs:
                row = {"prompt": prompt, "completion": completion}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        print(f"{split}: {len(pairs)} rows, {time.perf_counter() - start:.0f} s so far", flush=True)


if __name__ == "__main__":
    main()
