"""PREDICTED speed-ups on Macs: arithmetic on row costs that others published, nothing measured by us.

    python benchmarks/mac_predictions.py --out benchmarks/results/mac-predictions.json

The planner decodes a random text in a closed loop: at each place the first guess of a stream is
right with probability a, the second with half of the rest, whatever came before. A step costs what
the published curve says, and streams what decode/costs.py makes of it.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product
from pathlib import Path

import numpy as np

from mlx_specstream.decode.costs import HOST, LAUNCH, Costs, modelled_costs
from mlx_specstream.decode.planner import Choice, Planner

CURVES = Path(__file__).resolve().parents[1] / "tests/data/mac_curves.json"
ACCEPTANCES = (0.55, 0.6, 0.7, 0.8, 0.9)
MODEL = {"layers": 32, "msa_layers": 4, "streams": 4, "head_share": 0.06}
LABEL = (
    "PREDICTIONS, calculated from row costs that others published (tests/data/mac_curves.json); "
    "never measured by this project, on no Mac."
)


@dataclass(frozen=True)
class Guesses:
    """What streams say and how often they are right, by depth and rank; float [depth, K] each."""

    says: np.ndarray
    right: np.ndarray

    @cached_property
    def nodes(self) -> tuple[np.ndarray, np.ndarray]:
        """Every node below the root, likeliest first: paths int [A, depth], promises float [A]."""
        paths = _paths(*self.says.shape)
        depth = np.arange(len(self.says))
        promises = np.where(paths >= 0, self.says[depth, np.maximum(paths, 0)], 1.0).prod(axis=1)
        order = np.argsort(-promises, kind="stable")  # parents come before equal children
        return paths[order], promises[order]

    def accepted(self, nodes: int, luck: np.ndarray) -> list[int]:
        """Which of a tree's nodes hold the tokens that come; ``luck`` [depth or more], 0..1."""
        paths = self.nodes[0][: nodes - 1]
        ranks = (self._up_to <= luck[: len(self._up_to), None]).sum(axis=1)  # K: no guess is right
        return np.nonzero(((paths == ranks) | (paths < 0)).all(axis=1))[0].tolist()

    def first(self, gamma: int | None) -> Guesses:
        """Those of fewer streams."""
        if gamma is None or gamma >= len(self.says):
            return self
        if gamma not in self._fewer:
            self._fewer[gamma] = Guesses(self.says[:gamma], self.right[:gamma])
        return self._fewer[gamma]

    @cached_property
    def _fewer(self) -> dict[int, Guesses]:
        return {}

    @cached_property
    def _up_to(self) -> np.ndarray:
        return np.cumsum(self.right, axis=1)


@dataclass(frozen=True)
class Step:
    """One pass of a run: tokens before it, its rows, what it brought and whether it drafted."""

    place: int
    nodes: int
    accepted: int
    streams: bool
    gamma: int | None = None


@dataclass(frozen=True)
class Run:
    """A decoded text: its steps and its cost, in plain tokens."""

    steps: list[Step]
    cost: float

    @property
    def tokens(self) -> int:
        return sum(1 + step.accepted for step in self.steps)

    @property
    def speedup(self) -> float:
        return self.tokens / self.cost

    def sizes(self) -> dict[int, float]:
        """Rows of a pass -> share of the passes."""
        counts = Counter(step.nodes for step in self.steps)
        return {n: count / len(self.steps) for n, count in sorted(counts.items())}


class Always:
    """The policy to compare with: every pass has the same size, and streams run behind each."""

    def __init__(self, nodes: int, placement: str = "deferred"):
        self.nodes, self.placement = nodes, placement

    def choose(self, probabilities, context: int, from_streams: bool = True) -> Choice:
        return Choice(1 if probabilities is None else self.nodes, True, self.placement)

    def compares(self, gamma: int) -> bool:
        return False

    def observe(self, **done) -> None:
        pass


def geometric(acceptance: float, depth: int = MODEL["streams"], second: float = 0.5) -> Guesses:
    """Guesses that are right with ``acceptance`` at every depth, the second with part of the rest."""
    line = [acceptance, (1 - acceptance) * second]
    says = np.tile(line, (depth, 1))
    return Guesses(says, says)


def closed_loop(
    policy,
    costs: Costs,
    text: Callable[[int], Guesses],
    tokens: int,
    seed: int,
    *,
    context: int = 0,
    copies: Callable[[int], Guesses | None] = lambda place: None,
) -> Run:
    """Decode ``tokens`` tokens: plan, see what is accepted, observe.

    Args:
        policy: a ``Planner`` or ``Always``.
        text: the guesses of streams that run behind the token at a place.
        seed: of the text: how easy the token at each place is, the same for every policy.
        context: tokens of the prompt.
        copies: what is copied where streams drafted nothing.
    """
    luck = np.random.default_rng(seed).random(tokens + 64)  # [place]
    steps: list[Step] = []
    done, cost, guesses, from_streams = 0, 0.0, copies(0), False
    while done < tokens:
        promises = None if guesses is None else guesses.nodes[1]
        at = context + done
        choice = policy.choose(promises, at, from_streams)
        ranks = guesses.accepted(choice.nodes, luck[done:]) if choice.nodes > 1 else []
        accepted = len(ranks)
        fewer = []
        if guesses is not None and from_streams and policy.compares(len(guesses.says)):
            fewer = [guesses.first(gamma).nodes[1] for gamma in policy.fewer]
        cost += _cost(costs, choice, at)
        policy.observe(
            context=at,
            nodes=choice.nodes,
            probabilities=promises,
            accepted=accepted,
            from_streams=from_streams,
            streams=choice.streams,
            ranks=ranks,
            gamma=choice.gamma,
            fewer=fewer,
        )
        steps.append(Step(done, choice.nodes, accepted, choice.streams, choice.gamma))
        done += 1 + accepted
        from_streams = choice.streams
        guesses = text(done).first(choice.gamma) if choice.streams else copies(done)
    return Run(steps, cost)


def _cost(costs: Costs, choice: Choice, context: int) -> float:
    """Of a step, in plain tokens."""
    if choice.nodes == 1 and not choice.streams:
        return 1.0
    ms = costs.pass_at(choice.nodes, context)
    if choice.streams:
        ms += costs.streams_at(choice.placement, choice.nodes, context, choice.gamma)
    return float(ms) / costs.plain_at(context)


@cache
def _paths(depth: int, ranks: int) -> np.ndarray:
    """Every node of the full tree as the ranks along its path, -1 behind its end: int [A, depth]."""
    return np.array(
        [
            (*path, *[-1] * (depth - d))
            for d in range(1, depth + 1)
            for path in product(range(ranks), repeat=d)
        ]
    )


def published_curves() -> list[dict]:
    return json.loads(CURVES.read_text(encoding="utf-8"))["curves"]


def costs_of(curve: dict, **model) -> Costs:
    """Costs in plain tokens of a published curve and a model (default: ``MODEL``)."""
    rows = list(curve["rows"])
    cost = [c / curve["cost"][0] for c in curve["cost"]]
    slope = (cost[-1] - cost[-2]) / (rows[-1] - rows[-2])
    for n in range(rows[-1] + 1, curve.get("linear_to", 0) + 1):
        cost.append(cost[-1] + slope)
        rows.append(n)
    return modelled_costs(
        tuple(rows), tuple(cost), **{**MODEL, **model}, host=HOST["gpu"], launch=LAUNCH["gpu"]
    )


def predict(curve: dict, acceptance: float, tokens: int, seeds: int) -> dict:
    """The closed loop's mean over ``seeds`` runs."""
    costs = costs_of(curve)
    guesses = geometric(acceptance)
    runs = []
    for seed in range(seeds):
        planner = Planner(costs, placements=("deferred", "inline"))
        runs.append(closed_loop(planner, costs, lambda place: guesses, tokens, seed))
    sizes: Counter = Counter()
    for run in runs:
        sizes.update({n: share / seeds for n, share in run.sizes().items()})
    steps = sum(len(run.steps) for run in runs)
    usual = max(sizes, key=sizes.get)
    return {
        "acceptance": acceptance,
        "usual_rows": usual,
        "share_of_rows": {n: round(sizes[n], 3) for n in sorted(sizes)},
        "placement": planner.placement(usual, 0) if usual > 1 else None,
        "tokens_per_pass": round(sum(run.tokens for run in runs) / steps, 3),
        "predicted_speedup": round(
            sum(run.tokens for run in runs) / sum(run.cost for run in runs), 3
        ),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512, help="per run")
    parser.add_argument("--seeds", type=int, default=20, help="runs per cell")
    parser.add_argument("--out", help="also write a JSON file")
    args = parser.parse_args()
    from rich.console import Console
    from rich.table import Table

    table = Table(title=LABEL, caption="cells: predicted speed-up (usual rows of a pass)")
    table.add_column("published curve")
    for acceptance in ACCEPTANCES:
        table.add_column(f"a = {acceptance}", justify="right")
    results = []
    for curve in published_curves():
        cells = [predict(curve, a, args.tokens, args.seeds) for a in ACCEPTANCES]
        results.append({"curve": curve["name"], "source": curve["source"], "predictions": cells})
        table.add_row(
            f"{curve['name']} ({curve['source']})",
            *(f"{c['predicted_speedup']:.2f}x ({c['usual_rows']})" for c in cells),
        )
    Console().print(table)
    if args.out:
        written = {
            "kind": "prediction",
            "about": LABEL,
            "how": " ".join(__doc__.split("\n\n")[2].split()),
            "model": MODEL,
            "host": HOST["gpu"],
            "launch": LAUNCH["gpu"],
            "tokens": args.tokens,
            "seeds": args.seeds,
            "curves": results,
        }
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
