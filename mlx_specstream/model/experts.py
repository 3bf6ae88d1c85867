"""The seam of projections where they are experts: which of the rows that an expert sees are streams."""

from __future__ import annotations

import mlx.core as mx


class RouterSeam:
    """Around SwitchGLU / SwitchMLP: says which of the rows that its experts see are streams."""

    def __call__(self, x, indices):
        run = self._seams.running
        if run is None or run.rows.stream_of is None:
            return super().__call__(x, indices)

        def expert_rows(sorted_rows: bool) -> mx.array:
            *lead, k = indices.shape  # lead is [B, R], which some models flatten
            R = run.rows.count
            is_stream = mx.arange(R) >= run.rows.main
            is_stream = mx.broadcast_to(is_stream, (indices.size // (k * R), R))
            if not sorted_rows:  # x is [*lead, 1 or k, 1, d]
                return is_stream.reshape(*lead, 1, 1, 1)
            # mlx-lm sorts the (row, expert) pairs by expert; the same sort tells where rows went.
            order = mx.argsort(indices.flatten())
            return is_stream.reshape(-1)[order // k][:, None, None]  # x is [B * R * k, 1, d]

        run.expert_rows = expert_rows
        return super().__call__(x, indices)


class ExpertSeam:
    def __call__(self, x, indices, sorted_indices=False):
        run = self._seams.running
        y = super().__call__(x, indices, sorted_indices=sorted_indices)
        if run is None or run.rows.stream_of is None:
            return y
        return run.add_expert_lora(y, x, self._seam_projection, sorted_indices)
