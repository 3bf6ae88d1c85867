"""Train every row of the headline table, each for the same time. Can be killed and started again.

    python benchmarks/paper/train_all.py --work WORK --base M --minutes 60 --seeds 0 1 2

``--dry-run`` prints the commands and the time they take. ``--steps-of 0`` gives each row as many steps as
seed 0's made in its time: ``--seeds 1 2`` are then comparable whatever else the machine does.
"""

import study  # first: it finds a fast BLAS  # isort: skip
import argparse
import sys
from pathlib import Path

from medusa import ABOUT
from study import Run, script_command, train_command

# What the rows are; sizes on this base (hidden 384): 6,784 parameters per rank of LoRA and layer, 1,152
# per rank of conditioning and one more for each stream, 1,153 per rank of the root, and 384 per stream.
LOSSLESS = {
    # at most 50 k parameters: 1,920 + 4 * 6,784 + 15 * (1,152 + 5) + 3 * 1,153 = 49,870
    "small": {
        **{"num_streams": 5, "msa_layers": 4, "lora_rank": 1},
        **{"condition_rank": 15, "condition_shared": True, "root_rank": 3},
    },
    # at most 4 MB: 2,304 + 4 * 16 * 6,784 + 128 * 1,152 + 6 * 128 + 64 * 1,153 = 658,496 numbers, 2.6 MB
    "best": {
        **{"num_streams": 6, "msa_layers": 4, "lora_rank": 16},
        **{"condition_rank": 128, "condition_shared": True, "root_rank": 64},
    },
}
SHARED = {
    "shared-v1": {"mode": "shared", "num_streams": 4, "msa_layers": 2, "lora_rank": 32},
    "shared-p": {
        **{"mode": "shared", "num_streams": 4, "msa_layers": 2, "lora_rank": 32},
        "main_sees_streams": True,
    },
    # The control: plain LoRA fine-tuning on the same rows in the same order. Its one stream weighs nothing
    # in the loss and, as the main stream does not see it, changes nothing.
    "lora": {
        **{"mode": "shared", "num_streams": 1, "msa_layers": 1, "lora_rank": 32},
        "alpha": 1e-9,
    },
}
HEADS, DRAFT = ("medusa", "medusa-shared-head"), "draft-model"
ROWS = (*LOSSLESS, *SHARED, *HEADS, DRAFT)
MADE = {  # what is there when a row is finished and says how it was made; of streams it is streams.json
    **dict.fromkeys(HEADS, ABOUT),
    DRAFT: "training.json",
}


def folder_of(row: str, task: str, work: Path, seed: int) -> Path:
    return work / task / f"rows/{row}-{seed}"


EVERY = {"eval_every": 1000, "save_every": 200}


def row_run(row: str, task: str, work: Path, base: Path, length: dict, seed: int) -> Run:
    """The run that makes a row; ``length`` is its ``minutes`` or its ``iters``."""
    minutes = length.get("minutes")
    out, own = folder_of(row, task, work, seed), work / task / "own"
    reference, target = work / task / "reference", study.base_of(task, work, base)
    if row in SHARED:  # a fine-tuned model is its result, so it starts from what was not tuned yet
        flags = {**SHARED[row], "fused_path": out / "model", "seed": seed, **EVERY}
        command = train_command(base, reference, out, **length, **flags)
        return Run(out, command, "streams.json", minutes, [reference / "train.jsonl"])
    needs = [own / "train.jsonl"]
    if row in LOSSLESS:
        flags = {**LOSSLESS[row], "seed": seed, **EVERY}
        command = train_command(target, own, out, **length, **flags)
        return Run(out, command, "streams.json", minutes, needs)
    flags = {"model": target, "data": own, "out": out, **length, "seed": seed}
    if row == DRAFT:
        command = script_command("draft_model.py", **flags)
        return Run(out, command, "config.json", minutes, needs)
    command = script_command("medusa.py", **flags, shared_head=row == HEADS[1])
    return Run(out, command, MADE[row], minutes, needs)


def steps_of(row: str, task: str, work: Path, seed: int) -> int:
    """How many steps a finished row made."""
    folder = folder_of(row, task, work, seed)
    about = study.read_json(folder / MADE.get(row, "train.json"))
    if not about.get("finished", bool(about)):
        sys.exit(f"seed {seed} of {row} is not finished: {folder}")
    return about["steps"]


def base_run(task: str, work: Path, base: Path, minutes: float) -> Run:
    """Shared mode as the way to a base for a task that it knows nothing of."""
    out, reference = work / task / "base-streams", work / task / "reference"
    made = study.base_of(task, work, base)
    # The model is all that is kept of it, so its streams are the control's: they weigh nothing. At the
    # default rate of 1e-3 it diverged half-way (docs/log.md).
    flags = {**SHARED["lora"], "lora_rank": 64, "learning_rate": 7e-4, "seed": 0, **EVERY}
    flags["fused_path"] = made
    command = train_command(base, reference, out, minutes=minutes, **flags)
    return Run(out, command, "streams.json", minutes, [reference / "train.jsonl"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    study.add_places(parser)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=60, help="of every row")
    length.add_argument(
        "--steps-of", type=int, metavar="SEED", help="as many steps as that seed's row made"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if args.steps_of in args.seeds:
        parser.error(f"--steps-of {args.steps_of} is finished already: leave it out of --seeds")

    def length_of(row: str, task: str) -> dict:
        if args.steps_of is None:
            return {"minutes": args.minutes}
        return {"iters": steps_of(row, task, args.work, args.steps_of)}

    runs = [
        row_run(row, task, args.work, args.base, length_of(row, task), seed)
        for seed in args.seeds
        for task in args.tasks
        for row in args.rows
    ]
    study.finish(runs, args.dry_run)


if __name__ == "__main__":
    sys.exit(main())
