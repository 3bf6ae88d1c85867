"""The first answer of a process: what compiling costs, with and without what MLX kept on disk.

    python benchmarks/cold_start.py --model M --streams S --repeats 3 \
        --out benchmarks/results/cold_start.json

On a CPU MLX turns fused operations into C++, compiles them and keeps them in the system's temporary
folder. Every run is a process of its own; ``TMPDIR`` points to a fresh folder (cold), to the same one
again (again), to it after ``mlx-specstream tune`` (tuned), and to a fresh one without a compiler on ``PATH``
(no compiler). Reported: seconds to the first token and for the whole of the first two answers, loading
apart, traces of ours, C++ kernels compiled, and whether all runs said the same. ``mlx_lm`` is stock
mlx-lm, anything else is ours: ``plain``, ``planned`` or a tree.
"""

import mlx_specstream  # first: it finds a fast BLAS before mlx loads  # isort: skip
import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import about_machine, arguments
from tasks import FORMS, valid_sample

STATES = ("cold", "again", "tuned", "no compiler")


def kernels() -> int:
    """Compiled kernels in the temporary folder."""
    return sum(1 for _ in Path(tempfile.gettempdir()).glob("mlx/**/*.so"))


def child(args) -> None:
    """One process: load, answer twice, print what it took as one line of JSON."""
    tic = time.perf_counter()
    import mlx_lm

    from mlx_specstream.model.seams import seams_of

    if args.child == "mlx_lm":
        model, tokenizer = mlx_lm.load(args.model)
        generate, options = mlx_lm.stream_generate, {}
    else:
        model, tokenizer = mlx_specstream.load(args.model, streams=args.streams)
        generate, options = mlx_specstream.stream_generate, {}
        if args.child == "plain":
            options = {"use_streams": False}
        elif args.child != "planned":
            options = {"tree": args.child}
    found = {"load_s": time.perf_counter() - tic, "answers": []}
    before, said = kernels(), []
    for prompt in valid_sample(args.task, 2):
        tic, first, tokens = time.perf_counter(), None, []
        for r in generate(
            model, tokenizer, tokenizer.bos_token + prompt, max_tokens=args.max_tokens, **options
        ):
            tokens.append(r.token)
            first = first or time.perf_counter() - tic
        found["answers"].append(
            {
                "first_token_s": first,
                "whole_s": time.perf_counter() - tic,
                "tokens": len(tokens),
                "passes": getattr(r, "passes", len(tokens)),
                "kernels": kernels() - before,
            }
        )
        said.append(tokens)
    seams = seams_of(model)
    found["traces"] = len(seams.kept.get("buckets", ())) if seams else 0
    found["sha256"] = hashlib.sha256(json.dumps(said).encode()).hexdigest()
    print(json.dumps(found))


def environment_of(temporary: str, compiler: bool = True) -> dict[str, str]:
    environment = {
        **os.environ,
        "TMPDIR": temporary,
        "MLX_SPECSTREAM_CACHE": f"{temporary}/profiles",
    }
    if not compiler:
        empty = Path(temporary) / "empty"
        empty.mkdir(exist_ok=True)
        environment["PATH"] = str(empty)
    return environment


def tune(args, temporary: str) -> float:
    """Seconds of ``mlx-specstream tune``, nearly all of them the compiler's."""
    command = [sys.executable, "-m", "mlx_specstream", "tune", "--model", args.model]
    command += ["--streams", args.streams, "--contexts", "64", "--repeats", "1"]
    tic = time.perf_counter()
    subprocess.run(command, env=environment_of(temporary), check=True, capture_output=True)
    return time.perf_counter() - tic


def run(args, way: str, environment: dict[str, str]) -> dict:
    """A child's report, or its last line on stderr under ``failed``."""
    command = [sys.executable, __file__, "--child", way, "--model", args.model]
    command += ["--streams", args.streams, "--task", args.task]
    command += ["--max-tokens", str(args.max_tokens), "--out", "-"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])


def middle(runs: list[dict], answer: int, key: str) -> float:
    return statistics.median(r["answers"][answer][key] for r in runs)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--streams", required=True)
    parser.add_argument("--task", default="e2e", choices=list(FORMS))
    parser.add_argument("--ways", nargs="+", default=["mlx_lm", "plain", "planned", "best:8"])
    parser.add_argument("--states", nargs="+", default=list(STATES), choices=STATES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--out", required=True)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    about = arguments(args)
    del about["child"]
    results = {"machine": about_machine(), "arguments": about, "ways": {}}
    runs: dict[str, dict[str, list]] = {w: {s: [] for s in args.states} for w in args.ways}
    for _ in range(args.repeats):
        for way in args.ways:
            with (
                tempfile.TemporaryDirectory() as folder,
                tempfile.TemporaryDirectory() as bare,
            ):
                for state in ("cold", "again", "no compiler"):
                    compiler = state != "no compiler"
                    found = run(args, way, environment_of(folder if compiler else bare, compiler))
                    if state in args.states:
                        runs[way][state].append(found)
    if "tuned" in args.states:
        with tempfile.TemporaryDirectory() as folder:
            results["tune_s"] = tune(args, folder)
            for _ in range(args.repeats):
                for way in args.ways:
                    runs[way]["tuned"].append(run(args, way, environment_of(folder)))
    reference = None
    for way in args.ways:
        results["ways"][way] = runs[way]
        for state in args.states:
            good = [r for r in runs[way][state] if "failed" not in r]
            if len(good) < len(runs[way][state]):
                bad = next(r["failed"] for r in runs[way][state] if "failed" in r)
                print(f"{way}, {state}: FAILED: {bad}", flush=True)
            if not good:
                continue
            reference = reference or good[0]["sha256"]
            same = sum(r["sha256"] == reference for r in good)
            print(
                f"{way}, {state}: first token {middle(good, 0, 'first_token_s'):.2f} s, first answer "
                f"{middle(good, 0, 'whole_s'):.2f} s, second answer {middle(good, 1, 'whole_s'):.2f} s, "
                f"{max(r['traces'] for r in good)} traces, {middle(good, 0, 'kernels'):.0f} kernels "
                f"compiled ({middle(good, 1, 'kernels'):.0f} after the second), same text "
                f"{same}/{len(good)}",
                flush=True,
            )
    hashes = {r.get("sha256") for states in runs.values() for rs in states.values() for r in rs}
    results["all_the_same_text"] = len(hashes) == 1 and None not in hashes
    print(f"all runs said the same: {results['all_the_same_text']}")
    Path(args.out).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
