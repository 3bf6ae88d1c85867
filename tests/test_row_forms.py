"""Rows of data become what the model is fed in use: special tokens once, tools, and templates or none."""

import json
from functools import partial

from mlx_lm.utils import save_config, save_model
from test_eval import write  # a jsonl file
from tiny_models import COMMON, make_model, make_tokenizer
from tokenizers.processors import TemplateProcessing

from mlx_specstream.cli.main import main
from mlx_specstream.cli.options import chat_tokens
from mlx_specstream.generate import prompt_tokens
from mlx_specstream.measure.prompts import Encoder, from_file
from mlx_specstream.measure.questions import read_questions
from mlx_specstream.train.data import Example, to_example

CALL = {"type": "function", "function": {"name": "a9", "arguments": {}}}
ASKED = {"role": "user", "content": "a5 a6"}


def beginning(chat: bool = False):
    """A tokenizer that puts "a1" before a text, as llama's does."""
    tokenizer = make_tokenizer(chat=chat)
    begins = TemplateProcessing(single="a1 $A", special_tokens=[("a1", 1)])
    tokenizer._tokenizer.backend_tokenizer.post_processor = begins
    return tokenizer


def test_a_text_that_brings_its_special_tokens_gets_no_others():
    tokenizer = beginning()
    for text in ("a5 a6", "a1 a5 a6"):
        assert prompt_tokens(tokenizer, text).tolist() == [1, 5, 6]  # what decoding feeds
        row = {"prompt": text, "completion": "a7"}
        assert to_example(row, tokenizer, "x:1") == Example([1, 5, 6, 7, 0], 3)
        assert to_example(row, tokenizer, "x:1", answer=False) == Example([1, 5, 6], 3)
        assert to_example({"text": text}, tokenizer, "x:1") == Example([1, 5, 6, 0], 0)


def calling():
    """A tokenizer whose template has tools and calls."""
    chat = make_tokenizer(chat=True)
    chat._tokenizer.chat_template = (
        "{% if tools %}a{{ tools|length + 20 }} {% endif %}{% for m in messages %}"
        "{% if m.tool_calls %}a4 {{ m.tool_calls[0].function.name }} a0 {% else %}"
        "{{ 'a3' if m.role == 'user' else 'a4' }} {{ m.content }} {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}a4{% endif %}"
    )
    return chat


def test_a_call_of_a_tool_needs_no_content():
    chat, tools = calling(), [{"type": "function", "function": {"name": "a9"}}] * 2
    for content in ({}, {"content": None}, {"content": ""}):
        called = {"role": "assistant", "tool_calls": [CALL], **content}
        row = {"messages": [ASKED, called], "tools": tools}
        assert to_example(row, chat, "x:1") == Example([22, 3, 5, 6, 4, 9, 0], 5)
    row = {"prompt": "a5 a6", "completion": "a7", "tools": tools}
    assert to_example(row, chat, "x:1") == Example([22, 3, 5, 6, 4, 7], 5)
    assert to_example(row, chat, "x:1", answer=False) == Example([22, 3, 5, 6, 4], 5)


def test_bench_feeds_tools_as_training_did(tmp_path):
    """Rows with and without; of either form the prompt is what comes before the answer in training."""
    chat, tools = calling(), [{"type": "function", "function": {"name": "a9"}}] * 3
    said = {"role": "assistant", "content": "a7"}
    rows = [
        {"prompt": "a5 a6", "completion": "a7", "tools": tools},
        {"messages": [ASKED, said], "tools": tools[:1]},
        {"messages": [ASKED, said]},
    ]
    encoder = Encoder(chat, partial(chat_tokens, chat), None)
    prompts, _ = from_file(write(tmp_path / "own.jsonl", rows), encoder)
    assert [p.tokens for p in prompts] == [[23, 3, 5, 6, 4], [21, 3, 5, 6, 4], [3, 5, 6, 4]]
    for row, prompt in zip(rows, prompts, strict=True):
        example = to_example(row, chat, "x:1")
        assert example.tokens[: example.start] == prompt.tokens


def test_eval_leaves_out_answers_that_are_calls(tmp_path):
    said = {"role": "assistant", "content": "a7"}
    rows = [
        {"messages": [ASKED, {"role": "assistant", "tool_calls": [CALL]}]},
        {"messages": [ASKED, said]},
    ]
    path = write(tmp_path / "r.jsonl", rows)
    questions, notes = read_questions(path, make_tokenizer(chat=True), limit=-1, seed=0)
    assert [q.references for q in questions] == [["a7"]]
    assert notes == ["left out, as prompt or answer is empty: 1 rows"]


def test_questions_with_other_tools_are_other_questions(tmp_path):
    rows = [{"prompt": "a5", "completion": f"a{n}", "tools": [{"name": f"a{n}"}]} for n in (7, 8)]
    rows += [{"prompt": "a5", "completion": f"a{n}"} for n in (7, 9)]
    path = write(tmp_path / "r.jsonl", rows)
    questions, _ = read_questions(path, make_tokenizer(chat=True), limit=-1, seed=0)
    assert [q.references for q in questions] == [["a7"], ["a8"], ["a7", "a9"]]


def test_the_command_can_do_without_the_template(tmp_path, capsys):
    base = tmp_path / "base"
    save_model(base, make_model())
    save_config(
        {**COMMON, "model_type": "llama", "tie_word_embeddings": False}, base / "config.json"
    )
    make_tokenizer(chat=True).save_pretrained(base)
    rows = [{"prompt": f"a5 a{n}", "completion": " a7 a9 a11 a7"} for n in range(20, 26)]
    (tmp_path / "data").mkdir()
    for split in ("train", "valid"):
        write(tmp_path / f"data/{split}.jsonl", rows)
    shape = ["--msa-layers", "2", "--num-streams", "2", "--iters", "2", "--no-rehearsal"]
    train = ["train", "--model", base, "--data", tmp_path / "data", *shape, "--streams"]
    digests = []
    for name, more in (("templated", []), ("bare", ["--ignore-chat-template"])):
        assert main([str(a) for a in (*train, tmp_path / name, *more)]) == 0
        digests.append(json.loads((tmp_path / name / "train.json").read_text())["data"])
        evaluate = ["eval", "--model", base, "--streams", tmp_path / name, "--metrics", "-m", "4"]
        evaluate += ["--data", tmp_path / "data", "--json", tmp_path / f"{name}.json", *more]
        assert main([str(a) for a in evaluate]) == 0
        prompts = json.loads((tmp_path / f"{name}.json").read_text())["prompts"]
        assert [p["tokens"] for p in prompts] == [2 if more else 4] * len(rows)
    assert digests[0] != digests[1]
    capsys.readouterr()
