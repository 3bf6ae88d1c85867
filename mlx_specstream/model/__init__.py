"""Stock mlx-lm models with streams: seams, cache, rows, parameters, the streams folder."""
