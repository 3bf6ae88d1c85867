"""Streams trained in PyTorch become a streams folder, and go back, bit by bit."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tiny_models import make_model, make_streams

from mlx_specstream import load
from mlx_specstream.config import StreamConfig
from mlx_specstream.converters import convert
from mlx_specstream.converters.export import export
from mlx_specstream.converters.safetensors_writer import raw
from mlx_specstream.converters.torch_streams import NAMES, renamed
from mlx_specstream.errors import BadArgument, BadCheckpoint
from mlx_specstream.model.checkpoint import fingerprint, save_streams
from mlx_specstream.model.rows import causal_rows
from mlx_specstream.model.seams import Pass, seams_of

GOLDEN = Path(__file__).parent / "golden_sources"


def our_logits(model, tokens: list[int]) -> dict:
    """What `torch_twin.twin` gives, from our seams."""
    seams, L = seams_of(model), len(tokens)
    streams, ids = seams.streams, mx.array([tokens])
    roots = mx.concatenate([ids[:, 1:], ids[:, -1:]], axis=1)
    run = Pass(
        causal_rows(0, L), at_cut=lambda hidden, rows: seams.add_streams(hidden, rows, roots)
    )
    logits = seams.forward(run, ids)[0]
    g = streams.config.num_streams
    found = {"main": logits[:L], "streams": logits[L:].reshape(g, L, -1)}
    if streams.config.prune_rank:
        found["exit"] = seams.head(streams.exit_hidden(run.cut_hidden))[0]
    if streams.config.condition_rank:
        states = run.last_hidden[0, L:].reshape(g, L, -1)
        before = [model.model.embed_tokens(mx.roll(ids, -j, axis=1))[0] for j in range(1, g + 1)]
        states = streams.condition(states, mx.stack(before))
        found["conditioned"] = seams.head(states.reshape(1, g * L, -1))[0].reshape(g, L, -1)
    return {name: np.array(value.astype(mx.float32)) for name, value in found.items()}


def assert_same(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    for name, want in expected.items():
        want = np.array(want)
        assert np.abs(got[name] - want).max() <= 1e-4 * np.abs(want).max(), name


def add_tokenizer(folder):
    from test_convert import TOKENIZER

    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    text = '{"tokenizer_class": "PreTrainedTokenizerFast"}'
    (folder / "tokenizer_config.json").write_text(text)


@pytest.fixture
def source(tmp_path):
    """A training checkpoint of PyTorch, base and streams in one file."""

    def copy(name="streams"):
        shutil.copytree(GOLDEN / name, tmp_path / "hf")
        add_tokenizer(tmp_path / "hf")
        return tmp_path / "hf"

    return copy


def golden(name):
    found = json.loads((GOLDEN / name / "logits.json").read_text())
    return found.pop("tokens"), found


@pytest.mark.parametrize("name", ["streams", "streams_shared"])
def test_logits_equal_those_of_the_pytorch_twin(name, source, tmp_path):
    lines = []
    convert(source(name), tmp_path / "out", dtype="float32", log=lines.append)
    assert any("left out: step" in line for line in lines)
    tokens, expected = golden(name)
    model, _ = load(tmp_path / "out")
    assert_same(our_logits(model, tokens), expected)
    seams_of(model).streams.embeddings *= 1.01
    with pytest.raises(AssertionError, match=r"main|streams"):
        assert_same(our_logits(model, tokens), expected)


def test_streams_stay_in_full_precision(source, tmp_path):
    convert(source(), tmp_path / "out", dtype="bfloat16")
    stored = mx.load(str(tmp_path / "out/streams/streams.safetensors"))
    assert {value.dtype for value in stored.values()} == {mx.float32}
    assert {v.dtype for v in mx.load(str(tmp_path / "out/model.safetensors")).values()} == {
        mx.bfloat16
    }


@pytest.fixture
def both(tmp_path):
    """A small model folder with streams of every kind in it, and a draft vocabulary."""

    def make(name="llama", **settings):
        model = make_model(name)
        config = {"num_streams": 3, "msa_layers": 2, "lora_rank": 6, "init_rank": 5}
        config |= {"prune_rank": 7, "condition_rank": 9, "root_rank": 8, **settings}
        streams = make_streams(model, StreamConfig(**config))
        streams.draft_vocabulary = np.array([3, 11, 40], np.int32)
        streams.temperatures = np.array([0.7, 1.1, 2.3], np.float32)
        folder = tmp_path / "model"
        folder.mkdir()
        mx.save_safetensors(
            str(folder / "model.safetensors"), dict(tree_flatten(model.parameters()))
        )
        args = {"model_type": name.partition(":")[0], **vars(model.args), "hidden_act": "silu"}
        (folder / "config.json").write_text(
            json.dumps({k: v for k, v in args.items() if v is not None})
        )
        add_tokenizer(folder)
        save_streams(folder / "streams", streams, fingerprint(model), {"minutes": 3})
        return folder

    return make


def files_of(folder):
    return {
        path.name: (path.read_text() if path.suffix == ".json" else bits(mx.load(str(path))))
        for path in sorted(folder.iterdir())
        if path.suffix != ".md"
    }


def bits(tensors):
    return {name: (v.dtype, v.shape, bytes(raw(v))) for name, v in sorted(tensors.items())}


@pytest.mark.parametrize(
    "settings",
    [{}, {"value_rotation": 0.1}, {"lora_targets": ["v_proj"]}, {"condition_shared": True}],
)
@pytest.mark.parametrize("name", ["llama", "phi3", "qwen2_moe", "opt:350m"])
def test_round_trip_of_streams_is_bit_equal(name, settings, both, tmp_path):
    streams = both(name, **settings) / "streams"
    export(streams, tmp_path / "torch")
    convert(tmp_path / "torch", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(streams)


def test_pytorch_gets_its_own_names_and_shapes(both, tmp_path):
    streams = both() / "streams"
    export(streams, tmp_path / "torch")
    tensors, about = mx.load(
        str(tmp_path / "torch/pytorch_streams.safetensors"), return_metadata=True
    )
    shapes = {name: value.shape for name, value in tensors.items()}
    # hidden 64, heads 4 of 24, inner 160, three streams in two layers
    assert shapes["stream_embeddings.weight"] == (3, 64)
    assert shapes["msa_layers.1.q_proj.lora_A.weight"] == (6, 64)
    assert shapes["msa_layers.0.q_proj.lora_B.weight"] == (96, 6)
    assert shapes["msa_layers.0.down_proj.lora_A.weight"] == (6, 160)
    assert shapes["stream_init.lora_A.weight"] == (5, 64)
    assert shapes["early_exit.lora_B.weight"] == (64, 7)
    assert shapes["condition.embedding.weight"] == (3, 9, 64)
    assert shapes["condition.out.weight"] == (3, 64, 9)
    assert shapes["condition.bias"] == (3, 1, 9)
    assert shapes["root.state.weight"] == (1, 8, 64)
    assert len(shapes) == 1 + 2 * 7 * 2 + 2 + 2 + 4 + 4 + 1
    assert json.loads(about["stream_config"])["num_streams"] == 3
    assert about["format"] == "pt"
    ours = mx.load(str(streams / "streams.safetensors"))
    assert np.array_equal(tensors["stream_init.lora_A.weight"], ours["init.a"].T)


def test_a_model_and_its_streams_go_back_together(both, tmp_path):
    folder = both()
    export(folder, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "back")
    assert files_of(tmp_path / "back" / "streams") == files_of(folder / "streams")
    for place in (tmp_path / "hf", tmp_path / "back"):
        got = bits(mx.load(str(place / "model.safetensors")))
        assert got == bits(mx.load(str(folder / "model.safetensors")))


def edited(folder, change):
    """The exported streams with something changed in them."""
    path = folder / "pytorch_streams.safetensors"
    tensors, about = mx.load(str(path), return_metadata=True)
    change(tensors, about)
    (folder / "pytorch_streams.safetensors").unlink()
    mx.save_safetensors(str(path), tensors, about)
    return path


def rank(about, **changes):
    about["stream_config"] = json.dumps({**json.loads(about["stream_config"]), **changes})


A = "msa_layers.0.q_proj.lora_A.weight"
WRONG = {
    "no config": (lambda t, a: a.pop("stream_config"), "no 'stream_config'"),
    "no json": (lambda t, a: a.update(stream_config="{"), "stream_config is not JSON"),
    "unknown key": (lambda t, a: rank(a, colour=1), "unknown .'colour'"),
    "broken rule": (lambda t, a: rank(a, num_streams=0), "'num_streams' must be"),
    "other rank": (
        lambda t, a: rank(a, init_rank=4),
        r"'stream_init.lora_A.weight' must be \(4, 64",
    ),
    "missing": (lambda t, a: t.pop(A), f"{A}.*must be .* but is nothing"),
    "turned": (lambda t, a: t.update({A: t[A].T}), rf"'{A}' must be \(6, 64\) but is \(64, 6\)"),
    "too many layers": (lambda t, a: rank(a, msa_layers=9), "'msa_layers' is 9 but the base has 5"),
    "vocabulary": (
        lambda t, a: t.update(draft_vocabulary=mx.array([3, 3])),
        "draft_vocabulary must be ascending",
    ),
    "calibration": (
        lambda t, a: a.update(stream_calibration='{"temperatures": [1.0, 0.0, 2.0]}'),
        "stream_calibration is damaged: temperatures must be 3 numbers > 0",
    ),
    "calibration of nothing": (lambda t, a: a.update(stream_calibration="[]"), "is damaged"),
    "no base": (lambda t, a: a.pop("stream_base"), "give the base with --base"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_streams_are_one_clear_line(case, both, tmp_path):
    folder = both()
    export(folder / "streams", tmp_path / "torch")
    change, words = WRONG[case]
    path = edited(tmp_path / "torch", change)
    base = None if case == "no base" else folder
    with pytest.raises((BadArgument, BadCheckpoint), match=words) as error:
        convert(path, tmp_path / "out", base=base)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_streams_alone_of_a_known_base(both, tmp_path):
    """Without a fingerprint of their own they get the base's."""
    folder = both()
    export(folder / "streams", tmp_path / "torch")
    path = edited(tmp_path / "torch", lambda t, a: (a.pop("stream_base"), a.pop("stream_training")))
    convert(path, folder / "streams2", base=folder)
    about = json.loads((folder / "streams2/streams.json").read_text())
    assert about["base"] == json.loads((folder / "streams/streams.json").read_text())["base"]
    assert about["training"] == {"origin": "PyTorch"}
    load(folder, streams=folder / "streams2")


def test_every_name_has_a_way_back():
    for torch_name, our_name, swap in NAMES:
        there = torch_name.replace("*", "1", 1).replace("*", "shared_expert_up_proj")
        ours = our_name.replace("*", "1", 1).replace("*", "shared_expert_up_proj")
        assert renamed(there, back=False) == (ours, swap)
        assert renamed(ours, back=True) == (there, swap)
    assert renamed("model.layers.0.mlp.up_proj.weight", back=False) is None
