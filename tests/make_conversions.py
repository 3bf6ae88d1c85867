"""Write docs/conversions.md: every architecture from every source format, from real runs.

    pip install -e '.[torch]' && python tests/make_conversions.py [SHARED_MODELS]

Each cell is a conversion of a tiny random checkpoint that PyTorch, transformers or PEFT wrote, and says
how far the logits of mlx-lm are from theirs. With a folder of real models (`e2e-sql-14m`,
`babyllama-0.9m`) their greedy text from each format is compared, too, and each kind of quantisation
measured.
"""

import mlx_specstream  # noqa: F401  before mlx: it picks the BLAS  # isort: skip
import shutil
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
import torch_sources as sources
import torch_twin
from safetensors.torch import load_file
from test_convert_streams import our_logits
from test_convert_torch import (
    ADAPTERS,
    DTYPES,
    MERGED_ONLY,
    TOKENS,
    beside,
    mixed_pickle,
    mixed_safetensors,
    ours,
)
from torch_models import MODELS, build, family_of, logits_of, pack_experts, save_packed
from transformers import AutoModelForCausalLM

from mlx_specstream import load
from mlx_specstream.converters import convert
from mlx_specstream.converters.export import export
from mlx_specstream.errors import SpecStreamError
from mlx_specstream.model.support import TESTED

PAGE = Path(__file__).resolve().parents[1] / "docs" / "conversions.md"
NAMES = [name for name in MODELS if name != "llama_bf16"]
# What goes by each name here, for the reader.
KNOWN_AS = {
    "llama": "Llama 3 (llama3 rope)",
    "llama_plain": "Llama 1 and 2, OpenLLaMA, Vicuna",
    "mistral": "Mistral (sliding layers)",
    "phi": "Phi-1, 1.5, 2",
    "phi3": "Phi-3",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3 with experts",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3",
    "mixtral": "Mixtral",
    "smollm3": "SmolLM3",
    "olmo2": "OLMo 2",
    "gpt_oss": "gpt-oss, fine-tuned in full",
    "mamba": "Mamba",
    "qwen3_next": "Qwen3-Next (gated delta)",
    "ministral3": "Ministral 3",
    "gpt2": "GPT-2",
    "opt": "OPT-125m, 1.3b, 6.7b",
    "opt_350m": "OPT-350m",
    "opt_untied": "OPT, untied, no biases, gelu (Galactica)",
}
PROMPTS = {
    "babyllama-0.9m": "Once upon a time",
    "e2e-sql-14m": "<s>MR: name[The Phoenix], food[Italian], area[riverside]\nText:",
}
MODES = [
    *((f"affine, {bits} bits", {"q_bits": bits}) for bits in (2, 3, 4, 6, 8)),
    *((mode, {"q_mode": mode}) for mode in ("mxfp4", "nvfp4", "mxfp8")),
    *((name, {"quant_predicate": name}) for name in ("mixed_2_6", "mixed_3_6", "mixed_4_6")),
]


class Workbench:
    """A folder for one source and its conversions."""

    def __enter__(self):
        self.inner = tempfile.TemporaryDirectory()
        self.root = Path(self.inner.name)
        self.source = self.root / "hf"
        self.source.mkdir()
        sources.add_tokenizer(self.source)
        return self

    def __exit__(self, *error):
        self.inner.cleanup()


def apart(got, expected) -> str:
    """The largest difference, as a share of the largest logit."""
    expected = np.array(expected.detach() if torch.is_tensor(expected) else expected)
    share = np.abs(got - expected).max() / np.abs(expected).max()
    return f"{share:.0e}" if share <= 1e-4 else f"**{share:.0e}**"


def cell(run) -> str:
    """What a run says; the line of a refusal is collected as a footnote."""
    try:
        return run()
    except SpecStreamError as error:
        line = " ".join(str(error).split()).replace(tempfile.gettempdir(), "")
        if line not in FOOTNOTES:
            FOOTNOTES.append(line)
        return f"refused [{FOOTNOTES.index(line) + 1}]"


FOOTNOTES: list[str] = []


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) + "\n"


def architectures() -> str:
    rows = []
    for name in NAMES:
        row = [f"`{family_of(name)}`", KNOWN_AS.get(name, "")]
        for write in sources.FORMATS.values():
            row.append(cell(lambda n=name, w=write: from_format(n, w)))
        row.append(cell(lambda n=name: way_back(n)))
        row.append("yes" if family_of(name) in TESTED else "no: recurrent layers")
        rows.append(row)
        print(*row, sep=" | ", flush=True)
    blank = ["" for _ in list(sources.FORMATS)[1:]]
    rows.append(["`gpt_oss`", "experts in MXFP4, as published", published(), *blank, "", "yes"])
    head = ["model_type", "such as", *sources.FORMATS, "and back", "streams"]
    return table(head, rows)


def published() -> str:
    with Workbench() as bench:
        model = build("gpt_oss", bench.source)
        packed = pack_experts(model)
        expected = logits_of(model, TOKENS)
        save_packed(model, packed, bench.source)
        convert(bench.source, bench.root / "out", dtype="float32")
        return apart(ours(bench.root / "out"), expected)


def from_format(name: str, write) -> str:
    with Workbench() as bench:
        model = build(name, bench.source)
        expected = logits_of(model, TOKENS)
        convert(write(model, bench.source), bench.root / "out", dtype="float32")
        return apart(ours(bench.root / "out"), expected)


def way_back(name: str) -> str:
    """Exported again: bit-equal tensors, and transformers reads them."""
    with Workbench() as bench:
        model = build(name, bench.source)
        model.save_pretrained(bench.source)
        convert(bench.source, bench.root / "mlx")
        export(bench.root / "mlx", bench.root / "back")
        before = load_file(bench.source / "model.safetensors")
        after = load_file(bench.root / "back/model.safetensors")
        before = {k.removeprefix("transformer."): v for k, v in before.items()}
        equal = before.keys() == after.keys() and all(
            torch.equal(before[k], after[k]) for k in after
        )
        read = AutoModelForCausalLM.from_pretrained(
            bench.root / "back", attn_implementation="eager", dtype=torch.float32
        )
        expected = logits_of(model, TOKENS)
        close = apart(logits_of(read.eval(), TOKENS).numpy(), expected)
        return f"bit-equal, {close}" if equal else "**differs**"


def precisions() -> str:
    rows = []
    for name in ("llama", "qwen3", "gemma2", "opt", "gpt2"):
        for tied in (True, False) if name in ("llama", "qwen3", "opt") else (None,):
            row = [f"`{name}`", {True: "tied", False: "untied", None: "tied (always)"}[tied]]
            row += [cell(lambda n=name, t=tied, d=d: in_precision(n, t, d)) for d in DTYPES]
            rows.append(row)
    return table(["model_type", "head", *DTYPES], rows)


def in_precision(name: str, tied: bool | None, dtype: str) -> str:
    with Workbench() as bench:
        changes = {} if tied is None else {"tie_word_embeddings": tied}
        model = build(name, bench.source, **changes)
        with torch.no_grad():
            for value in model.parameters():
                value.copy_(value.to(DTYPES[dtype]).float())
        expected = logits_of(model, TOKENS)
        sources.pickled(model.to(DTYPES[dtype]), bench.source)
        convert(bench.source, bench.root / "out", dtype="float32")
        return apart(ours(bench.root / "out"), expected)


def meta() -> str:
    rows = []
    for parts in (1, 2):
        with Workbench() as bench:
            model = build("llama_plain", bench.source)
            (bench.source / "config.json").unlink()
            convert(sources.write_meta(model, bench.source, parts), bench.root / "out")
            rows.append([str(parts), apart(ours(bench.root / "out"), logits_of(model, TOKENS))])
    return table(["parts of `consolidated.*.pth`", "result"], rows)


def adapters() -> str:
    rows = []
    for kind, (name, settings) in ADAPTERS.items():
        with Workbench() as bench:
            model = build(name, bench.source)
            model.save_pretrained(bench.source)
            adapted = sources.write_peft(model, bench.root / "lora", **settings)
            expected = logits_of(adapted, TOKENS)
            convert(bench.source, bench.root / "out", adapter=bench.root / "lora")
            convert(bench.source, bench.root / "base")
            row = [kind, f"`{name}`", apart(ours(bench.root / "out"), expected)]

            def kept_apart(bench=bench, expected=expected):
                convert(bench.root / "lora", bench.root / "apart", base=bench.source)
                return apart(ours(bench.root / "base", bench.root / "apart"), expected)

            row.append("must be merged" if kind in MERGED_ONLY else cell(kept_apart))
            rows.append(row)
    return table(["adapter of PEFT", "base", "merged (`--adapter`)", "kept apart (mlx-lm's)"], rows)


def streams() -> str:
    rows = []
    for variant, changes in torch_twin.VARIANTS.items():
        config = {**torch_twin.FULL, **changes}
        row = [variant]
        for write in (mixed_safetensors, mixed_pickle, beside):
            with Workbench() as bench:
                model = build("llama_plain", bench.source)
                tensors = torch_twin.random_streams(model, config)
                expected = torch_twin.twin(model, tensors, config, TOKENS)
                source = write(model, tensors, config, bench.source)
                convert(source, bench.root / "out", dtype="float32")
                got = our_logits(load(bench.root / "out")[0], TOKENS)
                worst = max((apart(got[key], expected[key]) for key in expected), key=share_of)
                row.append(worst)
        rows.append(row)
    return table(
        ["streams", "one safetensors file", "training `.pt`", "file beside the base"], rows
    )


def share_of(text: str) -> float:
    return float(text.strip("*"))


def real_models(folder: Path) -> str:
    rows = []
    for name, prompt in PROMPTS.items():
        with Workbench() as bench:
            model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).eval()
            convert(folder / name, bench.root / "direct", dtype="float32")
            tokenizer = load(bench.root / "direct")[1]
            tokens = tokenizer.encode(prompt)
            expected = greedy(model, tokens)
            row = [name, same_text(bench.root / "direct", tokens, expected)]
            formats = {**sources.FORMATS, "Meta, 2 parts": lambda m, f: sources.write_meta(m, f, 2)}
            for number, write in enumerate(formats.values()):
                source = bench.root / f"hf{number}"
                shutil.copytree(
                    folder / name, source, ignore=shutil.ignore_patterns("*.bin", "*.safe*")
                )
                path, target = write(model, source), bench.root / f"out{number}"
                convert(path, target, dtype="float32")
                row.append(same_text(target, tokens, expected))
            export(bench.root / "direct", bench.root / "back")
            convert(bench.root / "back", bench.root / "again")
            row.append(same_text(bench.root / "again", tokens, expected))
            rows.append(row)
            print(*row, sep=" | ", flush=True)
    return table(["model", "as it is", *formats, "exported and back"], rows)


def greedy(model, tokens: list[int], count: int = 96) -> list[int]:
    """transformers' own argmax, through the end of sequence, so that texts are long."""
    tokens, begin = list(tokens), len(tokens)
    for _ in range(count):
        tokens.append(int(logits_of(model, tokens)[-1].argmax()))
    return tokens[begin:]


def same_text(folder: Path, prompt: list[int], expected: list[int]) -> str:
    from mlx_lm.generate import generate_step

    model, _ = load(folder)
    steps = generate_step(mx.array(prompt), model, max_tokens=len(expected))
    got = [token for token, _ in steps]
    return f"same {len(expected)} tokens" if got == expected else "**differs**"


def quantisation(folder: Path) -> str:
    rows = []
    for label, options in MODES:
        row = [label]
        for name in PROMPTS:
            with Workbench() as bench:
                lines = []
                group = {} if "q_mode" in options else {"q_group_size": 32}
                convert(
                    folder / name,
                    bench.root / "q",
                    quantize=True,
                    report=True,
                    log=lines.append,
                    **group,
                    **options,
                )
                report = next(line for line in lines if line.startswith("report"))
                mean, agree = report.split()[4], report.split("choice at ")[1].split()[0]
                row += [mean, agree]
        rows.append(row)
        print(*row, sep=" | ", flush=True)
    head = ["kind"]
    for name in PROMPTS:
        head += [f"{name}: KL, nats", "same first choice"]
    return table(head, rows)


def main() -> None:
    warnings.simplefilter("ignore")  # of other people's libraries
    mx.set_default_device(mx.cpu)
    libraries = ("mlx", "mlx-lm", "torch", "transformers", "peft", "safetensors")
    versions = ", ".join(f"{name} {version(name)}" for name in libraries)
    parts = [
        "# Conversions, from real runs\n",
        f"Written by `python tests/make_conversions.py`; {versions}, on a CPU. A figure is the largest "
        "difference of\nany logit from what PyTorch computes, as a share of the largest logit, in "
        "float32; 1e-4 would pass.\n",
        "## Architectures and formats\n",
        "Tiny random checkpoints, every setting far from its default. *And back*: written for "
        "transformers again\nwith `mlx-specstream export`, tensors compared bit by bit, and read by "
        "transformers. *streams*: parity of tree\ndecoding and streams is tested.\n",
        architectures(),
        "## Precisions and heads\n",
        "From `pytorch_model.bin`, computed in float32 from the stored weights.\n",
        precisions(),
        "## Meta's form\n",
        meta(),
        "## Adapters\n",
        "*Tied*: the base has one tensor for head and embedding, and the adapter changes one of them, as "
        "PEFT's\nrunning model does (its `merge_and_unload` changes both); the result has two. A checkpoint "
        "whose head differs\nfrom the embedding, whatever its config.json says, is converted as transformers "
        "5 reads it, with two tensors\nand `tie_word_embeddings` false; where mlx-lm's class has one for both "
        "(Gemma, GPT-2) it is refused.\n",
        adapters(),
        "## Streams trained in PyTorch\n",
        "The largest difference of main, stream, early-exit and conditioned logits.\n",
        streams(),
    ]
    if len(sys.argv) > 1:
        shared = Path(sys.argv[1])
        parts += [
            "## Two real models, greedy text\n",
            "Against the tokens that transformers ranks first in float32, one after the other (past an "
            "end of sequence).\n",
            real_models(shared),
            "## Quantisation\n",
            "What `--report` prints: KL(before || after) and how often both rank the same token first, "
            "over the\npositions of six prompts. Groups of 32 for affine and the mixed recipes.\n",
            quantisation(shared),
        ]
    if FOOTNOTES:
        parts.append("\n".join(f"[{i}] {line}  " for i, line in enumerate(FOOTNOTES, 1)) + "\n")
    PAGE.write_text("\n".join(parts), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
