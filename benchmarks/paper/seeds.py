"""Tokens per pass of every seed of the lossless rows and of Medusa-1, replayed over many prompts.

    python benchmarks/paper/seeds.py --work WORK --base M --seeds 0 1 2

Nothing is timed, so the machine may do other things, and exact replays are cheap enough for more prompts
than ``headline.py`` decodes. Rows are what ``train_all.py`` made; one that is missing is left out. With
``--rows`` and ``--seeds`` only these are measured, the others of the file stay.
"""

import study  # first: it finds a fast BLAS  # isort: skip
import argparse
import statistics

from machine import about_machine
from medusa import load_heads
from mlx.utils import tree_flatten
from mlx_lm import load as load_stock
from train_all import HEADS, LOSSLESS, MADE, folder_of, steps_of

from mlx_specstream import load, stream_generate
from mlx_specstream.measure.evaluate import replayed
from mlx_specstream.model.checkpoint import DESCRIPTION
from mlx_specstream.model.seams import seams_of

TREES = ("chain", "best:8", "best:16", study.BEST)


def own_answers(task: str, args) -> tuple[list[list[int]], list[list[int]], set[int]]:
    """Validation prompts, the base's greedy answers, and the tokens that end one."""
    model, tokenizer = load_stock(str(study.base_of(task, args.work, args.base)))
    prompts = [q.prompt.tokens for q in study.questions_of(task, tokenizer, args.prompts)]
    limit = study.TASKS[task].max_tokens
    say = lambda prompt: stream_generate(model, tokenizer, prompt, max_tokens=limit)  # noqa: E731
    return prompts, [[r.token for r in say(p)] for p in prompts], tokenizer.eos_token_ids


def measure(task: str, args) -> dict:
    """Row -> seed -> its parameters, its steps and, by tree, its tokens per pass."""
    prompts, answers, stop = own_answers(task, args)
    path, rows = study.base_of(task, args.work, args.base), {}
    for row in args.rows:
        for seed in args.seeds:
            folder = folder_of(row, task, args.work, seed)
            if not (folder / MADE.get(row, DESCRIPTION)).exists():
                continue
            if row in HEADS:
                model, _ = load_stock(str(path))
                seams = load_heads(model, folder)
            else:
                model, _ = load(path, streams=folder)
                seams = seams_of(model)
            trees = replayed(seams, prompts, answers, TREES, stop)
            found = {tree: round(each["tokens_per_pass"], 4) for tree, each in trees.items()}
            size = sum(x.size for _, x in tree_flatten(seams.streams.parameters()))
            made = {"parameters": size, "steps": steps_of(row, task, args.work, seed)}
            rows.setdefault(row, {})[str(seed)] = {**made, **found}
            print(f"{task} {row} {seed}: {found}", flush=True)
    return {"machine": about_machine(), "task": task, "prompts": len(prompts), "rows": rows}


def table(results: dict) -> str:
    """Markdown: every row's median over seeds and their range."""
    title = f"{results['task']}, {results['prompts']} prompts"
    lines = [f"| {title} | seeds | " + " | ".join(TREES) + " |", "|---" * (2 + len(TREES)) + "|"]
    for row, found in results["rows"].items():
        cells = []
        for tree in TREES:
            values = [each[tree] for each in found.values()]
            cells.append(f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})")
        lines.append(f"| {row} | {len(found)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    study.add_places(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    every = [*LOSSLESS, *HEADS]
    parser.add_argument("--rows", nargs="+", choices=every, default=every)
    parser.add_argument("--prompts", type=int, default=100, help="per task")
    args = parser.parse_args()
    for task in args.tasks:
        results, path = measure(task, args), study.RESULTS / f"seeds-{task}.json"
        if not results["rows"]:
            print(f"{task}: nothing is trained")
            continue
        before = study.read_json(path)
        if before.get("prompts") == args.prompts:
            for row, found in before["rows"].items():
                results["rows"][row] = {**found, **results["rows"].get(row, {})}
        study.save_json(path, results)
        print(f"\n{table(results)}\n")


if __name__ == "__main__":
    main()
