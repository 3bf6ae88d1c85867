"""Self-distillation: rows that are there for their prompts, and which of them are held out."""

import json

import pytest
from test_targets import HOW, STREAMS
from test_training import write
from tiny_models import make_model, make_tokenizer

from mlx_specstream.config import StreamConfig
from mlx_specstream.errors import BadData
from mlx_specstream.profile import FOLDER
from mlx_specstream.train.config import TrainConfig
from mlx_specstream.train.data import Example, read_examples
from mlx_specstream.train.session import held_out, train_streams


def test_rows_that_are_there_for_their_prompts(tmp_path):
    """No answer is needed, and one that is there is left away."""
    tokenizer, chat = make_tokenizer(), make_tokenizer(chat=True)
    asked = [{"role": "user", "content": "a5 a6"}]
    said = [*asked, {"role": "assistant", "content": "a7"}]
    forms = [
        (tokenizer, {"prompt": "a5 a6"}, [5, 6]),
        (tokenizer, {"prompt": "a5 a6", "completion": "a7"}, [5, 6]),
        (tokenizer, {"prompt": "a5 a6", "completion": ""}, [5, 6]),
        (chat, {"prompt": "a5 a6"}, [3, 5, 6, 4]),
        (chat, {"messages": asked}, [3, 5, 6, 4]),
        (chat, {"messages": said}, [3, 5, 6, 4]),
    ]
    for number, (reader, row, tokens) in enumerate(forms):
        more = [{"text": "a5 a6 a7"}, {"prompt": "a9 " * 8}]
        folder = write(tmp_path / str(number), "train.jsonl", [row, *more])
        examples, report = read_examples(folder, "train", reader, 8, answers=False)
        assert examples == [Example(tokens, len(tokens))]
        assert (report.rows, report.used, report.no_prompt, report.no_room) == (3, 1, 1, 1)
    for reader, row in ((tokenizer, {"prompt": 3}), (tokenizer, 7), (chat, {"messages": []})):
        line = row if isinstance(row, dict) else f"{row}\n"
        folder = write(tmp_path / "wrong", "train.jsonl", [line])
        with pytest.raises(BadData, match=r"train.jsonl:1: a row must have"):
            read_examples(folder, "train", reader, 8, answers=False)
    folder = write(tmp_path / "none", "train.jsonl", [{"text": "a5"}])
    with pytest.raises(BadData, match="no row with a prompt to answer"):
        read_examples(folder, "train", tokenizer, 8, answers=False)


def test_rows_of_a_prompt_are_held_out_together():
    prompts = [[5 + n, 9] for n in range(30)]
    rows = [Example([*prompt, 7, 8, a, 0], 2) for a in (11, 12, 13) for prompt in prompts]
    train, valid = held_out(rows)
    assert sorted(e.tokens for e in train + valid) == sorted(e.tokens for e in rows)
    assert len(valid) == 3
    assert not {tuple(e.tokens[:2]) for e in valid} & {tuple(e.tokens[:2]) for e in train}
    texts = [Example([5 + n, 7, 8, 0], 0) for n in range(60)]
    train, valid = held_out(texts)
    assert (len(train), len(valid)) == (57, 3)
    same = [Example([5, 9, n, 8, 0], 2) for n in range(40)]  # one prompt alone
    train, valid = held_out(same)
    assert (len(train), len(valid)) == (38, 2)


def test_prompts_alone_are_enough(tmp_path, monkeypatch):
    """None that is held out is trained on, and a dry run answers a few and keeps nothing."""
    monkeypatch.setenv(FOLDER, str(tmp_path / "cache"))
    data = tmp_path / "data"
    data.mkdir()
    for split, numbers in (("train", range(5, 17)), ("valid", (8, 9, 30))):
        rows = [{"prompt": f"a{i} a{i + 9} a3"} for i in numbers]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = TrainConfig(iters=2, batch_size=2, hosts=3)

    def run(**options):
        notes = []
        train_streams(
            make_model(), make_tokenizer(), data, tmp_path / "out", StreamConfig(**STREAMS), config,
            self_distill=HOW, note=notes.append, **options,
        )  # fmt: skip
        return "\n".join(notes)

    said = run(dry_run=True)
    assert "training rows left out, whose prompts are held out here: 2" in said
    assert "10 prompts to answer first, about" in said
    assert "10 rows to train on, 3 held out" in said
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "out").exists()
    said = run()
    assert "self-distillation: 10 prompts of 10 rows" in said
    assert "10 rows to train on, 3 held out" in said
    assert len(list((tmp_path / "cache/answers").iterdir())) == 2
    assert not list((tmp_path / "out").glob("answers*"))
