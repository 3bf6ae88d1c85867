"""The headline tables: every row decodes the same validation prompts, interleaved with mlx-lm.

    python benchmarks/paper/headline.py --work WORK --base M --seeds 0 1 2

Rows are what ``train_all.py`` made; one that is missing is left out and said so. ``bundled`` are the
streams of ``examples/streams``, trained on two of the tasks at once. Each row decodes greedily with
trees of 8 and of 32 nodes and as the planner likes (row costs measured first), and shared rows beside
mlx-lm on their own fine-tuned model. Tokens per pass of other trees are replayed exactly. A killed run
goes on behind the last prompt that all ways answered, and what was trained anew is measured anew. Numbers
and ids go to results/paper/; ``--print`` prints the tables from there.
"""

import study  # first: it finds a fast BLAS  # isort: skip
import argparse
import hashlib
import json
import statistics
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
from draft_model import DRAFTS
from medusa import TREES, MedusaSeams, load_heads
from mlx_lm import load as load_stock
from train_all import DRAFT, HEADS, LOSSLESS, MADE, SHARED, folder_of
from ways import BASELINE, ours, stock

from mlx_specstream import load
from mlx_specstream.decode.compiling import compiled_at_once
from mlx_specstream.measure.bench import about_model
from mlx_specstream.measure.evaluate import Evaluation, replayed
from mlx_specstream.measure.quality import TITLES
from mlx_specstream.measure.rows import measure_costs
from mlx_specstream.model.checkpoint import DESCRIPTION, VOCABULARY, WEIGHTS
from mlx_specstream.model.seams import attach, seams_of

PLANNED, BUNDLED = "planned", "bundled"
DECODED = (None, "best:8", study.BEST)  # None: planned
BUNDLED_STREAMS = study.HERE.parents[1] / "examples/streams/e2e-sql-14m"
WARM_UP = 10  # prompts, untimed
METHOD = b"compiled at once, three trees"  # what was timed in another way is timed anew
COSTS = {"rows": (1, 2, 3, 4, 6, 8, 12, 16, 24, 32), "contexts": (64, 192), "repeats": 4}


@dataclass
class Group:
    """Rows of one base: the first way is mlx-lm on it.

    Args:
        evaluation: their ways and answers.
        base: as mlx-lm loaded it.
        parameters: what each row adds to the base.
        replays: models whose streams (or heads) are replayed, by row.
        ours: models that our decoder runs.
    """

    evaluation: Evaluation
    base: object
    parameters: dict[str, int] = field(default_factory=dict)
    replays: dict[str, object] = field(default_factory=dict)
    ours: list[object] = field(default_factory=list)


def lossless_group(task: str, seed: int, args, notes: list[str]) -> Group:
    path, limit = study.base_of(task, args.work, args.base), study.TASKS[task].max_tokens
    base, tokenizer = load_stock(str(path))
    ways, group = [stock(BASELINE, base, tokenizer, limit)], Group(None, base)

    def both(row: str, model, **how) -> None:
        for tree in DECODED:
            key = f"{row}, {tree or PLANNED}"
            ways.append(ours(key, model, tokenizer, limit, tree=tree, **how))

    bundled = () if study.TASKS[task].own_base else (BUNDLED,)
    for row in (*LOSSLESS, *bundled, *HEADS, DRAFT):
        folder = BUNDLED_STREAMS if row == BUNDLED else folder_of(row, task, args.work, seed)
        made = MADE.get(row, DESCRIPTION)
        if not (folder / made).exists():
            notes.append(f"{row}: not trained")
            continue
        if row == DRAFT:
            draft, _ = load_stock(str(folder))
            group.parameters[row] = json.loads((folder / made).read_text())["parameters"]
            for n in DRAFTS:
                how = {"draft_model": draft, "num_draft_tokens": n}
                ways.append(stock(f"{row}, {n}", base, tokenizer, limit, **how))
            continue
        if row in HEADS:
            model, _ = load_stock(str(path))
            load_heads(model, folder)
            group.parameters[row] = json.loads((folder / made).read_text())["parameters"]
        else:
            model, _ = load(path, streams=folder)
            group.parameters[row] = stream_parameters(folder)
        group.replays[row] = model
        # Heads know no inline placement: they run behind the last layer.
        both(row, model, copies=False, placement="deferred" if row in HEADS else None)
        if row in ("best", BUNDLED):
            group.parameters[f"{row} + copies"] = group.parameters[row]
            both(f"{row} + copies", model, copies=True)
    model, _ = load_stock(str(path))
    attach(model)
    group.parameters["copies"] = 0
    both("copies", model, use_streams=False, copies=True)
    group.ours = [model, *group.replays.values()]
    for each in group.ours:
        measured(each, args)
    group.evaluation = evaluation_of(task, ways, tokenizer, args)
    return group


def shared_group(row: str, task: str, seed: int, args) -> Group | None:
    folder, limit = folder_of(row, task, args.work, seed), study.TASKS[task].max_tokens
    if not (folder / DESCRIPTION).exists():
        return None
    base, tokenizer = load_stock(str(folder / "model"))
    ways, group = [stock(BASELINE, base, tokenizer, limit)], Group(None, base)
    if row != "lora":
        model, _ = load(folder / "model", streams=folder)
        measured(model, args)
        group.ours.append(model)
        group.parameters[row] = stream_parameters(folder)
        for tree in DECODED:
            key = f"{row}, {tree or PLANNED}"
            ways.append(ours(key, model, tokenizer, limit, tree=tree, copies=False))
        if not seams_of(model).streams.config.main_sees_streams:
            group.replays[row] = model
    group.evaluation = evaluation_of(task, ways, tokenizer, args)
    return group


def evaluation_of(task: str, ways, tokenizer, args) -> Evaluation:
    questions = study.questions_of(task, tokenizer, args.prompts)
    return Evaluation(ways, questions, tokenizer, list(study.TASKS[task].metrics))


def measured(model, args) -> None:
    """What its planner reads."""
    seams = seams_of(model)
    if not args.no_costs:
        inline = not isinstance(seams, MedusaSeams)
        seams.kept["costs"] = measure_costs(seams, **COSTS, inline=inline)


def costs_of(model) -> dict | None:
    """What ``measured`` found, for the record."""
    costs = seams_of(model).kept.get("costs")
    return None if costs is None else costs.to_json()


def stream_parameters(folder: Path) -> int:
    arrays = mx.load(str(folder / WEIGHTS))
    return sum(v.size for name, v in arrays.items() if name != VOCABULARY)


def trained(task: str, seed: int, args) -> str:
    """A name of what the rows of a task are at the moment."""
    found = hashlib.sha256(METHOD + f" {args.prompts} {args.no_costs}".encode())
    for row in (*LOSSLESS, *SHARED, *HEADS, DRAFT):
        path = folder_of(row, task, args.work, seed) / MADE.get(row, DESCRIPTION)
        found.update(path.read_bytes() if path.exists() else b"not trained")
    found.update((BUNDLED_STREAMS / DESCRIPTION).read_bytes())
    return found.hexdigest()[:16]


def decode_all(groups: dict[str, Group], state: Path, of: str) -> None:
    """Prompt by prompt through all groups; ``state`` has what an earlier run answered ``of`` them."""
    keys = {name: [w.key for w in g.evaluation.ways] for name, g in groups.items()}
    prompts = [q.prompt.tokens for q in next(iter(groups.values())).evaluation.questions]
    key = hashlib.sha256(json.dumps([of, keys, prompts]).encode()).hexdigest()
    lines = state.read_text(encoding="utf-8").splitlines(True) if state.exists() else []
    whole = [line for line in lines if line.endswith("\n")]  # a kill leaves half a line at the end
    known = [json.loads(line) for line in whole[1:]] if whole[:1] == [f"{key}\n"] else []
    study.write_text(state, "\n".join([key, *map(json.dumps, known)]) + "\n")
    for found in known:
        for name, group in groups.items():
            evaluation = group.evaluation
            evaluation.rows += found[name]["rows"]
            for way, tokens in found[name]["said"].items():
                evaluation.said[way, evaluation.answered] = [tokens]
            evaluation.answered += 1
    with ExitStack() as warm:  # compiled code is to be warm when time counts
        for group in groups.values():
            for model in group.ours:
                warm.enter_context(compiled_at_once(seams_of(model)))
            group.evaluation.warm_up(WARM_UP)
        decode_rest(groups, state, len(known), len(prompts))


def decode_rest(groups: dict[str, Group], state: Path, first: int, last: int) -> None:
    for index in range(first, last):
        found = {}
        for name, group in groups.items():
            evaluation = group.evaluation
            before = len(evaluation.rows)
            evaluation.decode_next()
            said = {way.key: evaluation.said[way.key, index][0] for way in evaluation.ways}
            found[name] = {"rows": evaluation.rows[before:], "said": said}
        with open(state, "a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
        print(f"\r{index + 1}/{last} prompts", end="", flush=True)


def measure(task: str, seed: int, args) -> dict:
    notes: list[str] = []
    groups = {"lossless": lossless_group(task, seed, args, notes)}
    for row in SHARED:
        group = shared_group(row, task, seed, args)
        if group is None:
            notes.append(f"{row}: not trained")
        else:
            groups[row] = group
    of, state = trained(task, seed, args), args.work / task / f"headline-{seed}.jsonl"
    decode_all(groups, state, of)
    results = {"task": task, "seed": seed, "trained": of, "notes": notes, "groups": {}}
    for name, group in groups.items():
        evaluation = group.evaluation
        stop = evaluation.tokenizer.eos_token_ids
        prompts = [q.prompt.tokens for q in evaluation.questions]
        answers = evaluation.answers(BASELINE)
        trees = {
            row: replayed(seams_of(model), prompts, answers, TREES, stop)
            for row, model in group.replays.items()
        }
        about = about_model(name, group.base, None, None)
        results["groups"][name] = {
            **evaluation.results({"task": task, "seed": seed}, about, notes),
            "parameters": group.parameters,
            "replayed": trees,
            "costs": {row: costs_of(model) for row, model in group.replays.items()},
        }
    return results


def rows_of(results: dict) -> dict[str, dict]:
    """Row -> its figures, of one task and seed."""
    found = {}
    for name, group in results["groups"].items():
        summary, quality = next(iter(group["summary"].values())), group["quality"]
        label = "mlx-lm" if name == "lossless" else f"mlx-lm on {name}"
        found[label] = {"parameters": 0, "speedup": 1.0, **quality[BASELINE]}
        for row, parameters in group["parameters"].items():
            own = {w: f for w, f in summary.items() if w.rpartition(", ")[0] == row}
            best = max(own, key=lambda way: own[way]["speedup"]["median"])
            largest = max(f["tokens_per_pass"] for w, f in own.items() if not w.endswith(PLANNED))
            planned = own.get(f"{row}, {PLANNED}", own[best])
            found[row] = {
                "parameters": parameters,
                "tree": largest,
                "planned": planned["tokens_per_pass"],
                "speedup": own[best]["speedup"]["median"],
                **quality[best],
                "identical": own[best]["identical"] / max(1, own[best]["of"]),
            }
    return found


def table(task: str, every: list[dict]) -> str:
    """Markdown: the median over seeds, and their range where there are several."""
    metrics = list(next(iter(every[0]["groups"].values()))["quality"][BASELINE])
    columns = {
        "parameters": ("extra parameters", "{:,.0f}"),
        "tree": (f"tokens per pass, {study.BEST}", "{:.2f}"),
        "planned": ("planned", "{:.2f}"),
        "speedup": ("speed against mlx-lm", "{:.2f}x"),
        **{name: (TITLES[name], "{:.1f}") for name in metrics},
        "identical": ("identical answers", "{:.0%}"),
    }
    lines = ["| " + " | ".join([task, *(title for title, _ in columns.values())]) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    seeds = [rows_of(results) for results in every]
    for row in dict.fromkeys(row for rows in seeds for row in rows):
        cells = [row]
        for name, (_, form) in columns.items():
            values = [rows[row][name] for rows in seeds if name in rows.get(row, {})]
            cells.append(form.format(statistics.median(values)) if values else "")
            if len(values) > 1 and max(values) > min(values):
                cells[-1] += f" ({form.format(min(values))}-{form.format(max(values))})"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    study.add_places(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--prompts", type=int, default=100, help="per task")
    parser.add_argument("--no-costs", action="store_true", help="let planners guess row costs")
    parser.add_argument("--print", action="store_true", help="measure nothing")
    parser.add_argument("--results", type=Path, default=study.RESULTS)
    args = parser.parse_args()
    if not args.print:
        study.check_metrics(args.tasks)
    for task in args.tasks:
        every = []
        for seed in args.seeds:
            path = args.results / f"headline-{task}-{seed}.json"
            done = study.read_json(path).get("trained")
            if not args.print and done != trained(task, seed, args):
                study.save_json(path, measure(task, seed, args))
            if path.exists():
                every.append(study.read_json(path))
        if every:
            print(f"\n{table(task, every)}\n\nnotes: {'; '.join(every[0]['notes']) or 'none'}")


if __name__ == "__main__":
    main()
