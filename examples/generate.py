"""Load a model with its streams and print an answer with its counts.

python examples/generate.py MODEL [STREAMS] "a prompt"
"""

import sys

from mlx_specstream import load, stream_generate

model_path, *streams, prompt = sys.argv[1:]
model, tokenizer = load(model_path, streams=streams[0] if streams else None)
for response in stream_generate(model, tokenizer, prompt, max_tokens=200):
    print(response.text, end="", flush=True)
print(f"\n{response.generation_tokens} tokens in {response.passes} passes")
