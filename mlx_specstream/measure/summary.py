"""What follows from the raw rows of a benchmark: ratios with their spread, acceptance, time per pass.

Plain Python over the results of ``bench.py``, so that whoever has the file can do the sums again.
"""

from __future__ import annotations

import statistics
from typing import Any

from ..decode.record import PassRecord, Record

ALL = "all"
DEEPEST = 16  # drafted tokens; acceptance is not listed beyond


def spread(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def summarise(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """kind -> mode -> figures; the kind ``all`` has every prompt.

    Each figure of a repeat is a sum over a sum: all tokens of a kind through all their seconds.
    ``speedup`` is tokens per second against the baseline's of the same repeat, prompt included;
    ``generation_speedup`` the same without the time to the first token.
    """
    kinds = list(dict.fromkeys(p["kind"] for p in results["prompts"]))
    groups = {kind: _where(results, kind) for kind in kinds}
    if len(kinds) > 1:
        groups[ALL] = set(range(len(results["prompts"])))
    return {kind: _group(results, prompts) for kind, prompts in groups.items()}


def _where(results, kind: str) -> set[int]:
    return {i for i, p in enumerate(results["prompts"]) if p["kind"] == kind}


def _group(results: dict[str, Any], prompts: set[int]) -> dict[str, Any]:
    figures, baseline = {}, None
    for mode in (m["key"] for m in results["modes"]):
        rows = [r for r in results["runs"] if r["mode"] == mode and r["prompt"] in prompts]
        repeats = [
            [r for r in rows if r["repeat"] == k] for k in sorted({r["repeat"] for r in rows})
        ]
        rates = {
            "tokens_per_second": [_rate(rows) for rows in repeats],
            "generation_tokens_per_second": [_generation_rate(rows) for rows in repeats],
        }
        baseline = baseline or rates
        found = {name: spread(values) for name, values in rates.items()}
        for name, rate in (
            ("speedup", "tokens_per_second"),
            ("generation_speedup", "generation_tokens_per_second"),
        ):
            pairs = zip(rates[rate], baseline[rate], strict=True)
            found[name] = spread([_over(own, base) for own, base in pairs])
        found["first_token_s"] = spread([statistics.mean(r["first_s"] for r in x) for x in repeats])
        tokens, passes = sum(r["tokens"] for r in rows), sum(r["passes"] for r in rows)
        found["tokens"], found["passes"] = tokens, passes
        found["tokens_per_pass"] = (tokens - len(rows)) / passes if passes else 1.0
        found["pass_s"] = _over(sum(r["seconds"] - r["first_s"] for r in rows), passes)
        read = results["model"]["weight_bytes"]["per_token"]
        found["weights_gb_s"] = _over(read / 1e9, found["pass_s"])
        parted = {d["prompt"] for d in results["differences"] if d["mode"] == mode}
        found["identical"], found["of"] = len(prompts - parted), len(prompts)
        if any("accepted" in r for r in rows):
            found["acceptance"] = _acceptance(rows)
            found["copied_share"] = _over(
                sum(r["copied"] for r in rows), sum(sum(r["accepted"]) for r in rows)
            )
            found["nodes_per_pass"] = _over(sum(r["nodes"] for r in rows), passes)
            found["split"] = _split(results["split"], mode, prompts)
        figures[mode] = found
    return figures


def _rate(rows: list[dict]) -> float:
    return _over(sum(r["tokens"] for r in rows), sum(r["seconds"] for r in rows))


def _generation_rate(rows: list[dict]) -> float:
    """Tokens after the first, per second after the first."""
    return _over(sum(r["tokens"] - 1 for r in rows), sum(r["seconds"] - r["first_s"] for r in rows))


def _acceptance(rows: list[dict]) -> list[float]:
    record = Record([PassRecord(0, a) for r in rows for a in r["accepted"]])
    return record.acceptance_by_depth(min(record.deepest(), DEEPEST))


def _split(rows: list[dict], mode: str, prompts: set[int]) -> dict[str, float] | None:
    """Seconds per pass of each part, in the run that waited after each."""
    rows = [r for r in rows if r["mode"] == mode and r["prompt"] in prompts]
    passes = sum(r["passes"] for r in rows)
    if not passes:
        return None
    return {
        name: sum(r[name] for r in rows) / passes
        for name in ("base_s", "streams_s", "draft_s", "host_s")
    }


def _over(a: float, b: float) -> float:
    """a / b; 0 where nothing was measured (answers of a single token)."""
    return a / b if b > 0 else 0.0
