"""What ``train --from-log`` brings: tokens per pass before and after some answers of a task in use.

    python benchmarks/from_use.py --model M --streams S --task sqlctx --answers 100 400 \
        --work WORK --out benchmarks/results/from-use.json

The model answers training prompts of the task, logged as ``generate --log`` does; streams learn from that
log by the command itself; validation prompts are replayed exactly, so nothing is timed. The streams given
stay as they are: copies learn. A log that is finished in WORK is used again.
"""

import mlx_specstream  # first: it finds a fast BLAS before mlx loads  # isort: skip
import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

from machine import about_machine, arguments
from mlx_lm import load as load_stock
from tasks import FORMS, distinct_prompts, valid_sample

from mlx_specstream.measure.evaluate import replayed
from mlx_specstream.model.seams import seams_of
from mlx_specstream.train.answers import SelfDistill, answers
from mlx_specstream.train.identity import identity
from mlx_specstream.train.log import AnswerLog

TREES = ("chain", "best:8", "best:32")
SEED = 5  # of the prompts that are logged


class Base:
    """The plain base: what it says, greedily."""

    def __init__(self, path: str, folder: Path):
        self.model, self.tokenizer = load_stock(path)
        self.folder = folder  # of the answers
        self.stop = self.tokenizer.eos_token_ids

    def says(self, texts: list[str], max_tokens: int) -> tuple[list[list[int]], list[list[int]]]:
        """Prompts and answers, token ids."""
        bos, encode = self.tokenizer.bos_token, self.tokenizer.encode
        prompts = [encode(bos + text, add_special_tokens=False) for text in texts]
        longest = max(map(len, prompts)) + max_tokens
        how = SelfDistill(max_tokens=max_tokens)
        return prompts, answers(self.model, self.tokenizer, prompts, how, self.folder, longest)


def logged(base: Base, task: str, count: int, max_tokens: int) -> Path:
    """A log of ``count`` answers to training prompts of a task."""
    path = base.folder / f"{task}-{count}.log"
    if path.exists():
        return path
    texts = random.Random(SEED).sample(distinct_prompts(task, "train"), count)
    unfinished = path.with_suffix(".part")
    unfinished.unlink(missing_ok=True)
    log = AnswerLog(unfinished, identity(base.model))
    for prompt, answer in zip(*base.says(texts, max_tokens), strict=True):
        log.add(prompt, answer)
    return unfinished.rename(path)


def learned(model: str, streams: Path, log: Path, work: Path) -> tuple[Path, float]:
    """A copy of the streams that learned from a log, and the seconds it took."""
    copy = work / f"{log.stem}-streams"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(streams, copy)
    begin = time.perf_counter()
    command = ["train", "--model", model, "--streams", copy, "--from-log", log, "--no-rehearsal"]
    subprocess.run([sys.executable, "-m", "mlx_specstream", *map(str, command)], check=True)
    return copy, time.perf_counter() - begin


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--streams", required=True, type=Path)
    parser.add_argument("--task", required=True, choices=FORMS)
    parser.add_argument("--answers", type=int, nargs="+", default=[100, 400], help="in the log")
    parser.add_argument("--prompts", type=int, default=100, help="of validation")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    base = Base(args.model, args.work)
    prompts, said = base.says(valid_sample(args.task, args.prompts), args.max_tokens)
    found = {"machine": about_machine(), "arguments": arguments(args), "logs": {}}

    def look(count: int, streams: Path, **more) -> None:
        model, _ = mlx_specstream.load(args.model, streams=streams)
        trees = replayed(seams_of(model), prompts, said, TREES, base.stop)
        rates = {tree: round(each["tokens_per_pass"], 4) for tree, each in trees.items()}
        found["logs"][str(count)] = {**more, "tokens_per_pass": rates}
        print(f"{count} answers: {found['logs'][str(count)]}", flush=True)
        if args.out:
            args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    look(0, args.streams)
    for count in args.answers:
        log = logged(base, args.task, count, args.max_tokens)
        streams, seconds = learned(args.model, args.streams, log, args.work)
        size = sum(f.stat().st_size for f in (streams / "previous").glob("*.safetensors"))
        look(count, streams, seconds=round(seconds), bytes_to_undo=size)


if __name__ == "__main__":
    main()
