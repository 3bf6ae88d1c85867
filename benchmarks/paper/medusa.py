"""Medusa-1 heads (arXiv 2401.10774) as a baseline: the base is frozen, each head guesses one token ahead.

    python benchmarks/paper/medusa.py train --model M --data own --out heads --minutes 60
    python benchmarks/paper/medusa.py measure --model M --heads heads --task e2e

Head j is one residual block on the last hidden state x, after the final norm, and a head of its own
that begins as the base's (h^2 + h V parameters), or the base's own head (``--shared-head``):

    logits_j = U_j (x + silu(W_j x + b_j))        W_j, b_j = 0 at first

The heads take the place of streams: they are trained by the same trainer on the same rows, get temperatures
fitted on the same held-out rows and guess for the same decoder, as streams that run through no layer at all.
"""

import study  # first: it finds a fast BLAS  # isort: skip
import json
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from machine import about_machine
from mlx.utils import tree_flatten
from mlx_lm import load

from mlx_specstream.config import StreamConfig
from mlx_specstream.generate import stream_generate
from mlx_specstream.measure.evaluate import replayed
from mlx_specstream.model.checkpoint import save_tensors
from mlx_specstream.model.projections import embedding_of, hidden_size, weight_shape
from mlx_specstream.model.seams import Seams, detach
from mlx_specstream.model.streams import Streams
from mlx_specstream.train.calibration import fit_temperatures
from mlx_specstream.train.config import TrainConfig
from mlx_specstream.train.data import digest, read_examples
from mlx_specstream.train.loss import HEAD_ELEMENTS
from mlx_specstream.train.session import stop_between_steps
from mlx_specstream.train.trainer import CHECKPOINT, Trainer

WEIGHTS, ABOUT = "medusa.safetensors", "medusa.json"
TREES = ("chain", *(f"best:{n}" for n in (4, 6, 8, 12, 16, 24, 32)))


class Heads(Streams):
    """The parameters; streams to whoever asks, but without any layer, LoRA or embedding of theirs."""

    def __init__(self, model: nn.Module, num_heads: int, shared_head: bool):
        width, head = hidden_size(model), head_matrix(model)
        nothing = StreamConfig(num_heads, msa_layers=1, lora_rank=0, value_rotation=1.0)
        super().__init__(nothing, width, [])
        self.w = mx.zeros((num_heads, width, width))
        self.b = mx.zeros((num_heads, 1, width))
        if not shared_head:
            self.u = mx.broadcast_to(head.T.astype(mx.float32), (num_heads, width, head.shape[0]))

    def states(self, hidden: mx.array) -> mx.array:
        """Last hidden states of the base [B, P, E] -> [B, g, P, E]"""
        x = hidden[:, None]
        return x + nn.silu(x @ self.w + self.b)


class MedusaSeams(Seams):
    """The seams of a model whose guesses come from heads; its passes are as ever."""

    def __init__(self, model: nn.Module, heads: Heads):
        super().__init__(detach(model))
        self.streams = heads
        self.kept.clear()

    def forward(self, run, tokens=None, stores=None):
        logits = super().forward(run, tokens, stores)
        if run.cut_hidden is None:  # the heads begin behind the last layer
            run.cut_hidden = run.last_hidden
        return logits

    def run_streams(
        self, host_hidden, hosts, roots, stores, prefix=None, decoding=False, gamma=None
    ):
        """States of the heads [B, g * P, E] of hosts whose last hidden states are [B, P, E]."""
        states = self.streams.states(self.model.model.norm(host_hidden))[:, :gamma]
        return SimpleNamespace(last_hidden=states.flatten(1, 2).astype(host_hidden.dtype))

    def head(self, hidden):
        """States of all heads [B, g * P, E] -> logits [B, g * P, V]."""
        B, rows, E = hidden.shape
        assert B * rows * self.vocabulary_size <= HEAD_ELEMENTS, "in parts, heads would be mixed up"
        if "u" not in self.streams:
            return hidden @ head_matrix(self.model).T
        g = min(rows, self.streams.config.num_streams)  # of one host perhaps the first ones alone
        return (hidden.reshape(B, g, rows // g, E) @ self.streams.u[:g]).flatten(1, 2)


def head_matrix(model: nn.Module) -> mx.array:
    """[V, E]"""
    return (model.lm_head if "lm_head" in model else model.model.embed_tokens).weight


def load_heads(model: nn.Module, folder: Path) -> MedusaSeams:
    """Put trained heads into a model."""
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    heads = Heads(model, about["heads"], about["shared_head"])
    heads.load_weights(str(folder / WEIGHTS))
    heads.temperatures = np.array(about["temperatures"], np.float32)
    return MedusaSeams(model, heads)


def train(args) -> None:
    model, tokenizer = load(str(args.model))
    size = weight_shape(embedding_of(model))[0]
    hosts = min(args.hosts, HEAD_ELEMENTS // (args.batch_size * args.heads_number * size))
    config = TrainConfig(
        iters=args.iters or TrainConfig.iters, minutes=args.minutes, batch_size=args.batch_size,
        hosts=hosts, seed=args.seed, learning_rate=args.learning_rate, eval_every=1000,
    )  # fmt: skip
    train_rows, valid_rows = (
        read_examples(args.data, split, tokenizer, 2048)[0] for split in ("train", "valid")
    )
    mx.random.seed(args.seed)
    heads = Heads(model, args.heads_number, args.shared_head)
    seams = MedusaSeams(model, heads)
    trainer = Trainer(seams, config, args.out)
    if args.resume:
        trainer.resume(digest(train_rows, valid_rows))

    def report(progress):
        if progress.validation:
            top1 = [round(x, 3) for x in progress.validation["top1"]]
            print(f"step {progress.iteration}, {progress.seconds:.0f} s: top-1 {top1}", flush=True)

    args.out.mkdir(parents=True, exist_ok=True)
    with stop_between_steps(trainer):
        trainer.run(train_rows, valid_rows, report)
    weights = dict(tree_flatten(heads.parameters()))
    save_tensors(args.out / WEIGHTS, weights, {"format": "medusa"})
    temperatures, _ = fit_temperatures(seams, trainer.held_out(valid_rows))  # as streams get them
    about = {
        "temperatures": temperatures.tolist(),
        "heads": args.heads_number,
        "shared_head": args.shared_head,
        "parameters": sum(v.size for v in weights.values()),
        "steps": trainer.iteration,
        "seconds": round(trainer.seconds, 1),
        "config": config.to_json(),
        "validation": trainer.history[-1] if trainer.history else None,
    }
    study.save_json(args.out / ABOUT, about)
    (args.out / CHECKPOINT).unlink(missing_ok=True)


def measure(args) -> None:
    """Replay every tree; decode with the largest for real, which must take as many passes."""
    model, tokenizer = load(str(args.model))
    questions = study.questions_of(args.task, tokenizer, args.prompts)
    prompts, limit = [q.prompt.tokens for q in questions], study.TASKS[args.task].max_tokens
    answer = lambda prompt, **how: list(  # noqa: E731
        stream_generate(model, tokenizer, prompt, max_tokens=limit, **how)
    )
    answers = [[r.token for r in answer(p, use_streams=False)] for p in prompts]
    seams = load_heads(model, args.heads)
    found = replayed(seams, prompts, answers, TREES, tokenizer.eos_token_ids)
    real = [answer(prompt, tree=study.BEST) for prompt in prompts]
    same = sum([r.token for r in a] == b for a, b in zip(real, answers, strict=True))
    passes = sum(a[-1].passes for a in real)
    tokens = sum(map(len, answers)) - len(answers)
    about = json.loads((args.heads / ABOUT).read_text(encoding="utf-8"))
    results = {
        "machine": about_machine(),
        "task": args.task,
        "prompts": len(prompts),
        "generated_tokens": sum(map(len, answers)),
        "heads": about,
        "replayed": found,
        "decoded": {
            "tree": study.BEST,
            "tokens_per_pass": tokens / max(1, passes),
            "identical": same,
        },
    }
    kind = "shared-head" if about["shared_head"] else "own-heads"
    study.save_json(study.RESULTS / f"medusa-{args.task}-{kind}.json", results)
    for tree, row in found.items():
        print(f"{args.task} {tree}: {row['tokens_per_pass']:.3f} tokens per pass")
    print(f"decoded with {study.BEST}: {tokens / max(1, passes):.3f}, identical {same}")


def main():
    about = __doc__.splitlines()[0]
    parser, begin = study.train_and_measure(about, train, measure, "--heads", prompts=100)
    begin.add_argument("--heads-number", type=int, default=4)
    begin.add_argument("--shared-head", action="store_true")
    begin.add_argument("--batch-size", type=int, default=4)
    begin.add_argument("--hosts", type=int, default=16)
    begin.add_argument("--learning-rate", type=float, default=1e-3)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
