"""Where drafts cannot help, how much slower than plain decoding is the planner? Wall clock.

    python benchmarks/never_slower.py --model M --streams S --repeats 5 \
        --out benchmarks/results/never_slower.json

Cases: random streams; prompts of random token ids; sampling at T = 1 with our sampler and with
mlx-lm's own; both of the latter two at once. Every answer is ``--max-tokens`` long: end-of-text is
ignored. One repeat runs every prompt in every way, interleaved, mlx_lm.stream_generate on a stock
model of its own among them; the ratio of a repeat is its sum over ours. The planner has the row costs
measured at the start, as after ``mlx-specstream tune``, and knows nothing else of a text when it
begins, unless ``--keep`` lets it remember.
"""

import mlx_specstream  # first: it finds a fast BLAS before mlx loads  # isort: skip
import argparse
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

import mlx.core as mx
from machine import about_machine, arguments
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm import load as load_stock
from mlx_lm import stream_generate as stock_stream_generate
from mlx_lm.sample_utils import make_sampler as make_opaque_sampler
from tasks import valid_sample

from mlx_specstream.config import StreamConfig
from mlx_specstream.decode.costs_here import costs_key
from mlx_specstream.measure.rows import measure_costs
from mlx_specstream.model.projections import embedding_of, stream_shapes, weight_shape
from mlx_specstream.model.seams import Seams, attach, seams_of
from mlx_specstream.model.streams import Streams
from mlx_specstream.profile import FOLDER, save_profile

TARGETS = {"plain": 1.0, "planned": 0.97, "planned, no copies": 0.97}
WAYS = {
    "plain": {"use_streams": False},
    "planned": {},
    "planned, no copies": {"copies": False},
}
# name -> (random streams, random prompts, our sampler, mlx-lm's sampler)
CASES = {
    "random streams": (True, False, None, None),
    "random tokens": (False, True, None, None),
    "T = 1": (False, False, mlx_specstream.make_sampler, make_opaque_sampler),
    "T = 1, opaque": (False, False, make_opaque_sampler, make_opaque_sampler),
    "random tokens, T = 1": (False, True, mlx_specstream.make_sampler, make_opaque_sampler),
}


def random_streams(model, config: StreamConfig, seed: int = 1, scale: float = 0.3) -> Streams:
    """Streams whose every parameter is random, the B matrices too: sure of themselves and wrong."""
    mx.random.seed(seed)
    width = weight_shape(embedding_of(model))[1]
    streams = Streams(config, width, stream_shapes(model, config), embedding_scale=scale)
    flat = tree_flatten(streams.parameters())
    flat = [(p, scale * mx.random.normal(v.shape) if p.endswith(".b") else v) for p, v in flat]
    streams.update(tree_unflatten(flat))
    mx.eval(streams.parameters())
    return streams


def random_prompts(seams: Seams, count: int, length: int) -> list[list[int]]:
    draw = random.Random(5)
    return [[draw.randrange(3, seams.vocabulary_size) for _ in range(length)] for _ in range(count)]


def seconds(generate, *args, **kwargs) -> tuple[float, list]:
    tic = time.perf_counter()
    out = list(generate(*args, **kwargs))
    return time.perf_counter() - tic, out


def forget(seams: Seams) -> None:
    """What planner and copier learned of the answers so far."""
    for key in [k for k in seams.kept if k == "copies" or "planner" in k]:
        del seams.kept[key]


def planners(seams: Seams) -> list:
    return [v for k, v in seams.kept.items() if "planner" in k]


def run_case(name, args, stock, tokenizer, models) -> dict:
    wild_streams, wild_prompts, ours, theirs = CASES[name]
    model = models["random" if wild_streams else "trained"]
    seams, options = seams_of(model), {"max_tokens": args.max_tokens}
    if wild_prompts:
        prompts = random_prompts(seams, args.prompts, args.prompt_tokens)
    else:
        prompts = [tokenizer.bos_token + p for p in valid_sample(args.task, args.prompts)]
    samplers = [{} if make is None else {"sampler": make(temp=1.0)} for make in (ours, theirs)]
    taken, passes, same, drafting = {way: [] for way in [None, *args.ways]}, {}, {}, {}
    for repeat in range(args.repeats + 1):  # the first warms up
        sums, passes = dict.fromkeys(taken, 0.0), dict.fromkeys(args.ways, 0)
        same = dict.fromkeys(args.ways, 0)
        order = list(taken) if repeat % 2 else list(taken)[::-1]
        for index, prompt in enumerate(prompts):
            said = {}
            for way in order:
                if way is None:
                    now, out = seconds(
                        stock_stream_generate, stock, tokenizer, prompt, **options, **samplers[1]
                    )
                else:
                    if not args.keep:
                        forget(seams)
                    now, out = seconds(
                        mlx_specstream.stream_generate,
                        model,
                        tokenizer,
                        prompt,
                        seed=index,
                        **options,
                        **samplers[0],
                        **WAYS[way],
                    )
                    passes[way] += out[-1].passes
                    said[way] = [r.token for r in out]
                    if way != "plain":
                        assert all(p.costs.measured for p in planners(seams)), "default costs"
                        drafting[way] = any(p.speculating for p in planners(seams))
                assert len(out) == args.max_tokens
                sums[way] += now
            for way, tokens in said.items():
                same[way] += tokens == said[args.ways[0]]
        if repeat:
            for way, value in sums.items():
                taken[way].append(value)
    tokens = args.max_tokens * len(prompts)
    plain = statistics.median(taken[None])
    print(f"{name}, mlx_lm.stream_generate: {tokens / plain:.1f} tokens per second")
    row = {"mlx_lm_seconds": taken[None], "tokens": tokens, "ways": {}}
    for way in args.ways:
        ratios = sorted(a / b for a, b in zip(taken[None], taken[way], strict=True))
        found = row["ways"][way] = {
            "seconds": taken[way],
            "ratio": statistics.median(ratios),
            "ratio_range": [ratios[0], ratios[-1]],
            "target": TARGETS[way],
            "tokens_per_pass": (tokens - len(prompts)) / max(1, passes[way]),
            "drafting_at_the_end": drafting.get(way, False),
            "same_as_the_first_way": same[way],
            "of": len(prompts),
        }
        print(
            f"{name}, {way}: {found['ratio']:.3f} ({ratios[0]:.3f}..{ratios[-1]:.3f}) of its speed, "
            f"target {TARGETS[way]}, {found['tokens_per_pass']:.2f} tokens per pass, "
            f"same text as {args.ways[0]} {same[way]}/{len(prompts)}",
            flush=True,
        )
    row["traces"] = len(seams.kept["buckets"])
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--streams", required=True)
    parser.add_argument("--task", default="e2e", help="whose prompts are used")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--prompts", type=int, default=2, help="per case")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="of random prompts")
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8, 12, 16])
    parser.add_argument("--contexts", type=int, nargs="+", default=[64, 256, 512])
    parser.add_argument("--cost-repeats", type=int, default=4)
    parser.add_argument("--keep", action="store_true", help="let the planner remember answers")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)

    stock, tokenizer = load_stock(args.model)
    tokenizer.eos_token_ids = set()  # nothing ends an answer
    models = {"trained": mlx_specstream.load(args.model, streams=args.streams)[0]}
    if any(CASES[name][0] for name in args.cases):
        config = seams_of(models["trained"]).streams.config
        models["random"] = mlx_specstream.load(args.model, streams=False)[0]
        attach(models["random"], random_streams(models["random"], config))
    results = {"machine": about_machine(), "arguments": arguments(args), "costs": {}, "cases": {}}
    with tempfile.TemporaryDirectory() as folder:
        os.environ[FOLDER] = folder  # where the planner looks for what ``tune`` measured
        for name, model in models.items():
            seams = seams_of(model)
            costs = measure_costs(
                seams,
                rows=tuple(args.rows),
                contexts=tuple(args.contexts),
                repeats=args.cost_repeats,
            )
            save_profile(costs_key(seams), {"costs": costs.to_json()})
            results["costs"][name] = costs.to_json()
            print(f"measured the costs with {name} streams", flush=True)
        for name in args.cases:
            results["cases"][name] = run_case(name, args, stock, tokenizer, models)
            Path(args.out).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
