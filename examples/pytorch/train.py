"""Train streams for a Hugging Face model that stays as it is; mlx-specstream converts them.

    python train.py --model MODEL --data DATA --out STREAMS --minutes 60

DATA holds train.jsonl and, if there is one, valid.jsonl, with rows {"prompt": ..., "completion": ...}.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from streaming import PROJECTIONS, StreamConfig, StreamingModel, Streams, pick
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer

EMBEDDING_SHARE = 0.05  # initial P_j against the RMS of the hidden states they are added to
EMBEDDING_RATE = 2.2  # of P_j, as a multiple of the learning rate times that RMS
MEASURED_WIDTH, MEASURED_RATE = 384, 1e-3  # of a LoRA; with the square root of the width it falls
DECAY = 0.8  # weight of a stream in the loss against that of the one before
WARM_UP = 0.03  # of the run


class Example(NamedTuple):
    """Token ids of prompt and completion, and where the completion begins."""

    tokens: list[int]
    start: int

    def hosts(self) -> range:
        """Positions whose stream 1 has a target: row t says token t + 1, its stream j token t + 1 + j."""
        return range(max(self.start - 1, 0), len(self.tokens) - 2)


class Batch(NamedTuple):
    """tokens int64 [B, L], hosts int64 [B, P], targets int64 [B, g, P] (-1: none)."""

    tokens: torch.Tensor
    hosts: torch.Tensor
    targets: torch.Tensor


def read(path: Path, tokenizer, max_length: int) -> list[Example]:
    """The rows of a file that streams can learn from; exits with a line on one that is no row."""
    found = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                example = to_example(row["prompt"], row["completion"], tokenizer)
            except (ValueError, KeyError, TypeError) as error:
                sys.exit(f'{path}:{number}: a row must have "prompt" and "completion": {error!r}')
            example = Example(example.tokens[:max_length], example.start)
            if len(example.hosts()):
                found.append(example)
    if not found:
        sys.exit(f"{path} has no row with at least two completion tokens to learn from")
    return found


def to_example(prompt: str, completion: str, tokenizer) -> Example:
    """With a chat template, if the tokenizer has one: as mlx-specstream train does it."""
    if not tokenizer.chat_template:
        bos = tokenizer.bos_token  # a prompt that brings it gets no second one
        start = tokenizer.encode(
            prompt, add_special_tokens=bos is None or not prompt.startswith(bos)
        )
        rest = tokenizer.encode(completion, add_special_tokens=False)
        return Example([*start, *rest, tokenizer.eos_token_id], len(start))
    asked = [{"role": "user", "content": prompt}]
    whole = [*asked, {"role": "assistant", "content": completion}]
    tokens = tokenizer.apply_chat_template(whole, return_dict=False)
    start = len(tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False))
    ends = [at for at in range(start, len(tokens)) if tokens[at] == tokenizer.eos_token_id]
    return Example(tokens[: ends[0] + 1] if ends else tokens, start)


def make_batch(examples: list[Example], hosts: list[list[int]], num_streams: int, device) -> Batch:
    """Right-padded; a host that is padding has no target."""
    B, L, P = len(examples), max(len(e.tokens) for e in examples), max(map(len, hosts))
    tokens, rows = torch.zeros(B, L, dtype=torch.long), torch.zeros(B, P, dtype=torch.long)
    targets = torch.full((B, num_streams, P), -1)
    for b, (example, chosen) in enumerate(zip(examples, hosts, strict=True)):
        ids = torch.tensor(example.tokens)
        tokens[b, : len(ids)] = ids
        rows[b, : len(chosen)] = torch.tensor(chosen)
        for j in range(1, num_streams + 1):
            inside = [n for n, t in enumerate(chosen) if t + 1 + j < len(ids)]
            targets[b, j - 1, inside] = ids[[chosen[n] + 1 + j for n in inside]]
    return Batch(tokens.to(device), rows.to(device), targets.to(device))


def batches(examples: list[Example], args, device) -> Iterator[Batch]:
    """Without end: random examples of similar length, a few hosts of each."""
    order = torch.Generator().manual_seed(args.seed)
    while True:
        pool = torch.randperm(len(examples), generator=order)[: 32 * args.batch_size].tolist()
        pool.sort(key=lambda k: len(examples[k].tokens))
        groups = [pool[i : i + args.batch_size] for i in range(0, len(pool), args.batch_size)]
        for group in torch.randperm(len(groups), generator=order).tolist():
            chosen = [examples[k] for k in groups[group]]
            hosts = []
            for example in chosen:
                rows = example.hosts()
                some = torch.randperm(len(rows), generator=order)[: args.hosts].sort().values
                hosts.append([rows[k] for k in some.tolist()])
            yield make_batch(chosen, hosts, args.num_streams, device)


def stream_losses(model: StreamingModel, batch: Batch, target: str) -> torch.Tensor:
    """Mean loss of each stream [g] (paper Eq. 5 without the main stream, which is frozen).

    ``hard``: cross-entropy with the text. ``distill``: the Kullback-Leibler divergence from what the
    model itself says at the row of the target. Conditioned streams learn half from what they say
    alone and half from what they say given the token before; the first one only from the latter.
    """
    states = model.deferred(batch.tokens, batch.hosts)
    valid = batch.targets >= 0
    teacher = None
    if target == "distill":
        ahead = torch.arange(1, batch.targets.shape[1] + 1, device=valid.device)[:, None]
        at = (batch.hosts[:, None] + ahead).clamp(max=batch.tokens.shape[1] - 1)
        with torch.no_grad():
            rows = pick(states.main, at.flatten(1)).unflatten(1, at.shape[1:])
            teacher = log_softmax(model.head(rows), -1)

    def losses(hidden: torch.Tensor) -> torch.Tensor:  # [B, g, P]
        logits = model.head(hidden)
        if teacher is None:
            return cross_entropy(
                logits.movedim(-1, 1), batch.targets.clamp(min=0), reduction="none"
            )
        told = log_softmax(logits, -1)
        return kl_div(told, teacher, reduction="none", log_target=True).sum(-1)

    found = losses(model.given(states.streams, batch.tokens, batch.hosts))
    if model.config.condition_rank:
        alone = losses(states.streams)
        share = torch.full((alone.shape[1], 1), 0.5, device=alone.device)
        share[0] = 0.0
        found = found + share * (alone - found)
    return (found * valid).sum((0, 2)) / valid.sum((0, 2)).clamp(min=1)


@torch.no_grad()
def accuracy(model: StreamingModel, held_out: list[Batch]) -> list[float]:
    """How often each stream's first guess (given the token before, if conditioned) is the text's."""
    right = total = 0
    for batch in held_out:
        states = model.deferred(batch.tokens, batch.hosts).streams
        said = model.head(model.given(states, batch.tokens, batch.hosts)).argmax(-1)
        valid = batch.targets >= 0
        right = right + ((said == batch.targets) & valid).sum((0, 2))
        total = total + valid.sum((0, 2))
    return (right / total.clamp(min=1)).tolist()


def held_out_batches(examples: list[Example], args, device) -> list[Batch]:
    """No larger than those of training: as many rows, and as many hosts of each, evenly apart."""
    found = []
    for at in range(0, len(examples), args.batch_size):
        some = examples[at : at + args.batch_size]
        rows = [list(e.hosts()) for e in some]
        rows = [r[:: -(-len(r) // args.hosts)] for r in rows]
        found.append(make_batch(some, rows, args.num_streams, device))
    return found


@torch.no_grad()
def hidden_rms(model: StreamingModel, batch: Batch) -> float:
    """Of the hidden states that P_j is added to: the median over hosts, for the first token of a text is
    far larger in most models."""
    cut = pick(model.deferred(batch.tokens, batch.hosts).cut, batch.hosts).float()
    return cut.square().mean(-1).sqrt()[batch.targets[:, 0] >= 0].median().item()


def train(model: StreamingModel, examples: list[Example], held_out: list[Example], args) -> dict:
    """Train until the steps or the minutes are over; returns what is stored as ``training``."""
    device, streams = model.model.device, model.streams
    source, g = batches(examples, args, device), args.num_streams
    valid = held_out_batches(held_out, args, device)
    rms = hidden_rms(model, next(source))
    with torch.no_grad():  # small against the hidden states they are added to
        streams.stream_embeddings.weight.mul_(EMBEDDING_SHARE * rms)
    slow = [p for n, p in streams.named_parameters() if n != "stream_embeddings.weight"]
    groups = [
        {
            "params": [streams.stream_embeddings.weight],
            "speed": EMBEDDING_RATE * rms,
            "weight_decay": 0,
        },
        {"params": slow, "speed": 1.0, "weight_decay": 0.01},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate)
    weights = DECAY ** torch.arange(g, device=device)
    begun, done, step, losses = time.monotonic(), 0.0, 0, None
    about = {"origin": "PyTorch", "torch": torch.__version__, "arguments": vars(args).copy()}
    # Streams are shared with others, paths are not.
    about["arguments"] = {k: v for k, v in about["arguments"].items() if not isinstance(v, Path)}
    about["arguments"]["model"] = Path(args.model).name
    while done < 1.0:
        rate = args.learning_rate * min((done + 1e-3) / WARM_UP, (1 - done) / (1 - WARM_UP))
        for group in optimizer.param_groups:
            group["lr"] = rate * group["speed"]
        losses = stream_losses(model, next(source), args.target)
        loss = (losses * weights).sum() / weights.sum()
        if not loss.isfinite():
            sys.exit(f"the loss became {loss.item()} at step {step}: use a lower --learning-rate")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(streams.parameters(), 1.0)
        optimizer.step()
        step += 1
        seconds = time.monotonic() - begun
        done = seconds / (60 * args.minutes) if args.minutes else step / args.iters
        about |= {"steps": step, "seconds": round(seconds, 1)}
        if step % args.report_every == 0 or done >= 1.0:
            about["losses"] = [round(x, 4) for x in losses.tolist()]
            if valid:
                about["top1"] = [round(x, 4) for x in accuracy(model, valid)]
            print(
                f"step {step}, {seconds:.0f} s: losses {about['losses']}", file=sys.stderr, end=""
            )
            print(f", valid top-1 {about['top1']}" if valid else "", file=sys.stderr, flush=True)
        if step % args.save_every == 0:
            streams.save(args.out, about)
    return about


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="Hugging Face folder or hub id")
    parser.add_argument("--data", type=Path, required=True, help="folder with train.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="folder for the streams")
    parser.add_argument("--num-streams", type=int, default=4, help="gamma")
    parser.add_argument("--msa-layers", type=int, help="Ns (half of the layers, at most 4)")
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--lora-alpha", type=float, help="default: the rank")
    parser.add_argument("--lora-targets", nargs="+", choices=PROJECTIONS, default=PROJECTIONS)
    parser.add_argument("--condition-rank", type=int, default=64, help="of conditioned drafts")
    parser.add_argument("--root-rank", type=int, default=32, help="of streams that know their root")
    parser.add_argument("--target", choices=("hard", "distill"), default="hard")
    parser.add_argument("--iters", type=int, default=3000)
    parser.add_argument("--minutes", type=float, help="train for this long instead of --iters")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--hosts", type=int, default=16, help="positions with streams per sequence")
    parser.add_argument("--learning-rate", type=float, help="follows from the hidden size")
    parser.add_argument("--max-seq-length", type=int, default=2048)
    parser.add_argument("--valid-rows", type=int, default=50)
    parser.add_argument("--report-every", type=int, default=100)
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> Path:
    """Returns the file that was written."""
    args = parse(argv)
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    base = base.eval().to(args.device)  # no dropout: the base is frozen
    layers = base.config.num_hidden_layers
    if args.learning_rate is None:
        args.learning_rate = MEASURED_RATE * min(1, MEASURED_WIDTH / base.config.hidden_size) ** 0.5
    config = StreamConfig(
        num_streams=args.num_streams,
        msa_layers=args.msa_layers or max(1, min(4, layers // 2)),
        lora_rank=args.lora_rank,
        lora_alpha=float(args.lora_rank if args.lora_alpha is None else args.lora_alpha),
        lora_targets=tuple(args.lora_targets),
        condition_rank=args.condition_rank,
        condition_shared=args.condition_rank > 0,
        root_rank=args.root_rank,
    )
    model = StreamingModel(base, Streams(base, config).to(args.device))
    examples = read(args.data / "train.jsonl", tokenizer, args.max_seq_length)
    held_out = args.data / "valid.jsonl"
    valid = read(held_out, tokenizer, args.max_seq_length) if held_out.is_file() else []
    extra = sum(p.numel() for p in model.streams.parameters())
    print(f"{len(examples)} rows, {extra:,} parameters in the streams", file=sys.stderr)
    about = train(model, examples, valid[: args.valid_rows], args)
    path = model.streams.save(args.out, about)
    print(path)
    return path


if __name__ == "__main__":
    main()
