"""The PyTorch example trains streams; converted, they say what they said there.

pip install -e '.[test,torch]'
"""

import gzip
import json
import random

import mlx.core as mx
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install -e '.[torch]'")

import torch_twin  # noqa: E402 - it finds the example
import train as example  # noqa: E402
from reference import assert_close  # noqa: E402
from streaming import StreamConfig, StreamingModel, Streams, targets  # noqa: E402
from test_convert_streams import our_logits  # noqa: E402
from torch_models import LENGTH, SHAPE, build  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from mlx_specstream import load  # noqa: E402
from mlx_specstream.cli.main import main  # noqa: E402
from mlx_specstream.converters import convert  # noqa: E402
from mlx_specstream.model.checkpoint import fingerprint, save_streams  # noqa: E402
from mlx_specstream.model.seams import seams_of  # noqa: E402
from mlx_specstream.train import data, loss, passes  # noqa: E402

FAMILIES = ("llama_plain", "mistral", "qwen3")
V = SHAPE["vocab_size"]
WORDS = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{n}": n for n in range(3, V)}}
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [],
    "pre_tokenizer": {"type": "Whitespace"},
    "model": {"type": "WordLevel", "vocab": WORDS, "unk_token": "<unk>"},
}
ABOUT = {"tokenizer_class": "TokenizersBackend", "bos_token": "<s>", "eos_token": "</s>"}
pytestmark = pytest.mark.filterwarnings("ignore")  # of other people's libraries


@pytest.fixture
def folder(tmp_path):
    """A place for a small model, with a tokenizer of words in it."""
    made = tmp_path / "hf"
    made.mkdir()
    (made / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (made / "tokenizer_config.json").write_text(json.dumps(ABOUT))
    return made


@pytest.fixture
def rows(tmp_path):
    """A folder of data in which a word says the next ones."""
    draw, made = random.Random(3), tmp_path / "data"
    made.mkdir()
    for split, count in (("train", 40), ("valid", 6)):
        lines = []
        for _ in range(count):
            first, long = draw.randrange(3, V), draw.randrange(5, 12)
            said = [f"w{3 + (first + 7 * n) % (V - 3)}" for n in range(3 + long)]
            row = {"prompt": " ".join(said[:3]), "completion": " ".join(said[3:])}
            lines.append(json.dumps(row))
        (made / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return made


def streams_of(model, **settings):
    """A model of transformers with random streams; none of their values is zero."""
    config = {**torch_twin.FULL, "prune_rank": 0, "init_rank": 0, **settings}
    streams = Streams(model, StreamConfig(**config))
    streams.load_state_dict(torch_twin.random_streams(model, config))
    return StreamingModel(model, streams)


def deferred_logits(model, tokens, hosts):
    """[g, P, V] of our deferred streams, as training and decoding place them."""
    seams = seams_of(model)
    tokens = mx.array([tokens])
    roots = passes.following(tokens, hosts)
    hidden = passes.stream_hidden(seams, *passes.base_pass(seams, tokens), hosts, roots)
    g = seams.streams.config.num_streams
    return seams.head(hidden)[0].reshape(g, hosts.shape[1], -1)


def check_converted(hf, file, tokens, tmp_path):
    """Model and streams through the command line: the same logits, inline and deferred."""
    assert main(["convert", "--hf-path", str(hf), "--mlx-path", str(tmp_path / "mlx")]) == 0
    arguments = ["--base", str(tmp_path / "mlx"), "--mlx-path", str(tmp_path / "streams")]
    assert main(["convert", "--hf-path", str(file), *arguments]) == 0
    base = AutoModelForCausalLM.from_pretrained(hf, attn_implementation="eager").float().eval()
    twin = StreamingModel(base, Streams.load(base, file))
    expected = torch_twin.logits_of(twin, tokens)
    model, _ = load(tmp_path / "mlx", streams=tmp_path / "streams")
    ours = our_logits(model, tokens)
    assert ours.keys() == expected.keys()
    for name, want in expected.items():
        assert_close(ours[name], want, 1e-4, name)
    hosts = [0, 3, len(tokens) - 2]
    got = deferred_logits(model, tokens, mx.array([hosts]))
    assert_close(got, expected["streams"][:, hosts], 1e-4, "deferred")
    with torch.no_grad():
        there = twin.head(twin.deferred(torch.tensor([tokens]), torch.tensor([hosts])).streams)[0]
        assert_close(there, expected["streams"][:, hosts], 1e-5, "deferred in PyTorch")
        assert_close(expected["main"], base(torch.tensor([tokens])).logits[0], 1e-5, "main")
        for lora in twin.streams.msa_layers:
            for pair in lora.values():
                pair.lora_B.weight.zero_()
        without = torch_twin.logits_of(twin, tokens)["streams"]
    change = (without - expected["streams"]).abs().max() / expected["streams"].abs().max()
    assert change > 0.01, "the LoRA learned nothing, so that its conversion was not tested"


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_streams_convert(family, folder, rows, tmp_path):
    build(family, folder).save_pretrained(folder)
    before = (folder / "model.safetensors").read_bytes()
    arguments = "--num-streams 3 --msa-layers 2 --lora-rank 4 --condition-rank 5 --lora-alpha 6"
    arguments += " --iters 6 --batch-size 3 --hosts 4 --learning-rate 0.05"
    target = "distill" if family == "mistral" else "hard"
    places = ["--model", str(folder), "--data", str(rows), "--out", str(tmp_path / "out")]
    file = example.main([*places, *arguments.split(), "--target", target])
    assert (folder / "model.safetensors").read_bytes() == before
    tokens = [int(x) for x in np.random.default_rng(5).integers(3, V, LENGTH)]
    check_converted(folder, file, tokens, tmp_path)


def test_exported_streams_with_a_draft_vocabulary(folder, tmp_path):
    model = build("llama_plain", folder)
    model.save_pretrained(folder)
    file = streams_of(model).streams.save(tmp_path / "out", {"steps": 0})
    convert(folder, tmp_path / "mlx", dtype="float32")
    arguments = ["--base", str(tmp_path / "mlx"), "--mlx-path", str(tmp_path / "streams")]
    assert main(["convert", "--hf-path", str(file), *arguments]) == 0
    ours, _ = load(tmp_path / "mlx", streams=tmp_path / "streams")
    seams = seams_of(ours)
    seams.streams.draft_vocabulary = mx.array([2, 5, 11, 17])
    save_streams(tmp_path / "few", seams.streams, fingerprint(ours), {})
    assert main(["export", "--model", str(tmp_path / "few"), "--out", str(tmp_path / "back")]) == 0
    (found,) = (tmp_path / "back").rglob("*streams*.safetensors")
    back, there = Streams.load(model, found).state_dict(), Streams.load(model, file).state_dict()
    assert all(torch.equal(back[name], value) for name, value in there.items())


def test_another_family(folder, tmp_path):
    """Its tokenizer in transformers has a form of its own, so that nothing is trained here."""
    model = build("qwen2", folder)
    model.save_pretrained(folder)
    file = streams_of(model).streams.save(tmp_path / "out", {"steps": 0})
    check_converted(folder, file, [*range(5, 5 + LENGTH)], tmp_path)
    assert json.loads((tmp_path / "streams/streams.json").read_text())["training"] == {"steps": 0}


def test_the_bundled_models_original(shared, tmp_path):
    """A real model and its task: the loss falls, and what was learned arrives."""
    hf, task = shared / "models/e2e-sql-14m", shared / "data/e2e/train.jsonl.gz"
    if not (hf.is_dir() and task.is_file()):
        pytest.skip("no e2e-sql-14m or e2e among the models and data")
    with gzip.open(task, "rt", encoding="utf-8") as lines:
        found = [json.loads(line) for line, _ in zip(lines, range(24), strict=False)]
    (tmp_path / "data").mkdir()
    with open(tmp_path / "data/train.jsonl", "w", encoding="utf-8") as file:
        for row in found:
            prompt = f"MR: {row['prompt']}\nText:"
            file.write(json.dumps({"prompt": prompt, "completion": row["completion"]}) + "\n")
    places = ["--model", str(hf), "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    arguments = "--msa-layers 1 --lora-rank 8 --condition-rank 4 --iters 8 --hosts 6"
    file = example.main([*places, *arguments.split(), "--learning-rate", "0.01"])
    tokenizer = AutoTokenizer.from_pretrained(hf)
    prompt, start = example.to_example(prompt, found[-1]["completion"], tokenizer)
    assert 0 < start < len(prompt)
    check_converted(hf, file, prompt[: start + 9], tmp_path)


@pytest.mark.parametrize("target", ["hard", "distill"])
@pytest.mark.parametrize(("condition", "shared"), [(0, False), (5, False), (5, True)])
def test_the_loss_is_the_packages(condition, shared, target, folder, rows, tmp_path):
    """Same streams, same batch: the same loss of every stream."""
    model = build("qwen3", folder)
    twin = streams_of(model, condition_rank=condition, condition_shared=shared)
    model.save_pretrained(folder)
    twin.streams.save(folder, {})
    convert(folder, tmp_path / "out", dtype="float32")
    ours, tokenizer = load(tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(folder)
    lines = [json.loads(x) for x in (rows / "train.jsonl").read_text().splitlines()[:4]]
    examples = [data.to_example(row, tokenizer, "here") for row in lines]
    same = [example.to_example(row["prompt"], row["completion"], theirs) for row in lines]
    assert [(e.tokens, e.start) for e in examples] == [tuple(e) for e in same]
    hosts = [list(e.hosts())[:k] for k, e in zip((4, 2, 9, 1), same, strict=True)]
    batch = example.make_batch(same, hosts, 3, "cpu")
    want = example.stream_losses(twin, batch, target)
    own = data.make_batch(examples, [np.array(h) for h in hosts], 3)
    assert np.array_equal(own.targets, batch.targets)
    assert_close(loss.stream_losses(seams_of(ours), own, target).streams, want.detach(), 1e-4)


def test_padding_changes_nothing_and_the_base_gets_no_gradient(folder):
    model = build("mistral", folder)  # some of its layers slide
    twin = streams_of(model)
    draw = torch.Generator().manual_seed(2)
    tokens = torch.randint(3, V, (1, LENGTH), generator=draw)
    hosts = torch.tensor([[0, 4, 15]])
    alone = twin.deferred(tokens, hosts).streams
    padded = torch.cat([tokens[:, :17], torch.zeros(1, 5, dtype=torch.long)], 1)
    more = torch.tensor([[0, 4, 15, 0, 0], [1, 2, 3, 4, 5]])
    both = twin.deferred(torch.cat([padded, tokens]), more).streams
    assert_close(both[:1, :, :3].detach(), alone.detach(), 1e-5)
    alone.sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for n, p in twin.streams.named_parameters() if "cond" not in n)
    names = {name for name, _ in targets(model.model.layers[0], twin.config)}
    assert names == set(torch_twin.PROJECTIONS)


def test_the_plan_mask_is_refused_where_it_cannot_be(folder):
    twin = streams_of(build("llama_plain", folder), main_sees_streams=True)
    with pytest.raises(ValueError, match="main rows see their streams"):
        twin.deferred(torch.tensor([[3, 4, 5]]), torch.tensor([[1]]))


def test_a_bad_row_is_one_clear_line(folder, rows, tmp_path):
    build("llama_plain", folder).save_pretrained(folder)
    places = ["--model", str(folder), "--out", str(tmp_path / "out")]
    (rows / "train.jsonl").write_text('{"prompt": "w3"}\n')
    with pytest.raises(SystemExit, match=r"train.jsonl:1: a row must have .*'completion'"):
        example.main([*places, "--data", str(rows)])
    assert not (tmp_path / "out").exists()


def test_it_computes_what_the_golden_files_hold():
    """The golden streams, made by an older twin, are still what this one computes."""
    from test_convert_streams import GOLDEN, golden

    for name in ("streams", "streams_shared"):
        saved = torch.load(GOLDEN / name / "checkpoint.pt", weights_only=True)
        state = {k.removeprefix("module."): v for k, v in saved["model"].items()}
        prefix = "streams."
        streams = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(GOLDEN / name))
        base.load_state_dict({k: v for k, v in state.items() if not k.startswith(prefix)})
        tokens, expected = golden(name)
        got = torch_twin.twin(base.eval(), streams, json.loads(saved["stream_config"]), tokens)
        for kind, want in expected.items():
            assert_close(got[kind], want, 1e-4, kind)
