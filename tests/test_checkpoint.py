"""The streams folder: round trip, refusals in one line, other precisions of the same base."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tiny_models import make_model, make_streams, quantized

from mlx_specstream.config import StreamConfig
from mlx_specstream.errors import BadCheckpoint, SpecStreamError, StreamsMismatch
from mlx_specstream.model.checkpoint import (
    DESCRIPTION,
    WEIGHTS,
    compare,
    find_streams,
    fingerprint,
    load_streams,
    save_streams,
)
from mlx_specstream.model.seams import attach

CONFIG = StreamConfig(num_streams=3, msa_layers=2, lora_rank=4, prune_rank=8, init_rank=2)


@pytest.fixture
def folder(tmp_path):
    model = make_model()
    save_streams(tmp_path / "s", make_streams(model, CONFIG), fingerprint(model), {"steps": 5})
    return tmp_path / "s"


def one_line(caught):
    message = str(caught.value)
    assert isinstance(caught.value, SpecStreamError)
    assert "\n" not in message
    assert message.endswith(".") or ":" in message
    return message


def edit(folder, change):
    description = json.loads((folder / DESCRIPTION).read_text())
    change(description)
    (folder / DESCRIPTION).write_text(json.dumps(description))


def test_round_trip(folder):
    model = make_model()
    loaded, note = load_streams(folder, model)
    assert note is None
    assert loaded.config == CONFIG
    wanted = dict(tree_flatten(make_streams(model, CONFIG).parameters()))
    got = dict(tree_flatten(loaded.parameters()))
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert np.array_equal(np.array(got[name]), np.array(value)), name
    assert sorted(p.name for p in folder.iterdir()) == sorted([WEIGHTS, DESCRIPTION])
    attach(model, loaded)
    _, streams = model(mx.array([[1, 2, 3]]), streams=True)
    assert streams.shape == (1, 3, 3, 67)


def test_saving_again_replaces_the_folder(folder):
    model = make_model()
    save_streams(folder, make_streams(model, CONFIG, seed=9), fingerprint(model), {})
    loaded, _ = load_streams(folder, model)
    assert np.array_equal(
        np.array(loaded.embeddings), np.array(make_streams(model, CONFIG, seed=9).embeddings)
    )


def test_fingerprint_does_not_see_the_seams(folder):
    model = make_model()
    before = fingerprint(model)
    attach(model, make_streams(model, CONFIG))
    assert fingerprint(model) == before == json.loads(json.dumps(before))


def test_another_base_is_refused(folder):
    for name, seed in (("llama", 5), ("qwen2", 0)):
        with pytest.raises(StreamsMismatch, match="belongs to another base") as caught:
            load_streams(folder, make_model(name, seed))
        assert "--force" in one_line(caught)
    with pytest.raises(StreamsMismatch, match="num_layers is 6"):
        load_streams(folder, make_model(num_hidden_layers=6))
    with pytest.raises(StreamsMismatch, match="shape of"):
        load_streams(folder, make_model(intermediate_size=96))


def test_force_takes_streams_of_another_base_that_fit(folder):
    loaded, note = load_streams(folder, make_model(seed=5), force=True)
    assert "acceptance may differ" in note
    assert loaded.config == CONFIG
    with pytest.raises(StreamsMismatch, match="must be") as caught:
        load_streams(folder, make_model("qwen2"), force=True)
    one_line(caught)


def test_force_never_takes_streams_that_change_the_output(tmp_path):
    model = make_model()
    config = StreamConfig(2, 2, 4, main_sees_streams=True)
    save_streams(tmp_path, make_streams(model, config), fingerprint(model), {})
    assert load_streams(tmp_path, model)[1] is None
    with pytest.raises(StreamsMismatch) as caught:
        load_streams(tmp_path, make_model(seed=5), force=True)
    assert "--force" not in one_line(caught)


@pytest.mark.parametrize("name", ["llama", "mixtral", "phi3", "gpt_oss"])
def test_the_same_base_in_another_precision_loads_with_a_note(tmp_path, name):
    model = make_model(name)
    save_streams(tmp_path, make_streams(model, CONFIG), fingerprint(model), {})
    _, note = load_streams(tmp_path, quantized(make_model(name)))
    assert "cosine of 0.9" in note
    assert "\n" not in note
    for dtype in (mx.bfloat16, mx.float16):
        half = make_model(name)
        half.set_dtype(dtype)
        load_streams(tmp_path, half)  # so close that it needs no note
        load_streams(tmp_path, quantized(half))


def test_streams_made_on_a_quantized_base_load_on_the_full_one(tmp_path):
    model = quantized(make_model())
    save_streams(tmp_path, make_streams(model, CONFIG), fingerprint(model), {})
    assert load_streams(tmp_path, make_model())[1]
    assert load_streams(tmp_path, quantized(make_model()))[1] is None


def test_compare_is_not_fooled_by_scale():
    a, b = fingerprint(make_model()), fingerprint(make_model(seed=1))
    assert compare(a, a)[0] == "same"
    assert compare(a, b)[0] == "other"


@pytest.mark.parametrize("name", [WEIGHTS, DESCRIPTION])
def test_missing_file(folder, name):
    (folder / name).unlink()
    with pytest.raises(BadCheckpoint, match=f"{name} is missing") as caught:
        load_streams(folder, make_model())
    one_line(caught)


def test_missing_folder(tmp_path):
    with pytest.raises(BadCheckpoint, match="is missing"):
        load_streams(tmp_path / "nothing", make_model())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d.update(format_version=99), "format_version 99"),
        (lambda d: d.pop("format_version"), "damaged"),
        (lambda d: d["config"].update(colour="red"), "unknown .'colour'."),
        (lambda d: d["config"].pop("num_streams"), "missing .'num_streams'."),
        (lambda d: d["config"].update(num_streams=0), "'num_streams' must be an int >= 1, got 0"),
        (lambda d: d.update(config=[1]), "damaged"),
        (lambda d: d.pop("config"), "damaged"),
        (lambda d: d.pop("base"), "damaged"),
        (lambda d: d.update(base=7), "damaged"),
        (lambda d: d["base"].update(sketch=[]), "different lengths"),
        (lambda d: d["base"].update(sketch=[[1.0]]), "list of numbers"),
        (lambda d: d["base"].update(sketch=["x"]), "damaged"),
        (lambda d: d["base"].update(sketch=[1.0, "x"]), "damaged"),
        (lambda d: d["base"].update(sketch=[1.0, 2.0]), "different lengths"),
        (lambda d: d["base"].update(shapes="none"), "damaged"),
        (lambda d: d["config"].update(lora_targets=3), "damaged"),
        (lambda d: d["config"].update(lora_targets=["x_proj"]), "lora_targets"),
    ],
)
def test_broken_descriptions(folder, change, says):
    edit(folder, change)
    with pytest.raises((BadCheckpoint, StreamsMismatch), match=says) as caught:
        load_streams(folder, make_model())
    assert str(folder) in one_line(caught)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"x"', '{"format_version": 1}', "\xff"])
def test_damaged_json(folder, text):
    (folder / DESCRIPTION).write_bytes(text.encode("latin-1"))
    with pytest.raises(BadCheckpoint, match="damaged") as caught:
        load_streams(folder, make_model())
    one_line(caught)


@pytest.mark.parametrize("keep", [0, 5, 60, 2000, -4])
def test_truncated_weights(folder, keep):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:keep])
    with pytest.raises(BadCheckpoint, match=WEIGHTS) as caught:
        load_streams(folder, make_model())
    one_line(caught)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda w: w.update(embeddings=mx.zeros((4, 64))),
            r"embeddings must be \(3, 64\), got \(4, 64\)",
        ),
        (lambda w: w.pop("embeddings"), "embeddings must be .*, got nothing"),
        (lambda w: w.update(more=mx.zeros((1,))), "more must be nothing"),
    ],
)
def test_weights_that_do_not_match(folder, change, says):
    weights = mx.load(str(folder / WEIGHTS))
    change(weights)
    mx.save_safetensors(str(folder / WEIGHTS), weights)
    with pytest.raises(BadCheckpoint, match=says) as caught:
        load_streams(folder, make_model())
    one_line(caught)


def test_streams_inside_a_model_folder_are_found(folder, tmp_path):
    assert find_streams(tmp_path) is None
    shutil.copytree(folder, tmp_path / "streams")
    assert find_streams(tmp_path) == tmp_path / "streams"
    shutil.copy(folder / DESCRIPTION, tmp_path)
    assert find_streams(tmp_path) == tmp_path
