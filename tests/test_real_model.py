"""Real checkpoints: the same text as mlx-lm, and passes as the simulator says.

A small sample; the studies over hundreds of prompts are in benchmarks/.
"""

import gzip
import json
import random
from pathlib import Path

import mlx_lm
import pytest

from mlx_specstream import blas, load, stream_generate
from mlx_specstream.converters import convert
from mlx_specstream.decode.plan import placements
from mlx_specstream.decode.tree import TreeShape
from mlx_specstream.measure.simulate import guesses_by_count, replay
from mlx_specstream.model.seams import seams_of

ROOT = Path(__file__).resolve().parents[1]
STREAMS = ROOT / "examples/streams/e2e-sql-14m"
FORMS = {"e2e": "MR: {}\nText:", "sqlctx": "{}"}
# With the reference BLAS every row costs the same, so the sample shrinks to keep the suite short.
TREES = ("best:32", "cartesian:2")
PROMPTS, MAX_TOKENS = (1, 16) if blas.is_slow() else (4, 96)


@pytest.fixture(scope="module")
def converted(shared, tmp_path_factory) -> Path:
    return convert(shared / "models/e2e-sql-14m", tmp_path_factory.mktemp("real") / "e2e")


def prompts(shared: Path, task: str) -> list[str]:
    with gzip.open(shared / "data" / task / "valid.jsonl.gz", "rt", encoding="utf-8") as lines:
        distinct = sorted({json.loads(line)["prompt"] for line in lines})
    return ["<s>" + FORMS[task].format(p) for p in random.Random(11).sample(distinct, PROMPTS)]


@pytest.mark.parametrize("task", list(FORMS))
def test_same_tokens_as_mlx_lm_and_as_many_passes_as_simulated(shared, converted, task):
    stock, tokenizer = mlx_lm.load(str(converted))
    model, _ = load(converted, streams=STREAMS)
    seams, stop = seams_of(model), tokenizer.eos_token_ids
    shapes = {tree: TreeShape.parse(tree) for tree in TREES}
    # As many guesses as the decoder asks for: where streams are conditioned, the second best of 2 need
    # not be the second best of 31.
    counts = {tree: shape.candidates(seams.vocabulary_size) for tree, shape in shapes.items()}
    generated = passes = 0
    for prompt in prompts(shared, task):
        expected = [
            r.token for r in mlx_lm.stream_generate(stock, tokenizer, prompt, max_tokens=MAX_TOKENS)
        ]
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        guesses = guesses_by_count(seams, ids, expected, set(counts.values()))
        said = {
            tree: replay(guesses[counts[tree]], expected, shape, MAX_TOKENS, stop)
            for tree, shape in shapes.items()
        }
        for tree in TREES:
            for placement in placements(seams.streams.config):
                out = list(
                    stream_generate(
                        model,
                        tokenizer,
                        prompt,
                        max_tokens=MAX_TOKENS,
                        tree=tree,
                        placement=placement,
                    )
                )
                assert [r.token for r in out] == expected
                assert out[-1].passes == said[tree].passes
        generated += len(expected) - 1
        passes += said["best:32"].passes
    assert generated / passes > (1.0 if blas.is_slow() else 2.0)


def test_sentencepiece_and_pytorch_bin(shared, tmp_path):
    out = convert(shared / "models/babyllama-0.9m", tmp_path / "baby")
    stock, tokenizer = mlx_lm.load(str(out))
    text = mlx_lm.generate(stock, tokenizer, [tokenizer.bos_token_id], max_tokens=54)
    assert text == "Once upon a time, there was a little girl named Lily."
    model, tokenizer = load(out)
    ours = list(stream_generate(model, tokenizer, [tokenizer.bos_token_id], max_tokens=54))
    assert "".join(r.text for r in ours) == text
