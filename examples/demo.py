"""The main job in one go: the same answers with and without streams, and what each costs."""

import argparse
import statistics
import time

from mlx_specstream import blas, load, stream_generate
from mlx_specstream.measure.warm import warm_up

PROMPTS = (
    "MR: name[The Phoenix], eatType[pub], food[Italian], priceRange[cheap], area[riverside]\nText:",
    "MR: name[Alimentum], food[Greek], area[city centre], near[Avalon]\nText:",
    "CREATE TABLE table_name_11 (score VARCHAR, date VARCHAR, opponent VARCHAR)\n"
    "Q: What is the score when the opponent is Leeds United?\nSQL:",
)
REPEATS = 5


def run(model, tokenizer, prompt: str, use_streams: bool):
    """(text, last response, seconds of one whole answer, prompt included)."""
    start = time.perf_counter()
    responses = list(
        stream_generate(
            model,
            tokenizer,
            tokenizer.bos_token + prompt,
            max_tokens=96,
            use_streams=use_streams,
        )
    )
    seconds = time.perf_counter() - start
    return "".join(r.text for r in responses), responses[-1], seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--streams", required=True)
    args = parser.parse_args()
    model, tokenizer = load(args.model, streams=args.streams)
    print("warming up (on Linux MLX compiles its CPU kernels first: a minute or two)", flush=True)
    warm_up(model, tokenizer)
    for prompt in PROMPTS:
        for use_streams in (False, True, True):
            run(model, tokenizer, prompt, use_streams)
    for prompt in PROMPTS:
        seconds = {False: [], True: []}
        outcome = {}
        for _ in range(REPEATS):  # interleaved, so that a busy machine slows both alike
            for use_streams in (False, True):
                text, last, taken = run(model, tokenizer, prompt, use_streams)
                seconds[use_streams].append(taken)
                outcome[use_streams] = text, last
        print(f"\n{prompt}{outcome[True][0]}")
        for use_streams in (False, True):
            _, last = outcome[use_streams]
            speed = last.generation_tokens / statistics.median(seconds[use_streams])
            print(
                f"  {'streams' if use_streams else 'plain  '}  {last.generation_tokens} tokens in "
                f"{last.passes} passes, {last.tokens_per_pass:.2f} tokens per pass, "
                f"{speed:.0f} tokens per second with the prompt's own pass"
            )
        if outcome[True][0] != outcome[False][0]:
            raise SystemExit("the texts differ: please report this")
        faster = statistics.median(seconds[False]) / statistics.median(seconds[True])
        print(f"  same text, {faster:.2f}x the speed")
    print(f"\nBLAS: {blas.name()}")
    if blas.is_slow():
        print("Every row costs the same with it, so fewer passes hardly save time here.")


if __name__ == "__main__":
    main()
