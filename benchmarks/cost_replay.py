"""Do costs measured once say what whole decode steps cost, plan by plan, on a model of another size?

    python benchmarks/cost_replay.py --model M --streams S --out benchmarks/results/cost_replay.json

A random llama of 99 M parameters in 16 layers is built on the fly and gets random streams. Its costs
are measured as by ``mlx-specstream tune``. Then the real decode loop runs on it with every plan that
its planner weighs, while acceptance is replayed: which nodes each pass accepts comes from answers of
the trained model M (streams along its own text, trees of the same size; copies of its own copier).
The milliseconds of a pass are compared with those that the costs predict at the same contexts, as they
are and in plain tokens, which is all that the planner goes by (a machine that became slower since then
is slower for all plans).
``as planned`` is a whole run of the planner: M decodes with the large model's costs, and what each
pass did is replayed, sizes and placements mixed.
"""

import mlx_specstream  # first: it finds a fast BLAS before mlx loads  # isort: skip
import argparse
import json
import random
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np
from machine import about_machine, arguments
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from never_slower import random_streams
from tasks import FORMS, valid_sample

from mlx_specstream.config import StreamConfig
from mlx_specstream.decode import buckets
from mlx_specstream.decode.choose import Greedy
from mlx_specstream.decode.copy import Copied, Copier
from mlx_specstream.decode.decoder import Decoder
from mlx_specstream.decode.draft import Guesses, draft, size_of
from mlx_specstream.decode.plan import Planned, placements
from mlx_specstream.decode.planner import Planner
from mlx_specstream.decode.record import Record
from mlx_specstream.decode.tree import HostTree, TreeShape
from mlx_specstream.decode.verify import Accepted, descend
from mlx_specstream.measure.rows import measure_costs
from mlx_specstream.measure.simulate import guesses_along
from mlx_specstream.model.cache import make_prompt_cache
from mlx_specstream.model.seams import Seams, attach, seams_of

SHAPE = {
    "model_type": "llama",
    "hidden_size": 640,
    "num_hidden_layers": 16,
    "intermediate_size": 1920,
    "num_attention_heads": 10,
    "num_key_value_heads": 5,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
TARGET = 0.15  # relative error of every plan
COPIES = 8  # tokens of a copied draft
PAUSE = 3.0  # times the median: a step that took longer was interrupted by something else
FIRST = 4  # steps that are not timed: another size may have been there before


@dataclass(frozen=True)
class Step:
    """One pass of a script.

    Args:
        nodes: of the pass, the root included.
        streams: they run behind it.
        placement: where.
        copied: its draft is copied text alone.
        path: nodes that it accepts, the root first.
        gamma: only the first so many streams; None: all.
    """

    nodes: int
    streams: bool
    placement: str
    copied: bool
    path: tuple[int, ...]
    gamma: int | None = None


# --- what the trained model's drafts were worth


def replayed_paths(seams: Seams, answered, size: int, stop) -> list[tuple[int, ...]]:
    """The accepted nodes of every pass with trees of ``size`` nodes of streams."""
    shape, found = TreeShape("best", size), []
    for _, answer, guesses in answered:
        done = 1
        while done < len(answer):
            here = Guesses(*(mx.array(a) for a in guesses[done - 1]))
            nodes = min(size, size_of(here, None, shape))
            tree = draft(mx.array(answer[done - 1]), here, None, shape, nodes)
            depth, said = np.array(tree.depth), answer[done:]
            path, _ = descend(
                HostTree.of(tree),
                lambda node, depth=depth, said=said: said[depth[node]],
                limit=len(said),
                stop=stop,
            )
            found.append(tuple(path))
            done += len(path)
    return found


def copied_paths(tokenizer, answered, size: int) -> list[tuple[int, ...]]:
    """The same for text that the copier proposes, where it proposes any."""
    found = []
    for prompt, answer, _ in answered:
        copier, done = Copier(tokenizer, [*prompt, answer[0]], longest=COPIES), 1
        while done < len(answer):
            tokens = copier.propose().tokens[: size - 1]
            right = 0
            while right < min(len(tokens), len(answer) - done - 1):
                if tokens[right] != answer[done + right]:
                    break
                right += 1
            if tokens:
                found.append(tuple(range(right + 1)))
            copier.extend(answer[done : done + right + 1])
            done += right + 1
    return found


def planned_steps(seams: Seams, tokenizer, answered, planner: Planner, paths) -> list[Step]:
    """What a planner does while the trained model decodes; the nodes accepted are drawn from paths."""
    record, draw, plans = Record(), random.Random(3), []
    stop = tokenizer.eos_token_ids
    for prompt, answer, _ in answered:
        stores = make_prompt_cache(seams.model)
        seams.model(mx.array([prompt[:-1]]), cache=stores)
        copier = Copier(tokenizer, prompt, longest=COPIES)
        steering, asked = Planned(planner), []
        steering.next_pass = noting(steering.next_pass, asked)
        decoder = Decoder(
            seams, stores, prompt[-1:], Greedy(), steering, copier=copier, record=record
        )
        left, ended = len(answer), False
        while not ended:
            result = decoder.step(left, stop)
            left, ended = left - len(result.tokens), result.ended
        decoder.close()
        plans += asked[1:]  # behind the prompt's own pass, as in the record
    steps, before = [], False
    for done, plan in zip(record.passes, plans, strict=True):
        placement = "inline" if plan.inline else "deferred"
        copied = done.nodes > 1 and not before
        fitting = [p for p in paths.get(done.nodes, []) if len(p) == done.accepted + 1]
        if copied or not fitting:
            fitting = [tuple(range(done.accepted + 1))]
        path = draw.choice(sorted(set(fitting)))
        steps.append(Step(done.nodes, done.streams, placement, copied, path, plan.gamma))
        before = done.streams
    return steps


def noting(call, results: list):
    return lambda *given: results.append(call(*given)) or results[-1]


# --- the loop that is timed


class Scripted(Planned):
    """Asks the planner, as the loop does, and then does what the script says."""

    def __init__(self, planner: Planner, script: list[Step]):
        super().__init__(planner)
        self.script, self.at = script, 0

    @property
    def now(self) -> Step:
        return self.script[min(self.at, len(self.script) - 1)]

    def next_pass(self, guesses, text, context: int):
        plan = super().next_pass(guesses, text, context)
        step = self.now
        nodes = step.nodes if guesses is not None or text is not None else 1
        return replace(
            plan,
            tree=TreeShape("best", max(2, nodes)),
            nodes=nodes,
            inline=step.streams and step.placement == "inline",
            streams=step.streams,
            gamma=step.gamma,
        )

    def observe(self, plan, context: int, accepted: int) -> None:
        self.at += 1


class Proposals:
    """A copier that always has something when the script asks for it."""

    longest = COPIES

    def __init__(self, steering: Scripted):
        self.steering = steering
        self.text = Copied([*range(1, COPIES + 1)], [-0.5] * COPIES, [("", "", "")] * COPIES)

    def propose(self) -> Copied:
        return self.text if self.steering.now.copied else Copied()

    def extend(self, tokens) -> None:
        pass

    def observe(self, copied, right, tried) -> None:
        pass


class Replayed(Decoder):
    """Does everything that a decoder does, but accepts what the script says."""

    def _read(self, limit, stop):
        flight, real = self._flight, self._flight.verified.accepted
        np.array(real.report)  # the wait for the pass
        if flight.place:
            path = self.steering.now.path if flight.plan.nodes == self.steering.now.nodes else (0,)
            flight.verified.accepted = accepted_path(path, flight.shape.depth)
        return super()._read(limit, stop)


def accepted_path(path: tuple[int, ...], depth: int) -> Accepted:
    path = path[: depth + 1]
    padded = np.zeros(depth + 1, np.int32)
    padded[: len(path)] = path
    report = np.concatenate([[len(path), 0], padded, np.ones(depth + 1)]).astype(np.int32)
    return Accepted(mx.array(padded), mx.array(len(path), dtype=mx.int32), mx.array(report))


def run_script(seams: Seams, planner: Planner, script: list[Step], context: int) -> list[tuple]:
    """(context, nodes, streams, placement, gamma, seconds) of every timed step."""
    stores = make_prompt_cache(seams.model)
    seams.model(mx.arange(context)[None] % seams.vocabulary_size, cache=stores)
    mx.eval([store.state for store in stores])
    steering = Scripted(planner, script)
    decoder = Replayed(seams, stores, [1], Greedy(), steering, copier=Proposals(steering))
    decoder.step(1 << 30, ())  # the prompt's own pass
    rows = []
    while steering.at < len(script):
        before, step = decoder.buffers.offset, steering.now
        tic = time.perf_counter()
        decoder.step(1 << 30, ())
        took = time.perf_counter() - tic
        if steering.at > FIRST:
            rows.append((before, step.nodes, step.streams, step.placement, step.gamma, took))
    decoder.close()
    return rows


def stock_seconds(model, tokens: int, context: int) -> float:
    """Seconds a token of mlx-lm's own loop, for comparison."""
    from mlx_lm.generate import generate_step

    prompt, times = mx.arange(context) % SHAPE["vocab_size"], []
    tic = time.perf_counter()
    for _ in generate_step(prompt, model, max_tokens=tokens):
        times.append(time.perf_counter() - tic)
        tic = time.perf_counter()
    return statistics.median(times[FIRST:])


# --- predictions


def predicted(costs, rows: Iterable[tuple]) -> list[float]:
    """What the costs say of each step, ms."""
    return [
        float(
            costs.pass_at(nodes, context)
            + (costs.streams_at(placement, nodes, context, gamma) if streams else 0.0)
        )
        for context, nodes, streams, placement, gamma, _ in rows
    ]


def compared(costs, rounds: list[list[tuple]]) -> dict:
    """Real and predicted milliseconds of a pass; steps that were interrupted are left out."""
    middle = statistics.median(row[-1] for rows in rounds for row in rows)
    kept = [[row for row in rows if row[-1] < PAUSE * middle] for rows in rounds]
    means = [1e3 * statistics.fmean(row[-1] for row in rows) for rows in kept if rows]
    flat = [row for rows in kept for row in rows]
    real, said = statistics.median(means), statistics.fmean(predicted(costs, flat))
    return {
        "real_ms": real,
        "real_ms_range": [min(means), max(means)],
        "predicted_ms": said,
        "error": said / real - 1.0,
        "left_out": sum(map(len, rounds)) - len(flat),
        "steps": [
            [context, nodes, int(streams), placement, gamma, round(1e3 * s, 3)]
            for rows in rounds
            for context, nodes, streams, placement, gamma, s in rows
        ],
    }


def scripts_for(planner: Planner, paths: dict, copies: dict, steps: int) -> dict[str, list[Step]]:
    """A script for every plan that the planner weighs."""
    draw, found = random.Random(7), {}

    def some(pool: list) -> list[tuple[int, ...]]:
        return [draw.choice(pool) for _ in range(steps + FIRST)]

    found["plain"] = [Step(1, False, "deferred", False, p) for p in some([(0,)])]
    for placement in planner.placements:
        name = f"1 node, {placement}"
        found[name] = [Step(1, True, placement, False, p) for p in some([(0,)])]
        for size in planner.sizes:
            name = f"{size} nodes, {placement}"
            found[name] = [Step(size, True, placement, False, p) for p in some(paths[size])]
        for gamma in planner.fewer if placement == "deferred" else ():
            for size in planner.sizes:
                pool = [p[: gamma + 1] for p in paths[size]]
                name = f"{size} nodes, {gamma} streams"
                found[name] = [Step(size, True, placement, False, p, gamma) for p in some(pool)]
    for size in planner.sizes:
        if size <= COPIES + 1 and copies[size]:
            name = f"{size} nodes, copied"
            found[name] = [Step(size, False, "deferred", True, p) for p in some(copies[size])]
    return found


def study(seams: Seams, args, trained, tokenizer, answered) -> dict:
    """Costs, then every plan's passes, in rounds; all milliseconds."""
    tic = time.perf_counter()
    costs = measure_costs(
        seams,
        rows=tuple(args.rows),
        contexts=tuple(args.contexts),
        repeats=args.cost_repeats,
    )
    print(f"  measured the costs in {time.perf_counter() - tic:.0f} s", flush=True)
    config = seams.streams.config
    planner = Planner(
        costs, placements=("deferred", "inline"), streams=config.num_streams, copies=True
    )
    stop = tokenizer.eos_token_ids
    paths = {n: replayed_paths(seams_of(trained), answered, n, stop) for n in planner.sizes}
    copies = {n: copied_paths(tokenizer, answered, n) for n in planner.sizes}
    scripts = scripts_for(planner, paths, copies, args.steps)
    middle = costs.contexts[len(costs.contexts) // 2]  # users get one placement, the cheaper one
    possible = placements(seams_of(trained).streams.config)
    cheaper = min(possible, key=lambda p: costs.streams_at(p, 5, middle))
    learning = Planner(costs, placements=(cheaper,), streams=config.num_streams, copies=True)
    whole = planned_steps(seams_of(trained), tokenizer, answered, learning, paths)
    scripts["as planned"] = whole[: 3 * args.steps]
    for script in scripts.values():
        run_script(seams, planner, script, args.contexts[0])  # compiles
    rounds: dict[str, list] = {name: [] for name in scripts}
    stock = []
    for _ in range(args.rounds):
        stock.append(1e3 * stock_seconds(seams.model, args.steps, args.contexts[0]))
        for name, script in scripts.items():
            rounds[name].append(run_script(seams, planner, script, args.contexts[0]))
    plans = {name: compared(costs, found) for name, found in rounds.items()}
    heading = ("tokens", "real ms", "range", "predicted", "error", "in plain tokens")
    print("  {:20} {:>7} {:>8} {:>15} {:>9} {:>7} {:>15}".format("plan", *heading))
    for name, row in plans.items():
        row["tokens_per_pass"] = statistics.fmean(len(step.path) for step in scripts[name])
        row["error_in_plain_tokens"] = (1 + row["error"]) / (1 + plans["plain"]["error"]) - 1
        low, high = row["real_ms_range"]
        print(
            f"  {name:20} {row['tokens_per_pass']:7.2f} {row['real_ms']:8.2f} "
            f"{f'{low:.2f}..{high:.2f}':>15} {row['predicted_ms']:9.2f} "
            f"{100 * row['error']:6.1f}% {100 * row['error_in_plain_tokens']:14.1f}%",
            flush=True,
        )
    within, worst = {}, {}
    for key in ("error", "error_in_plain_tokens"):
        errors = {name: abs(row[key]) for name, row in plans.items()}
        within[key] = sum(e <= TARGET for e in errors.values())
        worst[key] = max(errors, key=errors.get)
        print(
            f"  {key.replace('_', ' ')}: {within[key]} of {len(plans)} plans within "
            f"{100 * TARGET:.0f}%, worst {worst[key]}"
        )
    print(f"  a token of mlx-lm's loop: {statistics.median(stock):.2f} ms", flush=True)
    return {
        "costs": costs.to_json(),
        "sizes": list(planner.sizes),
        "mlx_lm_ms": stock,
        "plans": plans,
        "within_target": within,
        "worst": worst,
        "traces": len(seams.kept["buckets"]),
        "seconds": time.perf_counter() - tic,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="trained, for acceptance")
    parser.add_argument("--streams", required=True, help="of the trained model")
    parser.add_argument("--prompts", type=int, default=6, help="per task, for acceptance")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--msa-layers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8, 12, 16])
    parser.add_argument("--contexts", type=int, nargs="+", default=[64, 192])
    parser.add_argument("--cost-repeats", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20, help="timed passes of a plan in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    buckets.MOST = 1 << 12  # all plans in turn would push out each other's traces

    trained, tokenizer = mlx_specstream.load(args.model, streams=args.streams)
    draws, answered = seams_of(trained), []
    most = max(args.rows) - 1
    for index in range(args.prompts):  # the tasks alternate, so that a short script has both
        for task in FORMS:
            text = tokenizer.bos_token + valid_sample(task, args.prompts)[index]
            prompt = tokenizer.encode(text, add_special_tokens=False)
            said = mlx_specstream.stream_generate(
                trained, tokenizer, prompt, max_tokens=args.max_tokens, use_streams=False
            )
            answer = [r.token for r in said]
            answered.append((prompt, answer, guesses_along(draws, prompt, answer, most)))

    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs.from_dict(SHAPE))
    model.eval()
    mx.eval(model.parameters())
    count = sum(a.size for _, a in tree_flatten(model.parameters()))
    print(f"llama with {count / 1e6:.1f} M parameters, {len(model.layers)} layers, float32")
    results = {
        "machine": about_machine(),
        "arguments": arguments(args),
        "shape": SHAPE,
        "parameters": count,
        "target": TARGET,
        "msa_layers": {},
    }
    for layers in args.msa_layers:
        print(f"streams in {layers} layers", flush=True)
        config = StreamConfig(num_streams=4, msa_layers=layers, condition_rank=32)
        seams = attach(model, random_streams(model, config, scale=0.02))
        results["msa_layers"][str(layers)] = study(seams, args, trained, tokenizer, answered)
        Path(args.out).write_text(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
