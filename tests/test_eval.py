"""eval: whole commands on small models, the sums in their results, the metrics, the refusals."""

import gzip
import json
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.utils import save_config, save_model
from reference import assert_close
from tiny_models import COMMON, attached, make_model, make_streams, make_tokenizer

from mlx_specstream.cli.main import main
from mlx_specstream.config import StreamConfig
from mlx_specstream.errors import BadData
from mlx_specstream.measure import evaluate, quality
from mlx_specstream.measure.bench import Mode
from mlx_specstream.measure.eval_tables import every_table
from mlx_specstream.measure.evaluate import Evaluation, accuracy, make_ways
from mlx_specstream.measure.prompts import OWN, Prompt
from mlx_specstream.measure.questions import Question, data_file, read_questions
from mlx_specstream.measure.simulate import replay
from mlx_specstream.model.checkpoint import fingerprint, save_streams
from mlx_specstream.train.data import Example

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "examples/models/e2e-sql-14m-4bit"
STREAMS = ROOT / "examples/streams/e2e-sql-14m"
TOKENS = 11
PROMPTS = ["a5 a6 a7", "a9 a14 a33 a20", "a60 a8", "a44 a11 a12 a13 a14", "a30 a31 a32"]


def write(path: Path, rows: list) -> Path:
    path.parent.mkdir(exist_ok=True)
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.writelines(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny random model as a folder, its streams beside it."""
    out = tmp_path_factory.mktemp("eval") / "tiny-model"
    out.mkdir()
    model = make_model("llama", num_hidden_layers=4)
    save_model(out, model)
    save_config(
        {**COMMON, "num_hidden_layers": 4, "model_type": "llama", "tie_word_embeddings": False},
        out / "config.json",
    )
    make_tokenizer()._tokenizer.save_pretrained(out)
    config = StreamConfig(num_streams=3, msa_layers=2, lora_rank=6, lora_alpha=9.0)
    save_streams(out.parent / "streams", make_streams(model, config), fingerprint(model), {})
    return out


@pytest.fixture(scope="module")
def said(folder) -> dict[str, list[int]]:
    """What mlx-lm answers to each prompt, an end of sequence left out."""
    model, tokenizer = mlx_lm.load(str(folder))
    return {
        prompt: [
            r.token
            for r in mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=TOKENS)
            if r.token != 0
        ]
        for prompt in PROMPTS
    }


@pytest.fixture(scope="module")
def data(folder, said, tmp_path_factory) -> Path:
    """Two of the five prompts have the model's own answer among their references."""
    right = ["".join(f"a{t}" for t in said[prompt]) for prompt in PROMPTS[:2]]
    rows = [
        {"prompt": PROMPTS[0], "completion": " a3 a4 a9"},
        {"prompt": PROMPTS[1], "completion": f"  {right[1]} "},
        {"prompt": PROMPTS[2], "completion": " "},
        {"prompt": PROMPTS[2], "completion": "a20 a21 a20 a21 a22"},
        {"prompt": PROMPTS[3], "completion": "a3 a4"},
        {"prompt": PROMPTS[0], "completion": right[0]},
        {"prompt": PROMPTS[4], "completion": "a7 a9"},
        {"prompt": PROMPTS[4], "completion": "a7 a9"},
    ]
    out = tmp_path_factory.mktemp("data")
    write(out / "valid.jsonl.gz", rows)
    return out


def run(folder, data, *more, streams=True) -> int:
    argv = ["eval", "--model", folder, "--data", data, "-m", TOKENS]
    argv += ["--streams", folder.parent / "streams"] if streams else []
    return main([str(a) for a in [*argv, *more]])


def results_of(folder, data, tmp_path, *more, **how) -> dict:
    assert run(folder, data, "--json", tmp_path / "r.json", *more, **how) == 0
    return json.loads((tmp_path / "r.json").read_text())


def test_a_data_file_with_and_without_streams(capsys, folder, data, said, tmp_path):
    trees = ["--tree", "planned", "--tree", "best:6", "--tree", "chain", "--tree", "best:6"]
    results = results_of(folder, data, tmp_path, *trees, "--limit", "-1")
    ways = ["plain", "planned", "best:6", "chain"]
    assert [m["key"] for m in results["modes"]] == ways
    assert [p["number"] for p in results["prompts"]] == [0, 1, 3, 4, 6]  # lines, counted from 0
    assert [p["references"] for p in results["prompts"]] == [2, 1, 1, 1, 1]
    lengths = [len(said[p]) + (len(said[p]) < TOKENS) for p in PROMPTS]  # an end besides
    assert len(results["runs"]) == len(ways) * len(PROMPTS)
    for row in results["runs"]:
        assert row["tokens"] == lengths[row["prompt"]]
        assert 0 < row["first_s"] < row["seconds"]
        if row["mode"] != "plain":
            assert (
                row["passes"]
                == len(row["accepted"])
                == lengths[row["prompt"]] - 1 - sum(row["accepted"])
            )
    figures = results["summary"][OWN]
    assert figures["plain"]["tokens_per_pass"] == 1.0
    for way in ways:
        passes = sum(r["passes"] for r in results["runs"] if r["mode"] == way)
        assert figures[way]["tokens_per_pass"] == pytest.approx(
            sum(n - 1 for n in lengths) / passes
        )
        assert (figures[way]["identical"], figures[way]["of"]) == (5, 5)
        assert results["quality"][way] == {"exact": pytest.approx(40.0)}
        assert results["answers"][way] == results["answers"]["plain"]
    for tree in ("best:6", "chain"):  # what was decoded is what is replayed
        replayed = results["replayed"][tree]
        assert replayed["tokens_per_pass"] == pytest.approx(figures[tree]["tokens_per_pass"])
        assert replayed["nodes_per_pass"] == pytest.approx(figures[tree]["nodes_per_pass"])
        deepest = len(figures[tree]["acceptance"])
        assert replayed["acceptance"][:deepest] == pytest.approx(figures[tree]["acceptance"])
    assert set(results["replayed"]) == {"chain", "best:6", "best:8", "best:16", "best:32"}
    assert results["accuracy"]["data"]["positions"] > 0
    assert results["accuracy"]["own answers"]["positions"] == sum(n - 1 for n in lengths)
    text = (tmp_path / "r.json").read_text()
    assert not any(prompt in text for prompt in [*PROMPTS, "a20 a21", "a3 a4", str(tmp_path)])
    out = capsys.readouterr().out
    assert "left out, as prompt or answer is empty: 1 rows" in out
    assert "rows with one prompt were merged: 6 references" in out
    for title in ("Accuracy of the streams", "5 prompts, decoded", "Acceptance", "replayed"):
        assert title in out
    assert "differs" not in out
    assert [line.split()[-1] for line in out.splitlines() if "5/5" in line] == ["40.0"] * 4


def test_a_sample_depends_on_the_seed_alone(folder, data, tmp_path):
    def chosen(*more):
        results = results_of(folder, data, tmp_path, "--limit", "2", "--no-streams", *more)
        return {
            p["number"]: results["answers"]["plain"][n] for n, p in enumerate(results["prompts"])
        }

    samples = [chosen("--seed", seed, "--temp", "0.8") for seed in (1, 1, 2, 3, 4)]
    assert samples[0] == samples[1]
    assert len({tuple(s) for s in samples}) > 1
    assert all(len(s) == 2 and list(s) == sorted(s) for s in samples)


def test_at_a_temperature_every_way_says_the_same(folder, data, tmp_path):
    more = ["--temp", "0.9", "--tree", "best:5", "--copies", "--metrics"]
    results = results_of(folder, data, tmp_path, *more)
    assert [m["key"] for m in results["modes"]] == ["plain", "best:5 + copies"]
    assert results["differences"] == []
    assert results["quality"] == {"plain": {}, "best:5 + copies": {}}
    assert results["replayed"] == {}
    other = results_of(folder, data, tmp_path, *more, "--seed", "5")
    assert other["answers"]["plain"] != results["answers"]["plain"]


def test_each_prompt_has_draws_of_its_own_and_all_ways_the_same(monkeypatch):
    given = []
    monkeypatch.setattr(evaluate, "stream_generate", lambda *a, **how: given.append(how) or [])
    keywords = {"seed": 7, "copies": None, "use_streams": True, "prune": None, "tree": None}
    ways = make_ways(None, None, keywords, [None, "best:4"], streams=True)
    for prompt in ([5, 6], [5, 7]):
        for way in ways:
            way.answer(prompt, None)
    seeds = [how["seed"] for how in given]
    assert seeds[0] == seeds[1] == seeds[2] != seeds[3] == seeds[4] == seeds[5]
    assert [how["tree"] for how in given[:3]] == [None, None, "best:4"]
    assert [how["use_streams"] for how in given[:3]] == [False, True, True]
    assert [how["copies"] for how in given[:3]] == [False, None, None]


def test_rows_beyond_the_models_context_are_counted(capsys, folder, data, monkeypatch):
    monkeypatch.setattr("mlx_specstream.cli.options.context_of", lambda model: 8)
    assert run(folder, data) == 0
    assert "of 5 rows are longer than the 8 tokens that the model reads" in capsys.readouterr().out


def test_streams_that_the_main_stream_sees(folder, data, tmp_path):
    config = StreamConfig(num_streams=2, msa_layers=1, lora_rank=4, main_sees_streams=True)
    model, _ = mlx_lm.load(str(folder))
    save_streams(tmp_path / "planned", make_streams(model, config), fingerprint(model), {})
    more = ["--streams", tmp_path / "planned", "--tree", "best:4"]
    results = results_of(folder, data, tmp_path, *more, streams=False)
    assert set(results["accuracy"]) == {"data", "own answers"}
    assert len(results["accuracy"]["data"]["top1"]) == 2
    assert results["replayed"] == {}  # guesses depend on the tree
    assert results["summary"][OWN]["best:4"]["of"] == 5


@pytest.mark.parametrize("copies", [False, True])
def test_without_streams(capsys, folder, data, tmp_path, copies):
    more = ["--copies"] if copies else []
    results = results_of(folder, data, tmp_path, *more, streams=False)
    assert [m["key"] for m in results["modes"]] == ["plain", *(["copies"] if copies else [])]
    assert results["quality"]["plain"] == {"exact": pytest.approx(40.0)}
    assert results["accuracy"] == results["replayed"] == {}
    assert results["differences"] == []
    out = capsys.readouterr().out
    assert "no streams" in out
    assert ("Acceptance by depth" in out) == copies


def test_texts_and_chats(folder, data, tmp_path):
    texts = write(tmp_path / "texts.jsonl", [{"text": "a5 a6 a7 a8 a9"}, {"text": "a5"}, "\n"])
    results = results_of(folder, texts, tmp_path, "--no-streams")
    assert [(p["tokens"], p["references"]) for p in results["prompts"]] == [(3, 0), (1, 0)]
    assert results["metrics"] == []
    tokenizer = make_tokenizer(chat=True)
    asked = [{"role": "user", "content": "a5 a6"}]
    parts = [{"type": "text", "text": "a9 "}, {"type": "text", "text": "a10"}]
    rows = [
        {"messages": [*asked, {"role": "assistant", "content": "a7 a8"}]},
        {"messages": [{"role": "user", "content": "a20"}, {"role": "assistant", "content": ""}]},
        {"messages": [*asked, {"role": "assistant", "content": parts}]},
        {"prompt": "a5", "completion": "a7"},
    ]
    path = write(tmp_path / "chat.jsonl", rows)
    questions, notes = read_questions(path, tokenizer, limit=9, seed=0, form="a33 {}")
    assert [q.prompt.tokens for q in questions] == [[3, 5, 6, 4], [3, 33, 5, 4]]
    assert [q.references for q in questions] == [["a7 a8", "a9 a10"], ["a7"]]
    assert questions[0].example.tokens == [3, 5, 6, 4, 7, 8, 0]
    assert notes[0].endswith("empty: 1 rows")


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--limit", "0"], "[limit] must be >= 1, or -1 for all prompts; got 0"),
        (["--metrics", "meteor"], "[metrics] must be of exact, bleu, rouge; got 'meteor'"),
        (["--split", "test"], "has no test.jsonl or test.jsonl.gz; choose another --split: valid"),
        (["--data", "{tmp}"], "has no valid.jsonl or valid.jsonl.gz; add one"),
        (["--data", "{tmp}/none.jsonl"], "is neither a file nor a folder"),
        (["--data", "{tmp}/d/empty.jsonl"], "has no row with a prompt and an answer"),
        (["--data", "{tmp}/d/broken.jsonl"], "broken.jsonl:2: not a row of JSON"),
        (["--data", "{tmp}/d/wrong.jsonl"], "wrong.jsonl:1: a row must have"),
        (["--data", "{tmp}/d/number.jsonl"], "number.jsonl:1: a row must have"),
        (["--data", "{tmp}/d/chat.jsonl"], "chat.jsonl:1: a row must have"),
        (["--data", "{tmp}/d/text.jsonl", "--metrics", "exact"], "[metrics] need answers"),
        (["--prompt-form", "Q:"], "[prompt_form] must hold {}, where the prompt goes; got 'Q:'"),
        (["--tree", "bush:3"], "bush:3"),
        (["--tree", "best:4", "--no-streams"], "[tree] needs streams"),
        (["--tree", "cartesian:30"], "error: [tree] 'cartesian:30' has"),
        (["--prune-keep", "3"], "no early-exit head"),
        (["--json", "{tmp}"], "cannot be written"),
        (["--temp", "-1"], "[temp] must be >= 0"),
    ],
)
def test_bad_input_is_one_line(capsys, folder, data, tmp_path, more, line):
    write(tmp_path / "d/empty.jsonl", [{"prompt": "a5", "completion": "\n"}, {"text": ""}])
    write(tmp_path / "d/broken.jsonl", [{"text": "a5 a6"}, "{\n"])
    write(tmp_path / "d/wrong.jsonl", [{"prompt": "a5"}])
    write(tmp_path / "d/number.jsonl", [{"prompt": 5, "completion": "a5"}])
    asked = {"role": "user", "content": "a5"}
    write(tmp_path / "d/chat.jsonl", [{"messages": [asked, {**asked, "role": "assistant"}]}])
    write(tmp_path / "d/text.jsonl", [{"text": "a5 a6 a7"}])
    more = [m.replace("{tmp}", str(tmp_path)) for m in more]
    assert run(folder, data, *more) == 2
    out, err = capsys.readouterr()
    (said,) = [x for x in err.splitlines() if "error:" in x]
    assert line in said
    assert "Traceback" not in err
    assert out == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d"]


def test_ctrl_c_shows_what_is_done(capsys, folder, data, tmp_path, monkeypatch):
    calls, decode = [], evaluate.decode

    def stopped(*args):
        calls.append(args)
        if len(calls) == 2 * (evaluate.WARM_UP + 2) + 2:  # the third prompt, its second way
            raise KeyboardInterrupt
        return decode(*args)

    monkeypatch.setattr(evaluate, "decode", stopped)
    (tmp_path / "r.json").write_text("before")
    assert run(folder, data, "--json", tmp_path / "r.json") == 130
    out, err = capsys.readouterr()
    assert "interrupted after 2 of 5 prompts" in out
    assert "2 prompts, decoded" in out
    assert "2/2" in out
    assert "100.0" in out  # exact: the two that the data has
    assert "data: first guess" in out
    assert "interrupted" in err
    assert (tmp_path / "r.json").read_text() == "before"
    calls.clear()
    assert run(folder, data, "--json", tmp_path / "new.json") == 130
    results = json.loads((tmp_path / "new.json").read_text())  # nothing was there to keep
    assert len(results["prompts"]) == 2
    assert "interrupted after 2 of 5 prompts" in results["notes"]
    calls.clear()
    capsys.readouterr()
    monkeypatch.setattr(evaluate, "WARM_UP", -1)  # stopped in the first prompt
    assert run(folder, data) == 130
    assert capsys.readouterr().out == ""


def test_the_bundled_streams_on_prose(capsys, tmp_path):
    """A form around the prompts, several references, metrics of libraries, passes worth having."""
    model = tmp_path / "model"  # on a CPU 4 bits are slow
    mlx_lm.convert(str(MODEL), str(model), dequantize=True, dtype="float32")
    names = ("Aromi", "Zizzi")
    rows = [
        {"prompt": f"name[{name}], food[{food}], area[riverside]", "completion": text}
        for name, food in zip(names, ("Italian", "French"), strict=True)
        for text in (
            f"{name} is a restaurant by the river that serves {food} food.",
            f"By the river there is {name}, with {food} food!",
        )
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    argv = ["eval", "--model", model, "--streams", STREAMS, "--data", path, "-m", 32]
    argv += ["--prompt-form", "MR: {}\\nText:", "--tree", "best:8", "--json", tmp_path / "r.json"]
    assert main([str(a) for a in argv]) == 0
    results = json.loads((tmp_path / "r.json").read_text())
    figures = results["summary"][OWN]
    assert figures["best:8"]["identical"] == 2
    assert figures["best:8"]["tokens_per_pass"] > 1.4
    for found in results["accuracy"].values():
        assert 0.3 < found["top1"][0] < found["topk"][0] <= 1
    replayed = results["replayed"]["best:8"]["tokens_per_pass"]
    assert replayed == pytest.approx(figures["best:8"]["tokens_per_pass"])
    trees = [results["replayed"][f"best:{n}"]["tokens_per_pass"] for n in (8, 16, 32)]
    assert trees == sorted(trees)
    assert [p["references"] for p in results["prompts"]] == [2, 2]
    out = capsys.readouterr().out
    for metric, name in (("bleu", "bleu"), ("rouge", "rougeL")):
        if quality.is_missing(metric):
            assert f"left out: {metric} needs" in out
        else:
            assert 5 < results["quality"]["plain"][name] == results["quality"]["best:8"][name]


# --- parts ---


@pytest.mark.parametrize("held", [1 << 25, 3 * 67 * 2])  # all hosts at once, two at a time
def test_accuracy_is_that_of_the_logits(monkeypatch, held):
    monkeypatch.setattr(evaluate, "LOGITS", held)
    seams = attached()
    examples = [
        Example([3, 8, 21, 40, 7, 7, 12, 9, 2, 0], 3),
        Example([5, 6, 5, 6, 5, 6, 5, 6, 5, 0], 0),
        Example([9, 14, 0], 2),  # no stream has anything to predict
    ]
    found, hits, asked = accuracy(seams, examples), np.zeros((2, 3)), np.zeros(3)
    for example in examples:
        _, logits = seams.model(mx.array([example.tokens]), streams=True)
        order = np.argsort(-np.array(logits)[0], axis=-1)  # [g, L, V]
        for j in range(3):
            for row in range(max(example.start - 1, 0), len(example.tokens) - 2 - j):
                rank = list(order[j, row]).index(example.tokens[row + 2 + j])
                hits[:, j] += rank < 1, rank < evaluate.TOP_K
                asked[j] += 1
    assert hits.any()
    assert_close(found["top1"], hits[0] / asked, 1e-6)
    assert_close(found["topk"], hits[1] / asked, 1e-6)
    assert found["positions"] == sum(len(e.hosts()) for e in examples) == 6 + 8


def test_a_tree_is_replayed_on_as_many_guesses_as_it_asks_for(monkeypatch):
    """More of them have other probabilities, and then another tree would be replayed."""
    asked = {}

    def spy(guesses, answer, shape, *rest):
        asked[str(shape)] = {g.tokens.shape for g in guesses}
        return replay(guesses, answer, shape, *rest)

    monkeypatch.setattr(evaluate, "replay", spy)
    trees = ["chain", "best:8", "best:5"]
    evaluate.replayed(attached(), [[5, 17, 3]], [[42, 8, 29, 11]], trees, ())
    assert asked == {"chain": {(3, 1)}, "best:8": {(3, 7)}, "best:5": {(3, 4)}}


class Said:
    """A response in place of ``stream_generate``'s."""

    def __init__(self, token: int, n: int):
        self.token, self.from_draft, self.passes = token, False, n
        self.logprobs = mx.arange(67) / 10.0


def fake(key: str, answers: dict[int, list[int]]) -> Mode:
    def answer(prompt, record):
        for n, token in enumerate(answers[prompt[0]]):
            yield Said(token, n)

    return Mode(key, key, answer)


def test_ways_that_differ_are_told_apart():
    questions = [
        Question(Prompt(OWN, n, [first], 1), [reference], Example([first, 5, 0], 1))
        for n, (first, reference) in enumerate(((8, "a5a6"), (9, "a7a7"), (11, "a20")))
    ]
    plain = fake("plain", {8: [5, 6, 0], 9: [7, 7, 7], 11: [20, 0]})
    other = fake("other", {8: [5, 6, 0], 9: [7, 7, 0], 11: [20, 21, 0]})
    evaluation = Evaluation([plain, other], questions, make_tokenizer(), ["exact"])
    evaluation.decode()
    model = {"weight_bytes": {"all": 1, "per_token": 1}, "streams": None, "layers": 1}
    model |= {"name": "m", "type": "t"}
    results = evaluation.results({}, model, [])
    assert results["quality"]["plain"]["exact"] == pytest.approx(200 / 3)
    assert results["quality"]["other"]["exact"] == pytest.approx(200 / 3)
    assert [(d["prompt"], d["position"]) for d in results["differences"]] == [(1, 2), (2, 1)]
    assert results["summary"][OWN]["other"]["identical"] == 1
    assert results["notes"] == ["1 of 3 plain answers were cut at max_tokens"]
    tables = {table.title: table for table in every_table(results)}
    assert [row[4] for row in tables["3 prompts, decoded"].rows] == ["3/3", "1/3"]
    assert len(tables["Where the text differs from mlx-lm's"].rows) == 2


def test_splits(tmp_path):
    write(tmp_path / "d/train.jsonl", [])
    write(tmp_path / "d/test.jsonl.gz", [])
    assert data_file(tmp_path / "d", "test").name == "test.jsonl.gz"
    assert data_file(tmp_path / "d/train.jsonl", "test").name == "train.jsonl"
    with pytest.raises(BadData, match="another --split: test, train"):
        data_file(tmp_path / "d", "valid")


def test_a_missing_library_is_said_in_one_line(capsys, folder, data, tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "find_spec", lambda name: None)
    assert run(folder, data, "--metrics", "exact", "rouge") == 2
    assert "[metrics] rouge needs rouge-score: pip install rouge-score." in capsys.readouterr().err
    prose = write(tmp_path / "p.jsonl", [{"prompt": "a5 a6", "completion": "a7 a8."}])
    assert run(folder, prose, "--no-streams") == 0
    out = capsys.readouterr().out
    assert "left out: bleu needs sacrebleu: pip install sacrebleu" in out
    assert "left out: rouge needs rouge-score" in out
