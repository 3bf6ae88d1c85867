"""Conversions that must fail: one clear line each, nothing run, nothing damaged, no litter."""

import errno
import json
import shutil
import struct
import zipfile
from functools import partial
from pathlib import Path

import mlx.core as mx
import pytest
from test_convert import copy_golden

from mlx_specstream.converters import convert
from mlx_specstream.converters.safetensors_writer import write_safetensors
from mlx_specstream.errors import BadArgument, BadCheckpoint, SpecStreamError, UnsupportedModel


@pytest.fixture
def checkpoint(tmp_path):
    return partial(copy_golden, tmp_path / "hf")


def expect(folder, target, words, kind=SpecStreamError, **options):
    """The conversion fails with one line that has these words, and leaves nothing behind."""
    before = sorted(target.parent.rglob("*"))
    with pytest.raises(kind, match=f"(?s){words}") as error:
        convert(folder, target, **options)
    assert "\n" not in str(error.value)
    assert sorted(target.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "int8"}, "dtype.*float16.*int8"),
        ({"quantize": True, "dequantize": True}, "not both"),
        ({"q_mode": "q4"}, "q_mode.*affine.*q4"),
        ({"quantize": True, "quant_predicate": "mixed"}, "mixed_2_6.*'mixed'"),
        ({"quantize": True, "quant_predicate": "mixed_2_6", "q_mode": "mxfp4"}, "affine.*mxfp4"),
        ({"quantize": True, "q_bits": 11, "q_group_size": 32}, "'q_bits' must be .* but got 11"),
    ],
)
def test_bad_arguments(options, words, checkpoint, tmp_path):
    expect(checkpoint("phi3"), tmp_path / "q", words, BadArgument, **options)


def test_an_existing_target_is_refused_and_left_alone(checkpoint, tmp_path):
    folder, target = checkpoint(), tmp_path / "q"
    target.mkdir()
    (target / "mine").write_text("x")
    expect(folder, target, "already exists; delete it or choose another name", BadArgument)
    expect(tmp_path / "nope", target, "already exists", BadArgument)  # said before any work
    target = tmp_path / "link"
    target.symlink_to(tmp_path / "nowhere")
    expect(folder, target, "already exists", BadArgument)


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def header(change):
    def edit(folder):
        raw = (folder / "model.safetensors").read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        table = json.loads(raw[8 : 8 + length])
        change(table)
        text = json.dumps(table).encode()
        data = raw[8 + length :]
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)

    return edit


def index(**table):
    def edit(folder):
        text = json.dumps({"weight_map": table})
        (folder / "model.safetensors.index.json").write_text(text)

    return edit


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def remove(name):
    return lambda folder: (folder / name).unlink()


def pickled(folder):
    (folder / "model.safetensors").unlink()
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
        canary = folder.parent / "canary"
        archive.writestr("a/data.pkl", b"cos\nsystem\n(S'touch " + bytes(canary) + b"'\ntR.")


def overlap(table):
    names = [n for n in table if n.endswith("input_layernorm.weight")]
    table[names[1]] = table[names[0]]


NORM = "model.norm.weight"
DAMAGE = {
    "no config": (remove("config.json"), "not a model folder, config.json is missing"),
    "broken config": (write("config.json", '{"model_type": '), "config.json: not readable as JSON"),
    "config is a list": (write("config.json", "[]"), "must hold a JSON object but holds a list"),
    "no weights": (remove("model.safetensors"), r"no weights; expected model\*\.safetensors or"),
    "no tokenizer": (remove("tokenizer.json"), "tokenizer is missing or does not load"),
    "broken tokenizer": (write("tokenizer.json", "{"), "tokenizer is missing or does not load"),
    "truncated": (truncate, "truncated: .* bytes are needed but the file has"),
    "cut in the header": (write("model.safetensors", "\x09\0\0\0"), "truncated or not safetensors"),
    "not safetensors": (write("model.safetensors", "<html>" * 9), "truncated or not safetensors"),
    "bad offsets": (
        header(lambda t: t[NORM].update(data_offsets=[0, 7])),
        "'model.norm.weight' has a damaged",
    ),
    "negative shape": (header(lambda t: t[NORM].update(shape=[-24])), "damaged header entry"),
    "strange type": (header(lambda t: t[NORM].update(dtype="Q4")), "unsupported type 'Q4'"),
    "overlap": (header(overlap), "overlaps another one"),
    "missing tensor": (header(lambda t: t.pop(NORM)), "Missing 1 parameters: model.norm.weight"),
    "unused tensor": (
        header(lambda t: t.update(extra=t[NORM])),
        "overlaps|not in model: extra",
    ),
    "wrong shape": (
        header(lambda t: t[NORM].update(shape=[4, 6])),
        r"Expected shape \(24,\) but received shape \(4, 6\)",
    ),
    "index escapes": (index(a="../../x.safetensors"), r"files of the same folder.*\.\./\.\./x"),
    "index is absolute": (index(a="/etc/x.safetensors"), "files of the same folder.*/etc/x"),
    "index of code": (index(a="evil.py"), "must name .safetensors files but names 'evil.py'"),
    "index is empty": (index(), "'weight_map' must map"),
    "index without file": (index(a="model-00002.safetensors"), "missing weight files: model-00002"),
    "missing shard": (
        lambda f: (f / "model.safetensors").rename(f / "model-00002-of-00003.safetensors"),
        "missing weight files: model-00001-of-00003.safetensors, model-00003-of-00003",
    ),
    "tensor twice": (
        lambda f: shutil.copy(f / "model.safetensors", f / "model-old.safetensors"),
        "is also in model",
    ),
    "pickle with code": (pickled, r"pytorch_model.bin: the pickle asks for os.system.*not run"),
}


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_damaged_folders(damage, checkpoint, tmp_path):
    folder = checkpoint()
    break_it, words = DAMAGE[damage]
    break_it(folder)
    expect(folder, tmp_path / "new" / "q" if damage == "truncated" else tmp_path / "q", words)
    assert not (tmp_path / "canary").exists()


def test_no_such_folder(tmp_path, monkeypatch):
    expect(tmp_path / "nope", tmp_path / "q", "nope does not exist", BadCheckpoint)
    (tmp_path / "file").write_text("x")
    expect(tmp_path / "file", tmp_path / "q", "file is not a folder", BadCheckpoint)

    def offline(*args, **kwargs):
        raise OSError("no route to host\nsecond line")

    monkeypatch.setattr("huggingface_hub.list_repo_files", offline)
    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    expect("owner/name", tmp_path / "q", "downloadable: no route to host", BadCheckpoint)


CANARY = "import pathlib; pathlib.Path(__file__).with_name('ran').touch()"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_file": "evil.py"}, "run the Python file 'evil.py'; it was not run"),
        ({"model_file": "../evil.py"}, "must be a file name of the folder"),
        ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, r"evil.Model\); it was not run"),
        ({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}, "no usable arch.*evil"),
    ],
)
def test_remote_code_is_never_run(changes, words, checkpoint, tmp_path):
    folder = checkpoint(**changes)
    (folder / "evil.py").write_text(CANARY)
    expect(folder, tmp_path / "q", words)
    assert not (folder / "ran").exists()


def test_stock_code_is_ignored_with_a_note(checkpoint, tmp_path):
    lines = []
    folder = checkpoint(auto_map={"AutoModelForCausalLM": "evil.LlamaForCausalLM"})
    (folder / "evil.py").write_text(CANARY)
    convert(folder, tmp_path / "q", log=lines.append)
    assert any("not run" in line for line in lines)
    assert "auto_map" not in json.loads((tmp_path / "q" / "config.json").read_text())
    assert not (folder / "ran").exists()
    shutil.rmtree(tmp_path / "q")
    own = checkpoint_config(folder, auto_map={"AutoModelForCausalLM": "evil.Model"})
    convert(own, tmp_path / "q", trust_remote_code=True)  # as a plain llama, and still not run
    assert not list(tmp_path.rglob("ran"))


def checkpoint_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_a_tokenizer_with_code_is_not_run(checkpoint, tmp_path):
    folder = checkpoint()
    (folder / "tokenizer.json").unlink()
    (folder / "evil.py").write_text(CANARY)
    tokenizer = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    expect(folder, tmp_path / "q", "tokenizer is missing or does not load", BadCheckpoint)
    assert not list(tmp_path.rglob("ran"))


def test_an_ignored_rope_scaling_is_found(checkpoint, tmp_path):
    rope = {"rope_type": "linear", "rope_theta": 3e5, "factor": 2.0}
    folder = checkpoint("mixtral", rope_parameters=rope)
    expect(folder, tmp_path / "q", "mixtral, layer . would not rotate as the config says")


STEPS = {
    "reading": "mlx_specstream.converters.weight_file.load_torch",
    "staging": "pathlib.Path.symlink_to",
    "weights": "mlx_specstream.converters.shards.write_safetensors",
    "config": "mlx_lm.utils.save_config",
    "tokenizer": "shutil.copyfile",
    "rename": "pathlib.Path.rename",
}
FAILURES = {
    "full disk": (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
    "other": (OSError(errno.EROFS, "Read-only file system"), "Read-only file system"),
    "interrupt": (KeyboardInterrupt(), None),
}


@pytest.mark.parametrize("failure", list(FAILURES))
@pytest.mark.parametrize("step", list(STEPS))
def test_failures_leave_no_litter(step, failure, checkpoint, tmp_path, monkeypatch):
    folder = checkpoint("qwen2")
    error, words = FAILURES[failure]

    def fail(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(STEPS[step], fail)
        before = sorted(tmp_path.rglob("*"))
        kind = BadCheckpoint if words else KeyboardInterrupt
        with pytest.raises(kind, match=words) as caught:
            convert(folder, tmp_path / "new" / "q")
        assert "\n" not in str(caught.value)
        assert sorted(tmp_path.rglob("*")) == before
    convert(folder, tmp_path / "new" / "q")  # and the next try works


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_noticed_while_writing():
    with pytest.raises(OSError, match="No space left"):
        write_safetensors(Path("/dev/full"), {"w": mx.zeros((300, 70))})


def test_unsupported_architecture(checkpoint, tmp_path):
    folder = checkpoint(model_type="bloom")
    expect(
        folder, tmp_path / "q", "no usable architecture for model_type 'bloom'", UnsupportedModel
    )
