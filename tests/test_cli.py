"""The command line as a user meets it: whole commands, their output, their errors."""

import gzip
import io
import json
import pickle
import shutil
import subprocess
import sys
import time
import zipfile
from importlib import import_module
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.tuner.utils import linear_to_lora_layers
from tiny_models import make_model, make_tokenizer

from mlx_specstream.cli.main import COMMANDS, main
from mlx_specstream.load import load_base
from mlx_specstream.model.checkpoint import read_description

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "examples/models/e2e-sql-14m-4bit"
STREAMS = ROOT / "examples/streams/e2e-sql-14m"
PROMPT = "MR: name[The Copper Kettle], food[Italian], area[riverside]\nText:"
COMMON = ["--model", str(MODEL), "--streams", str(STREAMS)]


def run(capsys, *argv) -> tuple[int, str, str]:
    code = main([str(a) for a in argv])
    return code, *capsys.readouterr()


def fails(capsys, *argv) -> str:
    """Run a command that must fail: exit code 2, one line, no traceback; returns the line."""
    code, out, err = run(capsys, *argv)
    lines = [line for line in err.splitlines() if "error:" in line]
    assert code == 2, err
    assert out == ""
    assert len(lines) == 1, err
    assert "Traceback" not in err
    assert lines[0].startswith("mlx-specstream: error: ")
    return lines[0]


@pytest.fixture
def broken(tmp_path) -> Path:
    """A copy of the bundled model to damage."""
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


def test_help_is_instant_and_complete():
    start = time.perf_counter()
    for argv in ([], *([name] for name in COMMANDS)):
        done = subprocess.run(
            [sys.executable, "-m", "mlx_specstream", *argv, "--help"],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0
        assert "usage: mlx-specstream" in done.stdout
    assert (time.perf_counter() - start) / (1 + len(COMMANDS)) < 2.0


def test_version_names_the_blas(capsys):
    code, out, _ = run(capsys, "--version")
    assert code == 0
    assert "mlx-lm " in out
    assert "BLAS: " in out


def test_no_command_prints_help_and_fails(capsys):
    code, out, _ = run(capsys)
    assert code == 2
    assert "generate" in out


@pytest.fixture
def inline(tmp_path) -> list:
    """The bundled streams, no longer told their root: these may run in the pass of their hosts."""
    description = json.loads((STREAMS / "streams.json").read_text())
    assert description["config"].pop("root_rank")
    weights = mx.load(str(STREAMS / "streams.safetensors"))
    kept = {name: w for name, w in weights.items() if not name.startswith("root.")}
    assert len(kept) < len(weights)
    (tmp_path / "rootless").mkdir()
    mx.save_safetensors(str(tmp_path / "rootless/streams.safetensors"), kept)
    (tmp_path / "rootless/streams.json").write_text(json.dumps(description))
    return ["--streams", tmp_path / "rootless", "--placement", "inline"]


def test_generate_gives_the_plain_text_in_fewer_passes(capsys, inline):
    code, plain, plain_err = run(capsys, "generate", *COMMON, "-p", PROMPT, "--no-streams")
    assert code == 0
    assert "1.00 tokens-per-pass" in plain_err
    fixed = ["--tree", "cartesian:2"], [*inline, "--tree", "best:7"]
    for more in ([], ["--copies", "--guard", "0.01", "--tree", "best:5"], *fixed):
        code, out, err = run(capsys, "generate", *COMMON, "-p", PROMPT, *more)
        assert code == 0
        assert out == plain
        rate = float(err.split(" tokens-per-pass")[0].split()[-1])
        assert rate > (1.5 if more else 1.0)  # the planner is careful until it knows the text


def test_generate_reads_stdin_and_seeds(capsys, monkeypatch, inline):
    texts = []
    for more in ([], ["--no-streams"], inline):
        monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT))
        argv = ["-p", "-", "--temp", "1.0", "--top-p", "0.9", "--seed", "5", "--quiet", *more]
        code, out, err = run(capsys, "generate", *COMMON, *argv)
        assert code == 0
        assert ("note: streams" in err) == (more != ["--no-streams"])  # 4 bits against float32
        texts.append(out)
    assert len(set(texts)) == 1


def test_adapter_path(capsys, tmp_path):
    model, _, _ = load_base(MODEL)
    linear_to_lora_layers(model, 3, {"rank": 2, "scale": 4.0, "dropout": 0.0})
    mx.random.seed(3)
    weights = {}
    for path, module in model.named_modules():
        if "lora_a" in module:
            weights[f"{path}.lora_a"] = module.lora_a
            weights[f"{path}.lora_b"] = 0.5 * mx.random.normal(module.lora_b.shape)
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), weights)
    parameters = {"rank": 2, "scale": 4.0, "dropout": 0.0}
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"fine_tune_type": "lora", "num_layers": 3, "lora_parameters": parameters})
    )
    argv = ["generate", *COMMON, "-p", PROMPT, "--quiet"]
    _, base, _ = run(capsys, *argv)
    code, tuned, _ = run(capsys, *argv, "--adapter-path", tmp_path)
    assert code == 0
    assert tuned != base
    assert run(capsys, *argv, "--adapter-path", tmp_path, "--no-streams")[1] == tuned


def test_chat_over_a_pipe(capsys, monkeypatch):
    lines = "name[Aromi]\n/help\n/stats\nfood[French]\n/reset\nname[Aromi]\n\n/exit\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    code, out, err = run(capsys, "chat", *COMMON, "-m", "12")
    assert code == 0
    monkeypatch.undo()
    _, alone, _ = run(capsys, "generate", *COMMON, "-p", "name[Aromi]", "-m", "12")
    assert out.startswith(alone)
    assert out.endswith(alone)  # /reset forgot what came between
    assert len(out) > 2 * len(alone)
    assert "conversation forgotten" in err
    assert err.count("per pass]") == 1  # /stats hid the others


def test_chat_keeps_the_conversation_in_step_with_its_cache(capsys, monkeypatch):
    """Every turn answers as a fresh model would answer the whole conversation."""
    from mlx_specstream.cli.chat import Conversation
    from mlx_specstream.generate import generate
    from mlx_specstream.load import load

    model, tokenizer = load(MODEL, streams=STREAMS)
    keywords = {"max_tokens": 9, "use_streams": True}
    chat = Conversation(model, tokenizer, None, keywords)
    for text in ("MR: name[Zizzi]\nText:", "MR: area[riverside]\nText:", "again"):
        messages = [*chat.messages, {"role": "user", "content": text}]
        tokens = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        fresh = generate(model, tokenizer, tokens, **keywords)
        assert "".join(r.text for r in chat.answer(text)) == fresh
    stopped = chat.answer("MR: name[Aromi]\nText:")
    said = next(stopped).text + next(stopped).text
    stopped.close()  # Ctrl-C
    assert chat.messages[-1] == {"role": "assistant", "content": said}
    messages = [*chat.messages, {"role": "user", "content": "more"}]
    tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    fresh = generate(model, tokenizer, tokens, **keywords)
    assert "".join(r.text for r in chat.answer("more")) == fresh


@pytest.mark.parametrize("use_streams", [True, False])
def test_chat_copies_without_streams(use_streams, monkeypatch):
    """From the whole conversation, and with a cache of ours where windows slide."""
    from mlx_specstream.cli.chat import Conversation

    module = import_module("mlx_specstream.generate")
    seen, real = [], module.make_copier

    def make_copier(seams, tokenizer, tokens):
        seen.append(tokens)
        return real(seams, tokenizer, tokens)

    monkeypatch.setattr(module, "make_copier", make_copier)
    tokenizer = make_tokenizer(chat=True)
    keywords = {"max_tokens": 5, "use_streams": use_streams, "copies": True}
    chat = Conversation(make_model("mistral"), tokenizer, None, keywords)
    plain = Conversation(make_model("mistral"), tokenizer, None, {**keywords, "copies": False})
    for text in ("a5 a6 a7 a8 a9 a10 a11", "a5 a6", "a7"):
        messages = [*chat.messages, {"role": "user", "content": text}]
        want = "".join(r.text for r in plain.answer(text))
        assert "".join(r.text for r in chat.answer(text)) == want
        assert seen[-1] == tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--model", "no/such/folder", "-p", "a"], "does not exist"),
        (["--model", ROOT / "docs", "-p", "a"], "has no config.json"),
        (["--model", MODEL, "-p", ""], "empty prompt"),
        (["--model", MODEL, "-p", "a", "-m", "0"], "got 0"),
        (["--model", MODEL, "-p", "a", "-m", "-2"], "got -2"),
        (["--model", MODEL, "-p", "a", "--temp", "-1"], "[temp] must be >= 0"),
        (["--model", MODEL, "-p", "a", "--tree", "best:4"], "[tree] needs streams"),
        (["--model", MODEL, "-p", "a", "--streams", ROOT / "docs"], "streams.json"),
        ([*COMMON, "-p", "a", "--tree", "bush:3"], "got 'bush:3'"),
        ([*COMMON, "-p", "a", "--tree", "best:\u00b2"], "got 'best:\u00b2'"),
        ([*COMMON, "-p", "\udcff", "--ignore-chat-template"], "valid Unicode"),
        ([*COMMON, "-p", "\udcff"], "chat template"),
        (["--model", MODEL, "-p", "a", "--num-draft-tokens", "2"], "needs --draft-model"),
        ([*COMMON, "-p", "a", "--prune-keep", "3"], "no early-exit head"),
        ([*COMMON, "-p", "a", "--kv-bits", "8"], "use_streams=False"),
        ([*COMMON, "-p", "a", "--max-kv-size", "64"], "use_streams=False"),
        ([*COMMON, "-p", "a", "--draft-model", MODEL], "[draft_model]"),
        ([*COMMON, "-p", "a", "--adapter-path", ROOT / "docs"], "adapter_config.json"),
    ],
)
def test_generate_refuses(capsys, argv, words):
    assert words in fails(capsys, "generate", *argv)


def test_damaged_models(capsys, broken):
    argv = ["generate", "--model", broken, "-p", "a"]
    weights = broken / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert str(broken) in fails(capsys, *argv)
    weights.write_bytes(b"\xff" * 64)
    assert str(broken) in fails(capsys, *argv)
    weights.unlink()
    assert "model*.safetensors" in fails(capsys, *argv)
    weights.write_bytes(whole)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "model_type": "nosuch"}))
    assert "nosuch" in fails(capsys, *argv)
    (broken / "config.json").write_text(json.dumps({**config, "model_file": "evil.py"}))
    assert "evil.py" in fails(capsys, *argv)
    (broken / "config.json").write_text("{")
    assert "config.json" in fails(capsys, *argv)
    (broken / "config.json").write_text(json.dumps(config))
    (broken / "tokenizer.json").write_text("{}")
    assert "tokenizer" in fails(capsys, *argv)


def test_streams_of_another_base(capsys, broken):
    weights = mx.load(str(broken / "model.safetensors"))
    mx.random.seed(11)
    shuffled = {
        k: v if v.dtype == mx.uint32 else mx.random.permutation(v.flatten()).reshape(v.shape)
        for k, v in weights.items()
    }
    mx.eval(shuffled)
    mx.save_safetensors(str(broken / "model.safetensors"), shuffled)
    argv = ["generate", "--model", broken, "--streams", STREAMS, "-p", PROMPT, "-m", "5"]
    assert "another base" in fails(capsys, *argv)
    code, forced, _ = run(capsys, *argv, "--force")
    assert code == 0
    assert forced == run(capsys, *argv, "--force", "--no-streams")[1]


def write_rows(path: Path, rows: list, opener=open) -> None:
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


ROWS = [
    {"prompt": f"MR: name[{name}]\nText:", "completion": f"{name} is a restaurant in the city."}
    for name in ("Aromi", "Zizzi", "Fitzbillies", "Cocum", "Giraffe")
]


def test_train_then_generate_then_resume(capsys, tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    write_rows(data / "train.jsonl.gz", ROWS, gzip.open)
    argv = ["train", "--model", MODEL, "--data", data, "--streams", out, "--num-streams", "3"]
    argv += ["--msa-layers", "1", "--lora-rank", "4", "--batch-size", "2", "--iters", "5"]
    code, _, err = run(capsys, *argv)
    assert code == 0
    assert "5 steps" in err
    assert "validation per stream" in err
    assert sorted(p.name for p in out.iterdir()) == [
        "streams.json", "streams.safetensors", "train.json", "train.svg",
    ]  # fmt: skip
    description = read_description(out)
    assert (description["config"].num_streams, description["config"].msa_layers) == (3, 1)
    assert description["training"]["steps"] == 5
    argv_generate = ["generate", "--model", MODEL, "-p", PROMPT, "--quiet"]
    plain = run(capsys, *argv_generate)[1]
    assert run(capsys, *argv_generate, "--streams", out)[1] == plain
    assert "nothing to resume" in fails_train(capsys, *argv, "--resume")


def fails_train(capsys, *argv) -> str:
    code, _, err = run(capsys, *argv)
    assert code == 2
    return next(line for line in err.splitlines() if "error:" in line)


def test_train_refuses_bad_data(capsys, tmp_path):
    argv = ["train", "--model", MODEL, "--data", tmp_path, "--streams", tmp_path / "out"]
    assert "train.jsonl" in fails_train(capsys, *argv)
    write_rows(tmp_path / "train.jsonl", ROWS[:2])
    with open(tmp_path / "train.jsonl", "a") as file:
        file.write('{"prompt": "a", \n')
    assert "train.jsonl:3" in fails_train(capsys, *argv)
    write_rows(tmp_path / "train.jsonl", [*ROWS, {"question": "a"}])
    assert "train.jsonl:6" in fails_train(capsys, *argv)
    (tmp_path / "train.jsonl").write_bytes(b'{"text": "\xff\xfe"}\n')
    assert "train.jsonl:1" in fails_train(capsys, *argv)
    write_rows(tmp_path / "train.jsonl", ROWS)
    assert "msa_layers" in fails_train(capsys, *argv, "--msa-layers", "9")
    assert "num_streams" in fails_train(capsys, *argv, "--num-streams", "0")
    assert "learning_rate" in fails_train(capsys, *argv, "--learning-rate", "0")
    assert not (tmp_path / "out").exists()


class Evil:
    def __reduce__(self):
        import os

        return os.system, ("touch canary",)


def test_convert_never_runs_a_pickle(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "hf"
    source.mkdir()
    shutil.copy(MODEL / "tokenizer.json", source)
    config = json.loads((MODEL / "config.json").read_text())
    config.pop("quantization")
    config.pop("quantization_config")
    (source / "config.json").write_text(json.dumps(config))
    with zipfile.ZipFile(source / "pytorch_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"x": Evil()}, protocol=2))
    line = fails_convert(capsys, "convert", "--hf-path", source, "--mlx-path", tmp_path / "out")
    assert "system" in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]  # no canary, no output, no litter


def fails_convert(capsys, *argv) -> str:
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    return next(line for line in err.splitlines() if "error:" in line)


def test_convert_on_a_full_disk_damages_nothing(capsys, tmp_path, monkeypatch):
    import errno

    from mlx_specstream.converters import shards

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards, "write_safetensors", full)
    argv = ["convert", "--hf-path", MODEL, "-d", "--mlx-path", tmp_path / "out"]
    assert "disk is full" in fails_convert(capsys, *argv)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", [("--q-bits", "4"), ("--q-mode", "mxfp4")])
def test_convert_ignores_no_option(capsys, tmp_path, option):
    argv = ["convert", "--hf-path", MODEL, "--mlx-path", tmp_path / "out", *option]
    assert "needs -q" in fails_convert(capsys, *argv)


def test_chat_says_at_once_what_cannot_be(capsys):
    assert "got 0" in fails(capsys, "chat", *COMMON, "-m", "0")
    assert "got 'bush:3'" in fails(capsys, "chat", *COMMON, "--tree", "bush:3")
    assert "no early-exit head" in fails(capsys, "chat", *COMMON, "--prune-keep", "3")


def test_no_streams_does_not_even_look(capsys, broken):
    (broken / "streams").mkdir()
    (broken / "streams/streams.json").write_text("{")
    argv = ["generate", "--model", broken, "-p", PROMPT, "-m", "4"]
    assert "streams" in fails(capsys, *argv)
    assert run(capsys, *argv, "--no-streams")[0] == 0


def test_convert_makes_a_folder_that_mlx_lm_loads(capsys, tmp_path):
    import mlx_lm

    out = tmp_path / "fp32"
    argv = ["convert", "--hf-path", MODEL, "--mlx-path", out, "-d", "--dtype", "float32"]
    code, printed, _ = run(capsys, *argv)
    assert code == 0
    assert printed.strip() == str(out)
    model, tokenizer = mlx_lm.load(str(out))
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == mx.float32
    text = mlx_lm.generate(model, tokenizer, "<s>" + PROMPT, max_tokens=12)
    argv = ["generate", "--model", out, "--streams", STREAMS, "-p", PROMPT, "-m", "12"]
    assert run(capsys, *argv)[1].rstrip("\n") == text
    assert "already exists" in fails_convert(
        capsys, "convert", "--hf-path", MODEL, "--mlx-path", out
    )
