"""bench: the whole command on a tiny model, the sums in its results, the report, the refusals."""

import json
import re
import statistics
from html.parser import HTMLParser
from importlib.resources import files

import mlx.core as mx
import pytest
from mlx_lm.utils import save_config, save_model
from tiny_models import COMMON, make_model, make_streams, make_tokenizer

from mlx_specstream.cli.main import main
from mlx_specstream.config import StreamConfig
from mlx_specstream.decode.record import PassRecord, Record
from mlx_specstream.measure import bandwidth, bench
from mlx_specstream.measure.bench import Mode, decode, run
from mlx_specstream.measure.prompts import KINDS, Encoder, Prompt, bundled
from mlx_specstream.measure.summary import spread, summarise
from mlx_specstream.measure.svg import Bar, bars, lines
from mlx_specstream.measure.tables import every_table
from mlx_specstream.model.checkpoint import fingerprint, save_streams

MODES = ["mlx-lm", "plain", "streams", "copies", "both", "mlx-lm-draft"]
OURS = ["streams", "copies", "both"]  # the ones that keep a record
REPEATS, TOKENS = 2, 9
OWN = ["a7 a9 a11 a7 a9 a11 a7", "a5 a6 a60 a61 a5 a6"]
TUNE = {
    "machine": {"cpu": "x"},
    "model": "tuned-model",
    "costs": {
        "rows": [1, 2, 8],
        "contexts": [64, 512],
        "pass_ms": [[2.0, 2.5, 4.0], [3.0, 3.5, 6.0]],
        "deferred_ms": [[0.5, 0.5, 0.5], [0.75, 0.75, 0.75]],
        "inline_ms": None,
        "plain_ms": [1.0, 1.5],
        "measured": True,
        "gammas": [1, 2],
        "saved_ms": [[0.31, 0.12], [0.43, 0.24]],
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random model as a folder, streams inside."""
    out = tmp_path_factory.mktemp("bench") / "tiny-model"
    out.mkdir()
    model = make_model("llama", num_hidden_layers=3)
    save_model(out, model)
    save_config(
        {**COMMON, "num_hidden_layers": 3, "model_type": "llama", "tie_word_embeddings": False},
        out / "config.json",
    )
    make_tokenizer(ends=False)._tokenizer.save_pretrained(out)
    config = StreamConfig(num_streams=3, msa_layers=2, lora_rank=6, lora_alpha=9.0)
    save_streams(out / "streams", make_streams(model, config), fingerprint(model), {})
    return out


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory):
    """(results, html, the JSON's text) of one run of the command with everything in it."""
    out = tmp_path_factory.mktemp("reports")
    (out / "own.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in OWN))
    (out / "tune.json").write_text(json.dumps(TUNE))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bandwidth, "CPU_ARRAY", 1 << 16)
        argv = ["bench", "--model", folder, "--draft-model", folder, "--data", out / "own.jsonl"]
        argv += ["--kinds", *KINDS, "--prompts", "1", "-m", TOKENS, "--repeats", REPEATS]
        argv += [
            "--json",
            out / "r.json",
            "--html",
            out / "new/r.html",
            "--tune",
            out / "tune.json",
        ]
        assert main([str(a) for a in argv]) == 0
    text = (out / "r.json").read_text()
    assert sorted(p.name for p in out.iterdir()) == ["new", "own.jsonl", "r.json", "tune.json"]
    return json.loads(text), (out / "new/r.html").read_text(), text


def test_every_prompt_was_run_in_every_way_and_repeat(made):
    results = made[0]
    assert [m["key"] for m in results["modes"]] == MODES
    kinds = [p["kind"] for p in results["prompts"]]
    assert kinds == [*KINDS, "own"]
    rows = [(r["mode"], r["prompt"], r["repeat"]) for r in results["runs"]]
    expected = [(m, p, k) for m in MODES for p in range(5) for k in range(1, REPEATS + 1)]
    assert sorted(rows) == sorted(expected)
    looked = [(r["mode"], r["prompt"]) for r in results["split"]]
    assert sorted(looked) == sorted((m, p) for m in OURS for p in range(5))
    assert results["model"]["streams"]["num_streams"] == 3
    assert results["model"]["name"] == "tiny-model"
    assert results["model"]["context"] == COMMON["max_position_embeddings"]
    assert {"cpu", "memory_gb", "device", "blas", "mlx", "mlx-lm"} <= set(results["machine"])
    assert results["tune"] == TUNE


def test_answers_equal_the_baselines(made):
    results = made[0]
    assert results["differences"] == []
    for mode in MODES:
        assert results["answers"][mode] == results["answers"]["mlx-lm"]
        assert all(f[mode]["identical"] == f[mode]["of"] for f in results["summary"].values())
    ids, hashes = results["answers"]["both"][:4], results["answers"]["both"][4:]
    assert all(len(answer) == TOKENS for answer in ids)
    assert all(re.fullmatch("[0-9a-f]{64}", answer) for answer in hashes)  # of --data


def test_passes_and_records_agree(made):
    for row in made[0]["runs"]:
        assert row["tokens"] == TOKENS
        assert 0 < row["first_s"] < row["seconds"]
        if row["mode"] in ("mlx-lm", "plain"):
            assert row["passes"] == TOKENS - 1
        if row["mode"] in OURS:
            assert len(row["accepted"]) == row["passes"]
            assert sum(row["accepted"]) + row["passes"] == TOKENS - 1
            assert row["nodes"] >= row["passes"] + sum(row["accepted"])
            assert row["copied"] <= sum(row["accepted"])
        if row["mode"] == "mlx-lm-draft":  # the draft model is the model: two drafted, one more
            assert row["passes"] == TOKENS // 3 - 1


def test_the_summary_is_what_the_rows_say(made):
    """The sums done once more, another way."""
    results = made[0]
    prompts = results["prompts"]
    assert set(results["summary"]) == {*KINDS, "own", "all"}
    for kind, figures in results["summary"].items():
        for mode, f in figures.items():
            rates, whole, first = {mode: [], "mlx-lm": []}, {mode: [], "mlx-lm": []}, []
            for k in range(1, REPEATS + 1):
                for name in rates:
                    rows = [
                        r
                        for r in results["runs"]
                        if (r["mode"], r["repeat"]) == (name, k)
                        and kind in ("all", prompts[r["prompt"]]["kind"])
                    ]
                    seconds = sum(r["seconds"] for r in rows)
                    start = sum(r["first_s"] for r in rows)
                    whole[name].append(len(rows) * TOKENS / seconds)
                    rates[name].append(len(rows) * (TOKENS - 1) / (seconds - start))
                    if name == mode:
                        first.append(start / len(rows))
            assert len(rows) == (5 if kind == "all" else 1) == f["of"]
            ratios = sorted(a / b for a, b in zip(whole[mode], whole["mlx-lm"], strict=True))
            later = sorted(a / b for a, b in zip(rates[mode], rates["mlx-lm"], strict=True))
            approx = pytest.approx
            assert f["tokens_per_second"]["median"] == approx(statistics.median(whole[mode]))
            assert f["generation_tokens_per_second"]["high"] == approx(max(rates[mode]))
            assert f["speedup"] == approx(
                {"median": statistics.median(ratios), "low": ratios[0], "high": ratios[-1]}
            )
            assert f["generation_speedup"]["median"] == approx(statistics.median(later))
            assert f["first_token_s"]["low"] == approx(min(first))
            assert f["tokens_per_pass"] == approx(f["of"] * REPEATS * (TOKENS - 1) / f["passes"])
            if mode in OURS:
                assert 1 + sum(f["acceptance"]) == approx(f["tokens_per_pass"])
                assert f["acceptance"] == sorted(f["acceptance"], reverse=True)
                assert set(f["split"]) == set(bench.PARTS)
    assert results["summary"]["all"]["mlx-lm"]["speedup"]["median"] == 1.0
    assert results["summary"]["all"]["copies"]["copied_share"] in (0.0, 1.0)  # nothing else drafts
    assert results["summary"]["all"]["streams"]["copied_share"] == 0.0
    assert summarise(results) == results["summary"]


def test_long_prompts_are_cut_to_the_context(made):
    results = made[0]
    room = COMMON["max_position_embeddings"] - TOKENS - 64
    long = [p for p in results["prompts"] if p["kind"] == "long"]
    assert all(room / 2 < p["tokens"] <= room < p["full"] for p in long)
    assert any("1 of 5 prompts cut" in note for note in results["notes"])


class Balanced(HTMLParser):
    """Tags that open and close in order, and what could reach the network."""

    VOID = ("meta", "br", "line", "rect", "circle", "polyline")  # svg's end in "/>" here

    def __init__(self, text: str):
        super().__init__()
        self.open, self.seen, self.reaching = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.reaching += [(tag, k) for k, _ in attrs if k in ("src", "href", "srcset", "data")]
        self.reaching += [(tag, k) for k, _ in attrs if k.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in self.VOID
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_is_one_page_that_reaches_nothing(made):
    html = made[1]
    page = Balanced(html)
    assert page.open == []
    assert page.reaching == []
    assert not {"script", "link", "img", "iframe", "object"} & set(page.seen)
    assert not re.search(r"https?:|//|url\(|@import", html)
    assert page.seen.count("svg") > 6
    assert "prefers-color-scheme: dark" in html
    assert "tuned-model" in html
    assert "behind 512 tokens: 1 alone 0.43 less, 2 alone 0.24 less" in html
    assert "cost of a pass by its rows" in html
    assert "nan" not in html.replace("finance", "").lower().split()
    for table in every_table(made[0]):
        assert table.title.replace("'", "&#x27;") in html
        assert all(len(row) == len(table.columns) for row in table.rows)


def test_nothing_written_holds_text_of_a_prompt(made):
    data = json.loads((files(bench.__package__) / "prompts.json").read_text(encoding="utf-8"))
    texts = [t for kind in data["kinds"].values() for t in kind]
    texts += [*data["long"]["sections"], *data["long"]["tasks"], *OWN]
    _, html, raw = made
    pieces = {
        " ".join(words[i : i + 3])
        for t in texts
        for words in [t.split()]
        for i in range(max(1, len(words) - 2))
    }
    assert len(pieces) > 2000
    assert not [p for p in pieces if p in html or p in raw]
    ids = [[int(w[1:]) for w in text.split()] for text in OWN]
    assert not any(str(i)[1:-1] in re.sub(r"\s+", " ", raw) for i in ids)


def fails(capsys, *argv) -> str:
    """The one line of a command that must fail."""
    code = main([str(a) for a in argv])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    (line,) = [line for line in err.splitlines() if "error:" in line]
    assert "Traceback" not in err
    return line


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--repeats", "0"], "[repeats] must be at least 1"),
        (["--prompts", "0"], "[prompts] must be at least 1"),
        (["-m", "1"], "[max_tokens] must be at least 2"),
        (["-m", "500"], "leaves no room for a prompt: the model's context is 512"),
        (["--kinds", "poem"], "must be of prose, code, json-sql, long; got 'poem'"),
        (["--kinds"], "must name at least one kind"),
        (["--num-draft-tokens", "2"], "needs --draft-model"),
        (["--data", "{tmp}/none.jsonl"], "neither a file nor a folder"),
        (["--data", "{tmp}"], "must hold valid.jsonl or valid.jsonl.gz"),
        (["--data", "{tmp}/empty.jsonl"], "holds no row"),
        (["--data", "{tmp}/broken.jsonl"], "broken.jsonl:2: not a row of JSON"),
        (["--data", "{tmp}/wrong.jsonl"], "wrong.jsonl:1: a row must have"),
        (["--data", "{tmp}/chat.jsonl"], "need a model with a chat template"),
        (["--json", "{tmp}"], "[json]"),
        (["--html", "{tmp}/empty.jsonl/x.html"], "[html]"),
        (["--json", "{tmp}/x", "--html", "{tmp}/x"], "must be two files"),
        (["--tune", "{tmp}/broken.jsonl"], "is not what mlx-specstream tune writes"),
        (["--tune", "{tmp}/costs.json"], "hold one list for each of 2 contexts"),
        (["--no-streams", "--tree", "chain"], "[tree] needs streams"),
        (["--tree", "bush:3", "--kinds", "prose"], "bush:3"),
        (["--model", "{tmp}/nothing"], "nothing"),
    ],
)
def test_bad_input_is_one_line(capsys, folder, tmp_path, monkeypatch, more, said):
    monkeypatch.setattr(bandwidth, "CPU_ARRAY", 1 << 12)
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a5"}\n{"prompt"\n')
    (tmp_path / "wrong.jsonl").write_text('{"prompt": ""}\n')
    (tmp_path / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "a5"}]}\n')
    costs = {**TUNE["costs"], "pass_ms": [[1.0, 2.0, 3.0]]}
    (tmp_path / "costs.json").write_text(json.dumps({**TUNE, "costs": costs}))
    before = sorted(tmp_path.iterdir())
    more = [m.format(tmp=tmp_path) for m in more]
    line = fails(capsys, "bench", "--model", folder, *more)
    assert said in line
    assert sorted(tmp_path.iterdir()) == before


def test_one_copy_of_the_weights_and_no_streams(capsys, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(bandwidth, "CPU_ARRAY", 1 << 12)
    argv = ["bench", "--model", folder, "--share-weights", "--kinds", "code", "--prompts", "1"]
    argv += ["-m", "6", "--repeats", "1", "--json", tmp_path / "r.json", "--no-streams"]
    assert main([str(a) for a in argv]) == 0
    results = json.loads((tmp_path / "r.json").read_text())
    assert [m["key"] for m in results["modes"]] == ["mlx-lm", "plain", "copies"]
    assert results["differences"] == []
    assert results["model"]["streams"] is None
    assert "baseline and ours shared one copy of the weights" in results["notes"]
    out = capsys.readouterr().out
    assert "streams + copies" not in out
    assert "Acceptance by depth" in out


# --- parts ---


@pytest.fixture
def record() -> Record:
    passes = [
        PassRecord(nodes=8, accepted=3, copied=1, streams=True, base_s=0.25),
        PassRecord(nodes=8, accepted=1, copied=1, streams=True, draft_s=0.5),
        PassRecord(nodes=1, accepted=0, recheck=True),
        PassRecord(nodes=4, accepted=0),
    ]
    return Record(passes)


def test_record_counts(record):
    thirds = [2 / 3, 1 / 3, 1 / 3, 0.0]
    assert record.acceptance_by_depth(4) == pytest.approx(thirds)  # the re-check left out
    assert record.deepest() == 3
    sums = record.totals()
    assert (sums["passes"], sums["nodes"], sums["accepted"], sums["copied"]) == (4, 21, 4, 2)
    assert (sums["streams"], sums["recheck"]) == (2, 1)
    assert (sums["base_s"], sums["streams_s"], sums["draft_s"]) == (0.25, 0.0, 0.5)
    assert Record().acceptance_by_depth(2) == [0.0, 0.0]
    assert Record().deepest() == 0


class Said:
    """A response with a token, in place of mlx-lm's."""

    def __init__(self, token: int, logits: list[float]):
        self.token, self.from_draft = token, False
        logits = mx.array(logits)
        self.logprobs = logits - mx.logsumexp(logits)


def fake(key: str, tokens: list[int], order: list[str] | None = None) -> Mode:
    """A mode that says ``tokens``, each with logits 3, 2, 1.75, 0 for 0, 1, 2, 3."""

    def answer(prompt, record):
        if order is not None:
            order.append(key)
        for token in tokens:
            yield Said(token, [3.0, 2.0, 1.75, 0.0])

    return Mode(key, key, answer)


def test_differences_have_a_place_and_a_gap():
    modes = [fake("mlx-lm", [0, 0, 0]), fake("one", [0, 2, 0]), fake("short", [0, 0])]
    raw = run(modes, [Prompt("prose", 0, [5], 1)], repeats=3)
    one, short = raw["differences"]
    assert (one["mode"], one["position"], one["repeats"]) == ("one", 1, 3)
    assert one["logit_gap"] == pytest.approx(1.25)
    assert (short["position"], short["logit_gap"]) == (2, None)


def test_no_way_always_follows_the_same_one():
    order: list[str] = []
    modes = [fake(k, [0, 0], order) for k in ("mlx-lm", "b", "c")]
    prompts = [Prompt("prose", n, [5], 1) for n in range(2)]
    raw = run(modes, prompts, repeats=2)
    assert "".join(k[0] for k in order) == "mbc" + "bcm" + "bcm" + "cmb" + "cmb" + "mbc"
    assert len(raw["runs"]) == 12  # the warm-up is not among them


def test_times_of_an_answer(monkeypatch):
    clock = iter([10.0, 13.0, 17.5])  # begin, first token, end
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    answer = decode(fake("mlx-lm", [0, 1, 2]), [5])
    assert (answer.first_s, answer.seconds) == (3.0, 7.5)
    assert (answer.tokens, answer.passes) == ([0, 1, 2], 2)


def test_the_bundled_prompts_are_enough():
    class Words:
        bos_token = None

        def encode(self, text, add_special_tokens):
            assert add_special_tokens
            return re.findall(r"\w+|[^\w\s]", text)  # fewer than any tokenizer makes

    prompts = bundled(list(KINDS), Encoder(Words(), None, None))
    for kind in KINDS:
        own = [p.tokens for p in prompts if p.kind == kind]
        assert len(own) >= 5
        assert len({tuple(t[:3]) for t in own}) == len(own)
        assert min(map(len, own)) >= (2000 if kind == "long" else 25)
    cut = Encoder(Words(), None, 30)
    assert all(len(p.tokens) <= 30 < p.full for p in bundled(["long"], cut))
    (first, *_) = bundled(["code"], cut)
    whole = Words().encode(
        json.loads((files(bench.__package__) / "prompts.json").read_text())["kinds"]["code"][0],
        True,
    )
    assert first.tokens == [whole[0], *whole[-29:]]


@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral"])
def test_weights_that_a_token_reads(name):
    model = make_model(name)
    counted = bandwidth.weight_bytes(model)
    layers = len(model.layers)
    experts = 0
    if name == "mixtral":  # 2 of 5 experts
        experts = 4 * layers * 3 * COMMON["intermediate_size"] * model.args.hidden_size * 3
    embedding = 4 * model.args.vocab_size * model.args.hidden_size
    unread = experts + (0 if name == "qwen3" else embedding)  # qwen3's is its head too
    assert counted["all"] - counted["per_token"] == unread
    assert counted["all"] > 2 * embedding


def test_vendor_figures():
    assert bandwidth.vendor_peak("Apple M3 Max Apple M3 Max") == "300-400"
    assert bandwidth.vendor_peak("Apple M1") == "68"
    assert bandwidth.vendor_peak("Apple M9 Pro") is None
    assert bandwidth.vendor_peak("Intel M3 something") is None


def test_plots_are_to_scale():
    svg = bars("<b>", [("", [Bar("x & y", 1.0, "1"), Bar("z", 2.0, "2", 7)])])
    widths = [float(w) for w in re.findall(r'<rect class="c\d" .*?width="(\S+?)"', svg)]
    assert widths[1] == pytest.approx(2 * widths[0])
    assert "&lt;b&gt;" in svg
    assert "x &amp; y" in svg
    plot = lines("t", [1, 2, 4], [([1.0, 2.0, 3.0], 2), ([2.0], 3)], "x", "y")
    points = [float(p.split(",")[0]) for p in re.search('points="(.*?)"', plot)[1].split()]
    assert points[2] - points[1] == pytest.approx(2 * (points[1] - points[0]), abs=0.2)


def test_spread():
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0}
