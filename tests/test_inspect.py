"""`inspect`: what a file or folder is, told without running or changing anything."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from fuzz_inputs import adapter_seeds, adapter_weights
from hostile_files import CASES
from mlx_lm.utils import load_model
from test_convert import copy_golden
from test_convert_pickle import legacy_file

from mlx_specstream.cli.main import main
from mlx_specstream.converters.inspection import digest
from mlx_specstream.model.checkpoint import fingerprint

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "examples/models/e2e-sql-14m-4bit"
STREAMS = ROOT / "examples/streams/e2e-sql-14m"


@pytest.fixture
def inspect(capsys):
    """Runs the command: (exit code, report, error lines)."""

    def run(path):
        code = main(["inspect", str(path), "--json"])
        captured = capsys.readouterr()
        return code, json.loads(captured.out or "{}"), captured.err.splitlines()

    return run


def test_a_model_folder_with_its_streams(inspect, tmp_path):
    shutil.copytree(MODEL, tmp_path / "m")
    shutil.copytree(STREAMS, tmp_path / "m" / "streams")
    before = sorted(tmp_path.rglob("*"))
    code, report, errors = inspect(tmp_path / "m")
    assert (code, errors, report["problems"], report["safe"]) == (0, [], [], "yes")
    assert report["kind"] == "model folder"
    assert report["architecture"] == "llama"
    assert report["sizes"].startswith("8 layers, hidden_size 384, vocab_size 4096")
    assert report["quantisation"] == "group_size 64, bits 4, mode affine"
    assert report["weights"].startswith("1 files, safetensors, ")
    config = json.loads((STREAMS / "streams.json").read_text())["config"]
    said = "{num_streams} streams over the top {msa_layers} layers, LoRA of rank {lora_rank}, "
    assert report["streams"].startswith(said.format(**config))
    assert report["streams are lossless"] == "yes"
    assert report["match"].startswith("alike: weights agree to a cosine of 0.99")
    model, _ = load_model(MODEL)
    assert report["fingerprint"] == digest(fingerprint(model))
    description = json.loads((STREAMS / "streams.json").read_text())
    assert report["trained on"] == digest(description["base"])
    assert sorted(tmp_path.rglob("*")) == before


def test_streams_by_themselves_and_on_another_base(inspect, tmp_path):
    code, report, _ = inspect(STREAMS)
    assert (code, report["kind"], report["safe"]) == (0, "streams folder", "yes")
    assert "match" not in report
    folder = copy_golden(tmp_path / "hf")
    shutil.copytree(STREAMS, folder / "streams")
    code, report, _ = inspect(folder)
    assert code == 0
    assert report["match"].startswith("other: num_layers is 3")


def test_the_fingerprint_is_that_of_the_converted_model(inspect, tmp_path, capsys):
    folder = copy_golden(tmp_path / "hf", "phi3")
    _, before, _ = inspect(folder)
    argv = ["--hf-path", str(folder), "--mlx-path", str(tmp_path / "out")]
    assert main(["convert", *argv]) == 0
    capsys.readouterr()
    _, after, _ = inspect(tmp_path / "out")
    assert before["fingerprint"] == after["fingerprint"]
    assert before["fingerprint"].endswith(", phi3")


def test_a_pickled_model(inspect, tmp_path):
    folder = copy_golden(tmp_path / "hf", "qwen2", auto_map={"AutoConfig": "evil.C"})
    (folder / "evil.py").write_text("raise SystemExit")
    code, report, _ = inspect(folder)
    assert code == 0
    assert report["weights"].startswith("2 files, pickled, ")
    assert report["python files"] == "evil.py (never run)"
    assert "it is not run" in report["note"]
    assert "not known before" in report["fingerprint"]


def test_single_files(inspect, tmp_path):
    code, report, _ = inspect(MODEL / "model.safetensors")
    assert (code, report["kind"], report["metadata"]) == (0, "safetensors file", "format=mlx")
    arrays = mx.load(str(MODEL / "model.safetensors"))
    assert report["tensors"] == str(len(arrays))
    floats = sum(a.size for a in arrays.values() if a.dtype == mx.float32)
    assert f"{floats:,} float32" in report["numbers"]
    code, report, _ = inspect(legacy_file(tmp_path / "old.bin"))
    assert (code, report["tensors"], report["numbers"]) == (0, "2", "6 float32, 5 int64")
    mx.save_safetensors(str(tmp_path / "gap.safetensors"), {"w": mx.ones((5, 3))})
    with open(tmp_path / "gap.safetensors", "ab") as file:
        file.write(b"hidden")
    assert inspect(tmp_path / "gap.safetensors")[1]["bytes of no tensor"] == "6"


def test_an_adapter(inspect, tmp_path):
    (tmp_path / "adapter_config.json").write_bytes(adapter_seeds()[0])
    adapter_weights(tmp_path / "adapter_model.safetensors")
    code, report, _ = inspect(tmp_path)
    assert (code, report["kind"], report["base"]) == (0, "PEFT adapter folder", "someone/model")
    assert (report["r"], report["lora_alpha"], report["tensors"]) == ("3", "6", "4")


@pytest.mark.parametrize("case", ["pickle runs code: REDUCE", "link to outside: config.json"])
def test_what_is_unsafe_is_said_and_the_exit_code_says_it(case, inspect, tmp_path):
    damage, words = CASES[case]
    folder = copy_golden(tmp_path / "hf")
    damage(folder)
    code, report, errors = inspect(folder)
    assert (code, report["safe"], len(errors)) == (2, "no", 1)
    assert words in report["problems"][0]
    assert words in errors[0]
    assert not (tmp_path / "canary").exists()


def test_nothing_to_describe_is_one_line(inspect, tmp_path):
    for path, words in ((tmp_path, "neither a model"), (tmp_path / "no", "does not exist")):
        code, report, errors = inspect(path)
        assert (code, report, len(errors)) == (2, {}, 1)
        assert words in errors[0]
    (tmp_path / "x").write_text("hello")
    code, report, errors = inspect(tmp_path / "x")
    assert (code, report["safe"]) == (2, "no")
    assert "neither safetensors nor" in errors[0]


def test_for_people(capsys):
    assert main(["inspect", str(STREAMS)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("path ")
    assert lines[-1].split() == ["safe", "yes"]
    assert len({line.index(line.split("  ")[-1].strip()) for line in lines}) == 1  # one column


def test_nothing_is_copied_to_look_at_it(inspect, tmp_path, monkeypatch):
    """A head that is left out, and experts to be split: the fingerprint reads what it samples."""

    def forbidden(*args):
        raise AssertionError("tensors were written")

    monkeypatch.setattr("mlx_specstream.converters.staging.write_safetensors", forbidden)
    folder = copy_golden(tmp_path / "hf", tie_word_embeddings=True)
    tensors = mx.load(str(folder / "model.safetensors"))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "pt"})
    code, report, _ = inspect(folder)
    monkeypatch.undo()
    assert code == 0
    assert main(["convert", "--hf-path", str(folder), "--mlx-path", str(tmp_path / "out")]) == 0
    model, _ = load_model(tmp_path / "out")
    assert report["fingerprint"] == digest(fingerprint(model))
