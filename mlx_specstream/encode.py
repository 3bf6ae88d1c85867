"""Text to token ids, as mlx-lm feeds a prompt. A leaf."""

from __future__ import annotations


def encode_text(tokenizer, text: str) -> list[int]:
    """Token ids with the tokenizer's special ones, unless the text brings them itself."""
    bos = tokenizer.bos_token
    return tokenizer.encode(text, add_special_tokens=bos is None or not text.startswith(bos))
