"""The one oracle: a decode step of Speculative Streaming in plain NumPy float64, row by row.

Written from the papers' equations (method 1.1-1.6) for the llama form; it shares no code with the
package and holds a tree as paths of tokens rather than as arrays. Also ``assert_close``, through
which every comparison of arrays goes.
"""

from __future__ import annotations

from itertools import product

import mlx.core as mx
import numpy as np


def assert_close(got, want, tolerance: float, what: str = "arrays") -> None:
    """Largest difference over the largest wanted value must be at most ``tolerance``."""
    kinds = [str(getattr(x, "dtype", type(x).__name__)) for x in (got, want)]
    got, want = (
        np.array(x.astype(mx.float32) if isinstance(x, mx.array) else x, dtype=np.float64)
        for x in (got, want)
    )
    assert got.shape == want.shape, f"{what}: shape {got.shape}, wanted {want.shape}"
    assert got.size, f"{what}: nothing to compare"
    difference = np.abs(got - want) / max(np.abs(want).max(), 1e-30)
    assert difference.max() <= tolerance, (  # a NaN fails too
        f"{what}: shape {got.shape}, {kinds[0]} against {kinds[1]}; difference over the largest "
        f"value: max {difference.max():.3e}, mean {difference.mean():.3e}; allowed {tolerance:.1e}"
    )


def numpy_weights(parameters: dict) -> dict[str, np.ndarray]:
    """Flattened MLX parameters as float64."""
    return {
        name: np.array(p.astype(mx.float32), dtype=np.float64) for name, p in parameters.items()
    }


class Reference:
    """A llama with streams, its K/V cache, and one step of decoding.

    Args:
        base, streams: parameters by name, float64.
        heads, kv_heads, head_dim, theta, eps: of the llama.
        gamma, msa_layers, scale: number of streams, Ns, LoRA alpha / rank.
        plan: the main stream attends to its own streams ([P] Eq. 1).
        shift: True: stream j sits at position t + j, else at t.
        epsilon: angle of the value rotation; 0 for learned embeddings.
        temperatures: what each stream's logits are divided by.
    """

    def __init__(
        self, base, streams, *, heads, kv_heads, head_dim, theta, eps,
        gamma, msa_layers, scale, plan=False, shift=True, epsilon=0.0, temperatures=None,
    ):  # fmt: skip
        self.w, self.s = base, streams
        self.H, self.K, self.D, self.theta, self.eps = heads, kv_heads, head_dim, theta, eps
        self.gamma, self.scale, self.plan = gamma, scale, plan
        self.shift, self.epsilon = shift, epsilon
        self.heat = [1.0] * gamma if temperatures is None else temperatures
        self.N = 1 + max(int(n.split(".")[2]) for n in base if n.startswith("model.layers."))
        self.cut = self.N - msa_layers
        self.cache = [[] for _ in range(self.N)]  # per layer: (keys [K, D], values [K, D])

    # --- the llama ---

    def norm(self, x, name):
        return x / np.sqrt(np.mean(x * x) + self.eps) * self.w[name + ".weight"]

    def linear(self, layer, block, name, x, j):
        y = self.w[f"model.layers.{layer}.{block}.{name}.weight"] @ x
        a = self.s.get(f"lora.{layer - self.cut}.{name}.a")
        if j and layer >= self.cut and a is not None:  # gated: streams only
            y = y + self.scale * (x @ a) @ self.s[f"lora.{layer - self.cut}.{name}.b"]
        return y

    def rope(self, x, position):
        half = self.D // 2
        out = x.copy()
        for d in range(half):
            angle = position * self.theta ** (-2.0 * d / self.D)
            re, im = x[:, d], x[:, d + half]
            out[:, d] = re * np.cos(angle) - im * np.sin(angle)
            out[:, d + half] = re * np.sin(angle) + im * np.cos(angle)
        return out

    def turn(self, value, j):  # V1 App. B Eq. 7
        half = self.D // 2
        turned = (value[:, :half] + 1j * value[:, half:]) * np.exp(1j * self.epsilon * j)
        return np.concatenate([turned.real, turned.imag], axis=1)

    def layer(self, i, rows):
        """One layer over rows; a row is a dict: x, position, j (0 main), sees (indices of rows)."""
        name = f"model.layers.{i}"
        for row in rows:
            x = self.norm(row["x"], f"{name}.input_layernorm")
            q, k, v = (self.linear(i, "self_attn", f"{p}_proj", x, row["j"]) for p in "qkv")
            row["q"] = self.rope(q.reshape(self.H, self.D), row["position"])
            row["k"] = self.rope(k.reshape(self.K, self.D), row["position"])
            row["v"] = v.reshape(self.K, self.D)
            if row["j"] and self.epsilon:
                row["v"] = self.turn(row["v"], row["j"])
        for row in rows:
            seen = self.cache[i] + [(rows[r]["k"], rows[r]["v"]) for r in row["sees"]]
            heads = []
            for h in range(self.H):
                g = h // (self.H // self.K)
                scores = np.array([k[g] @ row["q"][h] for k, _ in seen]) / np.sqrt(self.D)
                p = np.exp(scores - scores.max())
                heads.append(sum(w * v[g] for w, (_, v) in zip(p / p.sum(), seen, strict=True)))
            row["y"] = self.linear(i, "self_attn", "o_proj", np.concatenate(heads), row["j"])
        for row in rows:
            x = row["x"] + row["y"]
            y = self.norm(x, f"{name}.post_attention_layernorm")
            gate, up = (self.linear(i, "mlp", f"{p}_proj", y, row["j"]) for p in ("gate", "up"))
            y = self.linear(i, "mlp", "down_proj", gate / (1 + np.exp(-gate)) * up, row["j"])
            row["x"] = x + y

    def log_probs(self, x, heat=1.0):
        z = self.w["lm_head.weight"] @ self.norm(x, "model.norm") / heat
        return z - z.max() - np.log(np.exp(z - z.max()).sum())

    def prefill(self, tokens):
        embedding = self.w["model.embed_tokens.weight"]
        start = len(self.cache[0])
        rows = [
            {"x": embedding[t], "position": start + n, "j": 0, "sees": range(n + 1)}
            for n, t in enumerate(tokens)
        ]
        for i in range(self.N):
            self.layer(i, rows)
            self.cache[i] += [(row["k"], row["v"]) for row in rows]

    # --- one step ---

    def draft(self, guesses, kind, size):
        """Paths below the root, as tuples of tokens.

        Guesses are log-probabilities [gamma, V], or [gamma, V, V] given the token before.
        """
        if guesses is None:
            return []
        if guesses.ndim == 3:
            return self.draft_given_parents(guesses, kind, size)
        if kind == "best":  # every path there is, most probable first
            every = [
                (sum(guesses[d][t] for d, t in enumerate(path)), path)
                for length in range(1, len(guesses) + 1)
                for path in product(range(guesses.shape[1]), repeat=length)
            ]
            return [path for _, path in sorted(every, key=lambda e: -e[0])[: size - 1]]
        top = [np.argsort(-row, kind="stable")[: 1 if kind == "chain" else size] for row in guesses]
        lengths = range(1, len(top) + 1)
        return [tuple(map(int, p)) for length in lengths for p in product(*top[:length])]

    def draft_given_parents(self, guesses, kind, size):
        """As ``draft``; a best-first tree holds a path only with those of no higher ranks."""
        found = []

        def extend(path, score, ranks, above):
            if len(path) == len(guesses):
                return
            edges = guesses[len(path), path[-1] if path else 0]
            for rank, token in enumerate(np.argsort(-edges, kind="stable")):
                before = [*above, (above[-1] if above else 1) * (rank + 1)]
                if (kind == "best" and sum(before) > size - 1) or (kind != "best" and rank >= size):
                    break
                found.append((score + edges[token], (*path, int(token))))
                extend(found[-1][1], found[-1][0], (*ranks, rank), before)

        extend((), 0.0, (), [])
        if kind != "best":
            return [path for _, path in sorted(found, key=lambda e: len(e[1]))]
        return [path for _, path in sorted(found, key=lambda e: -e[0])[: size - 1]]

    def given_parents(self, hidden, root):
        """Log-probabilities [gamma, V, V] of each stream given the token before (the first: root).

        hidden: the streams' last states, gamma x [E].
        """
        said = []
        for j, h in enumerate(hidden):
            before = [root if j == 0 else token for token in range(len(self.w["lm_head.weight"]))]
            rows = [self.told("condition", j, h, token) for token in before]
            said.append([self.log_probs(x, self.heat[j]) for x in rows])
        return np.array(said)

    def told(self, name, j, h, token):
        """State h of stream j corrected by a token: h + RMS(h) silu(e A_j + h C_j + d_j) B_j."""
        e, rms = self.w["model.embed_tokens.weight"][token], np.sqrt(np.mean(h * h))
        maps, d = [self.s[f"{name}.{x}"] for x in "abc"], self.s[f"{name}.d"][j]
        a, b, c = (x[j if len(x) > 1 else 0] for x in maps)  # shared: one for all streams
        u = e / np.sqrt(np.mean(e * e)) @ a + (h / rms) @ c + d[0]
        return h + rms * (u / (1 + np.exp(-u))) @ b

    def choices(self, rows):
        """What the main stream chooses at rows at the cut."""
        rows = [dict(row) for row in rows]
        for i in range(self.cut, self.N):
            self.layer(i, rows)
        return [int(np.argmax(self.log_probs(row["x"]))) for row in rows]

    def prune(self, paths, rows, keep, threshold):
        """Early exit (method 1.6): which paths stay, by P(child | parent) at the cut."""
        exits = {}
        for path, row in zip(paths, rows, strict=True):
            x = row["x"] + (row["x"] @ self.s["early_exit.a"]) @ self.s["early_exit.b"]
            exits[path] = self.log_probs(x)
        edges = {p: [exits[p[:d]][p[d]] for d in range(len(p))] for p in paths}
        if threshold is not None:
            return [p for p in paths if all(e >= np.log(threshold) for e in edges[p])]
        best = sorted(paths, key=lambda p: (-sum(edges[p]), len(p)))[:keep]
        return [p for p in paths if p in best]

    def step(self, root, guesses, *, kind, size, limit, stop=(), keep=None, threshold=None):
        """Returns tokens, what the next streams say (as ``draft`` takes it), paths, kept paths."""
        paths = [(), *self.draft(guesses, kind, size)]
        embedding, start = self.w["model.embed_tokens.weight"], len(self.cache[0])

        def main_rows(paths, hidden):
            return [
                {
                    "x": x, "position": start + len(p), "j": 0,
                    "sees": [r for r, q in enumerate(paths) if p[: len(q)] == q],
                }
                for p, x in zip(paths, hidden, strict=True)
            ]  # fmt: skip

        rows = main_rows(paths, [embedding[(root, *p)[-1]] for p in paths])
        passed = []  # per layer: path -> (k, v)
        for i in range(self.cut):
            self.layer(i, rows)
            passed.append({p: (r["k"], r["v"]) for p, r in zip(paths, rows, strict=True)})
        kept = paths
        if keep is not None or threshold is not None:
            kept = self.prune(paths, rows, keep, threshold)
        rows = main_rows(kept, [rows[paths.index(p)]["x"] for p in kept])
        roots = self.choices(rows) if "root.a" in self.s else None
        for r in range(len(kept)):
            host, own = rows[r], []
            for j in range(1, self.gamma + 1):
                x = host["x"]
                if roots is not None:
                    x = self.told("root", 0, x, roots[r])
                if "init.a" in self.s:
                    x = x + (x @ self.s["init.a"]) @ self.s["init.b"]
                if not self.epsilon:
                    x = x + self.s["embeddings"][j - 1]
                own.append(len(rows))
                rows.append(
                    {
                        "x": x, "position": host["position"] + (j if self.shift else 0), "j": j,
                        "sees": [*main_sees(kept, r), *own],
                    }
                )  # fmt: skip
            if self.plan:
                host["sees"] = [*host["sees"], *own]
        for i in range(self.cut, self.N):
            self.layer(i, rows)
            passed.append({p: (r["k"], r["v"]) for p, r in zip(kept, rows, strict=False)})

        tokens, path = [], ()
        while True:
            tokens.append(int(np.argmax(self.log_probs(rows[kept.index(path)]["x"]))))
            longer = (*path, tokens[-1])
            if longer not in kept or len(tokens) == limit or tokens[-1] in stop:
                break
            path = longer
        for cached, new in zip(self.cache, passed, strict=True):
            cached += [new[path[:d]] for d in range(len(path) + 1)]
        first = len(kept) + kept.index(path) * self.gamma
        hidden = [rows[first + j]["x"] for j in range(self.gamma)]
        if "condition.a" in self.s:
            return tokens, self.given_parents(hidden, tokens[-1]), paths, kept
        streams = np.stack([self.log_probs(*said) for said in zip(hidden, self.heat, strict=True)])
        return tokens, streams, paths, kept


def main_sees(paths, r):
    """Rows of the ancestors of path r, and its own."""
    return [k for k, p in enumerate(paths) if paths[r][: len(p)] == p]
