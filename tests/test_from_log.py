"""Learning from use: the log of answers, streams that go on learning from it, and the way back."""

import json
import os
import stat

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import stream_generate
from test_train_command import base, command, data, record, run  # noqa: F401
from tiny_models import make_model, make_tokenizer

from mlx_specstream.cli.chat import Conversation
from mlx_specstream.errors import BadArgument, BadData
from mlx_specstream.model.checkpoint import load_streams, read_description
from mlx_specstream.train import log as log_of
from mlx_specstream.train.identity import identity
from mlx_specstream.train.log import LEAST, AnswerLog, read_log

PROMPTS = [[5 + n % 23, 9 + n // 23, 17] for n in range(40)]


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def add_answers(path, model, tokenizer, prompts=PROMPTS):
    log = AnswerLog(path, identity(model))
    for prompt in prompts:
        log.add(prompt, [r.token for r in stream_generate(model, tokenizer, prompt, max_tokens=9)])
    return path


@pytest.fixture(scope="module")
def used(tmp_path_factory):
    """The log of a model that has answered ``PROMPTS``."""
    return add_answers(tmp_path_factory.mktemp("log") / "log", make_model(), make_tokenizer())


# --- the log ---


def test_generate_keeps_nothing_unless_asked(base, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    argv = ["generate", "--model", base, "-p", "a5 a6 a7", "-m", "4", "--quiet"]
    assert run(capsys, *argv)[0] == 0
    assert list(tmp_path.iterdir()) == []
    assert run(capsys, *argv, "--log", tmp_path / "log")[0] == 0
    assert run(capsys, *argv, "--log", tmp_path / "log")[0] == 0
    head, *found = rows(tmp_path / "log")
    assert head == {"kind": "mlx-specstream answers", "version": 1}
    model, tokenizer = make_model(), make_tokenizer()
    want = [r.token for r in stream_generate(model, tokenizer, [5, 6, 7], max_tokens=4)]
    row = {"model": identity(model), "prompt": [5, 6, 7], "answer": want}
    assert found == [row, row]
    assert stat.S_IMODE(os.stat(tmp_path / "log").st_mode) == 0o600


def test_chat_keeps_whole_conversations(tmp_path):
    model, tokenizer = make_model(), make_tokenizer(chat=True)
    log = AnswerLog(tmp_path / "log", "me")
    keywords = {"max_tokens": 5, "use_streams": True}
    talk = Conversation(model, tokenizer, None, keywords, log)
    first = [r.token for r in talk.answer("a5 a6")]
    answers = talk.answer("a7")
    second = [next(answers).token, next(answers).token]
    answers.close()  # interrupted: what was said counts
    one, two = rows(tmp_path / "log")[1:]
    assert (one["prompt"], one["answer"]) == ([3, 5, 6, 4], first)
    assert two["answer"] == second
    assert two["prompt"][:4] == [3, 5, 6, 4]
    assert two["prompt"][-3:] == [3, 7, 4]


def test_a_log_is_private_and_never_grows_beyond_its_limit(tmp_path, monkeypatch):
    path = tmp_path / "log"
    path.touch(mode=0o644)
    monkeypatch.setattr(log_of, "LIMIT", 2000)
    log = AnswerLog(path, "me")
    for n in range(200):
        log.add([n, n + 1], [n] * (1 + n % 5))
        assert path.stat().st_size <= 2000
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert rows(path)[-1] == {"model": "me", "prompt": [n, n + 1], "answer": [n] * (1 + n % 5)}
    head, *found = rows(path)
    assert head["kind"] == "mlx-specstream answers"
    assert [row["prompt"][0] for row in found] == list(range(200 - len(found), 200))
    assert len(found) > 10
    log.add([1], [2] * 5000)  # larger than the log may be
    log.add([1], [])
    assert rows(path)[1:] == found
    assert [p.name for p in tmp_path.iterdir()] == ["log"]


def test_half_a_line_costs_that_line_alone(tmp_path):
    path = tmp_path / "log"
    AnswerLog(path, "me").add([1], [2])
    with open(path, "a") as file:
        file.write('{"model": "me", "pro')
    AnswerLog(path, "me").add([3], [4])
    lines = path.read_text().splitlines()
    assert len(lines) == 4
    assert json.loads(lines[3])["prompt"] == [3]
    with pytest.raises(BadData, match="0 different answers"):  # of two tokens or more
        read_log(path, "me", 99)


@pytest.mark.parametrize("content", [b"my notes\n", b'{"kind": "other", "version": 1}\n', b"[1]\n"])
def test_other_files_are_left_alone(tmp_path, content):
    path = tmp_path / "notes"
    path.write_bytes(content)
    with pytest.raises(BadArgument, match="is no log of answers"):
        AnswerLog(path, "me")
    assert path.read_bytes() == content
    with pytest.raises(BadData, match="is no log of answers"):
        read_log(path, "me", 99)
    with pytest.raises(OSError, match="directory"):
        AnswerLog(tmp_path, "me")


def test_what_is_read_of_a_log(used):
    model = make_model()
    found = read_log(used, identity(model), 99)
    everything = [*found.train, *found.valid]
    prompts = [tuple(e.tokens[: e.start]) for e in everything]
    learned = [row["prompt"] for row in rows(used)[1:] if len(row["answer"]) > 1]
    assert sorted(prompts) == sorted(map(tuple, learned))
    assert len(found.valid) == -(-len(learned) // 10)
    assert not {*prompts[: len(found.train)]} & {*prompts[len(found.train) :]}
    assert found.reports[0].rows == len(PROMPTS)
    with pytest.raises(BadData, match=r"0 different answers of this model \(40 of others\)"):
        read_log(used, "another", 99)
    with pytest.raises(BadData, match="missing"):
        read_log(used.with_name("none"), "another", 99)


def test_adapters_make_another_model():
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model = make_model()
    names = [identity(model)]
    linear_to_lora_layers(model, 2, {"rank": 2, "scale": 2.0, "dropout": 0.0})
    names.append(identity(model))
    for layer in model.layers[-2:]:
        layer.self_attn.q_proj.lora_b = mx.ones_like(layer.self_attn.q_proj.lora_b)
    names.append(identity(model))
    assert len(set(names)) == 3
    assert identity(make_model()) == names[0] != identity(make_model(seed=2))


# --- learning from it ---


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def test_streams_learn_from_the_log_and_back(base, data, used, tmp_path, capsys):  # noqa: F811
    streams, answers = tmp_path / "streams", used
    assert run(capsys, *command(base, data, streams, "--iters", "4", "--eval-every", "4"))[0] == 0
    before = files(streams)
    argv = ["train", "--model", base, "--streams", streams]
    learn = [*argv, "--from-log", answers, "--no-rehearsal", "--learning-rate", "0.01"]
    code, err = run(capsys, *learn, "--iters", "40", "--hosts", "4")
    assert code == 0, err
    assert "--undo takes them back" in err
    assert sorted(p.name for p in streams.iterdir()) == [
        "previous", "streams.json", "streams.safetensors", "train.json", "train.svg",
    ]  # fmt: skip
    after = files(streams)
    assert read_description(streams)["config"] == read_description(streams / "previous")["config"]
    about = record(streams)
    losses = {h["iteration"]: np.mean(h["loss"]) for h in about["history"]}
    assert losses[about["taken"]] == min(losses.values()) < 0.97 * losses[0]
    assert read_description(streams)["training"]["began_from"]["steps"] == 4
    assert load_streams(streams, make_model())[1] is None
    code, err = run(capsys, *argv, "--undo")
    assert (code, "as before" in err) == (0, True)
    for name in ("streams.json", "streams.safetensors", "train.json", "train.svg"):
        assert files(streams)[name] == before[name] != after[name], name
    assert not (streams / "previous").exists()
    code, err = run(capsys, *argv, "--undo")
    assert code == 2
    assert "no run from a log to take back" in err


def test_nothing_changes_unless_held_out_answers_are_guessed_better(
    base, data, used, tmp_path, capsys  # noqa: F811
):  # fmt: skip
    streams = tmp_path / "streams"
    assert run(capsys, *command(base, data, streams, "--iters", "4", "--eval-every", "4"))[0] == 0
    before = files(streams)
    argv = ["train", "--model", base, "--streams", streams, "--from-log", used, "--no-rehearsal"]
    code, err = run(capsys, *argv, "--learning-rate", "1e-9", "--iters", "16")
    assert code == 0, err
    assert "were not guessed better; as before" in err
    assert files(streams) == before
    assert {p.name for p in streams.iterdir()} == set(before)


def test_what_cannot_be_learned_from(base, data, used, tmp_path, capsys):  # noqa: F811
    streams = tmp_path / "streams"
    argv = ["train", "--model", base, "--from-log", used]
    for more, says in (
        ([], "has no streams in it"),
        (["--streams", streams], "streams.json is missing"),
        (["--streams", streams, "--mode", "shared"], "would change the model"),
        (["--streams", streams, "--data", data], "[data] has no place beside --from-log"),
    ):
        code, err = run(capsys, *argv, *more)
        assert code == 2, more
        assert says in err, err
    model = make_model()
    few = add_answers(tmp_path / "few", model, make_tokenizer(), PROMPTS[: LEAST - 1])
    argv = [*command(base, data, streams, "--iters", "1"), "--root-rank", "0"]
    assert run(capsys, *argv)[0] == 0
    argv = ["train", "--model", base, "--from-log", used, "--streams", streams]
    code, err = run(capsys, *argv, "--root-rank", "5")
    assert code == 2
    assert "[root_rank] must stay 0 with --from-log, got 5" in err
    code, err = run(capsys, "train", "--model", base, "--streams", streams, "--from-log", few)
    assert code == 2
    assert f"{LEAST} to several prompts are needed" in err
    description = json.loads((streams / "streams.json").read_text())
    description["config"]["main_sees_streams"] = True
    (streams / "streams.json").write_text(json.dumps(description))
    code, err = run(capsys, *argv)
    assert code == 2
    assert "would change what it says" in err


def test_undo_never_loses_later_streams(base, data, used, tmp_path, capsys):  # noqa: F811
    streams = tmp_path / "streams"
    argv = ["train", "--model", base, "--streams", streams]
    begin = command(base, data, streams, "--iters", "4", "--eval-every", "4")
    assert run(capsys, *begin)[0] == 0
    learn = [*argv, "--from-log", used, "--no-rehearsal", "--iters", "40", "--hosts", "4"]
    assert run(capsys, *learn)[0] == 0
    adopted = files(streams)
    assert run(capsys, *begin)[0] == 0  # a later run, into the same folder
    later = files(streams)
    code, err = run(capsys, *argv, "--undo")
    assert (code, files(streams)) == (2, later)
    assert "are not those that the last --from-log made" in err
    for name, content in adopted.items():
        (streams / name).write_bytes(content)
    assert run(capsys, *argv, "--undo")[0] == 0
