"""Safetensors written tensor by tensor: what other readers make of them, and what memory they take."""

import json
import struct

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors import deserialize

from mlx_specstream.converters.safetensors_header import read_header
from mlx_specstream.converters.safetensors_writer import DTYPES, write_hollow, write_safetensors
from mlx_specstream.converters.shards import save_weights


def arrays():
    """Every dtype, and every way to lie in memory."""
    numbers = mx.arange(30).reshape(5, 6)
    found = {
        f"as {code}": (numbers % 2).astype(kind)
        for kind, code in DTYPES.items()
        if kind != mx.float64
    }
    return found | {
        "transposed": numbers.T.astype(mx.float32),
        "part": numbers[1:4, ::2].astype(mx.bfloat16),
        "broadcast": mx.broadcast_to(mx.array([1.5, -2.0]), (3, 2)),
        "scalar": mx.array(-7, mx.int16),
        "empty": mx.zeros((0, 4)),
        "lazy": mx.exp(mx.ones((3,))) * 2,
    }


def numpy_bytes(array) -> bytes:
    """Row-major little-endian bytes by way of numpy."""
    if array.dtype == mx.bfloat16:
        return (np.array(array.astype(mx.float32)).view(np.uint32) >> 16).astype("<u2").tobytes()
    return np.ascontiguousarray(np.array(array)).tobytes()


def test_another_reader_finds_the_same(tmp_path):
    path, expected = tmp_path / "a.safetensors", arrays()
    given = dict(expected)
    write_safetensors(path, given, {"format": "mlx"})
    assert given == {}
    found = dict(deserialize(path.read_bytes()))
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name]["dtype"] == DTYPES[array.dtype]
        assert tuple(found[name]["shape"]) == array.shape
        assert bytes(found[name]["data"]) == numpy_bytes(array), name
    loaded, metadata = mx.load(str(path), return_metadata=True)
    assert metadata == {"format": "mlx"}
    for name, array in expected.items():
        assert loaded[name].dtype == array.dtype
        assert bool(mx.array_equal(loaded[name], array))
    length = struct.unpack("<Q", path.read_bytes()[:8])[0]
    assert (8 + length) % 8 == 0
    assert read_header(path).unused == 0


def test_a_hollow_file_has_the_same_header_and_size(tmp_path):
    write_safetensors(tmp_path / "full", arrays())
    given = arrays()
    write_hollow(tmp_path / "hollow", given)
    assert read_header(tmp_path / "hollow") == read_header(tmp_path / "full")
    assert not any(np.array(mx.load(str(tmp_path / "hollow"), format="safetensors")["lazy"]))


def test_one_tensor_at_a_time_is_computed(tmp_path):
    size, count = 1 << 22, 9
    tensors = {f"w{i}": mx.random.normal((size // 4,)) + i for i in range(count)}
    wrote = []
    mx.clear_cache()
    mx.reset_peak_memory()
    least = mx.get_active_memory()
    write_safetensors(tmp_path / "a", tensors, None, wrote.append)
    assert wrote == [size] * count
    assert mx.get_peak_memory() - least < 4 * size  # the sum, what it is made of, nothing else
    assert mx.get_active_memory() - least < size


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(24 + i, 10, bias=i == 1) for i in range(3)]
        self.norm = nn.RMSNorm(7)


def shards_of(largest):
    """mlx-lm's `make_shards` with a limit in bytes."""

    def make(weights):
        made, size = [], largest
        for name, value in weights.items():
            size += value.nbytes
            if size > largest:
                made, size = [*made, {}], value.nbytes
            made[-1][name] = value
        return made

    return make


@pytest.mark.parametrize(("largest", "files"), [(1 << 30, 1), (1200, 3)])
def test_files_and_index_are_those_of_mlx_lm(largest, files, tmp_path, monkeypatch):
    from mlx_lm import utils

    monkeypatch.setattr(utils, "make_shards", shards_of(largest))
    model, steps = Tiny(), []
    expected = dict(tree_flatten(model.parameters()))
    mx.eval(expected)
    utils.save_model(tmp_path / "theirs", model)
    (tmp_path / "ours").mkdir()
    save_weights(tmp_path / "ours", model, lambda *step: steps.append(step))
    theirs, ours = (
        {path.name: path for path in (tmp_path / name).iterdir()} for name in ("theirs", "ours")
    )
    assert ours.keys() == theirs.keys()
    assert len(ours) == files + 1
    name = "model.safetensors.index.json"
    assert json.loads(ours.pop(name).read_text()) == json.loads(theirs.pop(name).read_text())
    for name, path in ours.items():
        loaded, metadata = mx.load(str(path), return_metadata=True)
        other, same = mx.load(str(theirs[name]), return_metadata=True)
        assert (metadata, loaded.keys()) == (same, other.keys())
        assert all(bool(mx.array_equal(loaded[key], expected[key])) for key in loaded)
    total = sum(value.nbytes for value in expected.values())
    assert [done for done, _ in steps] == list(np.cumsum([v.nbytes for v in expected.values()]))
    assert {all_of_it for _, all_of_it in steps} == {total}
