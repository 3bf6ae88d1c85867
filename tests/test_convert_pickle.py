"""Reading PyTorch `.bin` files: plain tensors of every layout come in, code never runs."""

import argparse
import collections
import datetime
import io
import pickle
import pickletools
import struct
import zipfile
from pathlib import PosixPath

import mlx.core as mx
import numpy as np
import pytest

from mlx_specstream.converters.torch_pickle import load_torch, read_state
from mlx_specstream.errors import BadCheckpoint

# A pickle assembler: each function returns opcodes, so that a test can build what no pickler would.


def name(module, attribute):
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


def ops(value) -> bytes:
    if isinstance(value, bytes):  # opcodes already
        return value
    if isinstance(value, tuple):
        return b"(" + b"".join(map(ops, value)) + b"t"
    if isinstance(value, dict):
        return b"}(" + b"".join(ops(k) + ops(v) for k, v in value.items()) + b"u"
    return pickle.dumps(value, 2)[2:-1].replace(b"q\x00", b"")


def call(function, *arguments):
    return function + ops(arguments) + b"R"


def storage(kind, key, numel, *rest):
    return ops(("storage", name("torch", kind), key, "cpu", numel, *rest)) + b"Q"


def tensor(where, offset, shape, stride):
    hooks = call(name("collections", "OrderedDict"))
    rebuild = name("torch._utils", "_rebuild_tensor_v2")
    return call(rebuild, where, offset, shape, stride, False, hooks)


def state(entries):
    filled = b"(" + b"".join(ops(k) + v for k, v in entries.items()) + b"u"
    return b"\x80\x02" + call(name("collections", "OrderedDict")) + filled + b"."


def write_zip(path, data_pkl, storages=(), order=b"little", **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("shard/data.pkl", data_pkl)
        archive.writestr("shard/byteorder", order)
        for key, raw in dict(storages).items():
            archive.writestr(f"shard/data/{key}", raw)
    return path


def write_legacy(path, data_pkl, storages, magic=0x1950A86A20F9469CFC6C):
    with open(path, "wb") as stream:
        for value in (magic, 1001, {"little_endian": True, "protocol_version": 1001}):
            stream.write(pickle.dumps(value, 2))
        stream.write(data_pkl)
        stream.write(pickle.dumps(list(storages), 2))
        for values in storages.values():
            stream.write(struct.pack("<q", values.size) + values.tobytes())
    return path


def plain(numel=6, shape=(2, 3), stride=(3, 1), offset=0, kind="FloatStorage", key="0"):
    return state({"w": tensor(storage(kind, key, numel), offset, shape, stride)})


VALUES = np.array([0, 1, -2.5, 3, 0.25, -7, 11], np.float32)


@pytest.mark.parametrize(
    ("kind", "stored", "dtype"),
    [
        ("FloatStorage", "f4", mx.float32),
        ("DoubleStorage", "f8", mx.float32),
        ("HalfStorage", "f2", mx.float16),
        ("LongStorage", "i8", mx.int64),
        ("IntStorage", "i4", mx.int32),
        ("ShortStorage", "i2", mx.int16),
        ("CharStorage", "i1", mx.int8),
        ("ByteStorage", "u1", mx.uint8),
        ("BoolStorage", "?", mx.bool_),
    ],
)
@pytest.mark.parametrize("order", ["little", "big"])
def test_each_storage_type(tmp_path, kind, stored, dtype, order):
    values = np.abs(VALUES).astype(stored) if stored in "u1?" else VALUES.astype(stored)
    raw = values.astype(values.dtype.newbyteorder("<" if order == "little" else ">")).tobytes()
    pkl = plain(7, (7,), (1,), kind=kind)
    got = load_torch(write_zip(tmp_path / "a.bin", pkl, {"0": raw}, order.encode()))["w"]
    assert got.dtype == dtype
    np.testing.assert_array_equal(np.array(got), values)


def test_bfloat16(tmp_path):
    raw = (VALUES.view(np.uint32) >> 16).astype(np.uint16).tobytes()  # exact for these values
    pkl = plain(7, (7,), (1,), kind="BFloat16Storage")
    got = load_torch(write_zip(tmp_path / "a.bin", pkl, {"0": raw}))["w"]
    assert got.dtype == mx.bfloat16
    np.testing.assert_array_equal(np.array(got.astype(mx.float32)), VALUES)


def test_strides_offsets_and_shared_storages(tmp_path):
    values = np.arange(24, dtype=np.float32)
    where = storage("FloatStorage", "0", 24)
    pkl = state(
        {
            "rows": tensor(where, 0, (4, 6), (6, 1)),
            "columns": tensor(where, 0, (6, 4), (1, 6)),
            "part": tensor(where, 7, (2, 3), (6, 2)),
            "scalar": tensor(where, 23, (), ()),
            "empty": tensor(where, 24, (0, 5), (5, 1)),
            "parameter": call(
                name("torch._utils", "_rebuild_parameter"),
                tensor(where, 1, (3,), (1,)),
                True,
                call(name("collections", "OrderedDict")),
            ),
        }
    )
    got = load_torch(write_zip(tmp_path / "a.bin", pkl, {"0": values.tobytes()}))
    rows = values.reshape(4, 6)
    expected = {
        "rows": rows,
        "columns": rows.T,
        "part": [[7, 9, 11], [13, 15, 17]],
        "scalar": 23,
        "empty": np.zeros((0, 5)),
        "parameter": [1, 2, 3],
    }
    assert set(got) == set(expected)
    for key, value in expected.items():
        assert got[key].shape == np.shape(value)
        np.testing.assert_array_equal(np.array(got[key]), value)


def test_metadata_of_a_state_dict_is_ignored(tmp_path):
    pkl = plain()[:-1] + ops({"_metadata": {"": 1}, "items": 2}) + b"b."
    assert list(load_torch(write_zip(tmp_path / "a.bin", pkl, {"0": VALUES[:6].tobytes()}))) == [
        "w"
    ]


def legacy_file(path):
    pkl = state(
        {
            "a": tensor(storage("FloatStorage", "90", 7, None), 1, (2, 3), (3, 1)),
            "b": tensor(storage("LongStorage", "17", 5, None), 0, (5,), (1,)),
        }
    )
    return write_legacy(path, pkl, {"17": np.arange(5), "90": VALUES})


def test_legacy_file(tmp_path):
    got = load_torch(legacy_file(tmp_path / "a.bin"))
    np.testing.assert_array_equal(np.array(got["a"]), VALUES[1:].reshape(2, 3))
    np.testing.assert_array_equal(np.array(got["b"]), np.arange(5))


@pytest.mark.parametrize("write", ["zip", "legacy"])
def test_every_truncation_is_one_clear_error(tmp_path, write):
    path = tmp_path / "a.bin"
    if write == "zip":
        write_zip(path, plain(), {"0": VALUES[:6].tobytes()})
    else:
        legacy_file(path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(BadCheckpoint) as error:
            load_torch(path)
        assert str(error.value).startswith(str(path))
        assert "\n" not in str(error.value)


def hostile(command):
    """Pickles that run a shell command in an ordinary unpickler, each by another opcode."""
    system = name("os", "system")
    text = ops(command)
    stacked = ops("posix") + ops("system") + b"\x93"
    evaluate = name("builtins", "eval")
    return {
        "REDUCE": b"\x80\x02" + call(system, command) + b".",
        "STACK_GLOBAL": b"\x80\x04" + call(stacked, command) + b".",
        "INST": b"(" + text + b"ios\nsystem\n.",
        "OBJ": b"(" + system + text + b"o.",
        "NEWOBJ": b"\x80\x02" + name("subprocess", "Popen") + ops((command,)) + b"\x81.",
        "eval": b"\x80\x02" + call(evaluate, f"__import__('os').system({command!r})") + b".",
        "dotted": b"\x80\x04" + call(ops("torch") + ops("os.system") + b"\x93", command) + b".",
        "torch.load": b"\x80\x02" + call(name("torch", "load"), command) + b".",
        "in a state dict": state({"w": call(system, command)}),
        "as a hook": state(
            {"w": tensor(storage("FloatStorage", "0", 6), call(system, command), (6,), (1,))}
        ),
        "BUILD": b"\x80\x02"
        + name("collections", "OrderedDict")
        + ops({"__reduce__": system})
        + b"b.",
    }


@pytest.mark.parametrize("container", ["zip", "legacy"])
@pytest.mark.parametrize("attack", list(hostile("")))
def test_code_in_a_pickle_never_runs(tmp_path, attack, container):
    canary = tmp_path / "canary"
    path = tmp_path / "a.bin"
    pkl = hostile(f"touch {canary}")[attack]
    if container == "zip":
        write_zip(path, pkl, {"0": VALUES[:6].tobytes()})
    else:
        write_legacy(path, pkl, {})
    with pytest.raises(BadCheckpoint, match=r"was not run|torch\.load|system|Popen|eval") as error:
        load_torch(path)
    assert str(path) in str(error.value)
    assert not canary.exists()


def test_the_canary_is_real(tmp_path):
    canary = tmp_path / "canary"
    pickle.load(io.BytesIO(hostile(f"touch {canary}")["REDUCE"]))  # what must never happen above
    assert canary.exists()


F = "FloatStorage"


@pytest.mark.parametrize(
    ("pkl", "message"),
    [
        (plain(offset=1), "leaves its storage"),
        (plain(stride=(4, 1)), "leaves its storage"),
        (plain(offset=-1), "negative or huge"),
        (plain(stride=(-3, 1)), "negative or huge"),
        (plain(shape=(-2, 3)), "negative or huge"),
        (plain(shape=(1 << 70, 3)), "negative or huge"),
        (plain(shape=(1 << 40, 1 << 40), stride=(0, 0)), "leaves its storage"),
        (plain(shape=(0, 1 << 40, 1 << 40), stride=(1, 1, 1)), "damaged"),
        (plain(shape=(1, 6), stride=(1 << 60, 1)), "negative or huge"),
        (plain(shape=(2,)), "cannot have stride"),
        (plain(shape=(1,) * 40, stride=(1,) * 40), "cannot have stride"),
        (plain(shape="ab"), "must be tuples"),
        (plain(offset=True), "negative or huge"),
        (plain(7), "must have 28 bytes but has 24"),
        (plain(6, kind="HalfStorage"), "must have 12 bytes but has 24"),
        (plain(key="1"), "no entry 'data/1'"),
        (plain(key="../../etc/passwd"), "no entry"),
        (plain(kind="ComplexFloatStorage"), "torch.ComplexFloatStorage"),
        (state({"w": tensor(storage(F, "0", 6, "view"), 0, (6,), (1,))}), "views"),
        (state({"w": tensor(storage(F, "0", -6), 0, (6,), (1,))}), "unreadable storage"),
        (state({"w": tensor(ops("0"), 0, (6,), (1,))}), "no storage"),
        (state({"w": call(name("torch._utils", "_rebuild_tensor_v2"))}), "damaged"),
        (state({"model": ops({"w": 1})}), "'model.w' is a int, not a tensor"),
        (state({"layers": ops({"w": 1})}), "'layers' is a dict, not a tensor"),
        (state({"w": ops(5)}), "'w' is a int, not a tensor"),
        (ops([1, 2]) + b".", "the pickle is a list"),
        (b"\x80\x02r\xff\xff\xff\x7f.", "damaged"),
        (b"N" + b"r\xff\xff\xff\x7f.", "the pickle is a NoneType"),
        (b"garbage", "damaged"),
        (b"", "damaged"),
    ],
)
def test_damaged_descriptions(tmp_path, pkl, message):
    path = write_zip(tmp_path / "a.bin", pkl, {"0": VALUES[:6].tobytes()})
    with pytest.raises(BadCheckpoint, match=message) as error:
        load_torch(path)
    assert "\n" not in str(error.value)


def test_damaged_archives(tmp_path):
    path = tmp_path / "a.bin"
    good = {"0": VALUES[:6].tobytes()}
    with pytest.raises(BadCheckpoint, match="compressed"):
        load_torch(write_zip(path, plain(), good, compression=zipfile.ZIP_DEFLATED))
    with pytest.raises(BadCheckpoint, match="byte order"):
        load_torch(write_zip(path, plain(), good, b"middle"))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("code/model.py", "import os")
    with pytest.raises(BadCheckpoint, match=r"one data\.pkl"):
        load_torch(path)
    path.write_bytes(b"not a checkpoint at all")
    with pytest.raises(BadCheckpoint):
        load_torch(path)
    path.write_bytes(pickle.dumps({"w": 1}, 2))
    with pytest.raises(BadCheckpoint, match="neither a zip archive"):
        load_torch(path)


class Settings(argparse.Namespace):
    pass


BESIDE = {
    "arguments": argparse.Namespace(lr=1e-3, layers=[3, 4]),
    "a counter": collections.Counter("aab"),
    "a defaultdict": collections.defaultdict(list, a=[1]),
    "sets": [{1, 2}, frozenset("a")],
    "a path": PosixPath("/data/x"),
    "a time": datetime.datetime(2024, 3, 1),
    "numbers of numpy": [np.float32(3), np.int64(7)],
    "the state of a generator": np.random.RandomState(3).get_state(),
    "bytes": [b"ab", bytearray(b"c")],
    "a complex number": 1j,
    "a slice": slice(1, 2),
}


@pytest.mark.parametrize("kind", BESIDE)
def test_what_programs_keep_beside_the_weights_is_left_out(kind, tmp_path):
    """Read past, whatever Python's own pickler makes of it."""
    beside = pickletools.optimize(pickle.dumps(BESIDE[kind], 2))[2:-1]
    pkl = state({"args": beside, "model": plain()[2:-1]})
    path = write_zip(tmp_path / "last.pt", pkl, {"0": VALUES[:6].tobytes()})
    assert list(load_torch(path)) == ["w"]
    assert read_state(path).ignored == ["args"]
    with pytest.raises(BadCheckpoint, match=r"not a tensor|is a list"):
        load_torch(write_zip(path, state({"w": beside}), {}))


def test_a_class_of_the_program_is_refused(tmp_path):
    beside = pickle.dumps(Settings(lr=1), 2)[2:-1]
    pkl = state({"args": beside, "model": plain()[2:-1]})
    with pytest.raises(BadCheckpoint, match=r"test_convert_pickle\.Settings.*state_dict alone"):
        load_torch(write_zip(tmp_path / "last.pt", pkl, {}))


def test_legacy_sizes_must_agree(tmp_path):
    pkl = state({"a": tensor(storage(F, "9", 7, None), 0, (7,), (1,))})
    path = write_legacy(tmp_path / "a.bin", pkl, {"9": VALUES[:5]})
    with pytest.raises(BadCheckpoint, match="damaged or the file is truncated"):
        load_torch(path)
    with pytest.raises(BadCheckpoint, match="belongs to no tensor"):
        load_torch(write_legacy(path, pkl, {"9": VALUES, "10": VALUES}))
    with pytest.raises(BadCheckpoint, match="'9' is missing"):
        load_torch(write_legacy(path, pkl, {}))
    two = {
        "a": tensor(storage(F, "9", 7, None), 0, (7,), (1,)),
        "b": tensor(storage("IntStorage", "9", 7, None), 0, (7,), (1,)),
    }
    with pytest.raises(BadCheckpoint, match="two ways"):
        load_torch(write_legacy(path, state(two), {"9": VALUES}))


def test_what_is_read_survives_the_file(tmp_path):
    path = write_zip(tmp_path / "a.bin", plain(), {"0": VALUES[:6].tobytes()})
    got = load_torch(path)["w"]
    path.write_bytes(b"gone")
    np.testing.assert_array_equal(np.array(got), VALUES[:6].reshape(2, 3))
