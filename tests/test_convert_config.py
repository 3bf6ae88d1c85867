"""Hugging Face configs, old and new, as the mlx-lm class reads them; what it would drop."""

import copy

import pytest

from mlx_specstream.converters.hf_config import normalise, pattern_of
from mlx_specstream.converters.rotary import check_rotary, inverse_frequencies
from mlx_specstream.errors import BadCheckpoint, UnsupportedModel
from mlx_specstream.model.architectures import model_classes

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]


def config(model_type, **settings):
    small = {
        "hidden_size": 24,
        "intermediate_size": 36,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 43,
        "max_position_embeddings": 128,
    }
    return {"model_type": model_type, **small, **settings}


def test_new_style_becomes_what_mlx_lm_reads():
    source = config("llama", rope_parameters=LLAMA3, torch_dtype="torch.bfloat16")
    before = copy.deepcopy(source)
    got, notes = normalise(source)
    assert source == before
    assert notes == []
    assert "rope_parameters" not in got
    assert got["rope_theta"] == 5e5
    assert got["rope_scaling"] == {
        "type": "llama3",
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    assert (got["dtype"], got["torch_dtype"]) == ("bfloat16", "bfloat16")


def test_old_style_gives_the_same():
    scaling = {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
    old = config("llama", rope_theta=5e5, rope_scaling=scaling)
    keys = ("rope_theta", "rope_scaling", "tie_word_embeddings", "head_dim")
    old, new = normalise(old)[0], normalise(config("llama", rope_parameters=LLAMA3))[0]
    assert [old[key] for key in keys] == [new[key] for key in keys]
    assert normalise(new)[0] == new  # a converted folder converts again


def test_a_class_that_reads_the_new_style_gets_both():
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 7e5}
    got = normalise(config("qwen3", head_dim=10, rope_parameters=rope))[0]
    assert got["rope_parameters"] == rope
    assert (got["rope_theta"], got["rope_scaling"]["type"]) == (7e5, "linear")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        # transformers unties a Llama and gives Qwen2 a theta of 1e4; mlx-lm says otherwise
        (config("llama"), {"tie_word_embeddings": False, "head_dim": 6}),
        (config("qwen2"), {"tie_word_embeddings": False, "rope_theta": 10000.0}),
        (config("gemma2", sliding_window=None), {"query_pre_attn_scalar": 256}),
        (config("llama", tie_word_embeddings=True), {"tie_word_embeddings": True}),
        (
            config("gpt_neox", rope_parameters={"rope_theta": 3e4, "partial_rotary_factor": 0.5}),
            {"rotary_emb_base": 3e4, "rotary_pct": 0.5},
        ),
        (
            config("phi", rope_parameters={"rope_theta": 3e4, "partial_rotary_factor": 0.25}),
            {"rope_theta": 3e4, "partial_rotary_factor": 0.25},
        ),
        (
            config(
                "gemma3_text",
                num_hidden_layers=6,
                layer_types=[*MIXED[:2], *MIXED[:2], *MIXED[:2]],
                rope_parameters={
                    "sliding_attention": {"rope_type": "default", "rope_theta": 3e3},
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
                },
            ),
            {
                "rope_theta": 2e6,
                "rope_local_base_freq": 3e3,
                "rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 8.0},
                "sliding_window_pattern": 2,
            },
        ),
        (
            config("mistral", sliding_window=9, layer_types=MIXED),
            {"layer_types": MIXED, "sliding_window": 9, "model_type": "mistral"},
        ),
        (
            config("ministral", sliding_window=9, layer_types=MIXED),
            {"layer_types": MIXED, "sliding_window": 9, "model_type": "mistral"},
        ),
        (  # a window as wide as the context is none
            config("ministral", sliding_window=128, layer_types=MIXED[:1] * 3),
            {"layer_types": MIXED[1:2] * 3},
        ),
        (config("mistral", sliding_window=None), {"sliding_window": None}),
        (  # transformers 5 has renamed what mlx-lm still reads
            config("qwen3_moe", num_local_experts=5, head_dim=6),
            {"num_experts": 5, "moe_intermediate_size": 768},
        ),
        (config("mistral", sliding_window=128), {}),
        (config("smollm3"), {"no_rope_layers": [1, 1, 1]}),
        (config("gpt2", n_positions=19, n_embd=24, n_head=4, n_layer=3), {"n_ctx": 19}),
        (config("exaone4", sliding_window=9, layer_types=MIXED), {"sliding_window_pattern": "LGL"}),
    ],
)
def test_settings_and_defaults(source, expected):
    got = normalise(source)[0]
    assert {key: got[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (config("qwen2", hidden_act="gelu"), "hidden_act.*gelu.*qwen2"),
        (config("llama", partial_rotary_factor=0.5), "partial_rotary_factor.*0.5.*llama"),
        (config("gemma2", tie_word_embeddings=False), "tie_word_embeddings.*False.*gemma2"),
        (config("gemma", rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling.*gemma"),
        (config("mixtral", head_dim=10, sliding_window=None), "head_dim.*10.*mixtral"),
        (config("llama", final_logit_softcapping=30.0), "final_logit_softcapping.*30.0.*llama"),
        (config("qwen2", clip_qkv=8.0), "clip_qkv.*8.0.*qwen2"),
        (config("qwen2_moe", norm_topk_prob=True), "norm_topk_prob.*True.*qwen2_moe"),
        (config("phi", qk_layernorm=True), "qk_layernorm.*True.*phi"),
        (
            config("mistral", sliding_window=9, layer_types=MIXED[:1] * 3),
            "sliding_window.*9.*every layer.*set it to null",
        ),
        (config("mixtral", sliding_window=9), "sliding_window.*9.*no window"),
        (
            config("qwen2", use_sliding_window=True, sliding_window=9, max_window_layers=1),
            "sliding_window.*9.*qwen2",
        ),
        (config("gemma3_text", layer_types=[MIXED[1], *MIXED[:2]]), "every n-th layer"),
        (
            config(
                "llama",
                layer_types=MIXED,
                rope_parameters={
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                },
            ),
            "differs between layer types",
        ),
        (config("llama", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "not a valid"),
        (config("llama", num_hidden_layers="three"), "num_hidden_layers"),
        (config("internlm2", num_hidden_layers="three"), "wrong kind"),
    ],
)
def test_what_would_be_lost_is_an_error(source, words):
    with pytest.raises(BadCheckpoint, match=f"(?s){words}") as error:
        normalise(source)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "note"),
    [
        (config("gemma2", sliding_window=9), "exact up to 9 tokens"),
        (config("mistral", sliding_window=9), "exact up to 9 tokens"),
        (config("phi3", sliding_window=9, pad_token_id=0), "exact up to 9 tokens"),
        (
            config(
                "phi3",
                pad_token_id=0,
                original_max_position_embeddings=16,
                rope_parameters={
                    "rope_type": "longrope",
                    "rope_theta": 2e4,
                    "short_factor": [1.0] * 3,
                    "long_factor": [2.0] * 3,
                },
            ),
            "short ones up to 16 tokens",
        ),
        (config("gpt_neox"), "approximates GELU"),
    ],
)
def test_known_differences_are_said(source, note):
    assert any(note in line for line in normalise(source)[1])


def test_foreign_and_neutral_settings_pass():
    extra = {
        "use_cache": True,
        "attention_dropout": 0.1,
        "my_own_note": [1, 2],
        "num_experts_per_tok": 2,  # means nothing without experts
        "final_logit_softcapping": None,
        "hidden_act": "silu",
        "sliding_window": None,
    }
    got, notes = normalise(config("llama", **extra))
    assert notes == []
    assert {key: got[key] for key in extra} == extra
    normalise(config("phi", hidden_act="gelu_pytorch_tanh"))  # another spelling of gelu_new


def test_the_text_part_of_a_wrapper_is_rewritten():
    text = config("llama", rope_parameters={"rope_type": "default", "rope_theta": 3e5})
    wrapper = {"model_type": "mistral3", "text_config": text, "dtype": "bfloat16"}
    got = normalise(wrapper)[0]
    assert got["text_config"]["rope_theta"] == 3e5
    assert got["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("model_type", ["no_such", "base", "olmo", "../x", "a.b", "", None, 3])
def test_unsupported_architectures(model_type):
    with pytest.raises(UnsupportedModel, match="model_type") as error:
        normalise({"model_type": model_type})
    assert "\n" not in str(error.value)


def test_periods_of_layer_types():
    assert pattern_of(MIXED[:2] * 2, "gemma3_text") == 2
    assert pattern_of([*MIXED[:1] * 2, "full_attention"] * 2 + MIXED[:1], "cohere2") == 3
    with pytest.raises(BadCheckpoint):
        pattern_of(MIXED[:1] * 5, "gemma3_text")


def built(source):
    got = normalise(source)[0]
    model, args = model_classes(got)
    return model(args.from_dict(got))


def view(source, **rope):
    return {**source, "head_dim": 6, "rope_parameters": rope}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 3e5},
        {"rope_type": "linear", "rope_theta": 7e4, "factor": 3.0},
        LLAMA3,
        {
            "rope_type": "yarn",
            "rope_theta": 15000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "mscale": 0.7,
            "mscale_all_dim": 0.4,
        },
    ],
)
def test_rotary_modules_are_asked(rope):
    source = config("llama")
    model = built({**source, "rope_parameters": dict(rope)})
    assert check_rotary(model, view(source, **rope), "llama") == []
    for wrong in ({"rope_theta": 2 * rope["rope_theta"]}, {"rope_type": "linear", "factor": 5.0}):
        with pytest.raises(BadCheckpoint, match=r"layer \d would not rotate as the config says"):
            check_rotary(model, view(source, **{**rope, **wrong}), "llama")


@pytest.mark.parametrize(
    "source",
    [
        config("mixtral", sliding_window=None),
        config(
            "qwen3_moe",
            head_dim=6,
            num_experts=5,
            moe_intermediate_size=10,
            num_experts_per_tok=2,
        ),
    ],
    ids=["mixtral", "qwen3_moe"],
)
def test_a_declared_field_that_the_class_ignores(source):
    rope = {"rope_type": "linear", "rope_theta": 7e4, "factor": 3.0}
    model = built({**source, "rope_parameters": dict(rope)})
    with pytest.raises(BadCheckpoint, match="dropped or computed differently"):
        check_rotary(model, view(source, **rope), source["model_type"])


def test_yarn_without_rounding_is_a_note():
    rope = {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 4096,  # a range that ends between two frequencies
        "truncate": False,
    }
    source = config("llama", head_dim=6)
    model = built({**source, "rope_parameters": dict(rope)})
    assert "truncate=false" in check_rotary(model, view(source, **rope), "llama")[0]


def test_rotary_formulas_by_hand():
    frequencies, scale = inverse_frequencies({"rope_theta": 100.0}, 4, 128)
    assert frequencies.tolist() == pytest.approx([1.0, 0.1])
    assert scale == 1.0
    long = {"rope_type": "longrope", "rope_theta": 100.0, "long_factor": [2.0, 4.0]}
    long |= {"original_max_position_embeddings": 16}
    frequencies, scale = inverse_frequencies(long, 4, 64)
    assert frequencies.tolist() == pytest.approx([0.5, 0.025])
    assert scale == pytest.approx(1.5**0.5)  # 1 + ln 4 / ln 16
    assert inverse_frequencies({"rope_theta": 1.0, "rope_type": "mrope"}, 4, 64) is None
