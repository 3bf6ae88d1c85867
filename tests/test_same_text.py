"""A real model from each format that can be made of it: the same greedy text.

All formats of both models in three precisions: benchmarks/same_text.py.
"""

import json
import shutil

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from plain_sources import FORMATS

from mlx_specstream import load
from mlx_specstream.converters import convert
from mlx_specstream.converters.torch_pickle import load_torch

TOKENS = 40


def greedy(folder) -> list[int]:
    model, tokenizer = load(folder, streams=False)
    prompt = mx.array(tokenizer.encode("Once upon a time"))
    return [int(token) for token, _ in generate_step(prompt, model, max_tokens=TOKENS)]


@pytest.fixture(scope="module")
def story(shared, tmp_path_factory):
    """(source folder, its tensors, the text)"""
    source = shared / "models/babyllama-0.9m"
    direct = convert(source, tmp_path_factory.mktemp("direct") / "out")
    return source, load_torch(source / "pytorch_model.bin"), greedy(direct)


@pytest.mark.parametrize("label", FORMATS)
def test_the_same_text(label, story, tmp_path):
    source, tensors, expected = story
    folder = tmp_path / "hf"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.bin"))
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    without_head = {name: value for name, value in tensors.items() if name != "lm_head.weight"}
    convert(FORMATS[label](folder, without_head), tmp_path / "out")
    assert greedy(tmp_path / "out") == expected
