"""The prompts of the tasks that ``e2e-sql-14m`` was trained on, in its own form.

The data is read from ``SPECSTREAM_DATA`` (docs/data.md names the public
sources).
"""

import gzip
import json
import os
import random
from pathlib import Path

SHARED = Path(__file__).resolve().parents[2] / "shared"
DATA = Path(os.environ.get("SPECSTREAM_DATA", SHARED)) / "data"
FORMS = {"e2e": "MR: {}\nText:", "sqlctx": "{}"}


def distinct_prompts(task: str, split: str, data: Path = DATA) -> list[str]:
    """The distinct prompts of a split, sorted, in the base's form, without ``<s>``."""
    with gzip.open(data / task / f"{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return sorted({FORMS[task].format(json.loads(line)["prompt"]) for line in lines})


def valid_sample(task: str, count: int) -> list[str]:
    """``count`` distinct validation prompts, the same ones in every study."""
    return random.Random(11).sample(distinct_prompts(task, "valid"), count)
