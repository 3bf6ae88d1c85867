"""Quantised conversions: every mode that mlx-lm offers, recipes, and what the report says."""

import json
import math
import re

import mlx.core as mx
import numpy as np
import pytest
from test_cli import fails, run
from test_convert import copy_golden

from mlx_specstream import load
from mlx_specstream.converters import convert
from mlx_specstream.converters.report import compare, encoded
from mlx_specstream.errors import BadArgument, UnsupportedModel

MODES = [
    *(("affine", bits, group) for bits in (2, 3, 4, 6, 8) for group in (32,)),
    *(("mxfp4", None, None), ("nvfp4", None, None), ("mxfp8", None, None)),
]


@pytest.mark.parametrize(("mode", "bits", "group"), MODES)
def test_every_mode_loads_and_answers(mode, bits, group, tmp_path):
    folder, lines = copy_golden(tmp_path / "hf", "phi3"), []
    options = {"q_mode": mode, "q_bits": bits, "q_group_size": group}
    convert(folder, tmp_path / "q", quantize=True, report=True, log=lines.append, **options)
    settings = json.loads((tmp_path / "q/config.json").read_text())["quantization"]
    width = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}.get(mode, (bits, group))
    assert (settings["bits"], settings["group_size"], settings["mode"]) == (*width, mode)
    model, _ = load(tmp_path / "q")
    assert model.layers[0].self_attn.qkv_proj.bits == width[0]
    report = next(line for line in lines if line.startswith("report: "))
    kl = float(re.search(r"KL\(before \|\| after\) (\S+) nats", report)[1])
    assert 0 < kl < {2: 4.0, 3: 2.0, 4: 2.0}.get(width[0], 0.1)


def test_weights_packed_in_a_foreign_way_are_refused(tmp_path):
    """QLoRA's four bits, saved as they were trained."""
    packed = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    folder = copy_golden(tmp_path / "hf", "phi3", quantization_config=packed)
    with pytest.raises(UnsupportedModel, match=r"packed by 'bitsandbytes'.*dequantize") as error:
        convert(folder, tmp_path / "out")
    assert "\n" not in str(error.value)


def test_a_recipe_gives_more_bits_to_some(tmp_path):
    folder = copy_golden(tmp_path / "hf", "qwen3", hidden_size=24)
    convert(copy_golden(tmp_path / "hf3", "phi3"), tmp_path / "m", quantize=True, q_group_size=32,
            quant_predicate="mixed_2_6")  # fmt: skip
    settings = json.loads((tmp_path / "m/config.json").read_text())["quantization"]
    assert {v["bits"] for v in settings.values() if isinstance(v, dict)} == {2, 6}
    by_hand = {"quantize": True, "q_group_size": 32}
    keep = lambda path, module: "lm_head" not in path  # noqa: E731
    convert(tmp_path / "hf3", tmp_path / "p", quant_predicate=keep, **by_hand)
    stored = mx.load(str(tmp_path / "p/model.safetensors"))
    assert "lm_head.scales" not in stored
    assert "model.embed_tokens.scales" in stored
    # Rows of 24 fit no group of 32, and what is quantised is not quantised again: said, not passed over.
    with pytest.raises(BadArgument, match="nothing was quantised"):
        convert(folder, tmp_path / "n", **by_hand)
    whole = {"quantize": True, "q_group_size": 32, "q_bits": 4}
    convert(tmp_path / "hf3", tmp_path / "q", **whole)
    with pytest.raises(BadArgument, match="quantised already"):
        convert(tmp_path / "q", tmp_path / "qq", **{**whole, "q_bits": 8})
    assert not (tmp_path / "qq").exists()


def test_the_report_of_a_cast(tmp_path):
    folder, lines = copy_golden(tmp_path / "hf"), []
    convert(folder, tmp_path / "out", report=True, log=lines.append)
    assert any(
        re.match(r"report: KL.* 0 nats .*same first choice at 100.0%", line) for line in lines
    )
    convert(folder, tmp_path / "half", dtype="float16", report=True, log=lines.append)
    assert "at 100.0%" in lines[-2]
    assert "KL(before || after) 0 nats" not in lines[-2]


def test_kl_and_agreement_by_hand():
    before = [
        mx.log(mx.array([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]])),
        mx.log(mx.array([[0.2, 0.2, 0.6]])),
    ]
    after = [
        mx.log(mx.array([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]])),
        mx.log(mx.array([[0.2, 0.2, 0.6]])),
    ]
    got = compare(before, [x + 3 for x in after])  # a shift of all logits changes nothing
    kl = 0.5 * math.log(2) + 0.3 * math.log(0.6) + 0.2 * math.log(0.8)
    assert got.worst == pytest.approx(kl, rel=1e-5)
    assert got.kl == pytest.approx(kl / 3, rel=1e-4)
    assert (got.agreement, got.positions) == (pytest.approx(2 / 3), 3)
    assert "66.7% of 3 positions" in str(got)


class Words:
    def encode(self, text):
        return list(range(len(text.split()))) if text else []


def test_prompts_become_tokens():
    prompts = encoded(Words(), ["a b c", "", "x " * 200])
    assert [len(tokens) for tokens in prompts] == [3, 1, 64]


def test_report_by_command(capsys, tmp_path):
    folder = copy_golden(tmp_path / "hf", "phi3")
    argv = ["convert", "--hf-path", folder, "--mlx-path", tmp_path / "q"]
    code, out, err = run(capsys, *argv, "-q", "--q-group-size", "32", "--q-bits", "4", "--report")
    assert (code, out.strip()) == (0, str(tmp_path / "q"))
    assert "report: KL(before || after)" in err
    line = fails(capsys, *argv, "--q-bits", "5")
    assert "needs -q" in line
    assert np.isfinite(float(re.search(r"(\S+) nats", err)[1]))


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (["--q-bits", "0"], "'q_bits' must be 2 or 3 or 4 or 5 or 6 or 8 for q_mode 'affine'"),
        (["--q-bits", "-4"], "but got -4"),
        (["--q-group-size", "0"], "'q_group_size' must be 32 or 64 or 128"),
        (["--q-mode", "mxfp4", "--q-bits", "8"], "'q_bits' must be 4 for q_mode 'mxfp4'"),
        (["--q-mode", "nvfp4", "--q-group-size", "0"], "'q_group_size' must be 16"),
        (["--quant-predicate", "mixed_2_6", "--q-group-size", "0"], "'q_group_size' must be 32"),
        (["--quant-predicate", "mixed_2_6", "--q-bits", "8"], "has bits of its own"),
    ],
)
def test_numbers_that_no_quantisation_has(options, rule, capsys, tmp_path):
    """0 is no number of bits; mlx-lm would take its default instead and say nothing."""
    argv = ["--hf-path", tmp_path / "not-even-read", "--mlx-path", tmp_path / "out", "-q"]
    assert rule in fails(capsys, "convert", *argv, *options)
