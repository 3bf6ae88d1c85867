"""The curves: tokens per pass against each choice, from short runs of equal length.

    python benchmarks/paper/curves.py train --work WORK --base M --iters 400
    python benchmarks/paper/curves.py measure --work WORK --base M
    python benchmarks/paper/curves.py costs --base M     # idle machine: it times
    python benchmarks/paper/curves.py plot

A point is the default streams with one choice changed, trained for as many steps; what the layers below
the default cut make of the data is kept on disk. ``measure`` replays trees exactly on the base's own
answers to held-out prompts of the train split; pruning, whose drafts depend on what was kept, is
decoded. Predicted speeds are arithmetic: tokens per pass over what the pass and its streams cost on
this machine (``costs`` measures that, once per geometry; values of streams cost nothing, so new ones
stand for trained ones) or by the row costs that others published for Apple chips. Everything can be
killed and goes on.
"""

import study  # first: it finds a fast BLAS  # isort: skip
import argparse
import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
from curve_plots import plot
from mac_predictions import costs_of, published_curves
from machine import about_machine
from mlx_lm import load as load_stock
from study import Run, train_command

from mlx_specstream import load
from mlx_specstream.config import StreamConfig
from mlx_specstream.decode.costs import Costs
from mlx_specstream.decode.prune import PruneRule
from mlx_specstream.generate import stream_generate
from mlx_specstream.measure.evaluate import accuracy, replayed
from mlx_specstream.measure.rows import measure_costs
from mlx_specstream.model.seams import attach, seams_of
from mlx_specstream.train.data import Example, read_examples
from mlx_specstream.train.initial import new_streams

DEFAULT = {
    **{"num_streams": 4, "msa_layers": 1, "lora_rank": 32, "condition_rank": 0, "root_rank": 0},
    "seed": 0,
}
ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
# curve -> what it changes: x (or a name) -> flags of ``mlx-specstream train``
CURVES: dict[str, dict] = {
    "gamma": {n: {"num_streams": n} for n in range(1, 7)},
    "Ns": {n: {"msa_layers": n} for n in range(1, 9)},
    "Ns, told the root": {n: {"msa_layers": n, "root_rank": 32} for n in range(1, 7)},
    "LoRA rank": {r: {"lora_rank": r} for r in (0, 2, 4, 8, 16, 32, 64)},
    "LoRA placement": {
        "all": {},
        "attention": {"lora_targets": ATTENTION},
        "MLP": {"lora_targets": MLP},
        "q, v": {"lora_targets": ["q_proj", "v_proj"]},
        "o, down": {"lora_targets": ["o_proj", "down_proj"]},
    },
    "condition rank, a map each": {
        0: {},
        **{r: {"condition_rank": r, "no_condition_shared": True} for r in (4, 16, 64)},
    },
    "condition rank, one map": {
        0: {},
        **{r: {"condition_rank": r, "condition_shared": True} for r in (4, 16, 64, 256)},
    },
    "target": {"hard label": {}, "distilled": {"target": "distill"}},
    "stream position": {"t+j": {}, "t": {"stream_position": "t"}},
    "stream identity": {
        "embeddings": {},
        **{f"rotation {e}": {"value_rotation": e} for e in (0.02, 0.1, 0.5)},
    },
    "seed": {s: {"seed": s} for s in range(3)},
    "pruning": {"rank 8": {"prune_rank": 8}},
}
SIZES = (2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64)
CARTESIAN = {k: f"cartesian:{k}" for k in range(1, 7)}
TREES = ("chain", *(f"best:{m}" for m in SIZES))
KEPT = (4, 8, 12, 16, 24, 32)  # of the nodes of a tree, at the early exit
PRUNED = (study.BEST, "cartesian:3")
CONTEXT = 128  # tokens before a pass, where its cost is read
COSTS = {
    "rows": (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64),
    "contexts": (CONTEXT,),
    "repeats": 4,
}
RESULT = "curves.json"


def points(curves: Iterable[str] = CURVES) -> dict[str, dict]:
    """Every different point of some curves once: its name -> flags."""
    found = {}
    for curve in curves:
        for change in CURVES[curve].values():
            found.setdefault(point_of(change), {**DEFAULT, **change})
    return found


def point_of(change: dict) -> str:
    changed = {k: v for k, v in change.items() if DEFAULT.get(k) != v}
    words = (f"{k}={'+'.join(v) if isinstance(v, list) else v}" for k, v in changed.items())
    return ",".join(words) or "default"


def run_of(point: str, flags: dict, task: str, args) -> Run:
    out, own = args.work / task / "points" / point, args.work / task / "own"
    base = study.base_of(task, args.work, args.base)
    how = {"iters": args.iters, "eval_every": 10**6, "save_every": 200, "no_rehearsal": True}
    if flags["msa_layers"] == DEFAULT["msa_layers"]:  # a cut of one point's own would not pay
        how["cache_hidden"] = own.parent / "hidden"
    command = train_command(base, own, out, **flags, **how)
    return Run(out, command, "streams.json", needs=[own / "train.jsonl"])


def train(args) -> None:
    every = points(args.curves)
    runs = [run_of(p, flags, task, args) for task in args.tasks for p, flags in every.items()]
    study.finish(runs, args.dry_run)


def measure(args) -> None:
    path = args.results / RESULT
    found = study.read_json(path) or {"machine": about_machine(), "costs": {}, "tasks": {}}
    for task in args.tasks:
        base, rows = study.base_of(task, args.work, args.base), found["tasks"].setdefault(task, {})
        prompts, answers, limit = None, None, study.TASKS[task].max_tokens
        for point in points():
            folder = args.work / task / "points" / point
            if not (folder / "streams.json").exists():
                continue
            model, tokenizer = load(base, streams=folder)
            seams, stop = seams_of(model), tokenizer.eos_token_ids
            about = study.read_json(folder / "streams.json")
            of = hashlib.sha256(json.dumps([about, args.prompts]).encode()).hexdigest()[:16]
            if rows.get(point, {}).get("of") == of:
                continue
            if answers is None:
                prompts = held_out(args.work / task / "own", tokenizer, args.prompts)
                answers = [said(model, tokenizer, p, limit, use_streams=False)[0] for p in prompts]
            examples = [
                Example([*p, *a], len(p))
                for p, a in zip(prompts, answers, strict=True)
                if len(a) > 2
            ]
            trees = [*TREES, *(CARTESIAN.values() if point == "default" else ())]
            rows[point] = {
                "of": of,
                "prompts": len(prompts),
                "geometry": geometry(seams),
                "config": about["config"],
                "parameters": about["training"]["parameters"],
                "steps": about["training"]["steps"],
                "seconds": about["training"]["seconds"],
                "accuracy": accuracy(seams, examples),
                "trees": replayed(seams, prompts, answers, trees, stop),
            }
            if seams.streams.config.prune_rank:
                rows[point]["pruned"] = pruned(model, tokenizer, prompts, limit)
            study.save_json(path, found)
            best = rows[point]["trees"][study.BEST]["tokens_per_pass"]
            print(f"{task} {point}: {best:.3f} tokens per pass with {study.BEST}", flush=True)
            mx.clear_cache()


def time_machine(args) -> None:
    """What passes and streams cost here, for every geometry of the file that lacks it."""
    path = args.results / RESULT
    found = study.read_json(path)
    for point in (p for rows in found["tasks"].values() for p in rows.values()):
        if point["geometry"] in found["costs"]:
            continue
        model, _ = load_stock(str(args.base))
        seams = attach(model, new_streams(model, StreamConfig(**point["config"])))
        costs = measure_costs(seams, **COSTS, inline=False)
        found["costs"][point["geometry"]] = costs.to_json()
        study.save_json(path, {**found, "timed on": about_machine()})
        print(f"{point['geometry']}: {costs.plain_ms[0]:.1f} ms a plain token", flush=True)


def held_out(own: Path, tokenizer, count: int) -> list[list[int]]:
    """Prompts of the train split that nothing was trained on."""
    examples = read_examples(own, "valid", tokenizer, 2048)[0]
    return [e.tokens[: e.start] for e in examples[:count]]


def said(model, tokenizer, prompt, max_tokens: int, **how) -> tuple[list[int], int]:
    """Greedy answer and passes."""
    every = list(stream_generate(model, tokenizer, prompt, max_tokens=max_tokens, **how))
    return [r.token for r in every], every[-1].passes


def pruned(model, tokenizer, prompts, max_tokens: int) -> dict[str, dict]:
    """tree -> nodes kept -> tokens per pass of a real decode; "all" is without pruning."""
    found: dict[str, dict] = {}
    for tree in PRUNED:
        for keep in ("all", *KEPT):
            rule = None if keep == "all" else PruneRule(keep, None)
            how = {"tree": tree, "prune": rule, "placement": "deferred", "copies": False}
            runs = [said(model, tokenizer, p, max_tokens, **how) for p in prompts]
            tokens, passes = sum(len(a) - 1 for a, _ in runs), sum(n for _, n in runs)
            found.setdefault(tree, {})[str(keep)] = tokens / max(1, passes)
    return found


def geometry(seams) -> str:
    """What the cost of streams depends on; a LoRA is merged into the weights."""
    c = seams.streams.config
    root = f" r{c.root_rank}" if c.root_rank else ""
    told = f"c{c.condition_rank}{'s' * c.condition_shared}"
    return f"g{c.num_streams} Ns{c.msa_layers} {told} e{bool(c.value_rotation):d}{root}"


def speeds(point: dict, costs: Costs, context: int) -> dict[str, float]:
    """Predicted tokens per token of plain decoding, by tree."""
    plain = costs.plain_at(context)
    found = {}
    for tree, row in point["trees"].items():
        nodes = row["nodes_per_pass"]
        spent = costs.pass_at(nodes, context) + costs.streams_at("deferred", nodes, context)
        found[tree] = float(row["tokens_per_pass"] * plain / spent)
    return found


def pooled(costs: dict) -> dict[str, Costs]:
    """Geometry -> row costs of this machine, with what no streams change taken from all that was timed.

    Passes without streams and plain tokens are the same in every geometry, and a busy moment of the
    machine is not: their medians over all geometries serve each. Streams stay in the plain tokens of their
    own moment.
    """
    every = {name: Costs.from_json(each) for name, each in costs.items()}
    plain = np.median([c.plain_ms for c in every.values()], axis=0)  # [contexts]
    own = {name: plain[:, None] / np.array(c.plain_ms)[:, None] for name, c in every.items()}
    passes = np.median([own[name] * np.array(c.pass_ms) for name, c in every.items()], axis=0)
    shared = {"plain_ms": plain.tolist(), "pass_ms": passes.tolist()}
    return {
        name: replace(c, **shared, deferred_ms=(own[name] * np.array(c.deferred_ms)).tolist())
        for name, c in every.items()
    }


def predicted(point: dict, found: dict, model: dict) -> dict[str, dict]:
    """Machine -> the best tree and its predicted speed against plain decoding.

    Args:
        model: ``layers`` and ``head_share`` of the model that is thought to run on a Mac.
    """
    shape = {"msa_layers": point["config"]["msa_layers"], "streams": point["config"]["num_streams"]}
    machines = {c["name"]: (costs_of(c, **shape, **model), 0) for c in published_curves()}
    if point["geometry"] in found["costs"]:
        machines["this machine"] = pooled(found["costs"])[point["geometry"]], CONTEXT
    result = {}
    for name, (costs, context) in machines.items():
        every = speeds(point, costs, context)
        tree = max(every, key=every.get)
        result[name] = {"tree": tree, "speed": every[tree]}
        if costs.measured:
            result[name]["tokens_per_second"] = every[tree] * 1e3 / costs.plain_at(context)
    return result


def collect(found: dict) -> dict:
    """Task -> curve -> x -> figures; what the plots and tables show."""
    result: dict = {}
    for task, rows in found["tasks"].items():
        curves = result[task] = {}
        if not rows:
            continue
        model = {"layers": 8}  # as many as the base has, so that Ns means the same share
        for curve, choices in CURVES.items():
            for x, change in choices.items():
                point = rows.get(point_of(change))
                if point is not None and curve != "pruning":
                    curves.setdefault(curve, {})[x] = {
                        "tokens_per_pass": point["trees"][study.BEST]["tokens_per_pass"],
                        "parameters": point["parameters"],
                        "steps": point["steps"],
                        "predicted": predicted(point, found, model),
                    }
        if default := rows.get("default"):
            for name, trees in (
                ("k", CARTESIAN),
                ("tree size m", {m: f"best:{m}" for m in SIZES}),
            ):
                for x, tree in trees.items():
                    part = {**default, "trees": {tree: default["trees"][tree]}}
                    curves.setdefault(name, {})[x] = {
                        "tokens_per_pass": default["trees"][tree]["tokens_per_pass"],
                        "nodes": default["trees"][tree]["nodes_per_pass"],
                        "predicted": predicted(part, found, model),
                    }
        for tree, kept in rows.get("prune_rank=8", {}).get("pruned", {}).items():
            curves[f"nodes kept of {tree}"] = {
                (math.inf if keep == "all" else int(keep)): {"tokens_per_pass": value}
                for keep, value in kept.items()
            }
        result[task] = {name: each for name, each in curves.items() if len(each) > 1}
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    begin = commands.add_parser("train")
    study.add_places(begin)
    begin.add_argument("--iters", type=int, required=True, help="steps of every point")
    begin.add_argument("--curves", nargs="+", choices=CURVES, default=list(CURVES))
    begin.add_argument("--dry-run", action="store_true")
    begin.set_defaults(run=train)
    look = commands.add_parser("measure")
    study.add_places(look)
    look.add_argument("--prompts", type=int, default=60, help="per task")
    look.add_argument("--results", type=Path, default=study.RESULTS)
    look.set_defaults(run=measure)
    clock = commands.add_parser("costs")
    clock.add_argument("--base", type=Path, required=True)
    clock.add_argument("--results", type=Path, default=study.RESULTS)
    clock.set_defaults(run=time_machine)
    draw = commands.add_parser("plot")
    draw.add_argument("--results", type=Path, default=study.RESULTS)
    draw.add_argument("--docs", type=Path, default=study.HERE.parents[1] / "docs")
    draw.set_defaults(
        run=lambda args: plot(collect(study.read_json(args.results / RESULT)), args.docs)
    )
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
