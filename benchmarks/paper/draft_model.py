"""Two-model speculation as a baseline: a small llama with the base's tokenizer, learned from scratch on
the task's text, drafts for mlx-lm's own ``speculative_generate_step``.

    python benchmarks/paper/draft_model.py train --model M --data own --out draft --minutes 60
    python benchmarks/paper/draft_model.py measure --model M --draft draft --task e2e
"""

import study  # first: it finds a fast BLAS  # isort: skip
import json
import os
import time

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm import load
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.utils import save
from ways import BASELINE, stock

from mlx_specstream.measure.bench import about_model
from mlx_specstream.measure.evaluate import Evaluation
from mlx_specstream.model.checkpoint import save_tensors
from mlx_specstream.train.data import batches, read_examples
from mlx_specstream.train.trainer import CHECKPOINT

DRAFTS = (2, 3, 4, 5)  # num_draft_tokens
WARM_UP = 0.03  # of the run
SAVE_EVERY = 120.0  # seconds


def new_model(base: dict, layers: int, width: int) -> tuple[Model, dict]:
    """A llama like the base, but small; heads of 64 as there."""
    config = {
        **base, "num_hidden_layers": layers, "hidden_size": width, "intermediate_size": 8 * width // 3,
        "num_attention_heads": width // 64, "num_key_value_heads": max(1, width // 128), "head_dim": 64,
    }  # fmt: skip
    return Model(ModelArgs.from_dict(config)), config


def loss_of(model: Model, batch) -> mx.array:
    """Mean cross-entropy of every token behind the first one, prompts too: more to learn from."""
    tokens = mx.array(batch.tokens)
    losses = nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
    # Padding is token 0 behind the end of the sequence, which no row of these tasks holds.
    used = tokens[:, 1:] != 0
    return (losses * used).sum() / used.sum()


def train(args) -> None:
    _, tokenizer, base = load(str(args.model), return_config=True, lazy=True)
    mx.random.seed(args.seed)
    model, config = new_model(base, args.layers, args.width)
    optimizer = optim.AdamW(args.learning_rate, weight_decay=0.01)
    optimizer.init(model.trainable_parameters())
    examples, _ = read_examples(args.data, "train", tokenizer, 2048)[:2]
    step, seconds, path = 0, 0.0, args.out / CHECKPOINT
    if args.resume:
        state, about = mx.load(str(path), return_metadata=True)
        step, seconds = int(about["step"]), float(about["seconds"])
        part = lambda name: [  # noqa: E731
            (k.removeprefix(name), v) for k, v in state.items() if k.startswith(name)
        ]
        model.load_weights(part("model."))
        optimizer.state = tree_unflatten(part("optimizer."))
    args.out.mkdir(parents=True, exist_ok=True)
    source = batches(examples, size=args.batch_size, hosts=1, num_streams=1, seed=0, first=step)
    gradient = nn.value_and_grad(model, loss_of)
    clock, saved, loss = time.perf_counter() - seconds, seconds, None
    share = lambda: step / args.iters if args.iters else seconds / (60 * args.minutes)  # noqa: E731
    while (done := share()) < 1.0:
        optimizer.learning_rate = args.learning_rate * min((done + 1e-3) / WARM_UP, 1 - done)
        loss, change = gradient(model, next(source))
        optimizer.update(model, optim.clip_grad_norm(change, max_norm=1.0)[0])
        mx.eval(loss, model.parameters(), optimizer.state)
        step, seconds = step + 1, time.perf_counter() - clock
        if seconds - saved > SAVE_EVERY:
            saved = seconds
            temporary = args.out / f".{CHECKPOINT}.tmp.safetensors"
            state = {f"model.{k}": v for k, v in tree_flatten(model.parameters())}
            state |= {f"optimizer.{k}": v for k, v in tree_flatten(optimizer.state)}
            save_tensors(temporary, state, {"step": str(step), "seconds": str(seconds)})
            os.replace(temporary, path)
            print(f"step {step}, {seconds:.0f} s: loss {loss.item():.3f}", flush=True)
    count = sum(v.size for _, v in tree_flatten(model.parameters()))
    about = {"parameters": count, "steps": step, "seconds": round(seconds, 1), "loss": loss.item()}
    study.save_json(args.out / "training.json", about)
    save(args.out, args.model, model, tokenizer, config, donate_model=False)
    path.unlink(missing_ok=True)


def measure(args) -> None:
    """Plain mlx-lm and every number of drafted tokens, interleaved prompt by prompt."""
    study.check_metrics([args.task])
    model, tokenizer = load(str(args.model))
    draft, _ = load(str(args.draft))
    questions = study.questions_of(args.task, tokenizer, args.prompts)
    limit = study.TASKS[args.task].max_tokens
    ways = [stock(BASELINE, model, tokenizer, limit)]
    for n in DRAFTS:
        how = {"draft_model": draft, "num_draft_tokens": n}
        ways.append(stock(f"draft {n}", model, tokenizer, limit, **how))
    evaluation = Evaluation(ways, questions, tokenizer, list(study.TASKS[args.task].metrics))
    evaluation.decode(lambda done, total: print(f"\r{done}/{total}", end="", flush=True))
    about = json.loads((args.draft / "training.json").read_text(encoding="utf-8"))
    model_about = about_model("base", model, None, None)
    results = evaluation.results({"task": args.task, "draft": about}, model_about, [])
    study.save_json(study.RESULTS / f"draft-model-{args.task}.json", results)
    for way, found in next(iter(results["summary"].values())).items():
        speed = found["speedup"]["median"]
        print(f"\n{args.task} {way}: {found['tokens_per_pass']:.3f} tokens per pass, {speed:.2f}x")


def main():
    about = __doc__.splitlines()[0]
    parser, begin = study.train_and_measure(about, train, measure, "--draft", prompts=50)
    begin.add_argument("--layers", type=int, default=2)
    begin.add_argument("--width", type=int, default=128)
    begin.add_argument("--batch-size", type=int, default=8)
    begin.add_argument("--learning-rate", type=float, default=2e-3)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
