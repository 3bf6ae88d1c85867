"""Is a model that was fine-tuned together with its streams as good as one fine-tuned without them?

    python benchmarks/paper/shared_quality.py --work WORK --base M --prompts 400

``shared-v1`` and its control ``lora`` (the same rows, order and time; ``train_all.py``) answer as many
validation prompts, in mlx-lm's batches: with the V1 mask streams change no answer, so the fused models
alone are asked. Prompts go to tenths in turn; the difference comes with its standard error over these.
"""

import study  # first: it finds a fast BLAS  # isort: skip
import argparse
import math
import statistics

from machine import about_machine
from mlx_lm import load
from train_all import folder_of

from mlx_specstream.measure.quality import TITLES, score
from mlx_specstream.train.answers import SelfDistill, answers

SHARED, CONTROL = "shared-v1", "lora"
PARTS = 10
RESULT = "shared-quality.json"


def scores_of(row: str, task: str, args) -> list[dict[str, float]]:
    """The task's metrics of a row: over all prompts, then over every part."""
    model, tokenizer = load(str(folder_of(row, task, args.work, args.seed) / "model"))
    questions = study.questions_of(task, tokenizer, args.prompts)
    how = SelfDistill(max_tokens=study.TASKS[task].max_tokens)
    prompts, stop = [q.prompt.tokens for q in questions], tokenizer.eos_token_ids
    longest = max(map(len, prompts)) + how.max_tokens
    said = answers(model, tokenizer, prompts, how, args.work / task / "answers", longest)
    texts = [tokenizer.decode([t for t in ids if t not in stop]) for ids in said]
    references, metrics = [q.references for q in questions], list(study.TASKS[task].metrics)
    parts = [slice(None), *(slice(part, None, PARTS) for part in range(PARTS))]
    return [score(metrics, texts[part], references[part]) for part in parts]


def compared(task: str, args) -> dict[str, dict[str, float]]:
    """Metric -> shared, control, their difference and its standard error."""
    shared, control = (scores_of(row, task, args) for row in (SHARED, CONTROL))
    found = {}
    for metric in shared[0]:
        apart = [a[metric] - b[metric] for a, b in zip(shared[1:], control[1:], strict=True)]
        found[metric] = {
            **{SHARED: shared[0][metric], CONTROL: control[0][metric]},
            "difference": shared[0][metric] - control[0][metric],
            "standard_error": statistics.stdev(apart) / math.sqrt(PARTS),
        }
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    study.add_places(parser)
    parser.add_argument("--prompts", type=int, default=400, help="per task")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    study.check_metrics(args.tasks)
    path = study.RESULTS / RESULT
    results = study.read_json(path) or {"tasks": {}}
    results["machine"] = about_machine()
    for task in args.tasks:
        found = compared(task, args)
        results["tasks"][task] = {"prompts": args.prompts, "seed": args.seed, "metrics": found}
        study.save_json(path, results)
        for metric, row in found.items():
            print(
                f"{task} {TITLES[metric]}: {SHARED} {row[SHARED]:.1f}, {CONTROL} {row[CONTROL]:.1f}, "
                f"difference {row['difference']:+.2f} (standard error {row['standard_error']:.2f})"
            )


if __name__ == "__main__":
    main()
