"""Make the training data of the study, and the base of the task that needs one.

    python benchmarks/paper/prepare.py --work WORK --base M [--tasks e2e sqlctx dialogsum]

For each task: some prompts of its train split with the data's answers (``reference``, for shared mode),
then the same prompts with the base's own greedy answers (``own``, for everything that leaves the base
as it is). DialogSum's base is made in between: fine-tuned in shared mode, whose streams are a row
of the table too. A killed run goes on where it stopped. Nothing of this is meant to be committed.
"""

import study  # first: it finds a fast BLAS  # isort: skip
import argparse
import gzip
import json
import random
from pathlib import Path

from mlx_lm import load
from self_text import complete
from train_all import base_run

ROWS, VALID_ROWS = 8000, 200


def rows_of(task: str) -> dict[str, list[str]]:
    """Prompt in the base's form -> the data's answers, shuffled."""
    found: dict[str, list[str]] = {}
    with gzip.open(study.DATA / task / "train.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            prompt = study.TASKS[task].form.format(row["prompt"])
            found.setdefault(prompt, []).append(row["completion"].strip())
    prompts = sorted(found)
    random.Random(task).shuffle(prompts)
    return {prompt: found[prompt] for prompt in prompts}


def write(path: Path, pairs: list[tuple[str, str]]) -> None:
    random.Random(3).shuffle(pairs)
    rows = ({"prompt": prompt, "completion": answer} for prompt, answer in pairs)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    study.write_text(path, text)
    print(f"{path}: {len(pairs)} rows", flush=True)


def split(task: str, tokenizer, rows: int, valid: int) -> dict[str, dict[str, list[str]]]:
    """valid: the first ``valid`` prompts; train: the ``rows`` next ones."""
    longest, fit = study.TASKS[task].longest_prompt, []
    for prompt, answers in rows_of(task).items():
        if len(tokenizer.encode(prompt)) <= longest:
            fit.append((prompt, answers))
        if len(fit) == valid + rows:
            break
    return {"valid": dict(fit[:valid]), "train": dict(fit[valid:])}


def pairs_of(rows: dict[str, list[str]], count: int) -> list[tuple[str, str]]:
    """At most ``count`` prompts with an answer: the first answers of all, then the second ones, ..."""
    most = max(map(len, rows.values()))
    every = [(prompt, a[n]) for n in range(most) for prompt, a in rows.items() if n < len(a)]
    return every[:count]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    study.add_places(parser)
    parser.add_argument("--rows", type=int, default=ROWS, help="to train on, per task")
    parser.add_argument(
        "--own-rows", type=int, help="of these, to be answered by the base (default: all)"
    )
    parser.add_argument("--valid-rows", type=int, default=VALID_ROWS, help="held out, per task")
    parser.add_argument("--minutes", type=float, default=60, help="of DialogSum's base")
    args = parser.parse_args()
    for task in args.tasks:
        folder = args.work / task
        _, tokenizer = load(str(args.base), lazy=True)
        counts = {"valid": args.valid_rows, "train": args.rows}
        parts = split(task, tokenizer, args.rows, args.valid_rows)
        for name, rows in parts.items():
            path = folder / f"reference/{name}.jsonl"
            if not path.exists():
                write(path, pairs_of(rows, counts[name]))
        if study.TASKS[task].own_base:
            study.finish([base_run(task, args.work, args.base, args.minutes)])
        if all((folder / f"own/{name}.jsonl").exists() for name in parts):
            continue
        model, tokenizer = load(str(study.base_of(task, args.work, args.base)))
        for name, rows in parts.items():
            longest, cache = study.TASKS[task].max_tokens, folder / "own/answers"
            prompts = [*rows][: args.own_rows]
            write(folder / f"own/{name}.jsonl", complete(model, tokenizer, prompts, longest, cache))


if __name__ == "__main__":
    main()
