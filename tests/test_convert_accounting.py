"""Which tensor became what: told from the graph, held against what changes when a tensor changes."""

import json

import mlx.core as mx
import numpy as np
import pytest
from test_convert import copy_golden

from mlx_specstream.cli.main import main
from mlx_specstream.converters import convert
from mlx_specstream.converters.accounting import Account, Parameter, Tensor, describe, trace
from mlx_specstream.converters.safetensors_header import read_header


def sanitize(weights):
    """A bit of everything that mlx-lm's classes do."""
    q, k = mx.split(weights["fused"], [3], axis=0)
    packed, scales, biases = mx.quantize(weights["wide"].astype(mx.float16), group_size=32, bits=4)
    return {
        "renamed": weights["plain"],
        "same": weights["other"],
        "q": q.T,
        "k": k + 1,
        "experts": mx.stack([weights["expert.1"], weights["expert.0"]]),
        "packed": packed,
        "scales": scales,
        "biases": biases,
        "tied": weights["plain"].astype(mx.bfloat16) * weights["other"][0],
        "new": mx.zeros((2, 5)),
    }


SHAPES = {
    "plain": (4, 6),
    "other": (4, 6),
    "fused": (7, 5),
    "wide": (3, 64),
    "expert.0": (2, 8),
    "expert.1": (2, 8),
    "dropped": (9,),
}


@pytest.fixture
def lazy(tmp_path):
    """name -> lazily loaded array, one of them with other numbers."""

    def load(changed=None):
        mx.random.seed(5)
        arrays = {name: mx.random.normal(shape) for name, shape in SHAPES.items()}
        if changed:
            arrays[changed] = mx.random.normal(SHAPES[changed])
        path = tmp_path / f"{changed}.safetensors"
        mx.save_safetensors(str(path), arrays)
        return mx.load(str(path))

    return load


def test_origins_are_the_tensors_that_matter(lazy):
    sources = lazy()
    origins = trace(sources, sanitize(sources))
    before = {name: np.array(a.astype(mx.float32)) for name, a in sanitize(lazy()).items()}
    expected = {name: [] for name in before}
    for changed in sorted(SHAPES):
        for name, array in sanitize(lazy(changed)).items():
            if not np.array_equal(np.array(array.astype(mx.float32)), before[name]):
                expected[name].append(changed)
    assert expected["experts"] == ["expert.0", "expert.1"]  # the experiment itself has an effect
    assert {name: sorted(found) for name, found in origins.items()} == expected


def test_nothing_is_computed(lazy):
    mx.reset_peak_memory()
    least = mx.get_active_memory()
    huge = {name: mx.zeros((1 << 20, 1 << 10)) + i for i, name in enumerate(lazy())}
    trace(huge, {"sum": sum(huge.values())})
    assert mx.get_peak_memory() - least < 1 << 20


def test_an_account_lets_go_of_the_arrays(lazy):
    class Model:
        def sanitize(self, weights):
            return {name: value for name, value in weights.items() if name != "dropped"}

    account = Account()
    watched, args = account.watching(lambda config: (Model, int))({})
    assert (watched.__name__, args) == ("Model", int)
    kept = watched().sanitize(lazy())
    rows, unused = account.close(kept)
    assert account.sources == {}
    assert unused == [Tensor("dropped", (9,), "float32")]
    assert {row.tensor.name for row in rows} == SHAPES.keys() - {"dropped"}
    assert all([origin.name for origin in row.origins] == [row.tensor.name] for row in rows)


def test_layers_are_counted_together():
    layers = [Tensor(f"layers.{i}.rope.inv_freq", (6,), "float32") for i in range(12)]
    made = Parameter(Tensor("mask", (2, 3), "bool"), [])
    assert describe([made], [*layers, Tensor("mtp.w", (5, 4), "float16")]) == [
        "unused: layers.*.rope.inv_freq [6] float32, 12 of them",
        "unused: mtp.w [5, 4] float16",
        "made by the class, not from a tensor: mask [2, 3] bool",
    ]


def plan_of(folder, tmp_path, capsys, *options):
    before = sorted(tmp_path.rglob("*"))
    argv = ["--hf-path", str(folder), "--mlx-path", str(tmp_path / "out"), *options]
    assert main(["convert", *argv, "--dry-run"]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    return argv, capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", ("--dtype", "bfloat16")),
        ("qwen2", ()),  # pickled
        ("phi3", ("-q", "--q-bits", "8", "--q-group-size", "32")),  # fused projections
        ("mixtral", ()),  # experts are stacked
        ("gpt_oss", ()),
    ],
)
def test_a_dry_run_says_what_the_conversion_then_does(name, options, tmp_path, capsys):
    folder = copy_golden(tmp_path / "hf", name)
    argv, lines = plan_of(folder, tmp_path, capsys, *options)
    assert main(["convert", *argv]) == 0
    header = read_header(tmp_path / "out" / "model.safetensors")
    kinds = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "U32": "uint32", "U8": "uint8"}
    made = {f"{n} {list(t.shape)} {kinds[t.dtype]}" for n, t in header.tensors.items()}
    assert {line.split(" <- ")[0] for line in lines} == made
    assert len(lines) == len(made)
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    assert all(any(f"{file.name}: " in line for file in files) for line in lines)


def test_every_tensor_is_accounted_for(tmp_path, capsys):
    folder = copy_golden(tmp_path / "hf", "mixtral")
    _, lines = plan_of(folder, tmp_path, capsys)
    origins = [part for line in lines for part in line.split(" <- ")[1].split(" + ")]
    header = read_header(folder / "model.safetensors")
    said = {
        f"model.safetensors: {name} {list(t.shape)} float32" for name, t in header.tensors.items()
    }
    assert set(origins) == said
    assert len(origins) == len(said)  # each once


def test_a_tensor_without_a_use_is_said(tmp_path):
    folder = copy_golden(tmp_path / "hf")
    weights = mx.load(str(folder / "model.safetensors"))
    for i in range(3):
        weights[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = mx.ones((5,))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    lines = []
    convert(folder, tmp_path / "out", log=lines.append)
    said = [line for line in lines if line.startswith("unused")]
    assert said == ["unused: model.layers.*.self_attn.rotary_emb.inv_freq [5] float32, 3 of them"]
    card = (tmp_path / "out" / "README.md").read_text()
    total = len(
        json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["weight_map"]
    )
    assert f"- parameter tensors: {total}\n" in card
    assert str(tmp_path) not in card
