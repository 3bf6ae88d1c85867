"""The headline of the study as a whole, on tiny models: every row answers, and a killed run goes on."""

import gzip
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import save_config, save_model
from test_train_command import base  # noqa: F401
from tiny_models import COMMON, make_model, make_streams, make_tokenizer

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks/paper"))

import headline
import medusa
import study

from mlx_specstream.config import StreamConfig
from mlx_specstream.model.checkpoint import fingerprint, save_streams, save_tensors

PROMPTS = ("a5 a9 a13 a2", "a7 a8 a31", "a44 a2")


@pytest.fixture
def args(base, tmp_path, monkeypatch):  # noqa: F811
    """A work folder with rows of a task that is nobody's."""
    monkeypatch.setattr(study, "TASKS", {"toy": study.Task("{}", ("exact",), max_tokens=7)})
    monkeypatch.setattr(study, "DATA", tmp_path)
    monkeypatch.setattr(headline, "WARM_UP", 1)
    (tmp_path / "toy").mkdir()
    with gzip.open(tmp_path / "toy/valid.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"prompt": p, "completion": "a9"}) + "\n" for p in PROMPTS)
    rows, model = tmp_path / "toy/rows", make_model()
    small = StreamConfig(num_streams=3, msa_layers=2, lora_rank=4)
    save_streams(rows / "small-0", make_streams(model, small), fingerprint(model), {})
    monkeypatch.setattr(headline, "BUNDLED_STREAMS", rows / "small-0")
    heads = medusa.Heads(model, 2, shared_head=True)
    (rows / "medusa-shared-head-0").mkdir()
    weights = dict(tree_flatten(heads.parameters()))
    save_tensors(rows / "medusa-shared-head-0" / medusa.WEIGHTS, weights, {})
    about = {"heads": 2, "shared_head": True, "temperatures": [1.0, 1.2], "parameters": 77}
    study.save_json(rows / "medusa-shared-head-0" / medusa.ABOUT, about)
    draft = rows / "draft-model-0"
    shutil.copytree(base, draft)
    study.save_json(draft / "training.json", {"parameters": 99})
    tuned = make_model(seed=3)  # as shared mode left it
    fused = rows / "shared-v1-0/model"
    save_model(fused, tuned)
    config = {**COMMON, "model_type": "llama", "tie_word_embeddings": False}
    save_config(config, fused / "config.json")
    make_tokenizer().save_pretrained(fused)
    save_streams(rows / "shared-v1-0", make_streams(tuned, small), fingerprint(tuned), {})
    return SimpleNamespace(work=tmp_path, base=base, prompts=3, no_costs=True)


def test_every_row_is_measured(args):
    found = headline.measure("toy", 0, args)
    assert found["notes"] == [
        "best: not trained", "medusa: not trained", "shared-p: not trained", "lora: not trained"
    ]  # fmt: skip
    lossless, shared = found["groups"]["lossless"], found["groups"]["shared-v1"]
    assert set(found["groups"]) == {"lossless", "shared-v1"}
    rows = {"small", "bundled", "bundled + copies", "medusa-shared-head", "draft-model", "copies"}
    assert set(lossless["parameters"]) == rows
    assert set(lossless["replayed"]) == {"small", "bundled", "medusa-shared-head"}
    assert set(shared["replayed"]) == {"shared-v1"}
    for group in (lossless, shared):
        for way, figures in next(iter(group["summary"].values())).items():
            assert figures["identical"] == figures["of"] == 3, way
        for row, trees in group["replayed"].items():  # replayed as decoded
            decoded = next(iter(group["summary"].values()))[f"{row}, best:32"]
            assert trees["best:32"]["tokens_per_pass"] == decoded["tokens_per_pass"]
    table = headline.table("toy", [found]).splitlines()
    assert len(table) == 2 + 1 + len(rows) + 2
    assert json.dumps(found)


def test_answers_are_reused_only_of_what_was_trained(args, monkeypatch):
    first = headline.measure("toy", 0, args)
    state = args.work / "toy/headline-0.jsonl"
    lines = state.read_text().splitlines(True)
    state.write_text("".join(lines[:3]) + lines[3][:40])  # killed while it wrote the third prompt
    asked, real = [], headline.Evaluation.decode_next
    monkeypatch.setattr(
        headline.Evaluation, "decode_next", lambda self: asked.append(self.answered) or real(self)
    )
    again = headline.measure("toy", 0, args)
    assert asked == [2, 2]  # the third prompt, by both groups
    assert again["groups"]["lossless"]["answers"] == first["groups"]["lossless"]["answers"]
    asked.clear()
    about = args.work / "toy/rows/small-0/streams.json"
    about.write_text(about.read_text().replace('"training": {}', '"training": {"steps": 5}'))
    headline.measure("toy", 0, args)
    assert asked == [0, 0, 1, 1, 2, 2]
