"""Speculative Streaming on MLX."""
