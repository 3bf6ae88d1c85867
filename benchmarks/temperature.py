"""Tokens per pass at a temperature: coupled drafts, uncoupled ones, and greedy decoding beside them.

    python benchmarks/temperature.py --model M --streams S --prompts 100 \
        --out benchmarks/results/temperature.json

Every prompt has a seed of its own, the same in every way. ``kept`` is tokens per pass over greedy's on
the same prompts; ``same`` counts the answers that are token by token those of plain decoding with the
same seed. An opaque sampler is mlx-lm's own: only the first guess of each stream is coupled, by calling
the sampler itself.
"""

import mlx_specstream  # first: it finds a fast BLAS before mlx loads  # isort: skip
import argparse
import json
from pathlib import Path

from machine import about_machine, arguments
from mlx_lm.sample_utils import make_sampler as make_opaque_sampler
from tasks import FORMS, valid_sample

from mlx_specstream.decode.record import Record
from mlx_specstream.model.seams import seams_of

TARGET = 0.85  # of greedy's tokens per pass that coupled drafts are to keep
# name -> (who makes the sampler, is ``coupled`` its to choose)
SAMPLERS = {"ours": (mlx_specstream.make_sampler, True), "opaque": (make_opaque_sampler, False)}


def answers(model, tokenizer, prompts, seeds, record=None, **options) -> list[list[int]]:
    """The tokens of every answer."""
    if record is not None:
        options["record"] = record
    return [
        [r.token for r in mlx_specstream.stream_generate(model, tokenizer, p, seed=s, **options)]
        for p, s in zip(prompts, seeds, strict=True)
    ]


def summary(found: list[list[int]], record: Record, depth: int) -> dict:
    generated, passes = sum(len(tokens) - 1 for tokens in found), len(record.passes)
    return {
        "tokens": generated,
        "passes": passes,
        "tokens_per_pass": round(generated / max(1, passes), 4),
        "accepted_at_least": [round(x, 4) for x in record.acceptance_by_depth(depth)],
        "copied": sum(p.copied for p in record.passes),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--streams", required=True)
    parser.add_argument("--tasks", nargs="+", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--prompts", type=int, default=100, help="per task")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.7, 1.0])
    parser.add_argument("--samplers", nargs="+", default=list(SAMPLERS), choices=list(SAMPLERS))
    parser.add_argument("--tree", default="best:8")
    parser.add_argument("--copies", nargs="+", default=["off"], choices=["off", "on"])
    parser.add_argument("--seed", type=int, default=1, help="of the first prompt")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)

    model, tokenizer = mlx_specstream.load(args.model, streams=args.streams)
    depth = seams_of(model).streams.config.num_streams
    results = {
        "machine": about_machine(),
        "arguments": arguments(args),
        "target": TARGET,
        "tasks": {},
    }
    for task in args.tasks:
        prompts = [tokenizer.bos_token + p for p in valid_sample(task, args.prompts)]
        seeds = [args.seed + i for i in range(len(prompts))]
        same_for_all = (model, tokenizer, prompts, seeds)
        plain = {}  # the law and the seed give the text, whatever drafts
        rows = results["tasks"][task] = []
        for copies in args.copies:
            how = {"max_tokens": args.max_tokens, "tree": args.tree, "copies": copies == "on"}
            record = Record()
            greedy = summary(answers(*same_for_all, record, **how), record, depth)
            rows.append({"copies": copies, "sampler": "greedy", **greedy})
            print(
                f"{task}, copies {copies}, greedy: {greedy['tokens_per_pass']:.2f} tokens per pass"
            )
            for temperature in args.temperatures:
                for name in args.samplers:
                    make, choosable = SAMPLERS[name]
                    sampler, key = make(temp=temperature), (temperature, name)
                    if key not in plain:
                        plain[key] = answers(
                            *same_for_all,
                            sampler=sampler,
                            use_streams=False,
                            max_tokens=args.max_tokens,
                        )
                    for coupled in (True, False) if choosable else (True,):
                        record = Record()
                        found = answers(
                            *same_for_all, record, sampler=sampler, coupled=coupled, **how
                        )
                        row = {
                            "copies": copies,
                            "sampler": name,
                            "temperature": temperature,
                            "coupled": coupled,
                            **summary(found, record, depth),
                            "same": sum(a == b for a, b in zip(found, plain[key], strict=True)),
                            "of": len(prompts),
                        }
                        row["kept"] = round(row["tokens_per_pass"] / greedy["tokens_per_pass"], 4)
                        rows.append(row)
                        print(
                            f"{task}, copies {copies}, T = {temperature}, {name}, "
                            f"{'coupled' if coupled else 'uncoupled'}: "
                            f"{row['tokens_per_pass']:.2f} tokens per pass, {row['kept']:.3f} of "
                            f"greedy's, same as plain {row['same']}/{row['of']}",
                            flush=True,
                        )
        Path(args.out).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
